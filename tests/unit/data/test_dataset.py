"""Reading shards."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from comet_megatron.data import storage
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.shard_writer import write_shards
from comet_megatron.data.shards import load_index, load_manifest
from comet_megatron.errors import DataError


def test_every_sample_comes_back_as_written_in_any_order(shard_dir: Path, samples) -> None:
    dataset = ShardDataset(shard_dir)
    assert len(dataset) == len(samples)
    assert list(dataset.lengths) == [len(sample.ids) for sample in samples]
    assert dataset.num_tokens == dataset.lengths.sum() == dataset.manifest.num_tokens
    for number in np.random.default_rng(0).permutation(len(samples)):
        ids = dataset[number]
        assert ids.dtype == np.int32 and ids.flags.writeable
        np.testing.assert_array_equal(ids, samples[number].ids)


def test_it_counts_from_the_end_and_stops_at_the_end_as_a_sequence_does(shard_dir: Path, samples) -> None:
    dataset = ShardDataset(shard_dir)
    np.testing.assert_array_equal(dataset[-1], samples[-1].ids)
    for outside in (len(samples), -len(samples) - 1):
        with pytest.raises(IndexError):
            dataset[outside]
    assert sum(len(ids) for ids in dataset) == dataset.num_tokens


def test_open_files_are_bounded_and_closed(shard_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 2)
    dataset = ShardDataset(shard_dir)
    assert len(dataset.manifest.shards) > 3
    assert len(dataset[0]) and len(dataset[-1])  # what other tests left open is closed for these
    dataset.close()
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else pytest.skip("needs /proc")
    for number in [*range(len(dataset)), *range(len(dataset))]:
        assert len(dataset[number])
        assert len(os.listdir("/proc/self/fd")) <= before + 2
    dataset.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert len(dataset[0])  # opens it again


def test_a_pickled_dataset_reads_the_same(shard_dir: Path, samples) -> None:
    dataset = ShardDataset(shard_dir)
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    for number in (0, 39):
        np.testing.assert_array_equal(copy[number], samples[number].ids)


def test_threads_may_share_it(shard_dir: Path, samples, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MAX_OPEN_FILES", 1)  # as much opening and closing as possible
    dataset = ShardDataset(shard_dir)
    numbers = [int(n) for n in np.random.default_rng(0).integers(0, len(dataset), size=500)]
    with ThreadPoolExecutor(8) as pool:
        for number, ids in zip(numbers, pool.map(dataset.__getitem__, numbers), strict=True):
            np.testing.assert_array_equal(ids, samples[number].ids)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_forked_processes_may_share_open_files(shard_dir: Path, samples) -> None:
    dataset = ShardDataset(shard_dir)
    dataset[0]  # open before the fork
    children = []
    for _ in range(2):
        if (child := os.fork()) == 0:
            fine = all(np.array_equal(dataset[n], samples[n].ids) for n in range(len(dataset)))
            os._exit(0 if fine else 1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage", "complaint"),
    [
        ("shard-000001.tar", Path.unlink, "shard-000001.tar is missing"),
        ("shard-000001.tar", cut, "shard-000001.tar has .* bytes"),
        ("index.npz", Path.unlink, "index cannot be read"),
        ("index.npz", cut, "index is damaged"),
        ("manifest.json", Path.unlink, "no manifest.json"),
        ("manifest.json", halve, "manifest is damaged"),
    ],
)
def test_a_folder_that_is_not_whole_is_refused_when_opened(
    shard_dir: Path, name: str, damage: Callable[[Path], None], complaint: str
) -> None:
    damage(shard_dir / name)
    with pytest.raises(DataError, match=complaint) as caught:
        ShardDataset(shard_dir)
    assert str(shard_dir) in caught.value.where and caught.value.way_out


def test_all_bad_shards_are_named_at_once(shard_dir: Path) -> None:
    (shard_dir / "shard-000000.tar").unlink()
    cut(shard_dir / "shard-000002.tar")
    with pytest.raises(DataError, match="shard-000000.tar is missing; shard-000002.tar has"):
        ShardDataset(shard_dir)


def test_the_index_of_other_data_is_refused(shard_dir: Path, tmp_path: Path, samples) -> None:
    write_shards(
        samples[::-1],
        output_dir=tmp_path / "other",
        tokenizer_fingerprint="",
        vocab_size=1000,
        shard_bytes=4000,
        settings={},
    )
    (shard_dir / "index.npz").write_bytes((tmp_path / "other" / "index.npz").read_bytes())
    with pytest.raises(DataError, match="of other data"):
        ShardDataset(shard_dir)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        ShardDataset(tmp_path / "gone")


def test_a_flipped_bit_is_found_and_shard_and_sample_are_named(shard_dir: Path) -> None:
    manifest = load_manifest(shard_dir)
    index = load_index(shard_dir, manifest=manifest)
    victim = 20
    path = shard_dir / manifest.shards[index.shard[victim]].name
    content = bytearray(path.read_bytes())
    content[index.ids_offset[victim] + index.ids_size[victim] - 1] ^= 1
    path.write_bytes(content)
    dataset = ShardDataset(shard_dir)
    with pytest.raises(DataError, match="damaged") as caught:
        dataset[victim]
    assert path.name in caught.value.where and f"sample {victim}" in caught.value.where
    assert len(dataset[victim + 1]) and len(dataset[victim - 1])


def test_a_shard_cut_off_after_opening_is_found(shard_dir: Path) -> None:
    dataset = ShardDataset(shard_dir)
    path = shard_dir / "shard-000000.tar"
    os.truncate(path, 600)
    with pytest.raises(DataError, match="cut off") as caught:
        dataset[0]
    assert "shard-000000.tar, sample 0" in caught.value.where


def test_a_shard_removed_after_opening_is_found(shard_dir: Path) -> None:
    dataset = ShardDataset(shard_dir)
    (shard_dir / "shard-000000.tar").unlink()
    with pytest.raises(DataError, match="cannot be read"):
        dataset[0]


def test_ids_beyond_the_vocabulary_of_the_manifest_are_refused(shard_dir: Path, samples) -> None:
    dataset = ShardDataset(shard_dir)
    dataset.manifest = dataclasses.replace(dataset.manifest, vocab_size=int(samples[3].ids.max()))
    with pytest.raises(DataError, match=f"token id {samples[3].ids.max()} is outside the vocabulary") as caught:
        dataset[3]
    assert "sample 3" in caught.value.where
