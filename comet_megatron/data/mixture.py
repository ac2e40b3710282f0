"""The order of samples of several data sets, mixed by weights: a pure function of (seed, position).

Positions go in blocks of the same composition: a data set has its share of each block, to one part in BLOCK, at places
that the seed and the block's number decide. So it is known without a count how many samples of each came before. Within
a data set samples follow the order of sampler.py, epoch by epoch. One data set alone has just that order.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from comet_megatron.data.sampler import Order
from comet_megatron.errors import ConfigError

BLOCK = 4096  # positions


class Place(NamedTuple):
    """A sample of a mixture.

    Attributes:
        source: number of the data set.
        epoch: of that data set.
        sample: number of the sample in it.
    """

    source: int
    epoch: int
    sample: int


@dataclass(frozen=True)
class Mixture:
    """Data sets and their weights.

    Attributes:
        lengths: samples of each.
        weights: above 0; only their ratios matter.
        seed: of the order.

    Raises:
        ConfigError: no data set, an empty one, or a weight that is not above 0.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]
    seed: int

    def __post_init__(self) -> None:
        if not self.lengths or len(self.lengths) != len(self.weights) or min(self.lengths) < 1:
            raise ConfigError(f"a mixture of {len(self.lengths)} data sets with {len(self.weights)} weights")
        wrong = [w for w in self.weights if not 0 < w < math.inf]
        if wrong:
            raise ConfigError(f"the weight {wrong[0]} of a data set must be above 0")
        if len(self.lengths) > BLOCK:
            raise ConfigError(f"{len(self.lengths)} data sets are more than {BLOCK}", way_out="join some of them")

    @functools.cached_property
    def shares(self) -> tuple[int, ...]:
        """Positions of each data set in a block, at least one."""
        relative = [w / max(self.weights) for w in self.weights]  # whose sum is finite
        exact = [BLOCK * w / sum(relative) for w in relative]
        counts = [max(1, math.floor(e)) for e in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: (math.floor(exact[i]) - exact[i], i))
        for i in by_remainder:
            if sum(counts) < BLOCK:
                counts[i] += 1
        while sum(counts) > BLOCK:  # many tiny weights were raised to one
            counts[counts.index(max(counts))] -= 1
        return tuple(counts)

    def at(self, position: int) -> Place:
        """The sample at a position, counted since the start of training over all ranks."""
        if len(self.lengths) == 1:
            return Place(0, *self._orders[0].at(position))
        block, place = divmod(position, BLOCK)
        sources, ranks = _block(self.shares, self.seed, block)
        source = int(sources[place])
        number = block * self.shares[source] + int(ranks[place])
        return Place(source, *self._orders[source].at(number))

    @functools.cached_property
    def _orders(self) -> tuple[Order, ...]:
        return tuple(Order(length, seed=self.seed + source) for source, length in enumerate(self.lengths))


@functools.lru_cache(maxsize=4)
def _block(shares: tuple[int, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each place of a block: its data set, and how many of that stand before it in the block."""
    listed = np.repeat(np.arange(len(shares)), shares)
    keys = np.random.PCG64(np.random.SeedSequence((seed, block, len(shares)))).random_raw(BLOCK)
    sources = listed[np.argsort(keys, kind="stable")]
    ranks = np.empty(BLOCK, dtype=np.int64)
    for source in range(len(shares)):
        ranks[sources == source] = np.arange(shares[source])
    return sources, ranks
