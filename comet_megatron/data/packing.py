"""Which documents share a sequence: a pure function of their lengths and a seed.

Documents are taken in an order that the seed draws, and a sequence is closed when the next one would exceed its limit.
Which ones share a sequence is the same in every epoch, so that an epoch has a known number of sequences; their order
is drawn anew, as that of single samples. Each document of a sequence is computed by itself, with a memory, an attention
and positions of its own, so sequences need not be full: nothing is padded, and only the tokens of a step vary.
"""

from __future__ import annotations

import numpy as np

_STREAM = 0x9AC4  # tells these draws from the order of samples


class Packs:
    """Sequences of documents.

    Args:
        lengths: tokens of each document, [documents].
        limit: tokens of a sequence; a document that has more is a sequence by itself.
        seed: of the documents' order.
    """

    def __init__(self, lengths: np.ndarray, *, limit: int, seed: int) -> None:
        keys = np.random.PCG64(np.random.SeedSequence((seed, _STREAM))).random_raw(len(lengths))
        self._order = np.argsort(keys, kind="stable")
        reached = np.cumsum(lengths[self._order], dtype=np.int64)
        ends, start, before = [], 0, 0
        while start < len(reached):
            end = max(int(np.searchsorted(reached, before + limit, side="right")), start + 1)
            ends.append(end)
            start, before = end, int(reached[end - 1])
        self._ends = np.asarray(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> list[int]:
        """Documents of a sequence, in their order in it."""
        start = int(self._ends[number - 1]) if number else 0
        return self._order[start : int(self._ends[number])].tolist()
