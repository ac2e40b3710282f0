"""A loss or gradient that is not finite: find the step, the layer and the chunk, and say so."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist

from comet_megatron.errors import TrainingError
from comet_megatron.parallel.executor import BackwardSettings, Executor, Microbatch
from comet_megatron.parallel.layout import Layout
from comet_megatron.parallel.schedule import Op
from comet_megatron.train.model import TrainableModel

WAY_OUT = (
    "checkpoints written so far are intact: lower optimizer.lr or optimizer.memory_lr_mult, then go on with --resume "
    "or, without a checkpoint, in a new train.output"
)


class UnusableStep(TrainingError):
    """A step that must not change the weights, and has not; every rank raises it."""


class NotFinite(UnusableStep):
    """Its loss or gradient is not finite."""


EMBEDDING_PLACE = -1  # before the layers' numbers, as it is computed
Found = tuple[int, int, int, str]  # sequence, chunk, layer, what: in the order of computation


def stop_on_nonfinite_loss(executor: Executor, batch: Sequence[Microbatch], layout: Layout, *, step: int) -> NoReturn:
    """Compute the batch again, layer by layer, and name the first one whose output is not finite.

    Raises:
        NotFinite: always.
    """
    found = _first_nonfinite(executor, batch)
    places: list[Found | None] = [None] * layout.world_size
    dist.all_gather_object(places, found)
    # All stages of a pipeline have seen the same sequences: the earliest place is the cause of the others.
    first: dict[int, tuple[Found, int]] = {}
    for rank, place in enumerate(places):
        pipeline = _pipeline_of(rank, layout)
        if place is not None and (pipeline not in first or place < first[pipeline][0]):
            first[pipeline] = (place, rank)
    named = [f"in {what}, chunk {chunk} (rank {rank})" for (_, chunk, _, what), rank in first.values()]
    _stop("the loss", named, step=step)


def stop_on_nonfinite_gradient(model: TrainableModel, layout: Layout, *, step: int) -> NoReturn:
    """Name the first parameter whose gradient is not finite.

    Raises:
        NotFinite: always.
    """
    found = None
    for stage in model.stages:
        names = stage.global_names()
        for name, param in stage.named_parameters():
            grad = getattr(param, "main_grad", None)
            if found is None and grad is not None and not grad.isfinite().all():
                found = f"in the gradient of {names[name]}"
    places: list[str | None] = [None] * layout.world_size
    dist.all_gather_object(places, found)
    _stop("the gradient", [f"{place} (rank {rank})" for rank, place in enumerate(places) if place], step=step)


def _stop(what: str, named: Sequence[str], *, step: int) -> NoReturn:
    where = "; ".join(named[:3]) or "in the sum over ranks only"
    raise NotFinite(f"{what} of step {step} is not finite: first {where}", way_out=WAY_OUT)


def _pipeline_of(rank: int, layout: Layout) -> int:
    """Ranks that differ by their stage only have the same number."""
    return rank % (layout.world_size // layout.pp)


def _first_nonfinite(executor: Executor, batch: Sequence[Microbatch]) -> Found | None:
    found: list[Found] = []

    def check(layer: int, what: str) -> Callable[..., None]:
        def hook(module: object, inputs: object, output: object) -> None:
            tensors = (output if isinstance(output, torch.Tensor) else output[0],)
            if isinstance(output, tuple):
                tensors += tuple(t for t in output[1] if t is not None)
            if not all(bool(t.isfinite().all()) for t in tensors):
                op = executor.activity.state.doing
                assert isinstance(op, Op)
                found.append((op.sequence, op.chunk, layer, what))

        return hook

    hooks = []
    for stage in executor.stages.values():
        for layer in stage.decoder.layers:
            number = layer.layer_number - 1
            hooks.append(layer.register_forward_hook(check(number, f"layer {number}")))
        if stage.has_embedding:
            hooks.append(stage.embedding.register_forward_hook(check(EMBEDDING_PLACE, "the embedding")))
    try:
        results = executor.evaluate(batch, settings=BackwardSettings())
    finally:
        for hook in hooks:
            hook.remove()
    if executor.has_head:
        behind_all_layers = next(iter(executor.stages.values())).architecture.num_layers
        for number, result in enumerate(r for r in results if r.labels):
            bad = (chunk for chunk, loss in enumerate(result.losses.tolist()) if not math.isfinite(loss))
            found += [(number, chunk, behind_all_layers, "the head") for chunk in bad]
    return min(found, default=None)
