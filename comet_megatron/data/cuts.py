"""Where a sequence is cut into chunks, and how many tokens a beacon stands for: the same every time, or drawn.

The authors draw a way of cutting for each sequence, so that a model does not come to depend on one. Everything drawn is
a function of (seed, epoch, sample): not of ranks, and the same after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from comet_megatron.errors import ConfigError

SMALLEST_SHARE = 0.5  # of the chunk size that a drawn chunk has at least
_STREAM = 0xC075  # tells these draws from the order of samples


@dataclass(frozen=True)
class Cuts:
    """A sequence's chunks.

    Attributes:
        lengths: text tokens of each, in order; none is above the chunk size.
        stride: text tokens per beacon; -1: no beacons.
    """

    lengths: tuple[int, ...]
    stride: int


@dataclass(frozen=True)
class CutPlan:
    """How sequences are cut.

    Attributes:
        ways: probability of each way, see WAYS.
        chunk_size: text tokens of the longest chunk.
        stride: of the model.
        max_stride: strides are drawn from stride, 2 stride, 4 stride, ... up to this; 0: always the model's.
        sentence_end_ids: ids after which a sentence has ended, for the way `sentence`.
        seed: of the draws.
    """

    ways: Mapping[str, float]
    chunk_size: int
    stride: int
    seed: int
    max_stride: int = 0
    sentence_end_ids: frozenset[int] = frozenset()

    @property
    def is_fixed(self) -> bool:
        """Nothing is drawn."""
        return set(self.ways) == {"fixed"} and self.max_stride <= self.stride

    def cut(self, ids: np.ndarray, *, epoch: int, sample: int) -> Cuts:
        """Cut a sequence of token ids [tokens]."""
        draw = np.random.Generator(np.random.PCG64(np.random.SeedSequence((self.seed, _STREAM, epoch, sample))))
        way = _choose(list(self.ways.items()), draw.random())
        lengths = WAYS[way](len(ids), self, draw, ids)
        return Cuts(tuple(lengths), self._stride(draw))

    def _stride(self, draw: np.random.Generator) -> int:
        if self.stride < 1 or self.max_stride <= self.stride:
            return self.stride
        powers = int(np.log2(self.max_stride / self.stride))
        return self.stride << int(draw.integers(0, powers + 1))


def _choose(shares: Sequence[tuple[str, float]], number: float) -> str:
    total, reached = sum(share for _, share in shares), 0.0
    for name, share in shares:
        reached += share / total
        if number < reached:
            return name
    return shares[-1][0]


def _fixed(tokens: int, plan: CutPlan, draw: np.random.Generator, ids: np.ndarray) -> list[int]:
    """Full chunks, the last one with what is left."""
    return [min(plan.chunk_size, tokens - start) for start in range(0, tokens, plan.chunk_size)]


def _right(tokens: int, plan: CutPlan, draw: np.random.Generator, ids: np.ndarray) -> list[int]:
    """The first chunk has what is left over, all others are full."""
    return _fixed(tokens, plan, draw, ids)[::-1]


def _uniform(tokens: int, plan: CutPlan, draw: np.random.Generator, ids: np.ndarray) -> list[int]:
    """As few chunks as possible, of the same length to one token."""
    chunks = -(-tokens // plan.chunk_size)
    return [tokens * (i + 1) // chunks - tokens * i // chunks for i in range(chunks)]


def _random(tokens: int, plan: CutPlan, draw: np.random.Generator, ids: np.ndarray) -> list[int]:
    """Lengths from half a chunk to a whole one, the last with what is left."""
    smallest, lengths = max(1, int(plan.chunk_size * SMALLEST_SHARE)), []
    while tokens:
        lengths.append(min(tokens, int(draw.integers(smallest, plan.chunk_size + 1))))
        tokens -= lengths[-1]
    return lengths


def _sentence(tokens: int, plan: CutPlan, draw: np.random.Generator, ids: np.ndarray) -> list[int]:
    """After the last sentence that ends in the second half of a full chunk; a full chunk where none does."""
    ends = np.isin(ids, np.fromiter(plan.sentence_end_ids, dtype=np.int64, count=len(plan.sentence_end_ids)))
    smallest, lengths, start = max(1, int(plan.chunk_size * SMALLEST_SHARE)), [], 0
    while start < tokens:
        longest = min(plan.chunk_size, tokens - start)
        found = np.flatnonzero(ends[start + smallest - 1 : start + longest])
        is_end = start + longest == tokens
        lengths.append(longest if is_end or not len(found) else smallest + int(found[-1]))
        start += lengths[-1]
    return lengths


WAYS: Mapping[str, Callable[[int, CutPlan, np.random.Generator, np.ndarray], list[int]]] = {
    "fixed": _fixed,
    "right": _right,
    "uniform": _uniform,
    "random": _random,
    "sentence": _sentence,
}


def parse_ways(text: str) -> dict[str, float]:
    """`fixed`, or a mix such as `fixed:0.7, right:0.1, uniform:0.1, random:0.1`.

    Raises:
        ConfigError: an unknown way, one that is given twice, or a probability that is not above 0.
    """
    advice = f"give one of {', '.join(WAYS)}, or a mix such as fixed:0.7, right:0.1, random:0.2"
    ways: dict[str, float] = {}
    for part in text.split(","):
        name, colon, share = (piece.strip() for piece in part.partition(":"))
        try:
            number = float(share) if colon else 1.0
        except ValueError:
            number = 0.0
        if name not in WAYS or name in ways or not 0 < number < float("inf"):
            raise ConfigError(f"data.chunks={text!r}: {part.strip()!r} is no way of cutting", way_out=advice)
        ways[name] = number
    return ways


def sentence_end_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of tokens that end a sentence: their text ends in a full stop, a mark, or a line break."""
    ends = (".", "!", "?", "\n", "。", "！", "？")
    found = []
    for token, number in tokenizer.get_vocab().items():
        text = tokenizer.convert_tokens_to_string([token]).rstrip(" ")
        if text.endswith(ends):
            found.append(number)
    return frozenset(found)
