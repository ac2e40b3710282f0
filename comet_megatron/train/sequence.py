"""Forward and backward of one sequence on one stage: chunks forward, then back through the memory in reverse order.

Each chunk has its own autograd graph. What it hands on (the new memory) becomes detached leaves; the gradients that
later chunks leave there are handed to the chunk's own backward. Live at once: the graphs of one backpropagation window,
or with recomputation only its inputs and the graph of one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from comet_megatron.chunking import ChunkPlan, live_tokens, plan_chunks
from comet_megatron.model.chunk_tensors import ChunkTensors, build_chunk_tensors
from comet_megatron.model.loss import head_loss, head_loss_backward
from comet_megatron.model.memory import LayerMemory, WrittenMemory, carry_memory
from comet_megatron.model.stage import CometStage


@dataclass(frozen=True)
class BackwardSettings:
    """How a sequence is trained on.

    Attributes:
        bptt_chunks: chunks that a gradient flows through the memory, or "all".
        recompute: keep only the inputs of a chunk and compute it again in its backward.
        slice_tokens: rows of logits that exist at once.
    """

    bptt_chunks: int | str = "all"
    recompute: bool = False
    slice_tokens: int = 1024


@dataclass(frozen=True)
class SequenceResult:
    """What a sequence gave, on the device and without gradient.

    Attributes:
        losses: fp32 [chunks], summed cross entropy of each chunk.
        labels: labels of each chunk.
        gate_mean: fp32 [layers], over chunks and slots; empty where no gate was used.
        state_norm: fp32 [layers], of a global slot's state after the sequence, mean over slots; empty where there
            is no global memory.
    """

    losses: Tensor
    labels: tuple[int, ...]
    gate_mean: Tensor
    state_norm: Tensor


@dataclass
class _ChunkRecord:
    """What is kept of a chunk between its forward and its backward."""

    chunk: ChunkTensors
    entering: list[LayerMemory]
    leaves: list[WrittenMemory]
    hidden: Tensor | None
    written: list[WrittenMemory] | None


def train_sequence(
    stage: CometStage, token_ids: np.ndarray, labels: np.ndarray, *, scale: float, settings: BackwardSettings
) -> SequenceResult:
    """Accumulate the gradient of `scale` * (summed loss) in the stage's parameters.

    Args:
        token_ids: [b, tokens], text ids.
        labels: [b, tokens], next-token labels (chunking.next_token_labels).
        scale: of the loss; 1 / labels of the whole step, so that the loss does not depend on how the batch is split.
    """
    plans = plan_chunks(_live_length(labels), stage.memory_sizes)
    window_size = len(plans) if settings.bptt_chunks == "all" else int(settings.bptt_chunks)
    observed = _Observed(stage)
    memory = stage.empty_memory()
    losses: list[Tensor] = []
    for window in _windows(plans, window_size):
        memory = [_without_gradient(m) for m in memory]
        records: list[_ChunkRecord] = []
        for plan in window:
            chunk = _tensors(stage, plan, token_ids, labels)
            keep_graph = not settings.recompute or plan is window[-1]
            with torch.set_grad_enabled(keep_graph):
                hidden, written = stage(chunk, memory)
            observed.add(written)
            leaves = [_as_leaves(w) for w in written]
            records.append(
                _ChunkRecord(chunk, memory, leaves, hidden if keep_graph else None, written if keep_graph else None)
            )
            del hidden, written
            memory = [carry_memory(m, w, budget=stage.memory_sizes.budget) for m, w in zip(memory, leaves, strict=True)]
        window_losses = []
        while records:
            window_losses.append(_backward(stage, records.pop(), scale=scale, settings=settings))
        losses += reversed(window_losses)
    return observed.result(losses, tuple(_labels_of(plan, labels) for plan in plans), memory)


@torch.no_grad()
def evaluate_sequence(
    stage: CometStage, token_ids: np.ndarray, labels: np.ndarray, *, settings: BackwardSettings
) -> SequenceResult:
    """Losses of a sequence without gradients; memory and time as in `train_sequence`'s forward."""
    plans = plan_chunks(_live_length(labels), stage.memory_sizes)
    observed = _Observed(stage)
    memory = stage.empty_memory()
    losses = []
    for plan in plans:
        chunk = _tensors(stage, plan, token_ids, labels)
        hidden, written = stage(chunk, memory)
        observed.add(written)
        losses.append(head_loss(stage, hidden, chunk, slice_tokens=settings.slice_tokens))
        memory = [carry_memory(m, w, budget=stage.memory_sizes.budget) for m, w in zip(memory, written, strict=True)]
    return observed.result(losses, tuple(_labels_of(plan, labels) for plan in plans), memory)


def _live_length(labels: np.ndarray) -> int:
    """Tokens up to the last label of any sequence of the batch."""
    return max(live_tokens(row) for row in labels)


def _labels_of(plan: ChunkPlan, labels: np.ndarray) -> int:
    return int((labels[:, plan.text_start : plan.text_end] >= 0).sum())


def _windows(plans: Sequence[ChunkPlan], size: int) -> Iterator[Sequence[ChunkPlan]]:
    for start in range(0, len(plans), max(size, 1)):
        yield plans[start : start + size]


def _tensors(stage: CometStage, plan: ChunkPlan, token_ids: np.ndarray, labels: np.ndarray) -> ChunkTensors:
    return build_chunk_tensors(plan, token_ids, labels, stage.memory_sizes, shards=stage.shards, device=stage.device)


def _as_leaves(written: WrittenMemory) -> WrittenMemory:
    """The same values, detached, gathering gradients of their own."""
    state, entry = (None if t is None else t.detach().requires_grad_() for t in (written.global_state, written.entry))
    return WrittenMemory(state, entry)


def _without_gradient(memory: LayerMemory) -> LayerMemory:
    """Cut at the border of a backpropagation window."""
    state = None if memory.global_state is None else memory.global_state.detach()
    return LayerMemory(state, tuple(e.detach() for e in memory.entries))


def _backward(stage: CometStage, record: _ChunkRecord, *, scale: float, settings: BackwardSettings) -> Tensor:
    """Backward of one chunk; its summed loss."""
    if record.hidden is None:
        with torch.enable_grad():
            record.hidden, record.written = stage(record.chunk, record.entering)
    loss, hidden_gradient = head_loss_backward(
        stage, record.hidden, record.chunk, scale=scale, slice_tokens=settings.slice_tokens
    )
    outputs = [(record.hidden, hidden_gradient)]
    for written, leaves in zip(record.written, record.leaves, strict=True):
        for tensor, leaf in zip(written[:2], leaves[:2], strict=True):
            outputs.append((tensor, None if leaf is None else leaf.grad))
    # No gradient: evicted before anybody read it, or nothing labelled came after.
    pairs = [(t, g) for t, g in outputs if g is not None and t.requires_grad]
    if pairs:
        torch.autograd.backward(*zip(*pairs, strict=True))
    return loss


class _Observed:
    """Gathers what is logged of the memory, on the device."""

    def __init__(self, stage: CometStage) -> None:
        self.device = stage.device
        self.gates: list[list[Tensor]] = []

    def add(self, written: Sequence[WrittenMemory]) -> None:
        gates = [w.gate_mean for w in written if w.gate_mean is not None]
        if gates:
            self.gates.append(gates)

    def result(
        self, losses: Sequence[Tensor], labels: tuple[int, ...], memory: Sequence[LayerMemory]
    ) -> SequenceResult:
        nothing = torch.empty(0, device=self.device)
        states = [m.global_state.detach() for m in memory if m.global_state is not None]
        return SequenceResult(
            losses=torch.stack(list(losses)) if losses else nothing,
            labels=labels,
            gate_mean=torch.stack([torch.stack(g) for g in self.gates]).mean(0) if self.gates else nothing,
            state_norm=torch.stack([s.norm(dim=-1).mean() for s in states]) if states else nothing,
        )
