"""Damaged shards, indexes and manifests: each found and named; and a folder of very many shards."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tarfile
import time
import tracemalloc
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.shard_writer import index_shard, write_shards
from comet_megatron.data.shards import Manifest, Sample, ShardInfo, load_manifest
from comet_megatron.errors import DataError

OPTIONS = {"tokenizer_fingerprint": "f" * 64, "vocab_size": 1000, "settings": {}}


@pytest.fixture(scope="module")
def whole_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards, half of the samples with masks."""
    random = np.random.default_rng(0)
    ids = [random.integers(0, 1000, size=n) for n in random.integers(2, 60, size=12)]
    samples = [Sample(i, {"document": "d"}, random.random(len(i)) < 0.5 if n % 2 else None) for n, i in enumerate(ids)]
    folder = tmp_path_factory.mktemp("whole") / "shards"
    write_shards(samples, output_dir=folder, shard_bytes=1000, **OPTIONS)
    return folder


def read_all(folder: Path) -> list[tuple[bytes, bytes | None]]:
    dataset = ShardDataset(folder)
    masks = [dataset.loss_mask(n) for n in range(len(dataset))]
    return [(dataset[n].tobytes(), None if m is None else m.tobytes()) for n, m in enumerate(masks)]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_byte_of_the_folder_is_changed_the_data_is_the_same_or_the_file_is_named(
    whole_dir: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "shards"
    shutil.copytree(whole_dir, folder)
    path = folder / data.draw(st.sampled_from(sorted(p.name for p in folder.iterdir())))
    content = bytearray(path.read_bytes())
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flip":
        content[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[at:]
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    path.write_bytes(content)
    try:
        found = read_all(folder)
    except DataError as error:
        named = {path.name, "index.npz"} if path.name == "manifest.json" else {path.name}
        # A manifest that tells other sizes or another checksum accuses the file that it tells them of.
        assert path.name == "manifest.json" or any(name in str(error) for name in named)
    else:
        assert found == read_all(whole_dir)
    finally:
        shutil.rmtree(folder.parent)


JSON_LEAVES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
JSON_VALUES = JSON_LEAVES | st.lists(JSON_LEAVES, max_size=2) | st.dictionaries(st.text(max_size=3), JSON_LEAVES)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(Manifest.__dataclass_fields__)), value=JSON_VALUES)
def test_whatever_a_value_of_the_manifest_is_it_is_read_or_refused(
    whole_dir: Path, tmp_path_factory: pytest.TempPathFactory, name: str, value: object
) -> None:
    values = json.loads((whole_dir / "manifest.json").read_text())
    folder = tmp_path_factory.mktemp("manifest")
    (folder / "manifest.json").write_text(json.dumps({**values, name: value}))
    try:
        load_manifest(folder)
    except DataError as error:
        assert error.where == str(folder / "manifest.json")
    shutil.rmtree(folder)


def test_an_index_older_than_its_shards_is_found(whole_dir: Path, tmp_path: Path) -> None:
    manifest = load_manifest(whole_dir)
    for changed, complaint in ((7, "shards are not as written"), (0, "checksum is wrong")):
        folder = tmp_path / f"newer{changed}"
        shutil.copytree(whole_dir, folder)
        newer = [Sample((np.arange(30) + changed) % 1000) for _ in range(12 + changed)]
        write_shards(newer, output_dir=tmp_path / f"other{changed}", shard_bytes=1000, **OPTIONS)
        content = (tmp_path / f"other{changed}" / "shard-000000.tar").read_bytes()
        size = manifest.shards[0].size_bytes
        content = content if changed else (content + bytes(size))[:size]  # by chance of the same size
        (folder / "shard-000000.tar").write_bytes(content + (b"\0" * 10240 if changed else b""))
        with pytest.raises(DataError, match=complaint) as caught:
            read_all(folder)
        assert "shard-000000.tar" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("../000000000.ids.npy", "climbs out"),
        ("/etc/000000000.ids.npy", "climbs out"),
        ("a/../../000000000.ids.npy", "climbs out"),
        ("000000000.exe", "not one of a sample's files"),
        ("noextension", "not one of a sample's files"),
    ],
)
def test_a_member_that_climbs_out_or_is_no_samples_is_named(tmp_path: Path, name: str, complaint: str) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        member = tarfile.TarInfo(name)
        tar.addfile(member, io.BytesIO())
    with pytest.raises(DataError, match=complaint) as caught:
        index_shard(tmp_path / "bad.tar", shard=0)
    assert repr(name) in str(caught.value) and "bad.tar" in caught.value.where


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.CHRTYPE])
def test_a_link_or_a_device_in_a_shard_is_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        member = tarfile.TarInfo("000000000.ids.npy")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(DataError, match="not one of a sample's files"):
        index_shard(tmp_path / "bad.tar", shard=0)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 1 << 16), value=st.binary(min_size=1, max_size=8))
def test_whatever_a_tar_file_holds_it_is_indexed_or_refused(
    whole_dir: Path, tmp_path_factory: pytest.TempPathFactory, at: int, value: bytes
) -> None:
    content = bytearray((whole_dir / "shard-000000.tar").read_bytes())
    at %= len(content)
    content[at : at + len(value)] = value
    folder = tmp_path_factory.mktemp("tar")
    (folder / "shard.tar").write_bytes(content)
    try:
        index_shard(folder / "shard.tar", shard=0)
    except DataError as error:
        assert "shard.tar" in error.where
    shutil.rmtree(folder)


def many_shards(folder: Path, *, num_shards: int, samples_per_shard: int) -> None:
    """Shards with nothing in them, and an index that says otherwise."""
    count = num_shards * samples_per_shard
    size = 10240
    columns = {
        "shard": np.repeat(np.arange(num_shards, dtype=np.int32), samples_per_shard),
        "ids_offset": np.full(count, 512, dtype=np.int64),
        "ids_size": np.full(count, 4000, dtype=np.int64),
        "ids_crc32": np.zeros(count, dtype=np.uint32),
        "num_tokens": np.full(count, 968, dtype=np.int64),
    }
    folder.mkdir()
    np.savez(folder / "index.npz", **columns)
    shards = []
    for number in range(num_shards):
        shards.append(ShardInfo(f"shard-{number:06d}.tar", size, samples_per_shard))
        with open(folder / shards[-1].name, "wb") as file:
            file.truncate(size)
    manifest = Manifest(
        num_samples=count,
        num_tokens=count * 968,
        num_labels=count * 968,
        shards=tuple(shards),
        tokenizer_fingerprint="f" * 64,
        vocab_size=1000,
        settings={},
        fingerprint="0" * 64,
        index_sha256=hashlib.sha256((folder / "index.npz").read_bytes()).hexdigest(),
    )
    (folder / "manifest.json").write_text(json.dumps(asdict(manifest)))


def test_ten_thousand_shards_open_in_less_than_2_s_and_take_less_than_64_bytes_a_sample(tmp_path: Path) -> None:
    many_shards(tmp_path / "many", num_shards=10_000, samples_per_shard=30)
    fastest = min(_seconds_to_open(tmp_path / "many") for _ in range(2))
    assert fastest < 2
    tracemalloc.start()
    dataset = ShardDataset(tmp_path / "many")
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 64 * len(dataset) and len(dataset) == 300_000
    (tmp_path / "many" / "shard-009999.tar").unlink()
    with pytest.raises(DataError, match=re.escape("shard-009999.tar is missing")):
        ShardDataset(tmp_path / "many")


def _seconds_to_open(folder: Path) -> float:
    started = time.perf_counter()
    ShardDataset(folder)
    return time.perf_counter() - started
