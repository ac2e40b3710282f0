"""Shards behind URLs read as those on a disk, and what cannot be read is named."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import fsspec
import numpy as np
import pytest

from comet_megatron.data.dataset import JoinedDatasets, ShardDataset
from comet_megatron.data.shards import has_shards
from comet_megatron.data.storage import RemoteFolder, find_places, join, open_folder
from comet_megatron.errors import DataError


@pytest.fixture
def in_memory(shard_dir: Path):
    """The shards behind memory://shards."""
    files = fsspec.filesystem("memory")
    files.put(str(shard_dir) + "/", "/data/train/", recursive=True)
    yield "memory://data/train"
    files.rm("/data", recursive=True)


@pytest.fixture
def url(shard_dir: Path, in_memory: str, request: pytest.FixtureRequest) -> str:
    return in_memory if request.param == "memory" else f"file://{shard_dir}"


@pytest.mark.parametrize("url", ["memory", "file"], indirect=True)
def test_samples_behind_a_url_are_those_on_the_disk(url: str, shard_dir: Path, samples) -> None:
    remote, local = ShardDataset(url), ShardDataset(shard_dir)
    assert remote.manifest == local.manifest and remote.fingerprint == local.fingerprint
    for number in np.random.default_rng(0).permutation(len(samples)):
        np.testing.assert_array_equal(remote[number], samples[number].ids)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(remote))[3], samples[3].ids)


@pytest.mark.parametrize("url", ["memory", "file"], indirect=True)
def test_a_read_at_an_offset_asks_for_these_bytes_only(url: str, shard_dir: Path, monkeypatch) -> None:
    dataset, asked = ShardDataset(url), []
    kind = type(dataset._folder._files)
    real = kind.cat_file

    def cat_file(self, path, start=None, end=None, **more):
        asked.append((start, end))
        return real(self, path, start=start, end=end, **more)

    monkeypatch.setattr(kind, "cat_file", cat_file)
    assert len(dataset[5])
    assert asked == [
        (int(dataset._index.ids_offset[5]), int(dataset._index.ids_offset[5] + dataset._index.ids_size[5]))
    ]


def test_a_damaged_shard_behind_a_url_is_named_with_its_sample(in_memory: str, shard_dir: Path) -> None:
    dataset = ShardDataset(in_memory)
    where = int(dataset._index.ids_offset[7] + dataset._index.ids_size[7]) - 1
    name = dataset.manifest.shards[dataset._index.shard[7]].name
    files = fsspec.filesystem("memory")
    content = bytearray(files.cat_file(f"/data/train/{name}"))
    content[where] ^= 1
    files.pipe_file(f"/data/train/{name}", bytes(content))
    with pytest.raises(DataError, match="its checksum is wrong") as caught:
        dataset[7]
    assert caught.value.where == f"{in_memory}/{name}, sample 7"
    files.rm(f"/data/train/{name}")
    with pytest.raises(DataError, match="the shard cannot be read: FileNotFoundError"):
        dataset[7]
    with pytest.raises(DataError, match=f"{name} is missing"):
        ShardDataset(in_memory)


def test_what_is_not_there_is_told_at_once() -> None:
    with pytest.raises(DataError, match="has no manifest.json") as caught:
        ShardDataset("memory://nothing/here")
    assert caught.value.where == "memory://nothing/here"
    with pytest.raises(DataError, match="cannot be read: .*not known") as caught:
        ShardDataset("nosuch://bucket/train")
    assert caught.value.where == "nosuch://bucket/train"
    assert not has_shards("memory://nothing/here") and not has_shards("/no/such/folder")


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch) -> None:
    def no_package(url, **more):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", no_package)
    with pytest.raises(DataError, match=r"cannot read s3:// URLs: Install s3fs") as caught:
        open_folder("s3://bucket/train")
    assert "comet-megatron[s3]" in caught.value.way_out


def test_patterns_find_folders_on_disks_and_behind_urls(shard_dir: Path, in_memory: str, tmp_path: Path) -> None:
    (tmp_path / "shards2").mkdir()
    assert find_places(str(tmp_path / "shard*")) == [str(shard_dir), str(tmp_path / "shards2")]
    assert find_places(f"file://{tmp_path}/shard*") == [f"file://{shard_dir}", f"file://{tmp_path}/shards2"]
    (found,) = find_places("memory://data/*")
    assert found == "memory:///data/train" and ShardDataset(found).fingerprint == ShardDataset(in_memory).fingerprint
    assert find_places("memory://nothing/*") == [] == find_places(str(tmp_path / "nothing*"))


def test_a_name_is_joined_as_its_place_wants_it() -> None:
    assert join("s3://bucket/train/", "index.npz") == "s3://bucket/train/index.npz"
    assert join("data/train", "index.npz") == os.path.join("data", "train", "index.npz")


def test_a_remote_folder_lists_files_and_no_folders(in_memory: str, shard_dir: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/data/train/inner/file", b"1")
    assert RemoteFolder(in_memory).sizes() == {path.name: path.stat().st_size for path in shard_dir.iterdir()}


def test_joined_data_sets_count_through(shard_dir: Path, in_memory: str, samples) -> None:
    joined = JoinedDatasets([ShardDataset(shard_dir), ShardDataset(in_memory)], place="both")
    assert len(joined) == 2 * len(samples) and list(joined.lengths) == 2 * [len(s.ids) for s in samples]
    for number in (0, 39, 40, 79, -1):
        np.testing.assert_array_equal(joined[number], samples[number % 40].ids)
    assert joined.loss_mask(41) is None
    with pytest.raises(IndexError):
        joined[80]


def test_a_pattern_before_the_last_part_of_a_chain_is_refused() -> None:
    with pytest.raises(DataError, match="only be in the last part"):
        find_places("zip://tra*::file:///data.zip")


def test_a_failing_network_is_tried_again(in_memory: str, samples, monkeypatch) -> None:
    dataset, tries = ShardDataset(in_memory), []
    kind = type(dataset._folder._files)
    real = kind.cat_file

    def failing(self, *given, **named):
        tries.append(1)
        if len(tries) < 3:
            raise TimeoutError("no answer")
        return real(self, *given, **named)

    monkeypatch.setattr(kind, "cat_file", failing)
    monkeypatch.setattr("comet_megatron.data.storage.RETRY_AFTER_S", (0.0, 0.0))
    np.testing.assert_array_equal(dataset[0], samples[0].ids)
    assert len(tries) == 3


def test_open_files_of_many_folders_together_are_bounded(tmp_path: Path, monkeypatch) -> None:
    from comet_megatron.data import storage
    from comet_megatron.data.shard_writer import write_shards
    from comet_megatron.data.shards import Sample

    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 3)
    given = {"tokenizer_fingerprint": "", "vocab_size": 9, "shard_bytes": 1, "settings": {}}
    for number in range(8):
        write_shards([Sample(np.arange(5))], output_dir=tmp_path / str(number), **given)
    joined = JoinedDatasets([ShardDataset(tmp_path / str(n)) for n in range(8)], place="all")
    before = len(os.listdir("/proc/self/fd"))
    assert sum(len(ids) for ids in joined) == 40
    assert len(os.listdir("/proc/self/fd")) <= before + 3
    for part in joined.parts:
        part.close()
