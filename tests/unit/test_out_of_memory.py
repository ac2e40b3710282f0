"""A full GPU: the plan, the measurement, and the first setting to change."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comet_megatron.config.schema import Config, DataSection, ModelSection, ParallelSection, TrainSection
from comet_megatron.planning.memory import StateBytes
from comet_megatron.train.out_of_memory import GIB, describe_out_of_memory, first_knob

SMALL, LARGE = StateBytes(GIB, 2 * GIB, 3 * GIB), StateBytes(8 * GIB, 16 * GIB, 48 * GIB)
CONFIG = Config(
    model=ModelSection(path="start"), data=DataSection(train="shards"), train=TrainSection(output="run", steps=1)
)


def test_plan_and_measurement_are_said():
    told = describe_out_of_memory(SMALL, GIB // 2, peak=70 * GIB, has=80 * GIB, recompute="full")
    assert "70.0 of 80.0 GiB" in told and "weights 1.0, gradients 2.0, optimizer 3.0, 0.5 of chunks" in told
    assert "the activations of all chunks" in describe_out_of_memory(SMALL, 0, peak=0, has=0, recompute="none")


@pytest.mark.parametrize(
    ("state", "dp", "train", "parallel", "wanted"),
    [
        (SMALL, 1, {}, {}, "train.recompute=full"),
        (SMALL, 1, {"recompute": "full"}, {}, "train.loss_slice_tokens=256"),
        (SMALL, 1, {"recompute": "full", "loss_slice_tokens": 256}, {}, "train.bptt_chunks=64"),
        (SMALL, 1, {"recompute": "full", "loss_slice_tokens": 256, "bptt_chunks": 8}, {}, "parallel.pp=2"),
        (LARGE, 2, {}, {"zero1": False}, "parallel.zero1=true"),
        (LARGE, 1, {}, {"pp": 2}, "parallel.pp=4"),
    ],
)
def test_the_first_knob_is_the_cheapest_that_helps(state, dp, train, parallel, wanted):
    config = replace(CONFIG, train=replace(CONFIG.train, **train), parallel=ParallelSection(**parallel))
    assert wanted in first_knob(config, state=state, has=80 * GIB, dp=dp)
