"""The two memories of a layer: what is carried from chunk to chunk, and the nets that write and read it.

Shapes are Megatron's [slots or rows, batch, hidden]. Memory is whole on every tensor-parallel rank and the nets are
replicated: they see whole rows and whole gradients, so their own gradients need no reduction over tensor parallelism.
The nets compute in fp32 whatever the dtype of their weights, and the carried state is fp32.
Parameter names below `layers.N.` are those of the authors' checkpoints.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comet_megatron.config.schema import MemorySizes
from comet_megatron.model.norm import rms_norm

GLOBAL_NORM_EPS = 1.1920929e-07  # torch's default eps for fp32, in every dtype
TEMPORARY_NORM_EPS = 1e-12


class LayerMemory(NamedTuple):
    """What one layer carries into a chunk; empty before the first chunk.

    Attributes:
        global_state: fp32 [G, b, h], before its read adapter.
        entries: temporary memory, oldest first, one fp32 [beacons, b, h] per chunk that wrote it. Kept apart and not
            as one queue, so that a chunk's own tensor gathers the gradients of all chunks that read it.
    """

    global_state: Tensor | None = None
    entries: tuple[Tensor, ...] = ()


class WrittenMemory(NamedTuple):
    """What one layer wrote in one chunk.

    Attributes:
        global_state: fp32 [G, b, h], or None.
        entry: fp32 [beacons, b, h], or None.
        gate_mean: fp32 scalar without gradient, the mean gate; None where no gate was used.
    """

    global_state: Tensor | None = None
    entry: Tensor | None = None
    gate_mean: Tensor | None = None


def carry_memory(memory: LayerMemory, written: WrittenMemory, *, budget: int) -> LayerMemory:
    """The memory that enters the next chunk; entries wholly beyond the FIFO's budget are dropped."""
    entries = memory.entries if written.entry is None else (*memory.entries, written.entry)
    kept = sum(len(e) for e in entries)
    while entries and kept - len(entries[0]) >= budget:
        kept -= len(entries[0])
        entries = entries[1:]
    state = memory.global_state if written.global_state is None else written.global_state
    return LayerMemory(state, entries)


class MemoryNorm(nn.Module):
    """RMSNorm in fp32 with the memory's own eps."""

    def __init__(self, hidden_size: int, *, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x.float(), self.weight.float(), self.eps)


class ResidualAdapter(nn.Module):
    """x + up(down(x)), rank `adapter_rank`, in fp32."""

    def __init__(self, sizes: MemorySizes, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.down_proj = nn.Linear(hidden_size, sizes.adapter_rank, bias=False, dtype=dtype)
        self.up_proj = nn.Linear(sizes.adapter_rank, hidden_size, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(F.linear(x, self.down_proj.weight.float()), self.up_proj.weight.float())


class GlobalMemoryNet(nn.Module):
    """Writes the gated global state; `o_proj` adapts it where it is read (the carried state is not adapted)."""

    def __init__(self, sizes: MemorySizes, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = MemoryNorm(hidden_size, eps=GLOBAL_NORM_EPS, dtype=dtype)
        self.g_proj = nn.Linear(2 * hidden_size, 1, bias=False, dtype=dtype)
        self.o_proj = ResidualAdapter(sizes, hidden_size, dtype=dtype)

    def forward(self, beacons: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Beacons' outputs [G, b, h] and the old state -> new state, gate [G, b, 1] (None in the first chunk)."""
        candidate = self.norm(beacons)
        if state is None:
            return candidate, None
        gate = torch.sigmoid(F.linear(torch.cat([candidate, state], -1), self.g_proj.weight.float()))
        return gate * state + (1 - gate) * candidate, gate


def build_memory_nets(
    sizes: MemorySizes, hidden_size: int, *, dtype: torch.dtype, init_std: float
) -> dict[str, nn.Module]:
    """The nets of one layer, by attribute name; a memory that is switched off has none.

    Projections are drawn from normal(0, init_std), norms are ones, as the authors do.
    """
    nets: dict[str, nn.Module] = {}
    if sizes.global_slots:
        nets["global_memory_net"] = GlobalMemoryNet(sizes, hidden_size, dtype=dtype)
    if sizes.stride > 0:
        norm = MemoryNorm(hidden_size, eps=TEMPORARY_NORM_EPS, dtype=dtype)
        nets["temp_memory_net"] = nn.Sequential(norm, ResidualAdapter(sizes, hidden_size, dtype=dtype))
    for net in nets.values():
        for param in net.parameters():
            if param.dim() == 2:
                nn.init.normal_(param, std=init_std)
    return nets
