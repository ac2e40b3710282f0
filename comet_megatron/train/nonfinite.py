"""A loss or gradient that is not finite: find the step, the layer and the chunk, and stop with a message."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist

from comet_megatron.chunking import plan_chunks
from comet_megatron.errors import TrainingError
from comet_megatron.model.chunk_tensors import build_chunk_tensors
from comet_megatron.model.loss import head_loss
from comet_megatron.model.memory import carry_memory
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.layout import Layout

WAY_OUT = (
    "checkpoints written so far are intact: lower optimizer.lr or optimizer.memory_lr_mult, then go on with --resume "
    "or, without a checkpoint, in a new train.output"
)


def stop_on_nonfinite_loss(
    stage: CometStage, batch: Sequence[tuple[np.ndarray, np.ndarray]], layout: Layout, *, step: int
) -> NoReturn:
    """Compute the batch again, layer by layer, and name the first one whose output is not finite.

    Raises:
        TrainingError: always.
    """
    found = next((place for ids, labels in batch if (place := _first_nonfinite(stage, ids, labels))), None)
    _stop("the loss", found, layout, step=step)


def stop_on_nonfinite_gradient(stage: CometStage, layout: Layout, *, step: int) -> NoReturn:
    """Name the first parameter whose gradient is not finite.

    Raises:
        TrainingError: always.
    """
    names = (n for n, p in stage.named_parameters() if getattr(p, "main_grad", None) is not None)
    params = dict(stage.named_parameters())
    found = next((f"in the gradient of {n}" for n in names if not params[n].main_grad.isfinite().all()), None)
    _stop("the gradient", found, layout, step=step)


def _stop(what: str, found: str | None, layout: Layout, *, step: int) -> NoReturn:
    places: list[str | None] = [None] * layout.world_size
    dist.all_gather_object(places, found)
    named = [f"{place} (rank {rank})" for rank, place in enumerate(places) if place]
    where = "; ".join(named[:3]) or "in the sum over ranks only"
    raise TrainingError(f"{what} of step {step} is not finite: first {where}", way_out=WAY_OUT)


@torch.no_grad()
def _first_nonfinite(stage: CometStage, token_ids: np.ndarray, labels: np.ndarray) -> str | None:
    memory = stage.empty_memory()
    place: list[str] = []

    def check(name: str, number: int | None = None):
        def hook(module: object, inputs: object, output: object) -> None:
            tensors = (output if isinstance(output, torch.Tensor) else output[0],)
            if isinstance(output, tuple):
                tensors += tuple(t for t in output[1] if t is not None)
            if not place and not all(bool(t.isfinite().all()) for t in tensors):
                place.append(name if number is None else f"{name} {number}")

        return hook

    hooks = [layer.register_forward_hook(check("layer", layer.layer_number - 1)) for layer in stage.decoder.layers]
    if stage.embedding is not None:
        hooks.append(stage.embedding.register_forward_hook(check("the embedding")))
    try:
        for plan in plan_chunks(token_ids.shape[1], stage.memory_sizes):
            chunk = build_chunk_tensors(
                plan, token_ids, labels, stage.memory_sizes, shards=stage.shards, device=stage.device
            )
            hidden, written = stage(chunk, memory)
            if place:
                return f"in {place[0]}, chunk {plan.index}"
            if not head_loss(stage, hidden, chunk, slice_tokens=1024).isfinite():
                return f"in the head, chunk {plan.index}"
            memory = [
                carry_memory(m, w, budget=stage.memory_sizes.budget) for m, w in zip(memory, written, strict=True)
            ]
    finally:
        for hook in hooks:
            hook.remove()
    return None
