"""How a sequence is cut into chunks: which rows of a chunk are text, which are beacons, what is left out.

Pure: numbers in, plans out, no torch. Semantics (arXiv 2602.01766; measured on the authors' code):

    chunk 0:    [text, a beacon after every `stride` text tokens][global beacons]
    chunk i>0:  [global slots][temporary slots][text with beacons][global beacons]

Slots are a K/V prefix and have no rows. A partial last group of text tokens ends in a beacon too. In the last chunk of
a sequence, beacons that no text row sees are dead and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from comet_megatron.config.schema import MemorySizes

IGNORE_LABEL = -100


@dataclass(frozen=True)
class ChunkPlan:
    """One chunk of a sequence.

    Attributes:
        index: number of the chunk in its sequence, from 0.
        text_start, text_end: the text tokens of the sequence that this chunk holds.
        stride: text tokens per beacon; -1: none.
        num_global_beacons: rows at the end that write the global memory.
        writes_memory: False in the last chunk of a training sequence.
        global_slots, temporary_slots: memory slots entering the chunk.
    """

    index: int
    text_start: int
    text_end: int
    stride: int
    num_global_beacons: int
    writes_memory: bool
    global_slots: int
    temporary_slots: int

    @property
    def num_text(self) -> int:
        return self.text_end - self.text_start

    @property
    def num_slots(self) -> int:
        return self.global_slots + self.temporary_slots

    @property
    def num_beacons(self) -> int:
        """Beacon rows, global ones not counted. A final beacon that nobody reads is left out."""
        if self.stride < 1:
            return 0
        return -(-self.num_text // self.stride) if self.writes_memory else (self.num_text - 1) // self.stride

    @property
    def num_rows(self) -> int:
        return self.num_text + self.num_beacons + self.num_global_beacons

    @cached_property
    def text_rows(self) -> np.ndarray:
        """Row of each text token, int64 [num_text]."""
        tokens = np.arange(self.num_text)
        return tokens if self.stride < 1 else tokens + tokens // self.stride

    @cached_property
    def beacon_rows(self) -> np.ndarray:
        """Row of each beacon, int64 [num_beacons]."""
        text_before = np.minimum(np.arange(1, self.num_beacons + 1) * max(self.stride, 1), self.num_text)
        return text_before + np.arange(self.num_beacons)

    @cached_property
    def global_rows(self) -> np.ndarray:
        """Row of each global beacon, int64 [num_global_beacons]."""
        return np.arange(self.num_rows - self.num_global_beacons, self.num_rows)

    def row_ids(self, token_ids: np.ndarray, sizes: MemorySizes) -> np.ndarray:
        """Token id of each row, int64 [num_rows].

        Args:
            token_ids: text ids of the whole sequence, [tokens].
        """
        ids = np.empty(self.num_rows, dtype=np.int64)
        ids[self.text_rows] = token_ids[self.text_start : self.text_end]
        ids[self.beacon_rows] = sizes.beacon_id
        ids[self.global_rows] = sizes.global_beacon_ids[: self.num_global_beacons]
        return ids


def plan_chunks(
    num_tokens: int,
    sizes: MemorySizes,
    *,
    keep_last_memory: bool = False,
    lengths: Sequence[int] | None = None,
    stride: int | None = None,
) -> tuple[ChunkPlan, ...]:
    """Cut a sequence of `num_tokens` text tokens into chunks of `sizes.chunk_size`, the last one ragged.

    Args:
        keep_last_memory: the last chunk writes memory too (the memory after the sequence is asked for).
        lengths: text tokens of each chunk instead; as many as there are, or more, of which the first are taken.
        stride: text tokens per beacon instead of the model's.
    """
    chunks: list[ChunkPlan] = []
    temporary_slots = start = 0
    for index in range(num_tokens):
        if start == num_tokens:
            break
        end = min(start + (sizes.chunk_size if lengths is None else lengths[index]), num_tokens)
        writes_memory = end < num_tokens or keep_last_memory
        chunk = ChunkPlan(
            index=index,
            text_start=start,
            text_end=end,
            stride=sizes.stride if stride is None else stride,
            num_global_beacons=sizes.global_slots if writes_memory else 0,
            writes_memory=writes_memory,
            global_slots=sizes.global_slots if index else 0,
            temporary_slots=temporary_slots,
        )
        chunks.append(chunk)
        temporary_slots = min(sizes.budget, temporary_slots + chunk.num_beacons) if sizes.stride > 0 else 0
        start = end
    return tuple(chunks)


def next_token_labels(token_ids: np.ndarray, loss_mask: np.ndarray | None = None) -> np.ndarray:
    """Label of each text token: the next text token of the sequence, or IGNORE_LABEL. int64 [tokens].

    Args:
        loss_mask: bool [tokens]; True where the token is to be predicted. None: all of them.
    """
    labels = np.full(len(token_ids), IGNORE_LABEL, dtype=np.int64)
    labels[:-1] = token_ids[1:] if loss_mask is None else np.where(loss_mask[1:], token_ids[1:], IGNORE_LABEL)
    return labels


def live_tokens(labels: np.ndarray) -> int:
    """Text tokens up to the last labelled one: what follows has no influence on the loss."""
    labelled = np.flatnonzero(labels != IGNORE_LABEL)
    return int(labelled[-1]) + 1 if len(labelled) else 0
