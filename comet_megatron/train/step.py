"""One optimizer step over the global batch: every sequence forward and backward, reduction, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from comet_megatron.chunking import IGNORE_LABEL, next_token_labels
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.layout import Layout
from comet_megatron.train.nonfinite import stop_on_nonfinite_gradient, stop_on_nonfinite_loss
from comet_megatron.train.sequence import BackwardSettings, SequenceResult, evaluate_sequence, train_sequence


@dataclass(frozen=True)
class BatchResult:
    """What a global batch gave; the same on every rank.

    Attributes:
        loss: mean cross entropy over the batch's labels, nats.
        text_tokens: of the batch.
        chunk_losses: mean cross entropy by chunk index; NaN where no sequence had a label there.
        gate_means: mean gate by layer; empty where there is none.
        state_norms: mean norm of a global slot's state by layer; empty where there is none.
        grad_norm: before clipping; 0 in evaluation.
    """

    loss: float
    text_tokens: int
    chunk_losses: tuple[float, ...]
    gate_means: tuple[float, ...]
    state_norms: tuple[float, ...]
    grad_norm: float = 0.0


def train_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    sequences: Sequence[np.ndarray],
    layout: Layout,
    *,
    settings: BackwardSettings,
    step: int,
) -> BatchResult:
    """One update. Communicates on every axis.

    Args:
        sequences: this data-parallel rank's token ids, each int [tokens].
        step: number of the step, for messages.

    Raises:
        TrainingError: the loss or the gradient is not finite; the weights are as they were before the step.
    """
    optimizer.zero_grad()
    gathered = accumulate_gradients(model, sequences, layout, settings=settings, step=step)
    optimizer.prepare_grads()
    clip = optimizer.config.clip_grad
    grad_norm = float(optimizer.clip_grad_norm(clip) if clip > 0 else optimizer.get_grad_norm())
    if not math.isfinite(grad_norm):
        stop_on_nonfinite_gradient(model.module, layout, step=step)
    optimizer.step_with_ready_grads()
    model.module.write_new_rows()
    return BatchResult(**{**vars(gathered), "grad_norm": grad_norm})


def accumulate_gradients(
    model: DistributedDataParallel,
    sequences: Sequence[np.ndarray],
    layout: Layout,
    *,
    settings: BackwardSettings,
    step: int,
) -> BatchResult:
    """The gradient of the global batch's mean loss in every parameter's main_grad, reduced over all axes.

    With ZeRO-1 a data-parallel rank holds its own shard of the reduced gradient.

    Raises:
        TrainingError: the loss is not finite.
    """
    stage: CometStage = model.module
    model.zero_grad_buffer()
    batch = [(ids[None], next_token_labels(ids)[None]) for ids in sequences]
    num_labels = _global_sum(sum(int((labels != IGNORE_LABEL).sum()) for _, labels in batch), layout)
    scale = 1.0 / max(num_labels, 1)
    with model.no_sync():
        results = [train_sequence(stage, ids, labels, scale=scale, settings=settings) for ids, labels in batch]
    gathered = _gather(results, sequences, layout, num_layers=stage.num_layers)
    if not math.isfinite(gathered.loss):
        stop_on_nonfinite_loss(stage, batch, layout, step=step)
    finalize_model_grads([model], pg_collection=layout.groups)
    return gathered


def evaluate(
    stage: CometStage, sequences: Sequence[np.ndarray], layout: Layout, *, settings: BackwardSettings
) -> BatchResult:
    """Losses of this data-parallel rank's held-out sequences, averaged over all ranks'. Communicates on DP."""
    results = [
        evaluate_sequence(stage, ids[None], next_token_labels(ids)[None], settings=settings) for ids in sequences
    ]
    return _gather(results, sequences, layout, num_layers=stage.num_layers)


def _global_sum(value: int, layout: Layout) -> int:
    total = torch.tensor(value, dtype=torch.int64, device=layout.device.torch_device)
    dist.all_reduce(total, group=layout.groups.dp)
    return int(total)


def _gather(
    results: Sequence[SequenceResult], sequences: Sequence[np.ndarray], layout: Layout, *, num_layers: int
) -> BatchResult:
    """Sum over the data-parallel ranks in two collectives; one transfer to the host."""
    device = layout.device.torch_device
    chunks = torch.tensor(max((len(r.labels) for r in results), default=0), device=device)
    dist.all_reduce(chunks, op=dist.ReduceOp.MAX, group=layout.groups.dp)
    num_chunks = int(chunks)
    # Rows: loss and labels by chunk index; gate and its count, state norm and its count by layer; text tokens.
    by_chunk = torch.zeros(2, num_chunks, dtype=torch.float64, device=device)
    by_layer = torch.zeros(4, num_layers, dtype=torch.float64, device=device)
    for result in results:
        n = len(result.labels)
        by_chunk[0, :n] += result.losses
        by_chunk[1, :n] += torch.tensor(result.labels, dtype=torch.float64).to(device)
        for row, values in ((0, result.gate_mean), (2, result.state_norm)):
            if len(values):
                by_layer[row] += values
                by_layer[row + 1] += 1
    tokens = torch.tensor([float(sum(len(s) for s in sequences))], dtype=torch.float64, device=device)
    packed = torch.cat([by_chunk.flatten(), by_layer.flatten(), tokens])
    dist.all_reduce(packed, group=layout.groups.dp)
    values = packed.cpu()
    losses, labels = values[: 2 * num_chunks].view(2, num_chunks)
    gate, gates, norm, norms = values[2 * num_chunks : -1].view(4, num_layers)
    return BatchResult(
        loss=float(losses.sum() / labels.sum().clamp_min(1)),
        text_tokens=int(values[-1]),
        chunk_losses=tuple((losses / labels).tolist()),
        gate_means=_means(gate, gates),
        state_norms=_means(norm, norms),
    )


def _means(sums: Tensor, counts: Tensor) -> tuple[float, ...]:
    return tuple((sums / counts).tolist()) if bool((counts > 0).all()) else ()
