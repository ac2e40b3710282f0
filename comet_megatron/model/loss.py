"""Next-token loss, sliced over rows and split over the vocabulary: the whole logits matrix never exists.

The head runs where the gradient is asked for, forward and backward of a slice together, so that one slice of logits is
alive at a time and nothing is recomputed. Nothing is computed for a chunk without labels.
"""

from __future__ import annotations

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from comet_megatron.chunking import IGNORE_LABEL
from comet_megatron.model.chunk_tensors import ChunkTensors
from comet_megatron.model.stage import CometStage


def head_loss(stage: CometStage, hidden: Tensor, chunk: ChunkTensors, *, slice_tokens: int) -> Tensor:
    """Summed cross entropy of a chunk's labels, fp32 scalar, without gradient.

    Args:
        hidden: the last layer's output [rows / sequence shards, b, h].
        slice_tokens: rows of logits that exist at once.
    """
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    if chunk.num_labels:
        with torch.no_grad():
            rows = stage.labelled_hidden(hidden, chunk)
            for start in range(0, len(rows), slice_tokens):
                end = start + slice_tokens
                total += _slice_loss(stage, rows[start:end], chunk.labels[start:end])
    return total


def head_loss_backward(
    stage: CometStage, hidden: Tensor, chunk: ChunkTensors, *, scale: float, slice_tokens: int
) -> tuple[Tensor, Tensor | None]:
    """Loss of a chunk and the gradient of `scale` * loss: of the head's weights (accumulated) and of `hidden`.

    Returns:
        Summed cross entropy (fp32 scalar, without gradient), and the gradient of `hidden`; None without labels.
    """
    if not chunk.num_labels:
        return torch.zeros((), dtype=torch.float32, device=hidden.device), None
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        rows = stage.labelled_hidden(leaf, chunk)
        gradient = torch.empty_like(rows)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(rows), slice_tokens):
            end = start + slice_tokens
            part = rows[start:end].detach().requires_grad_()
            loss = _slice_loss(stage, part, chunk.labels[start:end])
            (loss * scale).backward()
            gradient[start:end] = part.grad
            total += loss.detach()
    torch.autograd.backward(rows, gradient)
    return total, leaf.grad


def _slice_loss(stage: CometStage, rows: Tensor, labels: Tensor) -> Tensor:
    """[n, b, h], int64 [n, b] -> summed cross entropy. The fp32 logits are consumed in place."""
    losses = tensor_parallel.vocab_parallel_cross_entropy(stage.logits(rows).float(), labels)
    if labels.shape[1] == 1:  # a row is kept for its only label
        return losses.sum()
    return losses.masked_fill(labels == IGNORE_LABEL, 0.0).sum()
