"""An asynchronous save writes the state of the moment it began, whatever training does to it meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from comet_megatron.checkpoint.model_folder import ModelDescription
from comet_megatron.checkpoint.saving import Contents, Saving
from comet_megatron.config.schema import OptimizerSection
from comet_megatron.model.build import build_stage
from comet_megatron.testing.runs import weights_of
from comet_megatron.testing.tiny import (
    build_oracle,
    layout_of,
    load_hf_tensors,
    oracle_tensors,
    tiny_architecture,
    tiny_memory,
    weights,
    whole_tensors,
)
from comet_megatron.train.model import build_trainable
from comet_megatron.train.optimizer import build_optimizer


def save_while_training(process, folder: Path, tokenizer: Path, zero1: bool) -> dict[str, torch.Tensor]:
    """The weights when the save began; all of them are changed before its thread may write."""
    layout = layout_of(process)
    architecture, memory = tiny_architecture(num_layers=1), tiny_memory()
    stage = build_stage(architecture, memory, layout.groups)
    load_hf_tensors(stage, oracle_tensors(build_oracle(architecture, memory)))
    model = build_trainable({0: stage}, layout, zero1=zero1)
    optimizer = build_optimizer(model, OptimizerSection(), precision="fp32", zero1=zero1)
    before = {name: tensor.clone() for name, tensor in whole_tensors(stage, weights(stage)).items()}
    may_write, write = threading.Event(), Saving._write
    Saving._write = lambda self, *arguments: (may_write.wait(60), write(self, *arguments))[1]
    try:
        contents = Contents(ModelDescription(architecture, memory, {"model_type": "qwen3"}), tokenizer)
        saving = Saving.start(folder, stage, optimizer, layout, contents=contents)
        with torch.no_grad():
            for param in stage.parameters():
                param.fill_(7.0)
        may_write.set()
        saving.finish()
    finally:
        Saving._write = write
    return before


@pytest.mark.parametrize("zero1", [False, True])
def test_what_is_saved_is_what_was_there_when_the_save_began(zero1, tmp_path, pool):
    (tmp_path / "tokenizer").mkdir()
    for world in (1, 2):
        folder = tmp_path / f"saved_{world}"
        before = pool(world).run(save_while_training, folder, tmp_path / "tokenizer", zero1)[0]
        found = pool(1).run(weights_of, folder)[0]
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], before[name]) for name in before)
