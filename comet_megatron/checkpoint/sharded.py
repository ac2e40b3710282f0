"""Save and load a stage and its optimizer as Megatron's sharded checkpoint, in the fully reshardable form.

What is saved on one layout loads on another. How a checkpoint is written: see saving.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from comet_megatron.checkpoint.agreement import reason_of
from comet_megatron.checkpoint.model_folder import WEIGHTS, ModelDescription, Progress
from comet_megatron.checkpoint.saving import Contents, Saving
from comet_megatron.checkpoint.state import sharded_state
from comet_megatron.errors import CheckpointError
from comet_megatron.model.specs import stored_prefixes
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.layout import Layout


def save_checkpoint(
    folder: Path,
    stage: CometStage,
    layout: Layout,
    *,
    description: ModelDescription,
    tokenizer: Path,
    optimizer: MegatronOptimizer | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a checkpoint and wait until it is whole. Every rank calls it; communicates on the world.

    Args:
        folder: its parent is made where it is missing; a folder that is there gets another name.
        tokenizer: folder that is copied into the checkpoint.
        optimizer, progress: of a training run.

    Raises:
        OutputError: on all ranks: one of them could not write; nothing is left of it.
    """
    contents = Contents(description, tokenizer, progress)
    Saving.start(folder, stage, optimizer, layout, contents=contents).finish()


def load_weights(folder: Path, stage: CometStage, layout: Layout) -> None:
    """Load a checkpoint's weights into the stage. Every rank calls it.

    Raises:
        CheckpointError: files are missing or damaged, or the weights have other sizes.
    """
    wanted = sharded_state(stage, None, layout, is_loading=True)
    wanted["model"].pop(CometStage.NEW_ROWS, None)  # a starting checkpoint has them in its embedding
    loaded = _load(wanted, folder)
    stage.load_state_dict(loaded["model"], strict=False)
    stage.read_new_rows()


def load_training_state(folder: Path, stage: CometStage, optimizer: MegatronOptimizer, layout: Layout) -> None:
    """Load weights and the optimizer's state, to go on exactly where the run was. Every rank calls it.

    Raises:
        CheckpointError: files are missing or damaged, or the weights have other sizes.
    """
    loaded = _load(sharded_state(stage, optimizer, layout, is_loading=True), folder)
    stage.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(folder / WEIGHTS))
    except (
        CheckpointingException,
        CheckpointException,
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
    ) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = reason_of(error)
        raise CheckpointError(
            f"the weights cannot be loaded: {reason}",
            where=str(folder / WEIGHTS),
            way_out="the checkpoint is damaged or of other sizes: use another one, or convert again",
        ) from error


def load_whole(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Some parameters of a checkpoint, whole and with Megatron's padding, as they are stored. One process.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    stored = _stored_tensors(folder)
    key_of = {name: stored_name(name) for name in names}
    wanted = {
        name: ShardedTensor.from_rank_offsets(
            key, torch.empty(tuple(stored[key].global_shape), dtype=stored[key].dtype)
        )
        for name, key in key_of.items()
    }
    return _load(wanted, folder)


def stored_shapes(folder: Path, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Whole shapes of those of the named parameters that a checkpoint holds."""
    stored = _stored_tensors(folder)
    key_of = {name: stored_name(name) for name in names}
    return {name: tuple(stored[key].global_shape) for name, key in key_of.items() if key in stored}


def stored_name(name: str) -> str:
    """Under which a checkpoint holds a parameter: Megatron files a norm under the matrix that follows it, with which
    Transformer Engine fuses it."""
    for ours, theirs in stored_prefixes().items():
        name = name.replace(f".{ours}", f".{theirs}")
    return name


def _stored_tensors(folder: Path) -> dict[str, ShardedTensor]:
    """Shapes and dtypes."""
    try:
        return dist_checkpointing.load_tensors_metadata(str(folder / WEIGHTS))
    except (CheckpointingException, OSError, EOFError, RuntimeError, KeyError) as error:
        raise CheckpointError(
            f"the weights cannot be read: {error!r}", where=str(folder / WEIGHTS), way_out="use another checkpoint"
        ) from error


def stored_precision(folder: Path) -> str:
    """ "fp32" or "bf16": how a checkpoint stores its weights."""
    final_norm = _stored_tensors(folder).get("decoder.final_layernorm.weight")
    return "bf16" if final_norm is not None and final_norm.dtype == torch.bfloat16 else "fp32"
