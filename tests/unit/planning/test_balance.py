"""The split of layers is the best of all there are, and follows from the costs of the schedule's ops."""

import dataclasses
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comet_megatron.chunking import plan_chunks
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.errors import ConfigError
from comet_megatron.parallel.schedule import Kind, Op, Workload, plan_schedule, recompute_everything
from comet_megatron.parallel.simulator import replay
from comet_megatron.planning.balance import (
    ChunkCosts,
    chunk_costs,
    describe_split,
    resolve_layers_per_stage,
    split_layers,
    stage_costs,
    stage_layers,
    steady_chunk,
)
from comet_megatron.planning.costs import plan_costs

MEMORY = MemorySizes(2048, 8, 2048, 0, 1, tuple(range(2, 514)), 0)
QWEN3_4B = Architecture("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, 1e-6, 1e6, True)


def all_splits(layers, stages):
    for cuts in combinations(range(1, layers), stages - 1):
        ends = (0, *cuts, layers)
        yield tuple(b - a for a, b in zip(ends, ends[1:], strict=False))


@given(
    st.integers(1, 5).flatmap(lambda stages: st.tuples(st.just(stages), st.integers(stages, 11))),
    st.floats(0, 4),
    st.floats(0, 4),
)
def test_no_split_has_a_cheaper_slowest_stage_nor_a_more_even_rest(sizes, first, last):
    stages, layers = sizes

    def rank(split):
        costs = stage_costs(split, ChunkCosts(1.0, first, last))
        return max(costs), sum(cost * cost for cost in costs)

    split = split_layers(layers, stages, layer=1.0, first=first, last=last)
    assert sum(split) == layers and min(split) >= 1
    most, squares = rank(split)
    others = [rank(other) for other in all_splits(layers, stages)]
    assert most == pytest.approx(min(m for m, _ in others))
    assert squares == pytest.approx(min(s for _, s in others))


def test_equal_stages_get_equal_layers_and_what_is_left_goes_to_the_first():
    assert split_layers(8, 4, layer=3.0) == (2, 2, 2, 2)
    assert split_layers(10, 4, layer=3.0) == (3, 3, 2, 2)


def test_a_heavy_head_leaves_its_stage_one_layer():
    assert split_layers(9, 3, layer=1.0, last=100.0) == (4, 4, 1)


@pytest.mark.parametrize("stages", [0, 5])
def test_more_stages_than_layers_or_none_is_refused(stages):
    with pytest.raises(ConfigError, match=f"{stages} stages"):
        split_layers(4, stages, layer=1.0)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_chunk_costs_what_its_ops_in_the_schedule_cost(recompute):
    plans = plan_chunks(2048 * 4, MEMORY)
    labels = [[plan.num_text for plan in plans]]
    cost = plan_costs(QWEN3_4B, [plans], labels, (20, 10, 6))
    kinds = (Kind.FORWARD, Kind.RECOMPUTE, Kind.BACKWARD) if recompute else (Kind.FORWARD, Kind.BACKWARD)
    steady = 2  # the last chunk but one
    costs = chunk_costs(QWEN3_4B, MEMORY, tokens=2048 * 4, recompute=recompute)
    by_ops = [sum(cost(Op(kind, stage, 0, steady)) for kind in kinds) for stage in range(3)]
    assert stage_costs((20, 10, 6), costs) == pytest.approx(by_ops, rel=1e-12)


def test_half_the_labels_make_half_the_head():
    whole, half = (chunk_costs(QWEN3_4B, MEMORY, tokens=9000, labelled_share=share) for share in (1.0, 0.5))
    assert half == dataclasses.replace(whole, last=whole.last / 2)


def test_the_steady_chunk_is_full_and_has_all_its_slots():
    plan = steady_chunk(MEMORY, tokens=2048 * 12 + 7)
    assert (plan.num_text, plan.num_slots, plan.num_global_beacons) == (2048, 2560, 512)
    assert steady_chunk(MEMORY, tokens=7).num_text == 7


@pytest.mark.parametrize(("recompute", "split"), [(False, (4, 5, 5, 5, 5, 5, 5, 2)), (True, (4, 5, 5, 5, 5, 5, 4, 3))])
def test_qwen3_4b_on_eight_stages_has_five_layers_a_stage_and_fewer_beside_the_head(recompute, split):
    found = resolve_layers_per_stage("auto", QWEN3_4B, MEMORY, num_stages=8, tokens=131072, recompute=recompute)
    assert found == split


def simulated(split, *, chunks):
    plans = [plan_chunks(2048 * chunks, MEMORY)]
    work = Workload(len(split), (chunks,), recompute=recompute_everything)
    cost = plan_costs(QWEN3_4B, plans, [[plan.num_text for plan in plans[0]]], split)
    return replay(plan_schedule(work), work, cost=cost)


def test_a_step_split_by_cost_is_faster_than_one_of_nearly_equal_layers():
    by_cost = resolve_layers_per_stage("auto", QWEN3_4B, MEMORY, num_stages=8, tokens=2048 * 64, recompute=True)
    equal = (5, 5, 5, 5, 4, 4, 4, 4)
    assert simulated(by_cost, chunks=64).makespan < 0.95 * simulated(equal, chunks=64).makespan
    worst = (4, 4, 4, 4, 5, 5, 5, 5)
    assert simulated(by_cost, chunks=64).makespan < 0.8 * simulated(worst, chunks=64).makespan


def test_a_list_is_taken_as_it_is_and_another_word_refused():
    given = {"num_stages": 2, "tokens": 100}
    assert resolve_layers_per_stage((35, 1), QWEN3_4B, MEMORY, **given) == (35, 1)
    with pytest.raises(ConfigError, match="layers_per_stage='even'"):
        resolve_layers_per_stage("even", QWEN3_4B, MEMORY, **given)


def test_stages_hold_consecutive_layers():
    assert stage_layers((3, 1, 2)) == [range(0, 3), range(3, 4), range(4, 6)]


def test_a_split_is_told_in_one_line():
    costs = ChunkCosts(layer=10.0, last=21.0)
    assert describe_split((10, 10, 9, 7), costs, setting="auto") == (
        "stages   PP 4: 10 + 10 + 9 + 7 layers (by cost: the head weighs 2.1 layers)"
    )
    assert describe_split((2, 1), costs, setting=(2, 1)) == (
        "stages   PP 2: 2 + 1 layers (as given: the head weighs 2.1 layers)"
    )
    assert describe_split((1,), costs, setting="auto") == "stages   PP 1: 1 layer"
    assert describe_split((4, *[5] * 9, 3), costs, setting="auto").startswith("stages   PP 11: 4 + 9 x 5 + 3 layers")
