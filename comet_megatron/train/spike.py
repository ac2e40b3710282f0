"""A gradient that is finite but much larger than those before it: when, and where it comes from."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.distributed as dist

from comet_megatron.parallel.layout import Layout
from comet_megatron.train.model import TrainableModel
from comet_megatron.train.nonfinite import WAY_OUT, UnusableStep

WINDOW = 100  # norms that count
LEAST = 20  # fewer say nothing of what is usual


def largest_usual_norm(norms: Sequence[float], *, deviations: float) -> float:
    """The mean of the norms plus so many of their standard deviations; no limit while they are few, or for 0."""
    if deviations == 0 or len(norms) < LEAST:
        return math.inf
    return statistics.fmean(norms) + deviations * statistics.pstdev(norms)


def remember_norm(norms: Sequence[float], norm: float) -> tuple[float, ...]:
    """The window with one more norm."""
    return (*norms, norm)[-WINDOW:]


def refuse_spike(
    model: TrainableModel, chunk_losses: Sequence[float], layout: Layout, *, norm: float, limit: float, step: int
) -> NoReturn:
    """Name the parameter with the largest gradient and the chunk with the largest loss. Communicates on the world.

    Raises:
        UnusableStep: always.
    """
    sizes: list[tuple[float, str]] = [(0.0, "")]
    for stage in model.stages:
        names = stage.global_names()
        for name, param in stage.named_parameters():
            if (grad := getattr(param, "main_grad", None)) is not None:
                sizes.append((float(torch.linalg.vector_norm(grad)), names[name]))
    of_ranks: list[tuple[float, str]] = [(0.0, "")] * layout.world_size
    dist.all_gather_object(of_ranks, max(sizes))
    rank = max(range(layout.world_size), key=lambda r: of_ranks[r][0])
    losses = {chunk: loss for chunk, loss in enumerate(chunk_losses) if math.isfinite(loss)}
    chunk = max(losses, key=losses.__getitem__, default=0)
    raise UnusableStep(
        f"the gradient norm {norm:.3g} of step {step} is above {limit:.3g} (train.spike_guard): most of it in "
        f"{of_ranks[rank][1]} (rank {rank}); the largest loss is in chunk {chunk}",
        way_out=WAY_OUT,
    )
