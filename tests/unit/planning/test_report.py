"""The report of a step: closed forms where there are some, and sums that must come out."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_megatron.chunking import plan_chunks
from comet_megatron.config.schema import Config, ModelSection, ParallelSection, TrainSection
from comet_megatron.errors import ConfigError
from comet_megatron.parallel.schedule import (
    Kind,
    Workload,
    live_chunks_bound,
    plan_schedule,
    plan_whole_sequences,
    recompute_everything,
    recompute_nothing,
)
from comet_megatron.parallel.simulator import cost_by_kind
from comet_megatron.planning.balance import chunk_costs
from comet_megatron.planning.memory import checkpoint_bytes, count_parameters, message_bytes, state_bytes
from comet_megatron.planning.report import most_live_bytes, plan_pipeline, simulate
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory

MODEL, MEMORY = tiny_architecture(num_layers=8), tiny_memory()  # chunks of 16 tokens
UNIT_COSTS = cost_by_kind({Kind.FORWARD: 1, Kind.RECOMPUTE: 1, Kind.BACKWARD: 2})


def config(*, precision="fp32", recompute="full", bptt_chunks="all", trainable="all", **parallel):
    return Config(
        model=ModelSection(path="start", precision=precision),
        parallel=ParallelSection(**parallel),
        train=TrainSection(output="run", steps=1, recompute=recompute, bptt_chunks=bptt_chunks, trainable=trainable),
    )


def plan(tokens, *, dp=1, **settings):
    return plan_pipeline(config(**settings), MODEL, MEMORY, tokens, longest=max(tokens, default=0), dp=dp)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5))
def test_ordinary_1f1b_wastes_what_its_closed_form_says(stages, sequences, chunks):
    work = Workload(stages, (chunks,) * sequences, whole_messages=True)
    _, timeline = simulate(work, plan_whole_sequences(work), cost=UNIT_COSTS)
    assert timeline.bubble == pytest.approx((stages - 1) / (sequences + stages - 1))


def test_recomputation_that_directly_follows_its_forward_is_left_out():
    work = Workload(3, (5,), recompute=recompute_everything)
    left, timeline = simulate(work, plan_schedule(work), cost=UNIT_COSTS)
    again = [[s.op.chunk for s in spans if s.op.kind is Kind.RECOMPUTE] for spans in timeline.spans]
    assert again == [[3, 2, 1, 0]] * 3  # the last chunk's forward is followed by its backward on every stage
    assert not left.recompute(2, 0, 4) and left.recompute(2, 0, 3)


def test_one_stage_never_waits_and_sends_nothing():
    report = plan([40, 70], pp=1)
    assert (report.links, report.layers_per_stage) == (0, (8,))
    assert report.timeline.bubble == pytest.approx(0) and report.efficiency == pytest.approx(1)
    assert report.stages[0].share_of_work == pytest.approx(1)


def test_the_last_token_is_no_input_so_a_sequence_of_a_chunk_and_one_has_one_chunk():
    assert plan([17, 18, 33], pp=2).chunks == (1, 2, 2)


def test_time_is_counted_in_forwards_of_a_layer():
    """Chunks without memory and of equal size: each stage's forward costs as many units as it has layers."""
    memory = tiny_memory(global_slots=0, stride=-1)
    report = plan_pipeline(config(pp=2, layers_per_stage=(5, 3)), MODEL, memory, [16 * 4 + 1], longest=16 * 4 + 1)
    forwards = [[s.duration for s in spans if s.op.kind is Kind.FORWARD] for spans in report.timeline.spans]
    assert forwards[0] == pytest.approx([5.0] * 4, rel=2e-3)  # and the embedding, next to nothing
    assert forwards[1] == pytest.approx([3.0] * 4)


def test_layers_are_split_by_the_longest_sequence_even_in_a_step_without_it():
    """In the longest sequence's steady chunk a layer reads memory, so the head weighs fewer layers."""
    model = dataclasses.replace(MODEL, vocab_size=3500)
    short, as_in_training = (
        plan_pipeline(config(pp=3), model, MEMORY, [17, 17], longest=longest) for longest in (17, 500)
    )
    assert as_in_training.costs == chunk_costs(model, MEMORY, tokens=500, recompute=True)
    assert (short.layers_per_stage, as_in_training.layers_per_stage) == ((3, 4, 1), (3, 3, 2))
    assert as_in_training.chunks == (1, 1)


def test_links_carry_the_hidden_states_of_every_chunk():
    report = plan([40, 70], pp=4, precision="bf16")
    chunks = [*plan_chunks(39, MEMORY), *plan_chunks(69, MEMORY)]
    assert (report.links, report.messages) == (3, 3 + 5)
    assert report.link_bytes == sum(message_bytes(MODEL, chunk, dtype_bytes=2) for chunk in chunks)


def test_the_checkpoints_of_one_sequence_are_all_alive_when_its_backward_starts():
    report = plan([100], pp=4, layers_per_stage=(2, 2, 2, 2))
    chunks = plan_chunks(99, MEMORY)
    assert [stage.live_chunks for stage in report.stages] == [7] * 4
    for number, stage in enumerate(report.stages):
        kept = [checkpoint_bytes(MODEL, chunk, 2, is_first=number == 0, dtype_bytes=4) for chunk in chunks]
        assert stage.checkpoint_bytes == sum(kept)


def test_live_bytes_are_the_most_at_one_moment_not_the_sum():
    """Windows of one chunk on two stages without slack: the first stage is one chunk ahead of the last."""
    work = Workload(2, (5,), bptt_chunks=1)
    _, timeline = simulate(work, plan_schedule(work, slack=0), cost=UNIT_COSTS)
    sizes = [1, 10, 100, 20, 3]
    assert most_live_bytes(timeline, 1, lambda op: sizes[op.chunk]) == 100
    assert most_live_bytes(timeline, 0, lambda op: sizes[op.chunk]) == 100 + 20


def test_a_stage_holds_the_state_of_its_own_parameters():
    report = plan([40], dp=2, pp=3, precision="bf16", layers_per_stage=(3, 3, 2))
    for number, stage in enumerate(report.stages):
        own = count_parameters(MODEL, MEMORY, len(stage.layers), is_first=number == 0, is_last=number == 2)
        assert stage.parameters == own
        assert stage.state == state_bytes(own, precision="bf16", dp=2, zero1=True)
    assert sum(stage.parameters.all for stage in report.stages) == count_parameters(MODEL, MEMORY, 8).all


def test_training_the_memory_only_needs_less_state():
    everything, memory = (plan([40], pp=2, trainable=part).stages[0] for part in ("all", "memory"))
    assert memory.state.gradients == 4 * memory.parameters.trained < everything.state.gradients
    assert memory.parameters.all > everything.parameters.all  # the new rows are a parameter of their own


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.integers(2, 150), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(0, 2),
    st.sampled_from(["none", "full"]),
    st.one_of(st.just("all"), st.integers(1, 4)),
)
def test_every_plan_stays_within_its_bounds(tokens, stages, slack, recompute, window):
    report = plan(tokens, pp=stages, slack=slack, recompute=recompute, bptt_chunks=window)
    assert 0 < report.efficiency <= 1 + 1e-9
    assert 0 <= report.timeline.bubble < 1
    shares = [stage.share_of_work for stage in report.stages]
    assert sum(shares) == pytest.approx(stages)
    assert report.timeline.bubble >= 1 - 1 / max(shares) - 1e-9
    work = Workload(stages, report.chunks, bptt_chunks=None if window == "all" else window)
    for number, stage in enumerate(report.stages):
        assert stage.live_chunks <= live_chunks_bound(work, number, slack=slack)


@pytest.mark.parametrize(("tokens", "says"), [([], "without sequences"), ([100, 0], "0 tokens"), ([1], "1 tokens")])
def test_a_step_with_nothing_to_learn_is_refused(tokens, says):
    with pytest.raises(ConfigError, match=says):
        plan(tokens, pp=2)


def test_a_workload_is_not_changed_where_nothing_is_recomputed():
    work = Workload(2, (3,), recompute=recompute_nothing)
    left, timeline = simulate(work, plan_schedule(work), cost=UNIT_COSTS)
    assert not any(left.recompute(stage, 0, chunk) for stage in range(2) for chunk in range(3))
    assert timeline.bubble == pytest.approx(1 - 9 / 12)  # (P-1)(f+b) of T(f+b) + (P-1)(f+b)
