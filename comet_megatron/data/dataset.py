"""A folder of shards as a sequence of samples, each read at its offset."""

from __future__ import annotations

import os
import threading
import zlib
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from comet_megatron.data.shards import (
    PREPARE_AGAIN,
    Manifest,
    ids_from_npy,
    load_index,
    load_manifest,
    mask_from_npy,
)
from comet_megatron.errors import DataError

MAX_OPEN_SHARDS = 16


class ShardDataset:
    """`dataset[i]` is the token ids of sample i, int32 [tokens], read from disk and checked.

    Opening reads the manifest and the index and looks at the size of every shard; shards are opened when needed, at
    most MAX_OPEN_SHARDS at a time. May be pickled, used by several threads and by forked processes.

    Attributes:
        manifest: what the folder holds.
        lengths: tokens of each sample, int64 [samples].
        label_counts: tokens of each sample that carry loss, int64 [samples].

    Raises:
        DataError: the manifest or index is missing or damaged, or a shard is missing or has another size.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.manifest: Manifest = load_manifest(self.folder)
        self._index = load_index(self.folder, manifest=self.manifest)
        self._check_shards()
        self._open_files: OrderedDict[int, int] = OrderedDict()  # shard number → file descriptor, last used at the end
        self._lock = threading.Lock()

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

    def __getitem__(self, sample: int) -> np.ndarray:
        """Token ids of a sample, int32 [tokens], writable.

        Raises:
            IndexError: there is no such sample.
            DataError: the sample is cut off or damaged on disk; names the shard and the sample.
        """
        number = self._checked(sample)
        index = self._index
        payload = self._payload(number, index.ids_offset, index.ids_size, index.ids_crc32, what="sample")
        return ids_from_npy(payload, where=self._where(number))

    def loss_mask(self, sample: int) -> np.ndarray | None:
        """Which tokens of a sample carry loss, bool [tokens], writable; None: all of them.

        Token t carries loss when it is predicted from the tokens before it, so the first one's value means nothing.

        Raises: as `dataset[sample]`.
        """
        number = self._checked(sample)
        index = self._index
        if index.mask_offset[number] < 0:
            return None
        payload = self._payload(number, index.mask_offset, index.mask_size, index.mask_crc32, what="loss mask")
        return mask_from_npy(payload, num_tokens=int(index.num_tokens[number]), where=self._where(number))

    def close(self) -> None:
        """Close the open shards; the dataset stays usable."""
        with self._lock:
            while self._open_files:
                os.close(self._open_files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: file descriptors and locks belong to a process."""
        state = self.__dict__.copy()
        del state["_open_files"], state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_files = OrderedDict()
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if hasattr(self, "_lock"):  # not when opening failed
            self.close()

    def _checked(self, sample: int) -> int:
        number = int(sample)
        if not -len(self) <= number < len(self):
            raise IndexError(f"sample {number} of a dataset of {len(self)}")
        return number % len(self)

    def _where(self, number: int) -> str:
        return f"{self.folder / self.manifest.shards[int(self._index.shard[number])].name}, sample {number}"

    def _payload(
        self, number: int, offsets: np.ndarray, sizes: np.ndarray, checksums: np.ndarray, *, what: str
    ) -> bytes:
        """The bytes of a sample's ids or mask, checked."""
        size, where = int(sizes[number]), self._where(number)
        payload = self._read(int(self._index.shard[number]), offset=int(offsets[number]), size=size, where=where)
        if len(payload) != size:
            problem = f"the shard is cut off: {len(payload)} of {size} bytes are there"
            raise DataError(problem, where=where, way_out=PREPARE_AGAIN)
        if zlib.crc32(payload) != int(checksums[number]):
            raise DataError(f"the {what} is damaged: its checksum is wrong", where=where, way_out=PREPARE_AGAIN)
        return payload

    def _read(self, shard: int, *, offset: int, size: int, where: str) -> bytes:
        with self._lock:  # so that no other thread closes the file between finding and reading it
            try:
                if shard not in self._open_files:
                    if len(self._open_files) >= MAX_OPEN_SHARDS:
                        os.close(self._open_files.popitem(last=False)[1])
                    path = self.folder / self.manifest.shards[shard].name
                    self._open_files[shard] = os.open(path, os.O_RDONLY)
                self._open_files.move_to_end(shard)
                return os.pread(self._open_files[shard], size, offset)
            except OSError as error:
                what = f"the shard cannot be read: {error.strerror}"
                raise DataError(what, where=where, way_out=PREPARE_AGAIN) from error

    def _check_shards(self) -> None:
        try:
            sizes = {entry.name: entry.stat().st_size for entry in os.scandir(self.folder) if entry.is_file()}
        except OSError as error:
            raise DataError(f"the data folder cannot be read: {error.strerror}", where=str(self.folder)) from error
        problems = []
        for shard in self.manifest.shards:
            if (size := sizes.get(shard.name)) is None:
                problems.append(f"{shard.name} is missing")
            elif size != shard.size_bytes:
                problems.append(f"{shard.name} has {size} bytes, not {shard.size_bytes}")
        if problems:
            shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
            raise DataError(f"shards are not as written: {shown}", where=str(self.folder), way_out=PREPARE_AGAIN)
