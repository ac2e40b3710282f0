"""What needs a GPU, asked for where there is none: one message, exit code 2, nothing written; and a full memory."""

from __future__ import annotations

import pytest
import torch

from comet_megatron.testing.runs import run_command, write_config, write_data, write_start
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory, tiny_sequences

# Enough layers and widths for FP8, so that the machine is all that is wrong.
ARCHITECTURE = tiny_architecture(num_layers=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pool):
    folder = tmp_path_factory.mktemp("gpu_bad_input")
    pool(1).run(write_start, folder / "start", ARCHITECTURE, tiny_memory())
    write_data(folder / "data", tiny_sequences([40, 50]))
    return folder


BAD = {
    "no GPU though cuda is asked for": ({"device": "cuda"}, {}, "train.device=cuda, and there is no GPU: torch"),
    "FP8 without a GPU": ({}, {"precision": "fp8"}, "model.precision=fp8 needs a GPU: torch"),
    "Transformer Engine without a GPU": ({}, {"precision": "bf16", "backend": "te"}, "model.backend=te needs a GPU"),
    "FP8 on torch": ({}, {"precision": "fp8", "backend": "torch"}, "use model.backend=te or auto"),
    "delayed scaling": ({}, {"precision": "fp8", "fp8_recipe": "delayed"}, "not right in a loop over chunks"),
    "fused gradients on a CPU": ({"fuse_weight_gradients": True}, {}, "model.backend became torch"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_a_machine_cannot_do_is_said_before_anything_is_built(name, folder, tmp_path, pool):
    train, model, wanted = BAD[name]
    run = tmp_path / "run"
    train = {**train, "output": str(run)}
    config = write_config(tmp_path / "run.yaml", folder, model=model, train=train)
    ((code, _, message),) = pool(1).run(run_command, "--config", str(config))
    assert code == 2 and wanted in message and "Traceback" not in message, message
    assert not run.exists()


def run_with_a_full_memory(process, config: str) -> tuple[int, str, str]:
    from comet_megatron.train import trainer

    def fails(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    right, trainer.train_step = trainer.train_step, fails
    try:
        return run_command(process, "--config", config)
    finally:
        trainer.train_step = right


def build_with_a_full_memory(process, config: str) -> tuple[int, str, str]:
    from comet_megatron.train import build

    def fails(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")

    right, build.build_trainable = build.build_trainable, fails
    try:
        return run_command(process, "--config", config)
    finally:
        build.build_trainable = right


def test_a_model_that_does_not_fit_is_explained(folder, tmp_path, pool):
    config = write_config(tmp_path / "run.yaml", folder, train={"output": str(tmp_path / "run")})
    ((code, _, message),) = pool(1).run(build_with_a_full_memory, str(config))
    assert code == 2 and "Traceback" not in message
    for part in ("building the model", "planned, in GiB: weights", "allocate 9.00 GiB", "parallel.pp=2"):
        assert part in message, message


def test_a_full_memory_is_explained(folder, tmp_path, pool):
    config = write_config(tmp_path / "run.yaml", folder, train={"output": str(tmp_path / "run")})
    ((code, _, message),) = pool(1).run(run_with_a_full_memory, str(config))
    assert code == 2 and "Traceback" not in message
    for part in ("out of memory", "planned, in GiB: weights", "Tried to allocate 2.00 GiB", "train.recompute=full"):
        assert part in message, message
