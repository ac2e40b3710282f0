"""Rotary position embedding of slots and rows: positions restart at 0 in each chunk and count the slots."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from comet_megatron.config.schema import RopeScaling


class Rotary(NamedTuple):
    """Cosines and signed sines of positions 0..n-1 in the model's dtype, each [n, 1, 1, head_dim].

    The first half of `sin` is negated: y = x * cos + (x with its halves swapped) * sin.
    """

    cos: Tensor
    sin: Tensor

    def tail(self, rows: int) -> Rotary:
        """The last `rows` positions: those of the chunk's own rows."""
        return Rotary(self.cos[-rows:], self.sin[-rows:])

    def apply(self, x: Tensor) -> Tensor:
        """Rotate [n, b, heads, head_dim]."""
        return _Rotate.apply(x, self.cos, self.sin)


class _Rotate(torch.autograd.Function):
    """In two passes and without a rolled copy, forward and backward."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        out = x * cos
        for own, other in _halves(x):
            out[..., own].addcmul_(x[..., other], sin[..., own])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        out = grad * cos
        for own, other in _halves(grad):
            out[..., own].addcmul_(grad[..., other], sin[..., other])
        return out, None, None


def _halves(x: Tensor) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    first, second = slice(x.shape[-1] // 2), slice(x.shape[-1] // 2, None)
    return (first, second), (second, first)


def scale_frequencies(frequencies: Tensor, scaling: RopeScaling | None) -> Tensor:
    """Frequencies [head_dim / 2] of a model that was stretched for longer texts.

    linear divides all by the factor. llama3 (source: transformers, modeling_rope_utils) divides those that turn less
    than low_freq_factor times in the original length, keeps those that turn more than high_freq_factor times, and
    blends in between.
    """
    if scaling is None:
        return frequencies
    divided = frequencies / scaling.factor
    if scaling.rope_type == "linear":
        return divided
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(divided, frequencies, kept.clamp(0, 1))


class RotaryTable:
    """Angles up to the longest chunk seen so far, computed in fp32 (theta and scaling from the model's config)."""

    def __init__(
        self,
        *,
        theta: float,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        scaling: RopeScaling | None = None,
    ) -> None:
        self.dtype = dtype
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        self.frequencies = scale_frequencies(1.0 / theta**exponents, scaling).to(device)
        self.table = Rotary(torch.empty(0), torch.empty(0))

    def first(self, positions: int) -> Rotary:
        """Positions 0..positions-1."""
        if len(self.table.cos) < positions:
            length = -(-positions // 256) * 256
            angles = torch.outer(torch.arange(length, device=self.frequencies.device).float(), self.frequencies)
            cos, sin = angles.cos(), angles.sin()
            cos, sin = torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)
            self.table = Rotary(*(t.to(self.dtype)[:, None, None] for t in (cos, sin)))
        return Rotary(self.table.cos[:positions], self.table.sin[:positions])
