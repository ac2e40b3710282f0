"""Rotary position embedding of slots and rows: positions restart at 0 in each chunk and count the slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotary(NamedTuple):
    """Cosines and signed sines of positions 0..n-1 in the model's dtype, each [n, 1, 1, head_dim].

    The first half of `sin` is negated, so that applying needs one roll and no concatenation of signs.
    """

    cos: Tensor
    sin: Tensor

    def tail(self, rows: int) -> Rotary:
        """The last `rows` positions: those of the chunk's own rows."""
        return Rotary(self.cos[-rows:], self.sin[-rows:])

    def apply(self, x: Tensor) -> Tensor:
        """Rotate [n, b, heads, head_dim]."""
        return x * self.cos + x.roll(x.shape[-1] // 2, -1) * self.sin


class RotaryTable:
    """Angles up to the longest chunk seen so far, computed in fp32 (theta from the model's config)."""

    def __init__(self, *, theta: float, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype = dtype
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        self.frequencies = (1.0 / theta**exponents).to(device)
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
