"""What is expected of drawn cuts is the mean of what training really draws; the worst is not exceeded."""

import numpy as np
import pytest

from comet_megatron.chunking import plan_chunks
from comet_megatron.config.schema import Config, DataSection, ModelSection, ParallelSection, TrainSection
from comet_megatron.data.cuts import CutPlan, parse_ways
from comet_megatron.planning.balance import chunk_costs, resolve_layers_per_stage
from comet_megatron.planning.costs import head_flops, layer_flops
from comet_megatron.planning.cutting import FULL_CHUNKS, Cutting
from comet_megatron.planning.report import plan_pipeline
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory

MODEL, MEMORY, TOKENS = tiny_architecture(num_layers=8), tiny_memory(chunk_size=64), 4096
CONFIG = Config(
    model=ModelSection(path="start"),
    parallel=ParallelSection(pp=2),
    train=TrainSection(output="run", steps=1, recompute="full"),
)


def cutting(chunks, max_stride=0):
    return Cutting.of(DataSection(chunks=chunks, max_stride=max_stride))


def drawn(chunks, max_stride, *, count=200):
    """Plans of sequences as training cuts them."""
    plan = CutPlan(parse_ways(chunks), MEMORY.chunk_size, MEMORY.stride, 1, max_stride)
    cuts = [plan.cut(np.zeros(TOKENS, dtype=np.int64), epoch=0, sample=i) for i in range(count)]
    return cuts, [plan_chunks(TOKENS, MEMORY, lengths=cut.lengths, stride=cut.stride) for cut in cuts]


def test_full_chunks_at_the_models_stride_are_nothing_drawn():
    assert not FULL_CHUNKS.draws(MEMORY) and not cutting("fixed", MEMORY.stride).draws(MEMORY)
    assert cutting("fixed", 2 * MEMORY.stride).draws(MEMORY) and cutting("fixed:0.9, right:0.1").draws(MEMORY)
    assert chunk_costs(MODEL, MEMORY, tokens=TOKENS) == chunk_costs(
        MODEL, MEMORY, tokens=TOKENS, cutting=cutting("fixed")
    )


def test_strides_double_up_to_the_largest():
    assert cutting("fixed", 20).strides(MEMORY) == (4, 8, 16)
    assert cutting("fixed", 20).strides(tiny_memory(stride=-1)) == (-1,)


@pytest.mark.parametrize(
    ("chunks", "max_stride"), [("random", 0), ("uniform", 0), ("fixed", 16), ("fixed:0.5, random:0.5", 8)]
)
def test_expected_costs_are_the_mean_of_what_is_drawn(chunks, max_stride):
    """The head over a layer, over whole sequences: what the balance of stages depends on."""
    _, sequences = drawn(chunks, max_stride)
    layer = np.mean([sum(layer_flops(MODEL, plan) for plan in plans) for plans in sequences])
    expected = chunk_costs(MODEL, MEMORY, tokens=TOKENS, cutting=cutting(chunks, max_stride))
    assert expected.last / expected.layer == pytest.approx(head_flops(MODEL, TOKENS) / layer, rel=0.03)


def test_fewer_beacons_make_layers_cheaper_and_the_head_heavier():
    model = tiny_architecture(num_layers=12)
    always, drawn_ = (chunk_costs(model, MEMORY, tokens=TOKENS, cutting=cutting("fixed", most)) for most in (0, 64))
    assert drawn_.last == pytest.approx(always.last) and drawn_.layer < always.layer
    split = resolve_layers_per_stage("auto", model, MEMORY, num_stages=3, tokens=TOKENS, cutting=cutting("random", 64))
    assert sum(split) == 12


@pytest.mark.parametrize(("chunks", "max_stride"), [("random", 16), ("fixed:0.6, right:0.2, random:0.2", 0)])
def test_no_draw_needs_more_than_the_planned_bytes(chunks, max_stride):
    cuts, _ = drawn(chunks, max_stride, count=20)
    planned = plan_pipeline(
        CONFIG, MODEL, MEMORY, [TOKENS + 1], longest=TOKENS, cuts=[cuts[0]], cutting=cutting(chunks, max_stride)
    )
    assert planned.cuts_are_drawn
    for cut in cuts[1:]:
        other = plan_pipeline(CONFIG, MODEL, MEMORY, [TOKENS + 1], longest=TOKENS, cuts=[cut])
        for worst, one in zip(planned.stages, other.stages, strict=True):
            assert worst.bytes.total >= one.bytes.total
