"""A device that is too small: told item by item, with what would fit."""

from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from comet_megatron.checkpoint.model_folder import ModelDescription
from comet_megatron.config.schema import Config, ModelSection, ParallelSection, TrainSection
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.planning.fit import check_fits_device, neediest, plan_run, what_fits
from comet_megatron.planning.report import plan_pipeline
from comet_megatron.planning.shapes import named_shape
from comet_megatron.testing.tiny import layout_alone, tiny_architecture, tiny_memory
from comet_megatron.train.room import check_room

MODEL, MEMORY = named_shape("qwen3-0.6b")
CONFIG = Config(
    model=ModelSection(path="start", precision="bf16"), train=TrainSection(output="run", steps=1, global_batch_size=8)
)
LONGEST = 32768


def stages_of(config, *, dp=8):
    return plan_run(config, MODEL, MEMORY, longest=LONGEST, dp=dp, on_cuda=True)


def test_what_fits_is_no_problem_and_one_byte_less_is():
    stages = stages_of(CONFIG)
    needed = neediest(stages)[1].total
    assert check_fits_device(stages, needed, device="a GPU") is None
    problem = check_fits_device(stages, needed - 1, device="a GPU", way_out="do this")
    assert problem.what.startswith("a rank needs") and "chunks" in problem.what and problem.way_out == "do this"


def test_the_stage_that_needs_most_is_named():
    config = replace(CONFIG, parallel=ParallelSection(pp=2, layers_per_stage=(2, 26)))
    assert check_fits_device(stages_of(config, dp=4), 10**9, device="a GPU").what.startswith("stage 1 needs")


def test_recomputation_is_the_first_thing_to_change():
    recomputed = replace(CONFIG, train=replace(CONFIG.train, recompute="full"))
    enough = neediest(stages_of(recomputed))[1].total
    told = what_fits(CONFIG, MODEL, MEMORY, longest=LONGEST, world_size=8, available_bytes=enough)
    assert told.startswith("train.recompute=full would need")


def test_then_another_layout_then_more_gpus_and_at_last_nothing():
    def told(gigabytes):
        return what_fits(
            CONFIG, MODEL, MEMORY, longest=LONGEST, world_size=8, available_bytes=int(gigabytes * 1e9), gpu="unknown"
        )

    assert told(6).startswith("parallel.tp=")
    assert told(1.6).startswith("no layout of 8 fits; ")
    assert told(0.1).startswith("no layout fits")


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_two_sequences_a_pipeline_keep_as_much_as_more_do(recompute):
    config = replace(
        CONFIG, parallel=ParallelSection(pp=2), train=replace(CONFIG.train, recompute=recompute, global_batch_size=4)
    )
    two = neediest(plan_run(config, MODEL, MEMORY, longest=LONGEST, dp=1, on_cuda=True))[1]
    four = plan_pipeline(config, MODEL, MEMORY, [LONGEST] * 4, longest=LONGEST, on_cuda=True).stages
    assert neediest(four)[1].total == two.total


def test_on_a_cpu_a_plan_beyond_the_free_memory_is_a_warning(monkeypatch):
    architecture, memory = tiny_architecture(), tiny_memory()
    description, process = ModelDescription(architecture, memory, {}), ProcessRank(0, 1, 0, 1)

    def room(available):
        monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
        return check_room(CONFIG, description, layout_alone(), process, longest=200)

    assert room(10**12) == []
    (line,) = room(10**5)
    assert line.startswith("warning  a rank needs") and "has 100.00 kB free" in line
