"""Write token shards, see shards.py: tar files of a chosen size, then their index, then the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from comet_megatron.data.shards import (
    IDS_DTYPES,
    IDS_MEMBER,
    INDEX_DTYPES,
    INDEX_NAME,
    MANIFEST_NAME,
    MASK_MEMBER,
    MEMBERS,
    META_MEMBER,
    NO_MASK,
    PREPARE_AGAIN,
    Manifest,
    Sample,
    ShardIndex,
    ShardInfo,
    ids_from_npy,
    manifest_text,
    mask_from_npy,
    npy_bytes,
)
from comet_megatron.data.tar_writer import TarFileWriter
from comet_megatron.errors import DataError
from comet_megatron.new_folder import new_folder

_HAS_MASK = 1 << 63  # joins the length in the fingerprint, so that samples without a mask have the one of version 1


def write_shards(
    samples: Iterable[Sample],
    *,
    output_dir: str | os.PathLike[str],
    tokenizer_fingerprint: str,
    vocab_size: int,
    shard_bytes: int,
    settings: Mapping[str, Any],
) -> Manifest:
    """Write a folder of shards that appears when it is complete. The same input gives the same bytes.

    Raises:
        OutputError: the output folder is not empty or cannot be made.
        DataError: there is no sample, or a sample is empty or has an id outside the vocabulary.
    """
    with new_folder(output_dir) as folder:
        with ShardWriter(
            folder, tokenizer_fingerprint=tokenizer_fingerprint, vocab_size=vocab_size, shard_bytes=shard_bytes
        ) as writer:
            for sample in samples:
                writer.add(sample)
            return writer.finish(settings=settings)


class ShardWriter:
    """Write shards into an existing empty folder; see write_shards for one that appears when it is complete.

    Args:
        folder: where the shards go.
        tokenizer_fingerprint: goes into the manifest.
        vocab_size: ids must be below it.
        shard_bytes: a shard is closed when its payloads reach this size.
    """

    def __init__(self, folder: Path, *, tokenizer_fingerprint: str, vocab_size: int, shard_bytes: int) -> None:
        self.folder = folder
        self.tokenizer_fingerprint = tokenizer_fingerprint
        self.vocab_size = vocab_size
        self.shard_bytes = shard_bytes
        self.num_samples = 0
        self.num_tokens = 0
        self.num_labels = 0
        self._shards: list[ShardInfo] = []
        self._index_parts: list[ShardIndex] = []
        self._digest = hashlib.sha256()
        self._file: BinaryIO | None = None
        self._tar: TarFileWriter | None = None
        self._bytes_in_shard = 0
        self._rows: list[tuple[int, ...]] = []  # of the index of the shard that is open

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:  # not finished: an error is on its way
            with contextlib.suppress(OSError):  # a full disk shows again when the rest is written
                self._file.close()
            self._file = None

    def add(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            DataError: it is empty, not one-dimensional integers, has an id outside the vocabulary, or a mask that is
                not bool [tokens].
        """
        ids, mask = self._checked(sample)
        meta = {**sample.meta, "num_tokens": len(ids)}
        if self._tar is None:
            self._tar = self._open_shard()
        key = f"{self.num_samples:09d}"
        payload = _npy_bytes(ids)
        offset = self._tar.add(f"{key}.{IDS_MEMBER}", payload)
        row = (len(self._shards), offset, len(payload), zlib.crc32(payload), len(ids))
        self._bytes_in_shard += len(payload)
        num_labels = len(ids)
        mask_columns = tuple(NO_MASK.values())
        if mask is not None:
            payload = _npy_bytes(mask.view(np.uint8))
            mask_columns = (self._tar.add(f"{key}.{MASK_MEMBER}", payload), len(payload), zlib.crc32(payload))
            meta["num_labels"] = num_labels = int(np.count_nonzero(mask))
            self._bytes_in_shard += len(payload)
        self._tar.add(f"{key}.{META_MEMBER}", json.dumps(meta, sort_keys=True).encode("utf-8"))
        self._rows.append((*row, *mask_columns, num_labels))
        self._count(ids, mask, num_labels)
        if self._bytes_in_shard >= self.shard_bytes:
            self._close_shard()

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The finished ones."""
        return tuple(self._shards)

    def checksum(self, shard: int) -> int:
        """Of the index of a finished shard, and by its checksums of all ids and masks in it."""
        part = self._index_parts[shard]
        return zlib.crc32(b"".join(getattr(part, name).tobytes() for name in INDEX_DTYPES))

    def continue_with(self, info: ShardInfo, *, checksum: int) -> bool:
        """Take up a shard that an earlier writer finished in this folder, the first one first.

        Returns: whether it is the next one, there, and as it was written; if not, nothing has changed.
        """
        assert self._file is None, "the writer has begun a shard of its own"
        path = self.folder / info.name
        if info.name != self._name_of_next():
            return False
        try:
            if path.stat().st_size != info.size_bytes:
                return False
            part = index_shard(path, shard=len(self._shards))
        except (OSError, DataError):
            return False
        self._index_parts.append(part)
        if self.checksum(len(self._shards)) != checksum or len(part) != info.num_samples:
            self._index_parts.pop()
            return False
        self._shards.append(info)
        with open(path, "rb") as file:
            for row in range(len(part)):
                where = f"{path}, sample {row}"
                ids = ids_from_npy(os.pread(file.fileno(), part.ids_size[row], part.ids_offset[row]), where=where)
                mask = None
                if part.mask_offset[row] >= 0:
                    payload = os.pread(file.fileno(), part.mask_size[row], part.mask_offset[row])
                    mask = mask_from_npy(payload, num_tokens=len(ids), where=where)
                self._count(ids, mask, int(part.num_labels[row]))
        return True

    def finish(self, *, settings: Mapping[str, Any]) -> Manifest:
        """Close the last shard, then write the index and the manifest.

        Raises:
            DataError: no sample was added.
        """
        if self._file is not None:
            self._close_shard()
        if not self.num_samples:
            raise DataError("there is no sample to write", where=str(self.folder))
        has_masks = any(part.mask_size.any() for part in self._index_parts)
        columns = {
            name: np.concatenate([getattr(part, name) for part in self._index_parts]).astype(kind)
            for name, kind in (INDEX_DTYPES if has_masks else IDS_DTYPES).items()
        }
        index_bytes = io.BytesIO()
        np.savez(index_bytes, **columns)  # type: ignore[arg-type]  # mypy takes columns for allow_pickle
        (self.folder / INDEX_NAME).write_bytes(index_bytes.getvalue())
        manifest = Manifest(
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            num_labels=self.num_labels,
            shards=tuple(self._shards),
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            vocab_size=self.vocab_size,
            settings=dict(settings),
            fingerprint=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(index_bytes.getvalue()).hexdigest(),
        )
        (self.folder / MANIFEST_NAME).write_text(manifest_text(asdict(manifest)), encoding="utf-8")
        return manifest

    def _count(self, ids: np.ndarray, mask: np.ndarray | None, num_labels: int) -> None:
        """Add a sample to the totals and to the fingerprint."""
        self._digest.update((len(ids) | (0 if mask is None else _HAS_MASK)).to_bytes(8, "little"))
        self._digest.update(ids.astype("<i4", copy=False).tobytes())
        if mask is not None:
            self._digest.update(np.packbits(mask, bitorder="little").tobytes())
        self.num_samples += 1
        self.num_tokens += len(ids)
        self.num_labels += num_labels

    def _checked(self, sample: Sample) -> tuple[np.ndarray, np.ndarray | None]:
        ids = np.asarray(sample.ids)
        where = f"sample {self.num_samples} {dict(sample.meta)}"
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise DataError(f"a sample must be a list of token ids, not {ids.dtype} {list(ids.shape)}", where=where)
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise DataError(f"token id {bad} is outside the vocabulary of {self.vocab_size}", where=where)
        if (mask := sample.loss_mask) is not None and (mask.dtype != np.bool_ or mask.shape != ids.shape):
            what = f"the loss mask must be bool {list(ids.shape)} as the ids, not {mask.dtype} {list(mask.shape)}"
            raise DataError(what, where=where)
        return ids.astype(np.int32, copy=False), mask

    def _open_shard(self) -> TarFileWriter:
        self._file = open(self.folder / self._name_of_next(), "wb")  # noqa: SIM115 (open until the shard is full)
        self._bytes_in_shard, self._rows = 0, []
        return TarFileWriter(self._file)

    def _name_of_next(self) -> str:
        return f"shard-{len(self._shards):06d}.tar"

    def _close_shard(self) -> None:
        assert self._file is not None and self._tar is not None
        self._tar.close()
        self._file.close()
        path = Path(self._file.name)
        self._file = self._tar = None
        self._index_parts.append(_index_of_rows(self._rows))
        self._shards.append(ShardInfo(path.name, path.stat().st_size, len(self._rows)))


def _npy_bytes(array: np.ndarray) -> bytes:
    """As npy_bytes, of [length]: numpy takes longer for the header than for a thousand numbers."""
    return _npy_header(array.dtype.str, len(array)) + array.tobytes()


@lru_cache(maxsize=1 << 14)  # lengths; 2 MB
def _npy_header(dtype: str, length: int) -> bytes:
    array = np.zeros(length, dtype)
    content = npy_bytes(array)
    return content[: len(content) - array.nbytes]


def _index_of_rows(rows: list[tuple[int, ...]]) -> ShardIndex:
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(INDEX_DTYPES)
    return ShardIndex(
        **{name: np.asarray(c, dtype=kind) for (name, kind), c in zip(INDEX_DTYPES.items(), columns, strict=True)}
    )


def index_shard(path: Path, *, shard: int) -> ShardIndex:
    """Read the index of one tar file from the file itself.

    Raises:
        DataError: it is no tar file, it is cut off, it holds something else than samples, or a sample is damaged.
    """
    rows: list[tuple[int, ...]] = []
    masks: dict[str, tuple[int, int]] = {}
    ids_members: list[tuple[str, int, int]] = []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            size_bytes = os.fstat(file.fileno()).st_size
            for member in tar:
                key, kind = _key_and_kind(member, path)
                if member.offset_data + member.size > size_bytes:
                    raise tarfile.ReadError(f"{member.name} goes on behind the end of the file")
                if kind == IDS_MEMBER:
                    ids_members.append((key, member.offset_data, member.size))
                elif kind == MASK_MEMBER:
                    masks[key] = (member.offset_data, member.size)
            for key, offset, size in ids_members:
                rows.append((shard, *_index_row(file.fileno(), offset, size, masks.pop(key, None), f"{path}, {key}")))
    except (tarfile.TarError, OSError, ValueError, OverflowError) as error:
        raise DataError(f"the shard cannot be read: {error}", where=str(path), way_out=PREPARE_AGAIN) from error
    if masks:
        what = f"a loss mask without token ids: {min(masks)}.{MASK_MEMBER}"
        raise DataError(what, where=str(path), way_out=PREPARE_AGAIN)
    return _index_of_rows(rows)


def _key_and_kind(member: tarfile.TarInfo, path: Path) -> tuple[str, str]:
    """The sample's key and which of its files a member of a tar file is."""
    key, _, kind = member.name.partition(".")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        what = f"a member's path climbs out of the folder: {member.name!r}"
        raise DataError(what, where=str(path), way_out="do not unpack this file; " + PREPARE_AGAIN)
    if not member.isfile() or kind not in MEMBERS:
        what = f"a member is not one of a sample's files ({', '.join(MEMBERS)}): {member.name!r}"
        raise DataError(what, where=str(path), way_out=PREPARE_AGAIN)
    return key, kind


def _index_row(file: int, offset: int, size: int, mask_place: tuple[int, int] | None, where: str) -> tuple[int, ...]:
    """A row of ShardIndex without its first column."""
    payload = os.pread(file, size, offset)
    num_tokens = len(ids_from_npy(payload, where=where))
    row = (offset, size, zlib.crc32(payload), num_tokens)
    if mask_place is None:
        return (*row, *NO_MASK.values(), num_tokens)
    mask_offset, mask_size = mask_place
    mask_payload = os.pread(file, mask_size, mask_offset)
    mask = mask_from_npy(mask_payload, num_tokens=num_tokens, where=where)
    return (*row, mask_offset, mask_size, zlib.crc32(mask_payload), int(np.count_nonzero(mask)))
