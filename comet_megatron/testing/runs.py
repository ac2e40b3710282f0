"""Whole training runs on tiny models, for tests: data and a start folder, the command itself, the final weights."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from torch import Tensor

from comet_megatron.checkpoint.model_folder import ModelDescription, read_description
from comet_megatron.checkpoint.sharded import load_weights, save_checkpoint, stored_precision
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.data.shard_writer import write_shards
from comet_megatron.data.shards import Sample
from comet_megatron.model.build import build_stage
from comet_megatron.parallel.layout import close_layout
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.testing.tiny import (
    TEXT_IDS,
    build_oracle,
    layout_of,
    load_hf_tensors,
    oracle_tensors,
    weights,
    whole_tensors,
)
from comet_megatron.train import trainer
from comet_megatron.train.main import main
from comet_megatron.train.step import train_step


def write_data(folder: Path, sequences: Sequence[np.ndarray], *, tokenizer_fingerprint: str = "none") -> None:
    """Shards of text ids."""
    write_shards(
        (Sample(ids=ids, meta={"name": str(i)}) for i, ids in enumerate(sequences)),
        output_dir=folder,
        tokenizer_fingerprint=tokenizer_fingerprint,
        vocab_size=TEXT_IDS,
        shard_bytes=1 << 14,
        settings={},
    )


def write_config(path: Path, folder: Path, **sections: dict[str, Any]) -> Path:
    """A config whose model is FOLDER/start, data FOLDER/data and output FOLDER/run; `sections` replace values."""
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder / "start")},
        "data": {"train": str(folder / "data")},
        "optimizer": {"lr": 1e-3, "warmup_steps": 2, "weight_decay": 0.1},
        "train": {"output": str(folder / "run"), "steps": 4, "global_batch_size": 2},
        "logging": {"tensorboard": False},
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    path.write_text(yaml.safe_dump(values))
    return path


def write_start(
    process: ProcessRank, folder: Path, architecture: Architecture, memory: MemorySizes, *, precision: str = "fp32"
) -> None:
    """A starting checkpoint with random weights and an empty tokenizer folder. Run it on one process of a pool."""
    layout = layout_of(process)
    stage = build_stage(architecture, memory, layout.groups, precision=precision)
    load_hf_tensors(stage, oracle_tensors(build_oracle(architecture, memory)))
    tokenizer = folder.parent / f"{folder.name}_tokenizer"
    tokenizer.mkdir()
    description = ModelDescription(architecture, memory, {"model_type": "qwen3", "eos_token_id": 0}, "none")
    save_checkpoint(folder, stage, layout, description=description, tokenizer=tokenizer)


def run_command(process: ProcessRank, *arguments: str) -> tuple[int, str, str]:
    """comet_megatron.train on every process of a pool: exit code, stdout, stderr."""
    close_layout()
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(list(arguments))
    close_layout()  # the command's own: the next test builds another
    return code, out.getvalue(), err.getvalue()


def run_with_signal(process: ProcessRank, number: int, rank: int, step: int, *arguments: str) -> tuple[int, str, str]:
    """The command; in one step one rank gets a signal."""

    def signalled(*given: Any, **named: Any) -> Any:
        if process.rank == rank and named["step"] == step:
            os.kill(os.getpid(), number)
        return train_step(*given, **named)

    with mock.patch.object(trainer, "train_step", signalled):
        return run_command(process, *arguments)


def run_and_record(process: ProcessRank, *arguments: str) -> tuple[int, str, int, dict[int, list[str]]]:
    """The command: exit code, stderr, this process's data-parallel rank, and by step what it was given to train on.

    A sequence is the hash of all that a step reads of it: ids, labels, cuts and stride.
    """
    read: dict[int, list[str]] = {}
    dp_rank = 0

    def recorded(model: Any, optimizer: Any, sequences: Sequence[Any], layout: Any, **named: Any) -> Any:
        nonlocal dp_rank
        dp_rank = layout.dp_rank
        read[named["step"]] = [_hash_of(sequence) for sequence in sequences]
        return train_step(model, optimizer, sequences, layout, **named)

    with mock.patch.object(trainer, "train_step", recorded):
        code, _, err = run_command(process, *arguments)
    return code, err, dp_rank, read


def _hash_of(sequence: Any) -> str:
    digest = hashlib.sha256(sequence.ids.tobytes() + sequence.labels.tobytes())
    digest.update(f"{sequence.chunk_lengths} {sequence.stride}".encode())
    return digest.hexdigest()[:16]


def weights_of(process: ProcessRank, checkpoint: Path) -> dict[str, Tensor]:
    """Whole tensors of a checkpoint under Hugging Face names. Run it on one process of a pool."""
    layout = layout_of(process)
    description = read_description(checkpoint)
    stage = build_stage(
        description.architecture, description.memory, layout.groups, precision=stored_precision(checkpoint)
    )
    load_weights(checkpoint, stage, layout)
    return whole_tensors(stage, weights(stage))
