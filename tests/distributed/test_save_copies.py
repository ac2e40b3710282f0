"""An asynchronous save writes the state of the moment it began, whatever training does to it meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from comet_megatron.checkpoint.checksums import read_checksums
from comet_megatron.checkpoint.model_folder import ModelDescription
from comet_megatron.checkpoint.saving import Contents, Saving
from comet_megatron.config.schema import OptimizerSection
from comet_megatron.model.build import build_stage
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.testing.runs import weights_of
from comet_megatron.testing.tiny import (
    build_oracle,
    layout_of,
    load_hf_tensors,
    oracle_tensors,
    tiny_architecture,
    tiny_memory,
    tiny_sequences,
    weights,
    whole_tensors,
)
from comet_megatron.train.model import build_trainable
from comet_megatron.train.optimizer import build_optimizer
from comet_megatron.train.step import train_step


def save_twice(process, folder: Path, tokenizer: Path, zero1: bool, precision: str) -> dict[str, torch.Tensor]:
    """Save a state that training has made, then save it again: all of it is changed before the thread may write.

    Returns: the weights that were saved.
    """
    layout = layout_of(process)
    architecture, memory = tiny_architecture(num_layers=1), tiny_memory()
    stage = build_stage(architecture, memory, layout.groups, precision=precision)
    load_hf_tensors(stage, oracle_tensors(build_oracle(architecture, memory)))
    model = build_trainable({0: stage}, layout, zero1=zero1)
    optimizer = build_optimizer(model, OptimizerSection(), precision=precision, zero1=zero1)
    train_step(model, optimizer, tiny_sequences((50,)), layout, settings=BackwardSettings(), step=1)
    before = {name: tensor.clone() for name, tensor in whole_tensors(stage, weights(stage)).items()}
    contents = Contents(ModelDescription(architecture, memory, {"model_type": "qwen3"}), tokenizer)
    Saving.start(folder / "alone", stage, optimizer, layout, contents=contents).finish()
    may_write, write = threading.Event(), Saving._write
    Saving._write = lambda self, *arguments: (may_write.wait(60), write(self, *arguments))[1]
    try:
        saving = Saving.start(folder / "beside", stage, optimizer, layout, contents=contents)
        with torch.no_grad():
            for tensor in trained_tensors(stage, optimizer):
                tensor.fill_(7.0)
        may_write.set()
        saving.finish()
    finally:
        Saving._write = write
    return before


def trained_tensors(stage, optimizer) -> Iterator[torch.Tensor]:
    """All that a step changes: weights, their fp32 masters, moments, numbers of steps."""
    yield from stage.parameters()
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if torch.is_tensor(value))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero1", [False, True])
def test_what_is_saved_is_what_was_there_when_the_save_began(zero1, precision, tmp_path, pool):
    (tmp_path / "tokenizer").mkdir()
    for world in (1, 2):
        folder = tmp_path / f"saved_{world}"
        before = pool(world).run(save_twice, folder, tmp_path / "tokenizer", zero1, precision)[0]
        found = pool(1).run(weights_of, folder / "beside")[0]
        assert found.keys() == before.keys()
        assert all(torch.equal(found[name], before[name]) for name in before)
        alone, beside = (read_checksums(folder / name) for name in ("alone", "beside"))
        del alone["weights/.metadata"], beside["weights/.metadata"]  # the folder's name is in it
        assert alone == beside and any(name.endswith(".distcp") for name in alone)


def copied_bytes(process, folder: Path, tokenizer: Path) -> tuple[int, int]:
    """Bytes that a save clones, and those of the files it writes."""
    layout = layout_of(process)
    architecture, memory = tiny_architecture(), tiny_memory()
    stage = build_stage(architecture, memory, layout.groups)
    load_hf_tensors(stage, oracle_tensors(build_oracle(architecture, memory)))
    model = build_trainable({0: stage}, layout, zero1=True)
    optimizer = build_optimizer(model, OptimizerSection(), precision="fp32", zero1=True)
    train_step(model, optimizer, tiny_sequences((50,)), layout, settings=BackwardSettings(), step=1)
    contents = Contents(ModelDescription(architecture, memory, {"model_type": "qwen3"}), tokenizer)
    clone, cloned = torch.Tensor.clone, 0

    def counted(self, *given, **named):
        nonlocal cloned
        cloned += self.numel() * self.itemsize
        return clone(self, *given, **named)

    torch.Tensor.clone = counted
    try:
        saving = Saving.start(folder, stage, optimizer, layout, contents=contents)
    finally:
        torch.Tensor.clone = clone
    saving.finish()
    return cloned, 16 * sum(param.numel() for param in stage.parameters())


def test_a_save_clones_the_state_once(tmp_path, pool):
    """Views were cloned twice: once to have memory of their own, and once more with all the others."""
    (tmp_path / "tokenizer").mkdir()
    ((cloned, state),) = pool(1).run(copied_bytes, tmp_path / "saved", tmp_path / "tokenizer")
    assert state <= cloned < 1.05 * state


def gathered_states(process) -> list[tuple[int, int, bool]]:
    """On the main rank, of each key of each buffer: parameters, those whose state is not what Megatron gathers, and
    whether the last shard ends behind the buffer."""
    layout = layout_of(process)
    architecture, memory = tiny_architecture(num_layers=1), tiny_memory()
    stage = build_stage(architecture, memory, layout.groups)
    load_hf_tensors(stage, oracle_tensors(build_oracle(architecture, memory)))
    model = build_trainable({0: stage}, layout, zero1=True)
    optimizer = build_optimizer(model, OptimizerSection(), precision="fp32", zero1=True)
    train_step(model, optimizer, tiny_sequences((50,)), layout, settings=BackwardSettings(), step=1)
    found = []
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        ours = part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=True)
        theirs = part.get_parameter_state_dp_zero(use_gloo_comm=False, return_on_all_ranks=False)
        for number, buffer in enumerate(part.buffers if process.rank == 0 else ()):
            ((dtype, one),), ((_, other),) = ours[number].items(), theirs[number].items()
            assert one.keys() == other.keys() and one["numel_unpadded"] == other["numel_unpadded"], dtype
            places = [(start, end) for start, end, _ in buffer.param_index_map.values()]
            is_padded = sum(bucket.grad_data.numel() for bucket in buffer.buckets) > one["numel_unpadded"]
            for key in ("param", "exp_avg", "exp_avg_sq"):
                wrong = [
                    place for place in places if not torch.equal(one[key][slice(*place)], other[key][slice(*place)])
                ]
                assert any(bool(one[key][slice(*place)].any()) for place in places)
                found.append((len(places), len(wrong), is_padded))
    return found


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_optimizers_state_is_gathered_as_megatron_gathers_it(world, pool):
    found = pool(world).run(gathered_states)[0]
    assert found and all(params > 10 and wrong == 0 for params, wrong, _ in found)
    assert any(is_padded for _, _, is_padded in found)
