"""Folders of shards as sequences of samples, each read at its offset."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np

from comet_megatron.data.shards import (
    PREPARE_AGAIN,
    Manifest,
    ids_from_npy,
    load_index,
    load_manifest,
    mask_from_npy,
)
from comet_megatron.data.storage import DataFolder, join, open_folder
from comet_megatron.errors import DamagedSample, DataError


class Samples(Protocol):
    """Samples by number. Opening looks at indexes only; a sample is read when it is asked for.

    Attributes:
        place: where they lie, for the user.
        lengths: tokens of each sample, int64 [samples].
        label_counts: tokens of each sample that carry loss, int64 [samples].
        fingerprint: of all token ids and loss masks, hexadecimal.
    """

    place: str

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def label_counts(self) -> np.ndarray: ...

    @property
    def fingerprint(self) -> str: ...

    def __len__(self) -> int: ...

    def __getitem__(self, sample: int) -> np.ndarray:
        """Token ids of a sample, int32 [tokens], writable.

        Raises:
            IndexError: there is no such sample.
            DamagedSample: it is cut off or damaged; names the shard and the sample.
            DataError: it cannot be read.
        """

    def loss_mask(self, sample: int) -> np.ndarray | None:
        """Which tokens of a sample carry loss, bool [tokens], writable; None: all of them.

        Token t carries loss when it is predicted from the tokens before it, so the first one's value means nothing.

        Raises: as `samples[sample]`.
        """


class ShardDataset:
    """The samples of one folder of shards, on a local disk or behind a URL.

    Opening reads the manifest and the index and looks at the size of every shard. May be pickled and used by several
    threads. See Samples.

    Attributes:
        manifest: what the folder holds.

    Raises:
        DataError: the manifest or index is missing or damaged, or a shard is missing or has another size.
    """

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = str(place)
        self._folder: DataFolder = open_folder(place)
        self.manifest: Manifest = load_manifest(self._folder)
        self._index = load_index(self._folder, manifest=self.manifest)
        self._check_shards()

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def lengths(self) -> np.ndarray:
        return self._index.num_tokens

    @property
    def label_counts(self) -> np.ndarray:
        return self._index.num_labels

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def __getitem__(self, sample: int) -> np.ndarray:
        number = _checked(sample, self)
        index = self._index
        payload = self._payload(number, index.ids_offset, index.ids_size, index.ids_crc32, what="sample")
        ids = ids_from_npy(payload, where=self._where(number))
        if len(ids) and not 0 <= ids.min() <= ids.max() < (known := self.manifest.vocab_size):
            bad = ids.min() if ids.min() < 0 else ids.max()
            what = f"token id {bad} is outside the vocabulary of {known}"
            raise DamagedSample(what, where=self._where(number), way_out=PREPARE_AGAIN)
        return ids

    def loss_mask(self, sample: int) -> np.ndarray | None:
        number = _checked(sample, self)
        index = self._index
        if index.mask_offset[number] < 0:
            return None
        payload = self._payload(number, index.mask_offset, index.mask_size, index.mask_crc32, what="loss mask")
        return mask_from_npy(payload, num_tokens=int(index.num_tokens[number]), where=self._where(number))

    def close(self) -> None:
        """Close the open shards; the dataset stays usable."""
        self._folder.close()

    def _shard_of(self, number: int) -> str:
        return self.manifest.shards[int(self._index.shard[number])].name

    def _where(self, number: int) -> str:
        return f"{join(self.place, self._shard_of(number))}, sample {number}"

    def _payload(
        self, number: int, offsets: np.ndarray, sizes: np.ndarray, checksums: np.ndarray, *, what: str
    ) -> bytes:
        """The bytes of a sample's ids or mask, checked."""
        size, where = int(sizes[number]), self._where(number)
        try:
            payload = self._folder.read_at(self._shard_of(number), int(offsets[number]), size)
        except DataError as error:
            raise DataError(f"the shard {error.what}", where=where, way_out=error.way_out) from error
        if len(payload) != size:
            problem = f"the shard is cut off: {len(payload)} of {size} bytes are there"
            raise DamagedSample(problem, where=where, way_out=PREPARE_AGAIN)
        if zlib.crc32(payload) != int(checksums[number]):
            raise DamagedSample(f"the {what} is damaged: its checksum is wrong", where=where, way_out=PREPARE_AGAIN)
        return payload

    def _check_shards(self) -> None:
        sizes, problems = self._folder.sizes(), []
        for shard in self.manifest.shards:
            if (size := sizes.get(shard.name)) is None:
                problems.append(f"{shard.name} is missing")
            elif size != shard.size_bytes:
                problems.append(f"{shard.name} has {size} bytes, not {shard.size_bytes}")
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise DataError(f"shards are not as written: {shown}", where=self.place, way_out=PREPARE_AGAIN)


class JoinedDatasets:
    """The samples of several, one after the other. See Samples.

    Args:
        parts: at least one.
        place: where they lie, for the user: the pattern that found them.
    """

    def __init__(self, parts: Sequence[Samples], *, place: str) -> None:
        self.parts, self.place = tuple(parts), place
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.concatenate([part.lengths for part in self.parts])

    @cached_property
    def label_counts(self) -> np.ndarray:
        return np.concatenate([part.label_counts for part in self.parts])

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(" ".join(part.fingerprint for part in self.parts).encode()).hexdigest()

    def __getitem__(self, sample: int) -> np.ndarray:
        part, number = self._at(sample)
        return part[number]

    def loss_mask(self, sample: int) -> np.ndarray | None:
        part, number = self._at(sample)
        return part.loss_mask(number)

    def _at(self, sample: int) -> tuple[Samples, int]:
        number = _checked(sample, self)
        part = int(np.searchsorted(self._ends, number, side="right"))
        return self.parts[part], number - (int(self._ends[part - 1]) if part else 0)


def joined(parts: Sequence[Samples], *, place: str) -> Samples:
    """The only one, or all of them one after the other."""
    return parts[0] if len(parts) == 1 else JoinedDatasets(parts, place=place)


def _checked(sample: int, samples: Samples) -> int:
    number = int(sample)
    if not -len(samples) <= number < len(samples):
        raise IndexError(f"sample {number} of a dataset of {len(samples)}")
    return number % len(samples)
