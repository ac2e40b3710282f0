"""The form of token shards: WebDataset tar files, an index of offsets into them, a manifest.

A folder of shards:

    shard-000000.tar  per sample {key}.ids.npy (int32 [tokens]), {key}.meta.json and, where only some tokens carry
                      loss, {key}.mask.npy (uint8 [tokens], 1: the token carries loss)
    index.npz         one row a sample, see ShardIndex
    manifest.json     see Manifest; written last, so a folder with one is complete

The tar files are plain WebDataset; the index is what makes the order of reading free and a resume exact.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from comet_megatron.data.storage import DataFolder, is_url, join, open_folder
from comet_megatron.errors import DamagedSample, DataError

FORMAT = "comet_megatron.shards"
VERSION = 3  # 1 had no loss masks, 2 no checksum of the manifest
READABLE_VERSIONS = (1, 2, 3)
MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npz"
IDS_MEMBER = "ids.npy"
MASK_MEMBER = "mask.npy"
META_MEMBER = "meta.json"
MEMBERS = (IDS_MEMBER, MASK_MEMBER, META_MEMBER)
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


IDS_DTYPES = {
    "shard": np.int32,
    "ids_offset": np.int64,
    "ids_size": np.int64,
    "ids_crc32": np.uint32,
    "num_tokens": np.int64,
}
MASK_DTYPES = {"mask_offset": np.int64, "mask_size": np.int64, "mask_crc32": np.uint32, "num_labels": np.int64}
INDEX_DTYPES = IDS_DTYPES | MASK_DTYPES
NO_MASK = {"mask_offset": -1, "mask_size": 0, "mask_crc32": 0}


def npy_bytes(array: np.ndarray) -> bytes:
    """The array as the content of a .npy file."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def ids_from_npy(payload: bytes, *, where: str) -> np.ndarray:
    """The token ids, int32 [tokens], of the content of a .npy file; writable.

    Raises:
        DamagedSample: damaged, or not such an array; `where` says of which sample.
    """
    ids = _array_from_npy(payload, what="token ids", where=where)
    if ids.dtype != np.int32 or ids.ndim != 1:
        what = f"token ids must be int32 [tokens], not {ids.dtype} {list(ids.shape)}"
        raise DamagedSample(what, where=where, way_out=PREPARE_AGAIN)
    return ids


def mask_from_npy(payload: bytes, *, num_tokens: int, where: str) -> np.ndarray:
    """The loss mask, bool [num_tokens], of the content of a .npy file; writable.

    Raises:
        DamagedSample: damaged, or not such a mask; `where` says of which sample.
    """
    mask = _array_from_npy(payload, what="loss mask", where=where)
    if mask.dtype != np.uint8 or mask.shape != (num_tokens,) or (len(mask) and mask.max() > 1):
        what = f"the loss mask must be uint8 [{num_tokens}] of 0 and 1, not {mask.dtype} {list(mask.shape)}"
        raise DamagedSample(what, where=where, way_out=PREPARE_AGAIN)
    return mask.view(np.bool_)


def _array_from_npy(payload: bytes, *, what: str, where: str) -> np.ndarray:
    try:
        return np.lib.format.read_array(io.BytesIO(payload), allow_pickle=False)
    except Exception as error:  # numpy reads the header as Python, which fails in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DamagedSample(f"the {what} are damaged: {reason}", where=where, way_out=PREPARE_AGAIN) from error


def manifest_text(values: Mapping[str, Any]) -> str:
    """The content of manifest.json, with a checksum of the values."""
    return json.dumps({**values, "checksum": _manifest_checksum(values)}, indent=2, sort_keys=True) + "\n"


def _manifest_checksum(values: Mapping[str, Any]) -> str:
    """CRC-32 of the values, 8 hex digits: it finds damage, not forgery."""
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def load_manifest(place: str | os.PathLike[str] | DataFolder) -> Manifest:
    """Read manifest.json of a folder, or of a URL's.

    Raises:
        DataError: the folder or the manifest is missing, damaged, or of another version.
    """
    folder = _folder_of(place)
    path = join(folder.place, MANIFEST_NAME)
    if not folder.has(MANIFEST_NAME):
        raise _no_manifest(folder.place)
    content = folder.read(MANIFEST_NAME)
    try:
        values = json.loads(content.decode("utf-8"))
        found = (values["format"], values["version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"the manifest is damaged: {type(error).__name__} {error}"
        raise DataError(what, where=path, way_out=PREPARE_AGAIN) from error
    if found[0] != FORMAT or found[1] not in READABLE_VERSIONS:
        readable = ", ".join(map(str, READABLE_VERSIONS))
        what = f"the manifest is {found[0]} version {found[1]}; this code reads {FORMAT} versions {readable}"
        raise DataError(what, where=path, way_out="prepare the data again with tools/prepare_data.py")
    try:
        if found[1] >= 3 and values.pop("checksum") != _manifest_checksum(values):
            raise ValueError("its checksum is not that of what it says")
        if found[1] == 1:  # no masks: every token carries loss
            values["num_labels"] = values["num_tokens"]
        values["shards"] = tuple(ShardInfo(**shard) for shard in values["shards"])
        manifest = Manifest(**values)
        _check_manifest(manifest)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"the manifest is damaged: {error}", where=path, way_out=PREPARE_AGAIN) from error
    return manifest


def has_shards(place: str) -> bool:
    """Whether there is a folder of shards.

    Raises:
        DataError: it cannot be read.
    """
    return open_folder(place).has(MANIFEST_NAME)


def _folder_of(place: str | os.PathLike[str] | DataFolder) -> DataFolder:
    return open_folder(place) if isinstance(place, str | os.PathLike) else place


def _no_manifest(place: str) -> DataError:
    way_out = "give a folder of shards: the train or eval folder that tools/prepare_data.py wrote"
    if not is_url(place) and not Path(place).is_dir():
        return DataError("the data folder does not exist", where=place, way_out=way_out)
    found = [] if is_url(place) else sorted(p.parent.name for p in Path(place).glob(f"*/{MANIFEST_NAME}"))
    if found:
        way_out = "perhaps you mean " + " or ".join(join(place, name) for name in found)
    return DataError(f"the data folder has no {MANIFEST_NAME}", where=place, way_out=way_out)


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


def load_index(place: str | os.PathLike[str] | DataFolder, *, manifest: Manifest) -> ShardIndex:
    """Read index.npz of a folder, or of a URL's.

    Raises:
        DataError: it is missing, damaged, or does not belong to the manifest.
    """
    folder = _folder_of(place)
    path = join(folder.place, INDEX_NAME)
    try:
        content = folder.read(INDEX_NAME)
    except DataError as error:
        raise DataError(f"the index {error.what}", where=path, way_out=PREPARE_AGAIN) from error
    if hashlib.sha256(content).hexdigest() != manifest.index_sha256:
        what = "the index is damaged or of other data: its sha256 is not the one in the manifest"
        raise DataError(what, where=path, way_out=PREPARE_AGAIN)
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as columns:
            index = _index_of(columns, manifest)
        _check_index(index, manifest)
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"the index is damaged: {error}", where=path, way_out=PREPARE_AGAIN) from error
    return index


def _index_of(columns: Mapping[str, np.ndarray], manifest: Manifest) -> ShardIndex:
    """Of the columns of index.npz; those of the masks are there if a sample has one."""
    found = {name: columns[name] for name in IDS_DTYPES}
    if "mask_offset" in columns:
        found |= {name: columns[name] for name in MASK_DTYPES}
    else:  # arrays that take no memory
        count = len(found["shard"])
        found |= {name: np.broadcast_to(MASK_DTYPES[name](value), count) for name, value in NO_MASK.items()}
        found["num_labels"] = found["num_tokens"]
    return ShardIndex(**found)


def _check_index(index: ShardIndex, manifest: Manifest) -> None:
    """Raise ValueError unless the index fits the manifest and its offsets lie in the shards."""
    for name, kind in INDEX_DTYPES.items():
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
