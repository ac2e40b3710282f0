"""The order of samples: a pure function of (seed, epoch, position).

Position p counts samples since the start of training, over all ranks: step k of a run with global batch G takes the
positions k·G to (k+1)·G - 1. There is no state to save: who knows the step knows what comes next, at any number of
data-parallel ranks.
"""

from __future__ import annotations

import numpy as np

from comet_megatron.errors import ConfigError


class Order:
    """The order of one data set; the permutations of two epochs are kept.

    Raises:
        ConfigError: no samples, or a negative seed.
    """

    def __init__(self, num_samples: int, *, seed: int) -> None:
        if num_samples < 1 or seed < 0:
            what = f"num_samples={num_samples}, seed={seed}"
            raise ConfigError(f"the order of samples is not defined for {what}", way_out="use a seed of 0 or more")
        self.num_samples, self.seed = num_samples, seed
        self._epochs: dict[int, np.ndarray] = {}

    def at(self, position: int) -> tuple[int, int]:
        """(epoch, number of the sample) at a position; each epoch is a permutation of all samples.

        Raises:
            ConfigError: a negative position.
        """
        if position < 0:
            raise ConfigError(f"the order of samples is not defined for position={position}")
        epoch, place = divmod(position, self.num_samples)
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a batch touches two epochs
                del self._epochs[min(self._epochs)]
            self._epochs[epoch] = _permutation(self.num_samples, self.seed, epoch)
        return epoch, int(self._epochs[epoch][place])


def sample_index(position: int, *, num_samples: int, seed: int) -> tuple[int, int]:
    """What Order has at one position. For many positions of one data set keep the Order.

    Raises:
        ConfigError: as Order.
    """
    return Order(num_samples, seed=seed).at(position)


def plan_positions(step: int, *, global_batch_size: int, dp_rank: int, dp_size: int) -> range:
    """Positions, counted since the start of training, that a data-parallel rank trains on in a step (the first is 0).

    Ranks take contiguous blocks: the lists of ranks 0, 1, ... one after the other are the list of a single rank.
    A batch may reach into the next epoch, and then hold a sample twice.

    Raises:
        ConfigError: dp_size does not divide global_batch_size, or a value is out of range.
    """
    if global_batch_size < 1 or step < 0:
        raise ConfigError(f"there is no step {step} with train.global_batch_size={global_batch_size}")
    if dp_size < 1 or global_batch_size % dp_size:
        divisors = [str(d) for d in range(1, global_batch_size + 1) if global_batch_size % d == 0]
        raise ConfigError(
            f"train.global_batch_size={global_batch_size} is not a multiple of the data-parallel size {dp_size}",
            way_out=f"use {', '.join(divisors)} data-parallel ranks, or another global_batch_size",
        )
    if not 0 <= dp_rank < dp_size:
        raise ConfigError(f"dp_rank={dp_rank} is not a rank of dp_size={dp_size}")
    local_batch_size = global_batch_size // dp_size
    first = step * global_batch_size + dp_rank * local_batch_size
    return range(first, first + local_batch_size)


def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [num_samples]. Of random bits, as numpy fixes those for all its versions, but not Generator.permutation."""
    keys = np.random.PCG64(np.random.SeedSequence((seed, epoch))).random_raw(num_samples)
    order = np.argsort(keys, kind="stable")
    order.flags.writeable = False
    return order
