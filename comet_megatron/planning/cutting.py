"""What a plan makes of sequences whose cuts are drawn: how long chunks and strides are on average and at worst. Pure.

Time and the balance of stages are planned from what is expected, memory from the worst that can be drawn. Where a
sentence ends is not known from numbers: chunks cut at sentences are taken to be full on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from comet_megatron.config.schema import DataSection, MemorySizes
from comet_megatron.data.cuts import SMALLEST_SHARE, CutPlan, parse_ways

_MAY_BE_SHORT = ("random", "sentence")


@dataclass(frozen=True)
class Cutting:
    """data.chunks and data.max_stride.

    Attributes:
        ways: probability of each way.
        max_stride: strides are drawn up to this; 0: always the model's.
    """

    ways: Mapping[str, float]
    max_stride: int = 0

    @classmethod
    def of(cls, data: DataSection) -> Cutting:
        """
        Raises:
            ConfigError: data.chunks names no way of cutting.
        """
        return cls(parse_ways(data.chunks), data.max_stride)

    def strides(self, memory: MemorySizes) -> tuple[int, ...]:
        """Equally likely."""
        found = [memory.stride]
        while memory.stride > 0 and 2 * found[-1] <= self.max_stride:
            found.append(2 * found[-1])
        return tuple(found)

    def draws(self, memory: MemorySizes) -> bool:
        """Sequences are not all in full chunks at the model's stride."""
        return set(self.ways) != {"fixed"} or len(self.strides(memory)) > 1

    def expected_lengths(self, memory: MemorySizes, *, tokens: int) -> dict[int, float]:
        """Text tokens of most of a sequence's chunks, and how likely they are."""
        total, found = sum(self.ways.values()), dict[int, float]()
        for way, share in self.ways.items():
            length = memory.chunk_size
            if way == "uniform":
                length = -(-tokens // -(-tokens // memory.chunk_size))
            if way == "random":
                length = max(1, round(memory.chunk_size * (SMALLEST_SHARE + 1) / 2))
            found[length] = found.get(length, 0.0) + share / total
        return found

    def shortest(self, memory: MemorySizes) -> int:
        """Text tokens of the shortest chunk that is not a remainder."""
        may_be_short = any(way in _MAY_BE_SHORT for way in self.ways)
        return max(1, int(memory.chunk_size * SMALLEST_SHARE)) if may_be_short else memory.chunk_size

    def plan(self, memory: MemorySizes, *, seed: int) -> CutPlan:
        """The draws of a run, but that no sentence ends are known."""
        return CutPlan(self.ways, memory.chunk_size, memory.stride, seed, self.max_stride)


FULL_CHUNKS = Cutting({"fixed": 1.0})
