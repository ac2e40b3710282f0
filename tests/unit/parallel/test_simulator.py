"""Replay of op lists: times checked against the dependencies written out here, bounds, merged lists, broken lists."""

import random
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comet_megatron.parallel.schedule import (
    Kind,
    Op,
    Workload,
    plan_forwards,
    plan_schedule,
    plan_whole_sequences,
    recompute_everything,
)
from comet_megatron.parallel.simulator import (
    ScheduleError,
    Span,
    Timeline,
    cost_by_kind,
    lower_bound,
    merge_op_lists,
    replay,
)

thorough = settings(max_examples=100, deadline=None)


@dataclass(frozen=True)
class RecomputeSome:
    """Chunks that are computed again, without any regularity along stages, sequences or chunks."""

    pattern: tuple[bool, ...]

    def __call__(self, stage: int, sequence: int, chunk: int) -> bool:
        return self.pattern[(5 * stage + 3 * sequence + chunk) % len(self.pattern)]


@dataclass(frozen=True)
class UnevenCosts:
    """A cost for each op, in halves, so that sums are exact."""

    halves: tuple[int, ...]

    def __call__(self, op: Op) -> float:
        kind = list(Kind).index(op.kind)
        return self.halves[(7 * kind + 5 * op.stage + 3 * op.sequence + op.chunk) % len(self.halves)] / 2


@dataclass(frozen=True)
class StageCosts:
    """A cost for each kind and stage, the same for all chunks."""

    halves: tuple[int, ...]

    def __call__(self, op: Op) -> float:
        return self.halves[(3 * list(Kind).index(op.kind) + op.stage) % len(self.halves)] / 2


def lists_of(element, *, longest: int) -> st.SearchStrategy[tuple]:
    return st.lists(element, min_size=1, max_size=longest).map(tuple)


def any_workload(*, stages: int, sequences: int, chunks: int) -> st.SearchStrategy[Workload]:
    return st.builds(
        Workload,
        num_stages=st.integers(1, stages),
        chunks=lists_of(st.integers(1, chunks), longest=sequences),
        bptt_chunks=st.none() | st.integers(1, 6),
        recompute=st.builds(RecomputeSome, lists_of(st.booleans(), longest=11)),
        split_backward=st.booleans(),
    )


@dataclass(frozen=True)
class Plan:
    """plan_schedule with some slack, or whole sequences as microbatches, with or without chunk-sized messages."""

    slack: int | None
    whole_messages: bool = False

    def __call__(self, work: Workload) -> tuple[Workload, list[list[Op]]]:
        if self.slack is not None:
            return work, plan_schedule(work, slack=self.slack)
        work = replace(work, whole_messages=self.whole_messages)
        return work, plan_whole_sequences(work)


workloads = any_workload(stages=9, sequences=5, chunks=24)
small_workloads = any_workload(stages=4, sequences=3, chunks=5)
seeds = st.integers(0, 2**32 - 1)
plans = st.builds(Plan, st.integers(0, 3)) | st.builds(Plan, st.none(), st.booleans())
uneven_costs = st.builds(UnevenCosts, lists_of(st.integers(1, 8), longest=13))
latencies = st.integers(0, 3)


def needed_by(op: Op, work: Workload) -> list[Op]:
    """What an op waits for, written out for each kind."""
    kind, stage, sequence, chunk = op
    last_chunk = work.chunks[sequence] - 1
    in_two = work.split_backward
    gradient = Kind.HIDDEN_GRADIENT if in_two else Kind.BACKWARD
    has_stage_behind = stage + 1 < work.num_stages
    window_goes_on = chunk < last_chunk and (not work.bptt_chunks or (chunk + 1) % work.bptt_chunks > 0)
    if kind is Kind.FORWARD:
        hidden_from = last_chunk if work.whole_messages else chunk
        hidden = [Op(Kind.FORWARD, stage - 1, sequence, hidden_from)] if stage > 0 else []
        memory = [Op(Kind.FORWARD, stage, sequence, chunk - 1)] if chunk > 0 else []
        return hidden + memory
    if kind is Kind.RECOMPUTE:
        return [Op(Kind.FORWARD, stage, sequence, chunk)]
    if kind is Kind.WEIGHT_GRADIENT:
        return [Op(Kind.HIDDEN_GRADIENT, stage, sequence, chunk)]
    assert kind is gradient
    graph = [Op(Kind.RECOMPUTE if work.recompute(stage, sequence, chunk) else Kind.FORWARD, stage, sequence, chunk)]
    hidden_from = 0 if work.whole_messages else chunk
    hidden = [Op(gradient, stage + 1, sequence, hidden_from)] if has_stage_behind else []
    memory = [Op(gradient, stage, sequence, chunk + 1)] if window_goes_on else []
    return graph + hidden + memory


def assert_as_early_as_allowed(timeline: Timeline, op_lists, work: Workload, *, cost, latency: float) -> None:
    """Each op in its list's order, one at a time, at once when its process is free and all it needs has arrived."""
    assert [[span.op for span in process] for process in timeline.spans] == op_lists
    when = {span.op: (process, span) for process, spans in enumerate(timeline.spans) for span in spans}
    for process, spans in enumerate(timeline.spans):
        free = 0
        for span in spans:
            arrivals = [
                when[needed][1].end + (latency if when[needed][0] != process else 0)
                for needed in needed_by(span.op, work)
            ]
            assert span.start == max([free, *arrivals])
            assert span.end == span.start + cost(span.op)
            free = span.end


def any_order(work: Workload, seed: int) -> list[list[Op]]:
    """Op lists of stages in an order drawn from all that respect the dependencies."""
    draw = random.Random(seed)
    waiting = {op: set(needed_by(op, work)) for stage in range(work.num_stages) for op in work.ops(stage)}
    op_lists = [[] for _ in range(work.num_stages)]
    while waiting:
        op = draw.choice([op for op, needed in waiting.items() if not needed])
        op_lists[op.stage].append(op)
        del waiting[op]
        for needed in waiting.values():
            needed.discard(op)
    return op_lists


# --- dependencies ----------------------------------------------------------------------------------------------------


@thorough
@given(workloads, st.booleans())
def test_the_dependencies_of_each_op_are_those_written_out_here(work, whole_messages):
    work = replace(work, whole_messages=whole_messages)
    for stage in range(work.num_stages):
        for op in work.ops(stage):
            assert sorted(map(str, work.dependencies(op))) == sorted(map(str, needed_by(op, work)))


# --- replay ----------------------------------------------------------------------------------------------------------


@thorough
@given(workloads, plans, uneven_costs, latencies)
def test_every_op_starts_as_soon_as_its_process_is_free_and_what_it_needs_has_arrived(work, plan, cost, latency):
    """And so every dependency holds, nothing waits forever, and a process does one op at a time, in its order."""
    work, op_lists = plan(work)
    timeline = replay(op_lists, work, cost=cost, latency=latency)
    assert_as_early_as_allowed(timeline, op_lists, work, cost=cost, latency=latency)


@settings(max_examples=50, deadline=None)
@given(small_workloads, seeds, uneven_costs, latencies)
def test_any_order_that_respects_the_dependencies_can_be_replayed(work, seed, cost, latency):
    op_lists = any_order(work, seed)
    timeline = replay(op_lists, work, cost=cost, latency=latency)
    assert_as_early_as_allowed(timeline, op_lists, work, cost=cost, latency=latency)


@thorough
@given(workloads, uneven_costs, latencies)
def test_forwards_alone_are_replayed_as_evaluation(work, cost, latency):
    op_lists = plan_forwards(work)
    timeline = replay(op_lists, work, cost=cost, latency=latency)
    assert_as_early_as_allowed(timeline, op_lists, work, cost=cost, latency=latency)


def times(timeline: Timeline) -> list[list[tuple[float, float]]]:
    return [[(span.start, span.end) for span in process] for process in timeline.spans]


def test_the_times_of_a_known_case_with_latency():
    work = Workload(2, (2,))
    cost = cost_by_kind({Kind.FORWARD: 1, Kind.BACKWARD: 2})
    timeline = replay(plan_schedule(work), work, cost=cost, latency=1)
    assert times(timeline) == [[(0, 1), (1, 2), (7, 9), (9, 11)], [(2, 3), (3, 4), (4, 6), (6, 8)]]
    assert (timeline.makespan, timeline.busy) == (11, (6, 6))
    assert timeline.bubble == pytest.approx(10 / 22)
    assert [timeline.live_chunks(process) for process in (0, 1)] == [2, 2]


def test_a_hop_within_a_process_takes_no_latency():
    """Stages 0 and 2 on one process, stage 1 on another."""
    work = Workload(3, (1,))
    (forward_0, backward_0), (forward_1, backward_1), (forward_2, backward_2) = plan_schedule(work)
    op_lists = [[forward_0, forward_2, backward_2, backward_0], [forward_1, backward_1]]
    timeline = replay(op_lists, work, cost=lambda op: 1, latency=10)
    assert times(timeline) == [[(0, 1), (22, 23), (23, 24), (45, 46)], [(11, 12), (34, 35)]]
    joined = replay([[forward_0, forward_1, *op_lists[0][1:3], backward_1, backward_0]], work, cost=lambda op: 1)
    assert (joined.makespan, joined.bubble) == (6, 0)


def test_a_recorded_timeline_need_not_start_at_zero():
    first, second = Op(Kind.FORWARD, 0, 0, 0), Op(Kind.FORWARD, 1, 0, 0)
    timeline = Timeline(((Span(first, 100.0, 101.0),), (Span(second, 102.0, 105.0),)))
    assert (timeline.start, timeline.end, timeline.makespan) == (100.0, 105.0, 5.0)
    assert timeline.bubble == pytest.approx(1 - 4 / 10)


def test_a_timeline_without_ops_takes_no_time():
    timeline = Timeline(((), ()))
    assert (timeline.makespan, timeline.busy, timeline.bubble, timeline.live_chunks(0)) == (0, (0, 0), 0, 0)


@thorough
@given(small_workloads, seeds)
def test_a_chunk_lives_from_its_forward_to_the_last_op_of_its_backward(work, seed):
    timeline = replay(any_order(work, seed), work, cost=lambda op: 1)
    for process, spans in enumerate(timeline.spans):
        lifetimes = {}
        for span in spans:
            first, _ = lifetimes.get(span.op[1:], (span.start, None))
            lifetimes[span.op[1:]] = first, span.end
        changes = sorted([(first, 1) for first, _ in lifetimes.values()] + [(end, -1) for _, end in lifetimes.values()])
        live = most = 0
        for _, change in changes:  # at equal times an end comes before a start
            live += change
            most = max(most, live)
        assert timeline.live_chunks(process) == most


# --- lower bound -----------------------------------------------------------------------------------------------------


@thorough
@given(workloads, plans, uneven_costs, latencies)
def test_no_plan_is_faster_than_the_lower_bound(work, plan, cost, latency):
    work, op_lists = plan(work)
    timeline = replay(op_lists, work, cost=cost, latency=latency)
    assert max(timeline.busy) <= lower_bound(work, cost=cost, latency=latency) <= timeline.makespan


stage_costs = st.builds(StageCosts, lists_of(st.integers(1, 8), longest=13))


@thorough
@given(small_workloads, seeds, stage_costs, latencies)
def test_no_order_at_all_is_faster_than_the_lower_bound(work, seed, cost, latency):
    timeline = replay(any_order(work, seed), work, cost=cost, latency=latency)
    assert lower_bound(work, cost=cost, latency=latency) <= timeline.makespan


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 16), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
def test_equal_sequences_reach_the_lower_bound_when_backward_is_one_op(stages, length, sequences, forward, backward):
    cost = cost_by_kind({Kind.FORWARD: forward, Kind.RECOMPUTE: forward, Kind.BACKWARD: backward})
    fused = Workload(stages, (length,) * sequences)
    for work in (fused, replace(fused, recompute=recompute_everything)):
        assert replay(plan_schedule(work), work, cost=cost).makespan == lower_bound(work, cost=cost)


@pytest.mark.parametrize("sizes", [(4, 16, 1), (8, 64, 1), (8, 64, 4), (16, 64, 2), (4, 16, 8), (8, 16, 8)])
def test_a_split_backward_comes_within_five_percent_of_the_lower_bound(sizes):
    stages, length, sequences = sizes
    work = Workload(stages, (length,) * sequences, recompute=recompute_everything, split_backward=True)
    makespan = replay(plan_schedule(work), work, cost=lambda op: 1).makespan
    assert 0.95 * makespan <= lower_bound(work, cost=lambda op: 1) < makespan


@thorough
@given(workloads, uneven_costs, latencies)
def test_the_lower_bound_of_a_single_stage_is_the_sum_of_its_ops(work, cost, latency):
    work = replace(work, num_stages=1)
    (ops,) = plan_schedule(work)
    timeline = replay([ops], work, cost=cost, latency=latency)
    assert lower_bound(work, cost=cost, latency=latency) == timeline.makespan == sum(map(cost, ops))
    assert timeline.bubble == 0


@pytest.mark.parametrize(
    ("chunks", "bptt_chunks", "costs", "latency", "bound"),
    [
        # stage 1: 1 there, its work of 2 x 5, 1 back, and its weight gradients of 2 x 2 fill that
        ((1, 1), None, (1, 1, 1, 2), 0, 1 + 10),
        # the same with a hop of 3 there, and 4 + 3 back of which the weight gradients fill 4
        ((1, 1), None, (1, 1, 4, 2), 3, (1 + 3) + 16 + (7 - 4)),
        # one sequence: stage 0 has its work of 8, and fills 1 of the way through stage 1 of 1 + 4 and two hops of 3
        ((1,), None, (1, 1, 4, 2), 3, 8 + (11 - 1)),
        # one sequence of two windows: stage 0 fills the way with the other window, so it is stage 1 that counts
        ((2,), 1, (1, 1, 4, 2), 3, (1 + 3) + 16 + (7 - 4)),
    ],
)
def test_the_lower_bound_counts_what_recomputation_and_weight_gradients_cannot_fill(
    chunks, bptt_chunks, costs, latency, bound
):
    work = Workload(2, chunks, bptt_chunks, recompute=recompute_everything, split_backward=True)
    kinds = (Kind.FORWARD, Kind.RECOMPUTE, Kind.HIDDEN_GRADIENT, Kind.WEIGHT_GRADIENT)
    cost = cost_by_kind(dict(zip(kinds, costs, strict=True)))
    assert lower_bound(work, cost=cost, latency=latency) == bound


def test_recomputation_that_more_than_fills_the_way_takes_nothing_off_the_lower_bound():
    """Stage 0 has 1 + 9 + 2 to do, and the way through stage 1 is 1 + 2."""
    work = Workload(2, (1,), recompute=recompute_everything)

    def cost(op: Op) -> float:
        return {Kind.FORWARD: 1, Kind.RECOMPUTE: 1 if op.stage else 9, Kind.BACKWARD: 2}[op.kind]

    assert lower_bound(work, cost=cost) == 12 == replay(plan_schedule(work), work, cost=cost).makespan


def test_with_one_sequence_the_lower_bound_takes_the_way_of_its_last_chunk():
    """Stage 0 has 2 forwards and backwards of 5 and 1; between them the last chunk is 1 + 5 on stage 1."""
    work = Workload(2, (2,))

    def cost(op: Op) -> float:
        return 5 if op.kind is Kind.BACKWARD and op.chunk == 1 else 1

    assert lower_bound(work, cost=cost) == 8 + 6 == replay(plan_schedule(work), work, cost=cost).makespan


def test_the_lower_bound_ends_with_the_sequence_whose_way_back_is_shortest():
    """Stage 1 starts after 1, has 2 forwards of 1 and backwards of 20, and the way back is 10 or 1."""
    work = Workload(2, (1, 1))

    def cost(op: Op) -> float:
        if op.kind is Kind.FORWARD:
            return 1
        return 20 if op.stage == 1 else (10, 1)[op.sequence]

    assert lower_bound(work, cost=cost) == 1 + 42 + 1 == replay(plan_schedule(work), work, cost=cost).makespan


# --- one list for all stages -----------------------------------------------------------------------------------------


@thorough
@given(workloads, plans)
def test_merged_lists_keep_each_stages_order_and_every_dependency(work, plan):
    work, op_lists = plan(work)
    merged = merge_op_lists(op_lists, work)
    for stage, ops in enumerate(op_lists):
        assert [op for op in merged if op.stage == stage] == ops
    assert len(merged) == sum(map(len, op_lists))
    done = set()
    for op in merged:
        assert done.issuperset(needed_by(op, work))
        done.add(op)


def test_one_process_with_all_stages_never_waits():
    work = Workload(4, (5, 2, 7), bptt_chunks=3, recompute=recompute_everything)
    merged = merge_op_lists(plan_schedule(work), work)
    timeline = replay([merged], work, cost=lambda op: 1, latency=5)
    assert (timeline.makespan, timeline.bubble) == (4 * 14 * 3, 0)


# --- broken lists ----------------------------------------------------------------------------------------------------


def error_of(op_lists, work: Workload) -> str:
    with pytest.raises(ScheduleError) as caught:
        replay(op_lists, work, cost=lambda op: 1)
    return str(caught.value)


def test_a_cycle_of_waits_names_the_ops_that_wait():
    """Stage 0 wants a gradient that stage 1 gives only after a forward that stage 0 does later."""
    work = Workload(2, (1, 1))
    forward, backward = ([Op(kind, 0, s, 0) for s in (0, 1)] for kind in (Kind.FORWARD, Kind.BACKWARD))
    behind = [op._replace(stage=1) for op in (*forward, *backward)]
    ahead = [forward[0], backward[0], forward[1], backward[1]]
    assert error_of([ahead, behind], work) == (
        "these ops wait for each other: backward of sequence 0 chunk 0 on stage 0; "
        "forward of sequence 1 chunk 0 on stage 1"
    )
    assert replay([[*forward, *backward], behind], work, cost=lambda op: 1).makespan == 6


def test_a_backward_before_its_own_forward_waits_forever():
    forward, backward = Op(Kind.FORWARD, 0, 0, 0), Op(Kind.BACKWARD, 0, 0, 0)
    assert "backward of sequence 0 chunk 0 on stage 0" in error_of([[backward, forward]], Workload(1, (1,)))


@settings(max_examples=30, deadline=None)
@given(small_workloads, st.data())
def test_an_op_that_is_missing_is_named(work, data):
    work = replace(work, num_stages=work.num_stages + 1)  # so that some backward is left: forwards alone are evaluation
    op_lists = plan_schedule(work)
    op = data.draw(st.sampled_from([op for ops in op_lists for op in ops]))
    op_lists[op.stage].remove(op)
    assert error_of(op_lists, work) == f"{op} is not in the lists exactly once"


@settings(max_examples=30, deadline=None)
@given(small_workloads, st.data())
def test_an_op_that_is_there_twice_is_named_on_whatever_process(work, data):
    op_lists = plan_schedule(work)
    op = data.draw(st.sampled_from([op for ops in op_lists for op in ops]))
    data.draw(st.sampled_from(op_lists)).append(op)
    assert error_of(op_lists, work) == f"{op} is not in the lists exactly once"


@pytest.mark.parametrize(
    "stranger",
    [
        Op(Kind.FORWARD, 0, 0, 2),
        Op(Kind.FORWARD, 0, 1, 0),
        Op(Kind.RECOMPUTE, 0, 0, 0),
        Op(Kind.WEIGHT_GRADIENT, 1, 0, 0),
        Op(Kind.FORWARD, 2, 0, 0),
    ],
)
def test_an_op_of_other_work_is_named(stranger):
    work = Workload(2, (2,))
    first, last = plan_schedule(work)
    assert error_of([[*first, stranger], last], work) == f"{stranger} is in the lists and not in the work"


def test_a_missing_forward_is_named_also_in_evaluation():
    work = Workload(2, (2,))
    first, last = plan_forwards(work)
    assert (
        error_of([first, last[:1]], work) == "forward of sequence 0 chunk 1 on stage 1 is not in the lists exactly once"
    )


def test_lists_with_some_backwards_must_hold_all_of_them():
    work = Workload(2, (1,))
    first, last = plan_schedule(work)
    assert "backward of sequence 0 chunk 0 on stage 0" in error_of([first[:1], last], work)


def test_a_stage_in_two_processes_is_refused():
    work = Workload(1, (2,))
    (ops,) = plan_schedule(work)
    with pytest.raises(ScheduleError, match="stage 0 is in the lists of several processes"):
        replay([ops[:1], ops[1:]], work, cost=lambda op: 1.0)


def test_no_work_takes_no_time():
    work = Workload(2, ())
    assert replay(plan_schedule(work), work, cost=lambda op: 1.0).makespan == 0
    assert lower_bound(work, cost=lambda op: 1.0) == 0
