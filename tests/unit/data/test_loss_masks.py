"""Loss masks in shards: written, read, checked, and no part of data that has none."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.shard_writer import index_shard, write_shards
from comet_megatron.data.shards import MASK_MEMBER, Sample, load_index, load_manifest
from comet_megatron.errors import DataError

OPTIONS = {"tokenizer_fingerprint": "f" * 64, "vocab_size": 1000, "shard_bytes": 4000, "settings": {}}


@pytest.fixture
def masked(samples) -> list[Sample]:
    """The samples, two of three with a mask."""
    random = np.random.default_rng(1)
    masks = [random.random(len(s.ids)) < 0.3 if n % 3 else None for n, s in enumerate(samples)]
    return [Sample(s.ids, s.meta, mask) for s, mask in zip(samples, masks, strict=True)]


@pytest.fixture
def masked_dir(tmp_path: Path, masked) -> Path:
    write_shards(masked, output_dir=tmp_path / "masked", **OPTIONS)
    return tmp_path / "masked"


def labels_of(sample: Sample) -> int:
    return len(sample.ids) if sample.loss_mask is None else int(sample.loss_mask.sum())


def test_masks_come_back_as_written_and_samples_without_one_have_none(masked_dir: Path, masked) -> None:
    dataset = ShardDataset(masked_dir)
    for number, sample in enumerate(masked):
        np.testing.assert_array_equal(dataset[number], sample.ids)
        if sample.loss_mask is None:
            assert dataset.loss_mask(number) is None
        else:
            mask = dataset.loss_mask(number)
            assert mask.dtype == np.bool_ and mask.flags.writeable
            np.testing.assert_array_equal(mask, sample.loss_mask)
    assert list(dataset.label_counts) == [labels_of(sample) for sample in masked]
    assert dataset.manifest.num_labels == sum(labels_of(sample) for sample in masked)
    np.testing.assert_array_equal(dataset.loss_mask(-2), masked[-2].loss_mask)
    with pytest.raises(IndexError):
        dataset.loss_mask(len(masked))


def test_a_mask_is_a_plain_webdataset_member_and_the_meta_data_counts_its_labels(masked_dir: Path, masked) -> None:
    found = []
    for path in sorted(masked_dir.glob("*.tar")):
        found += list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode())
    for sample, read in zip(masked, found, strict=True):
        assert (MASK_MEMBER in read) == (sample.loss_mask is not None)
        if sample.loss_mask is not None:
            np.testing.assert_array_equal(read[MASK_MEMBER], sample.loss_mask.astype(np.uint8))
            assert read["meta.json"]["num_labels"] == labels_of(sample)


def test_the_fingerprint_sees_every_bit_of_a_mask_and_whether_there_is_one(tmp_path: Path, samples) -> None:
    def fingerprint(name: str, first_mask: np.ndarray | None) -> str:
        changed = [Sample(samples[0].ids, {}, first_mask), *samples[1:]]
        return write_shards(changed, output_dir=tmp_path / name, **OPTIONS).fingerprint

    every = np.ones(len(samples[0].ids), dtype=bool)
    but_last = every.copy()
    but_last[-1] = False
    assert len({fingerprint("none", None), fingerprint("every", every), fingerprint("but last", but_last)}) == 3


def test_data_without_masks_has_the_fingerprint_and_the_index_it_had_in_version_1(shard_dir: Path) -> None:
    manifest = load_manifest(shard_dir)
    assert manifest.fingerprint == "520be44e8bb72145ae2234ec9b9d56ac1f5ab1993a30d791c02f73c066410706"
    with np.load(shard_dir / "index.npz") as columns:
        assert sorted(columns) == ["ids_crc32", "ids_offset", "ids_size", "num_tokens", "shard"]


def test_a_folder_of_version_1_is_read_and_every_token_carries_loss(shard_dir: Path, samples) -> None:
    path = shard_dir / "manifest.json"
    values = json.loads(path.read_text())
    del values["num_labels"]
    path.write_text(json.dumps(values | {"version": 1}))
    dataset = ShardDataset(shard_dir)
    assert dataset.manifest.num_labels == dataset.num_tokens
    assert list(dataset.label_counts) == list(dataset.lengths)
    np.testing.assert_array_equal(dataset[3], samples[3].ids)
    assert dataset.loss_mask(3) is None


def test_indexing_a_shard_with_masks_again_gives_the_index_on_disk(masked_dir: Path) -> None:
    manifest = load_manifest(masked_dir)
    index = load_index(masked_dir, manifest=manifest)
    again = [index_shard(masked_dir / shard.name, shard=n) for n, shard in enumerate(manifest.shards)]
    for name in ("mask_offset", "mask_size", "mask_crc32", "num_labels"):
        np.testing.assert_array_equal(getattr(index, name), np.concatenate([getattr(part, name) for part in again]))


def test_a_flipped_bit_of_a_mask_is_found_and_shard_and_sample_are_named(masked_dir: Path) -> None:
    manifest = load_manifest(masked_dir)
    index = load_index(masked_dir, manifest=manifest)
    victim = 20
    path = masked_dir / manifest.shards[index.shard[victim]].name
    content = bytearray(path.read_bytes())
    content[index.mask_offset[victim] + index.mask_size[victim] - 1] ^= 1
    path.write_bytes(content)
    dataset = ShardDataset(masked_dir)
    assert len(dataset[victim])
    with pytest.raises(DataError, match="loss mask is damaged") as caught:
        dataset.loss_mask(victim)
    assert path.name in caught.value.where and f"sample {victim}" in caught.value.where


@pytest.mark.parametrize("bad", [np.ones(3, dtype=np.uint8), np.ones(2, dtype=bool), np.ones((3, 1), dtype=bool)])
def test_a_mask_that_does_not_fit_its_ids_is_refused(tmp_path: Path, bad: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"loss mask must be bool \[3\]"):
        write_shards([Sample(np.arange(3), {}, bad)], output_dir=tmp_path / "out", **OPTIONS)
    assert not list(tmp_path.iterdir())


def test_a_mask_without_ids_is_found_when_a_shard_is_indexed(masked_dir: Path, tmp_path: Path) -> None:
    with tarfile.open(masked_dir / "shard-000000.tar") as whole, tarfile.open(tmp_path / "bad.tar", "w") as bad:
        for member in whole:
            if member.name != "000000001.ids.npy":
                bad.addfile(member, whole.extractfile(member))
    with pytest.raises(DataError, match="loss mask without token ids: 000000001"):
        index_shard(tmp_path / "bad.tar", shard=0)
