"""Token shards on disk: WebDataset tar files, an index of offsets into them, a manifest.

A folder of shards:

    shard-000000.tar  per sample {key}.ids.npy (int32 [tokens]), {key}.meta.json and, where only some tokens carry
                      loss, {key}.mask.npy (uint8 [tokens], 1: the token carries loss)
    index.npz         one row a sample, see ShardIndex
    manifest.json     see Manifest; written last, so a folder with one is complete

The tar files are plain WebDataset; the index is what makes the order of reading free and a resume exact.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from comet_megatron.errors import DataError
from comet_megatron.new_folder import new_folder

FORMAT = "comet_megatron.shards"
VERSION = 3  # 1 had no loss masks, 2 no checksum of the manifest
READABLE_VERSIONS = (1, 2, 3)
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npz"
IDS_MEMBER = "ids.npy"
MASK_MEMBER = "mask.npy"
META_MEMBER = "meta.json"
_MEMBERS = (IDS_MEMBER, MASK_MEMBER, META_MEMBER)
_HAS_MASK = 1 << 63  # joins the length in the fingerprint, so that samples without a mask have the one of version 1
PREPARE_AGAIN = "prepare the data again with tools/prepare_data.py, or copy the whole folder again"


@dataclass(frozen=True)
class Sample:
    """One training sequence: its token ids, and what a person may want to know of it (JSON data).

    Attributes:
        loss_mask: bool [tokens], which tokens carry loss; None: all of them.
    """

    ids: np.ndarray
    meta: Mapping[str, Any] = field(default_factory=dict)
    loss_mask: np.ndarray | None = None


@dataclass(frozen=True)
class ShardInfo:
    """One tar file of the folder."""

    name: str
    size_bytes: int
    num_samples: int


@dataclass(frozen=True)
class Manifest:
    """What a folder of shards holds.

    Attributes:
        num_labels: tokens that carry loss; all of a sample that has no mask.
        fingerprint: sha256 of what training reads: the token ids and loss masks of all samples in order. It does not
            depend on how the samples are cut into shards, nor on their meta data.
        tokenizer_fingerprint: tokenizer.tokenizer_fingerprint of the tokenizer that made the ids.
        vocab_size: ids are below this.
        index_sha256: of index.npz.
        settings: how the data was made (sequence_length and so on).
    """

    num_samples: int
    num_tokens: int
    num_labels: int
    shards: tuple[ShardInfo, ...]
    tokenizer_fingerprint: str
    vocab_size: int
    settings: Mapping[str, Any]
    fingerprint: str
    index_sha256: str
    format: str = FORMAT
    version: int = VERSION


@dataclass(frozen=True)
class ShardIndex:
    """Where the token ids and the loss mask of each sample are. All arrays are [num_samples]."""

    shard: np.ndarray  # int32, number of the tar file
    ids_offset: np.ndarray  # int64, first byte of the .npy payload in the tar file
    ids_size: np.ndarray  # int64, bytes of the payload
    ids_crc32: np.ndarray  # uint32, of the payload
    num_tokens: np.ndarray  # int64
    mask_offset: np.ndarray  # int64, as of the ids; -1: no mask
    mask_size: np.ndarray  # int64; 0: no mask
    mask_crc32: np.ndarray  # uint32; 0: no mask
    num_labels: np.ndarray  # int64, tokens that carry loss

    def __len__(self) -> int:
        return len(self.shard)


_IDS_DTYPES = {
    "shard": np.int32,
    "ids_offset": np.int64,
    "ids_size": np.int64,
    "ids_crc32": np.uint32,
    "num_tokens": np.int64,
}
_MASK_DTYPES = {"mask_offset": np.int64, "mask_size": np.int64, "mask_crc32": np.uint32, "num_labels": np.int64}
_INDEX_DTYPES = _IDS_DTYPES | _MASK_DTYPES
_NO_MASK = {"mask_offset": -1, "mask_size": 0, "mask_crc32": 0}


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
        self._tar: Any = None
        self._bytes_in_shard = 0
        self._samples_in_shard = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:  # not finished: an error is on its way
            with contextlib.suppress(OSError):
                self._tar.close()  # else it tries by itself when it is collected, and complains of the closed file
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
        members = {IDS_MEMBER: npy_bytes(ids)}
        num_labels = len(ids)
        if mask is not None:
            members[MASK_MEMBER] = npy_bytes(mask.astype(np.uint8))
            meta["num_labels"] = num_labels = int(np.count_nonzero(mask))
        payload_bytes = sum(map(len, members.values()))
        members[META_MEMBER] = json.dumps(meta, sort_keys=True).encode("utf-8")
        if self._file is None:
            self._open_shard()
        self._tar.write({"__key__": f"{self.num_samples:09d}", **members})
        self._count(ids, mask, num_labels)
        self._samples_in_shard += 1
        self._bytes_in_shard += payload_bytes
        if self._bytes_in_shard >= self.shard_bytes:
            self._close_shard()

    @property
    def shards(self) -> tuple[ShardInfo, ...]:
        """The finished ones."""
        return tuple(self._shards)

    def checksum(self, shard: int) -> int:
        """Of the index of a finished shard, and by its checksums of all ids and masks in it."""
        part = self._index_parts[shard]
        return zlib.crc32(b"".join(getattr(part, name).tobytes() for name in _INDEX_DTYPES))

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
            for name, kind in (_INDEX_DTYPES if has_masks else _IDS_DTYPES).items()
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

    def _open_shard(self) -> None:
        from webdataset import TarWriter  # imports torch, which reading the shards does not need

        path = self.folder / self._name_of_next()
        self._file = open(path, "wb")  # noqa: SIM115 (not by name: TarWriter takes some names for URLs)
        self._tar = TarWriter(self._file, encoder=False, mtime=0)
        self._bytes_in_shard = self._samples_in_shard = 0

    def _name_of_next(self) -> str:
        return f"shard-{len(self._shards):06d}.tar"

    def _close_shard(self) -> None:
        assert self._file is not None
        self._tar.close()
        self._file.close()
        path = Path(self._file.name)
        self._file = None
        part = index_shard(path, shard=len(self._shards))
        assert len(part) == self._samples_in_shard, f"{path} holds {len(part)} samples, not {self._samples_in_shard}"
        self._index_parts.append(part)
        self._shards.append(ShardInfo(path.name, path.stat().st_size, self._samples_in_shard))


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
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(_INDEX_DTYPES)
    return ShardIndex(
        **{name: np.asarray(c, dtype=kind) for (name, kind), c in zip(_INDEX_DTYPES.items(), columns, strict=True)}
    )


def _key_and_kind(member: tarfile.TarInfo, path: Path) -> tuple[str, str]:
    """The sample's key and which of its files a member of a tar file is."""
    key, _, kind = member.name.partition(".")
    if member.name.startswith("/") or ".." in member.name.split("/"):
        what = f"a member's path climbs out of the folder: {member.name!r}"
        raise DataError(what, where=str(path), way_out="do not unpack this file; " + PREPARE_AGAIN)
    if not member.isfile() or kind not in _MEMBERS:
        what = f"a member is not one of a sample's files ({', '.join(_MEMBERS)}): {member.name!r}"
        raise DataError(what, where=str(path), way_out=PREPARE_AGAIN)
    return key, kind


def _index_row(file: int, offset: int, size: int, mask_place: tuple[int, int] | None, where: str) -> tuple[int, ...]:
    """A row of ShardIndex without its first column."""
    payload = os.pread(file, size, offset)
    num_tokens = len(ids_from_npy(payload, where=where))
    row = (offset, size, zlib.crc32(payload), num_tokens)
    if mask_place is None:
        return (*row, *_NO_MASK.values(), num_tokens)
    mask_offset, mask_size = mask_place
    mask_payload = os.pread(file, mask_size, mask_offset)
    mask = mask_from_npy(mask_payload, num_tokens=num_tokens, where=where)
    return (*row, mask_offset, mask_size, zlib.crc32(mask_payload), int(np.count_nonzero(mask)))


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as the content of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def ids_from_npy(payload: bytes, *, where: str) -> np.ndarray:
    """The token ids, int32 [tokens], of the content of a .npy file; writable.

    Raises:
        DataError: damaged, or not such an array; `where` says of which sample.
    """
    ids = _array_from_npy(payload, what="token ids", where=where)
    if ids.dtype != np.int32 or ids.ndim != 1:
        what = f"token ids must be int32 [tokens], not {ids.dtype} {list(ids.shape)}"
        raise DataError(what, where=where, way_out=PREPARE_AGAIN)
    return ids


def mask_from_npy(payload: bytes, *, num_tokens: int, where: str) -> np.ndarray:
    """The loss mask, bool [num_tokens], of the content of a .npy file; writable.

    Raises:
        DataError: damaged, or not such a mask; `where` says of which sample.
    """
    mask = _array_from_npy(payload, what="loss mask", where=where)
    if mask.dtype != np.uint8 or mask.shape != (num_tokens,) or (len(mask) and mask.max() > 1):
        what = f"the loss mask must be uint8 [{num_tokens}] of 0 and 1, not {mask.dtype} {list(mask.shape)}"
        raise DataError(what, where=where, way_out=PREPARE_AGAIN)
    return mask.view(np.bool_)


def _array_from_npy(payload: bytes, *, what: str, where: str) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
    except Exception as error:  # numpy reads the header as Python, which fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"the {what} are damaged: {reason}", where=where, way_out=PREPARE_AGAIN) from error


def manifest_text(values: Mapping[str, Any]) -> str:
    """The content of manifest.json, with a checksum of the values."""
    return json.dumps({**values, "checksum": _manifest_checksum(values)}, indent=2, sort_keys=True) + "\n"


def _manifest_checksum(values: Mapping[str, Any]) -> str:
    """CRC-32 of the values, 8 hex digits: it finds damage, not forgery."""
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def load_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Read manifest.json.

    Raises:
        DataError: the folder or the manifest is missing, damaged, or of another version.
    """
    path = Path(folder) / MANIFEST_NAME
    way_out = "give a folder of shards: the train or eval folder that tools/prepare_data.py wrote"
    if not Path(folder).is_dir():
        raise DataError("the data folder does not exist", where=str(folder), way_out=way_out)
    if not path.is_file():
        inside = sorted(p.parent.name for p in Path(folder).glob(f"*/{MANIFEST_NAME}"))
        if inside:
            way_out = "perhaps you mean " + " or ".join(str(Path(folder) / name) for name in inside)
        raise DataError(f"the data folder has no {MANIFEST_NAME}", where=str(folder), way_out=way_out)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        found = (values["format"], values["version"])
    except (ValueError, KeyError, TypeError, OSError) as error:
        what = f"the manifest is damaged: {type(error).__name__} {error}"
        raise DataError(what, where=str(path), way_out=PREPARE_AGAIN) from error
    if found[0] != FORMAT or found[1] not in READABLE_VERSIONS:
        readable = ", ".join(map(str, READABLE_VERSIONS))
        what = f"the manifest is {found[0]} version {found[1]}; this code reads {FORMAT} versions {readable}"
        raise DataError(what, where=str(path), way_out="prepare the data again with tools/prepare_data.py")
    try:
        if found[1] >= 3 and values.pop("checksum") != _manifest_checksum(values):
            raise ValueError("its checksum is not that of what it says")
        if found[1] == 1:  # no masks: every token carries loss
            values["num_labels"] = values["num_tokens"]
        values["shards"] = tuple(ShardInfo(**shard) for shard in values["shards"])
        manifest = Manifest(**values)
        _check_manifest(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"the manifest is damaged: {error}", where=str(path), way_out=PREPARE_AGAIN) from error
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    """Raise ValueError unless the manifest agrees with itself."""
    for name in ("num_samples", "num_tokens", "vocab_size"):
        if not _is_count(value := getattr(manifest, name)) or value == 0:
            raise ValueError(f"{name} is {value!r}")
    if not _is_count(manifest.num_labels) or manifest.num_labels > manifest.num_tokens:
        raise ValueError(f"num_labels is {manifest.num_labels!r} of {manifest.num_tokens} tokens")
    for name in ("tokenizer_fingerprint", "fingerprint", "index_sha256"):
        if not isinstance(value := getattr(manifest, name), str):
            raise ValueError(f"{name} is {value!r}")
    if not isinstance(manifest.settings, dict):
        raise ValueError(f"settings is {manifest.settings!r}")
    for shard in manifest.shards:
        if not isinstance(shard.name, str) or os.path.basename(shard.name) != shard.name or "\0" in shard.name:
            raise ValueError(f"{shard.name!r} is not the name of a file in the folder")
        if not _is_count(shard.size_bytes) or not _is_count(shard.num_samples):
            raise ValueError(f"{shard.name} has {shard.size_bytes!r} bytes and {shard.num_samples!r} samples")
    if (total := sum(shard.num_samples for shard in manifest.shards)) != manifest.num_samples:
        raise ValueError(f"its shards have {total} samples and it says {manifest.num_samples}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def load_index(folder: str | os.PathLike[str], *, manifest: Manifest) -> ShardIndex:
    """Read index.npz.

    Raises:
        DataError: it is missing, damaged, or does not belong to the manifest.
    """
    path = Path(folder) / INDEX_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        what = f"the index cannot be read: {error.strerror}"
        raise DataError(what, where=str(path), way_out=PREPARE_AGAIN) from error
    if hashlib.sha256(content).hexdigest() != manifest.index_sha256:
        what = "the index is damaged or of other data: its sha256 is not the one in the manifest"
        raise DataError(what, where=str(path), way_out=PREPARE_AGAIN)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as columns:
            index = _index_of(columns, manifest)
        _check_index(index, manifest)
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"the index is damaged: {error}", where=str(path), way_out=PREPARE_AGAIN) from error
    return index


def _index_of(columns: Mapping[str, np.ndarray], manifest: Manifest) -> ShardIndex:
    """Of the columns of index.npz; those of the masks are there if a sample has one."""
    found = {name: columns[name] for name in _IDS_DTYPES}
    if "mask_offset" in columns:
        found |= {name: columns[name] for name in _MASK_DTYPES}
    else:  # arrays that take no memory
        count = len(found["shard"])
        found |= {name: np.broadcast_to(_MASK_DTYPES[name](value), count) for name, value in _NO_MASK.items()}
        found["num_labels"] = found["num_tokens"]
    return ShardIndex(**found)


def _check_index(index: ShardIndex, manifest: Manifest) -> None:
    """Raise ValueError unless the index fits the manifest and its offsets lie in the shards."""
    for name, kind in _INDEX_DTYPES.items():
        column = getattr(index, name)
        if column.shape != (manifest.num_samples,) or column.dtype != kind:
            found = f"{column.dtype} {list(column.shape)}"
            raise ValueError(f"{name} is {found}, and the manifest says {manifest.num_samples} samples")
    if index.shard.min() < 0 or index.shard.max() >= len(manifest.shards):
        raise ValueError(f"it names shard {index.shard.max()} of {len(manifest.shards)}")
    sizes = np.asarray([shard.size_bytes for shard in manifest.shards], dtype=np.int64)[index.shard]
    for kind in ("ids", "mask"):
        offset, size = getattr(index, f"{kind}_offset"), getattr(index, f"{kind}_size")
        lowest = 0 if kind == "ids" else -1
        if (offset < lowest).any() or (size < 0).any() or (offset + size > sizes).any():
            raise ValueError(f"{kind}_offset points outside of a shard")
    for total in ("num_tokens", "num_labels"):
        if (found := int(getattr(index, total).sum())) != getattr(manifest, total):
            raise ValueError(f"its samples have {found} {total}, the manifest says {getattr(manifest, total)}")
