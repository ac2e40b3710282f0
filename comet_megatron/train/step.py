"""One optimizer step over the global batch: every sequence forward and backward, reduction, clipping, update."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from comet_megatron.chunking import next_token_labels
from comet_megatron.data.training_data import TrainingSequence
from comet_megatron.parallel.executor import BackwardSettings, Executor, Microbatch, SequenceResult
from comet_megatron.parallel.layout import Layout
from comet_megatron.train.model import TrainableModel
from comet_megatron.train.nonfinite import stop_on_nonfinite_gradient, stop_on_nonfinite_loss
from comet_megatron.train.spike import refuse_spike

Text = TrainingSequence | np.ndarray  # or plain token ids [tokens], each a label, in full chunks


@dataclass(frozen=True)
class BatchResult:
    """What a global batch gave; the same on every rank.

    Attributes:
        loss: mean cross entropy over the batch's labels, nats.
        text_tokens: of the batch.
        chunk_losses: mean cross entropy by chunk index; NaN where no sequence had a label there.
        gate_means: mean gate by layer; empty where there is none.
        state_norms: mean norm of a global slot's state by layer; empty where there is none.
        bubble: share of the stages' time in the pass over the batch that they waited; 0 with one stage.
        grad_norm: before clipping; 0 in evaluation.
    """

    loss: float
    text_tokens: int
    chunk_losses: tuple[float, ...]
    gate_means: tuple[float, ...]
    state_norms: tuple[float, ...]
    bubble: float = 0.0
    grad_norm: float = 0.0


def train_step(
    model: TrainableModel,
    optimizer: MegatronOptimizer,
    sequences: Sequence[Text],
    layout: Layout,
    *,
    settings: BackwardSettings,
    step: int,
    largest_norm: float = math.inf,
) -> BatchResult:
    """One update. Communicates on every axis.

    Args:
        sequences: of this data-parallel rank.
        step: number of the step, for messages.
        largest_norm: of the gradient that is still used.

    Raises:
        UnusableStep: the loss or the gradient is not finite, or the gradient too large; weights and optimizer are as
            they were before the step.
    """
    optimizer.zero_grad()
    gathered = accumulate_gradients(model, sequences, layout, settings=settings, step=step)
    with model.executor.activity.phase("the optimizer's update"):
        optimizer.prepare_grads()
        clip = optimizer.config.clip_grad
        grad_norm = float(optimizer.clip_grad_norm(clip) if clip > 0 else optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            stop_on_nonfinite_gradient(model, layout, step=step)
        if grad_norm > largest_norm:
            refuse_spike(model, gathered.chunk_losses, layout, norm=grad_norm, limit=largest_norm, step=step)
        optimizer.step_with_ready_grads()
        model.write_new_rows()
    return BatchResult(**{**vars(gathered), "grad_norm": grad_norm})


def accumulate_gradients(
    model: TrainableModel,
    sequences: Sequence[Text],
    layout: Layout,
    *,
    settings: BackwardSettings,
    step: int,
) -> BatchResult:
    """The gradient of the global batch's mean loss in every parameter's main_grad, reduced over all axes.

    With ZeRO-1 a data-parallel rank holds its own shard of the reduced gradient.

    Raises:
        UnusableStep: the loss is not finite.
    """
    model.zero_gradients()
    activity = model.executor.activity
    batch = _microbatches(model.executor, sequences)
    with activity.phase("counting the labels of the batch"):
        num_labels = _global_sum(sum(sum(m.num_labels) for m in batch), layout)
    with model.accumulating():
        results = model.executor.train(
            batch,
            scale=1.0 / max(num_labels, 1),
            settings=settings,
            after_last_backward=model.start_reduction,
        )
    with activity.phase("summing the gradients over the ranks"):
        model.finish_reduction(layout)
    gathered = _gather(results, sequences, layout, executor=model.executor)
    if not math.isfinite(gathered.loss):
        stop_on_nonfinite_loss(model.executor, batch, layout, step=step)
    return gathered


def evaluate(
    executor: Executor, sequences: Sequence[Text], layout: Layout, *, settings: BackwardSettings
) -> BatchResult:
    """Losses of this data-parallel rank's held-out sequences, averaged over all ranks'. Communicates on DP and PP."""
    results = executor.evaluate(_microbatches(executor, sequences), settings=settings)
    return _gather(results, sequences, layout, executor=executor)


def _microbatches(executor: Executor, sequences: Sequence[Text]) -> list[Microbatch]:
    """Each sequence on its own."""
    return [
        executor.microbatch(s.ids[None], s.labels[None], chunk_lengths=s.chunk_lengths, stride=s.stride)
        if isinstance(s, TrainingSequence)
        else executor.microbatch(s[None], next_token_labels(s)[None])
        for s in sequences
    ]


def _global_sum(value: int, layout: Layout) -> int:
    if layout.dp == 1:
        return value  # the host need not wait for the device before the first chunk
    total = torch.tensor(value, dtype=torch.int64, device=layout.device.torch_device)
    dist.all_reduce(total, group=layout.groups.dp)
    return int(total)


def _gather(
    results: Sequence[SequenceResult], sequences: Sequence[Text], layout: Layout, *, executor: Executor
) -> BatchResult:
    """Sum over the data-parallel ranks and the stages."""
    with executor.activity.phase("gathering the losses"):
        return _gather_now(results, sequences, layout, executor=executor)


def _gather_now(
    results: Sequence[SequenceResult], sequences: Sequence[Text], layout: Layout, *, executor: Executor
) -> BatchResult:
    device = layout.device.torch_device
    chunks = torch.tensor(max((len(r.labels) for r in results), default=0), device=device)
    dist.all_reduce(chunks, op=dist.ReduceOp.MAX, group=layout.groups.dp)
    num_chunks, num_layers = int(chunks), next(iter(executor.stages.values())).architecture.num_layers
    # Rows: loss and labels by chunk index; gate and its count, state norm and its count by layer; text tokens.
    by_chunk = torch.zeros(2, num_chunks, dtype=torch.float64, device=device)
    by_layer = torch.zeros(4, num_layers, dtype=torch.float64, device=device)
    for result in results:
        n = len(result.labels)
        if executor.has_head:
            by_chunk[0, :n] += result.losses
            by_chunk[1, :n] += torch.tensor(result.labels, dtype=torch.float64).to(device)
        for row, values in ((0, result.gate_mean), (2, result.state_norm)):
            if len(values):
                by_layer[row, list(result.layers)] += values
                by_layer[row + 1, list(result.layers)] += 1
    tokens = float(sum(len(s) for s in sequences)) if executor.has_head else 0.0
    bubble = _measure_bubble(executor, layout) / (layout.dp * layout.pp)  # of which the sum is the mean
    rest = torch.tensor([tokens, bubble], dtype=torch.float64, device=device)
    packed = torch.cat([by_chunk.flatten(), by_layer.flatten(), rest])
    dist.all_reduce(packed, group=layout.groups.dp)
    dist.all_reduce(packed, group=layout.groups.pp)
    values = packed.cpu()
    losses, labels = values[: 2 * num_chunks].view(2, num_chunks)
    gate, gates, norm, norms = values[2 * num_chunks : -2].view(4, num_layers)
    return BatchResult(
        loss=float(losses.sum() / labels.sum().clamp_min(1)),
        text_tokens=int(values[-2]),
        chunk_losses=tuple((losses / labels).tolist()),
        gate_means=_means(gate, gates),
        state_norms=_means(norm, norms),
        bubble=float(values[-1]),
    )


def _measure_bubble(executor: Executor, layout: Layout) -> float:
    """Waiting of this pipeline's stages, in the ops just done, as a share of their time. Communicates on PP."""
    if layout.pp == 1:
        return 0.0
    spans = executor.activity.spans()
    own = [sum(s.duration for s in spans), spans[-1].end if spans else 0.0]
    times = torch.zeros(layout.pp, 2, dtype=torch.float64, device=layout.device.torch_device)
    times[layout.pp_rank] = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(times, group=layout.groups.pp)
    busy, makespan = float(times[:, 0].sum()), float(times[:, 1].max())
    return 1 - busy / (layout.pp * makespan) if makespan else 0.0


def _means(sums: Tensor, counts: Tensor) -> tuple[float, ...]:
    return tuple((sums / counts).tolist()) if bool((counts > 0).all()) else ()
