"""Token shards on disk: WebDataset tar files, an index of offsets into them, a manifest.

A folder of shards:

    shard-000000.tar  per sample {key}.ids.npy (int32 [tokens]) and {key}.meta.json
    index.npz         one row a sample, see ShardIndex
    manifest.json     see Manifest; written last, so a folder with one is complete

The tar files are plain WebDataset; the index is what makes the order of reading free and a resume exact.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from comet_megatron.errors import DataError
from comet_megatron.new_folder import new_folder

FORMAT = "comet_megatron.shards"
VERSION = 1
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npz"
IDS_MEMBER = "ids.npy"
META_MEMBER = "meta.json"
PREPARE_AGAIN = "prepare the data again with tools/prepare_data.py, or copy the whole folder again"


@dataclass(frozen=True)
class Sample:
    """One training sequence: its token ids, and what a person may want to know of it (JSON data)."""

    ids: np.ndarray
    meta: Mapping[str, Any] = field(default_factory=dict)


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
        fingerprint: sha256 of what training reads: the token ids of all samples in order. It does not depend on how
            the samples are cut into shards, nor on their meta data.
        tokenizer_fingerprint: tokenizer.tokenizer_fingerprint of the tokenizer that made the ids.
        vocab_size: ids are below this.
        index_sha256: of index.npz.
        settings: how the data was made (sequence_length and so on).
    """

    num_samples: int
    num_tokens: int
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
    """Where the token ids of each sample are. All arrays are [num_samples]."""

    shard: np.ndarray  # int32, number of the tar file
    ids_offset: np.ndarray  # int64, first byte of the .npy payload in the tar file
    ids_size: np.ndarray  # int64, bytes of the payload
    ids_crc32: np.ndarray  # uint32, of the payload
    num_tokens: np.ndarray  # int64

    def __len__(self) -> int:
        return len(self.shard)


_INDEX_DTYPES = {
    "shard": np.int32,
    "ids_offset": np.int64,
    "ids_size": np.int64,
    "ids_crc32": np.uint32,
    "num_tokens": np.int64,
}


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
            self._file.close()
            self._file = None

    def add(self, sample: Sample) -> None:
        """Append one sample.

        Raises:
            DataError: it is empty, not one-dimensional integers, or has an id outside the vocabulary.
        """
        ids = self._checked(sample)
        payload = npy_bytes(ids)
        if self._file is None:
            self._open_shard()
        self._tar.write(
            {
                "__key__": f"{self.num_samples:09d}",
                IDS_MEMBER: payload,
                META_MEMBER: json.dumps({**sample.meta, "num_tokens": len(ids)}, sort_keys=True).encode("utf-8"),
            }
        )
        self._digest.update(len(ids).to_bytes(8, "little"))
        self._digest.update(ids.astype("<i4", copy=False).tobytes())
        self.num_samples += 1
        self.num_tokens += len(ids)
        self._samples_in_shard += 1
        self._bytes_in_shard += len(payload)
        if self._bytes_in_shard >= self.shard_bytes:
            self._close_shard()

    def finish(self, *, settings: Mapping[str, Any]) -> Manifest:
        """Close the last shard, then write the index and the manifest.

        Raises:
            DataError: no sample was added.
        """
        if self._file is not None:
            self._close_shard()
        if not self.num_samples:
            raise DataError("there is no sample to write", where=str(self.folder))
        columns = {
            name: np.concatenate([getattr(part, name) for part in self._index_parts]).astype(kind)
            for name, kind in _INDEX_DTYPES.items()
        }
        index_bytes = io.BytesIO()
        np.savez(index_bytes, **columns)  # type: ignore[arg-type]  # mypy takes columns for allow_pickle
        (self.folder / INDEX_NAME).write_bytes(index_bytes.getvalue())
        manifest = Manifest(
            num_samples=self.num_samples,
            num_tokens=self.num_tokens,
            shards=tuple(self._shards),
            tokenizer_fingerprint=self.tokenizer_fingerprint,
            vocab_size=self.vocab_size,
            settings=dict(settings),
            fingerprint=self._digest.hexdigest(),
            index_sha256=hashlib.sha256(index_bytes.getvalue()).hexdigest(),
        )
        text = json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n"
        (self.folder / MANIFEST_NAME).write_text(text, encoding="utf-8")
        return manifest

    def _checked(self, sample: Sample) -> np.ndarray:
        ids = np.asarray(sample.ids)
        where = f"sample {self.num_samples} {dict(sample.meta)}"
        if ids.ndim != 1 or not len(ids) or ids.dtype.kind not in "iu":
            raise DataError(f"a sample must be a list of token ids, not {ids.dtype} {list(ids.shape)}", where=where)
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise DataError(f"token id {bad} is outside the vocabulary of {self.vocab_size}", where=where)
        return ids.astype(np.int32, copy=False)

    def _open_shard(self) -> None:
        from webdataset import TarWriter  # imports torch, which reading the shards does not need

        path = self.folder / f"shard-{len(self._shards):06d}.tar"
        self._file = open(path, "wb")  # noqa: SIM115 (not by name: TarWriter takes some names for URLs)
        self._tar = TarWriter(self._file, encoder=False, mtime=0)
        self._bytes_in_shard = self._samples_in_shard = 0

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
        DataError: it is no tar file, it is cut off, or a sample in it is damaged.
    """
    rows: list[tuple[int, int, int, int, int]] = []
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            places = [(m.name, m.offset_data, m.size) for m in tar if m.name.endswith("." + IDS_MEMBER)]
            for name, offset, size in places:
                payload = os.pread(file.fileno(), size, offset)
                ids = ids_from_npy(payload, where=f"{path}, {name}")
                rows.append((shard, offset, size, zlib.crc32(payload), len(ids)))
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"the shard cannot be read: {error}", where=str(path), way_out=PREPARE_AGAIN) from error
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(_INDEX_DTYPES)
    return ShardIndex(
        **{name: np.asarray(c, dtype=kind) for (name, kind), c in zip(_INDEX_DTYPES.items(), columns, strict=True)}
    )


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
    try:
        ids = np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"the token ids are damaged: {error}", where=where, way_out=PREPARE_AGAIN) from error
    if ids.dtype != np.int32 or ids.ndim != 1:
        what = f"token ids must be int32 [tokens], not {ids.dtype} {list(ids.shape)}"
        raise DataError(what, where=where, way_out=PREPARE_AGAIN)
    return ids


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
    if found != (FORMAT, VERSION):
        what = f"the manifest is {found[0]} version {found[1]}; this code reads {FORMAT} version {VERSION}"
        raise DataError(what, where=str(path), way_out="prepare the data again with tools/prepare_data.py")
    try:
        values["shards"] = tuple(ShardInfo(**shard) for shard in values["shards"])
        manifest = Manifest(**values)
        _check_manifest(manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the manifest is damaged: {error}", where=str(path), way_out=PREPARE_AGAIN) from error
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    """Raise ValueError unless the manifest agrees with itself."""
    for name in ("num_samples", "num_tokens", "vocab_size"):
        if not isinstance(value := getattr(manifest, name), int) or value <= 0:
            raise ValueError(f"{name} is {value!r}")
    for shard in manifest.shards:
        if not isinstance(shard.name, str) or Path(shard.name).name != shard.name:
            raise ValueError(f"{shard.name!r} is not the name of a file in the folder")
    if (total := sum(shard.num_samples for shard in manifest.shards)) != manifest.num_samples:
        raise ValueError(f"its shards have {total} samples and it says {manifest.num_samples}")


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
            index = ShardIndex(**{f.name: columns[f.name] for f in fields(ShardIndex)})
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"the index is damaged: {error}", where=str(path), way_out=PREPARE_AGAIN) from error
    if {len(getattr(index, f.name)) for f in fields(ShardIndex)} != {manifest.num_samples}:
        what = f"the index does not have {manifest.num_samples} samples as the manifest says"
        raise DataError(what, where=str(path), way_out=PREPARE_AGAIN)
    return index
