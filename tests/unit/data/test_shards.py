"""Writing shards and their index."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from comet_megatron.data.shard_writer import index_shard, write_shards
from comet_megatron.data.shards import Sample, ShardIndex, load_index, load_manifest
from comet_megatron.errors import DataError, OutputError

OPTIONS = {"tokenizer_fingerprint": "f" * 64, "vocab_size": 1000, "settings": {}}


def test_the_shards_are_plain_webdataset_files_in_the_order_of_the_samples(shard_dir: Path, samples) -> None:
    found = []
    for path in sorted(shard_dir.glob("*.tar")):
        found += list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False).decode())
    assert len(found) == len(samples)
    for sample, read in zip(samples, found, strict=True):
        np.testing.assert_array_equal(read["ids.npy"], sample.ids)
        assert read["ids.npy"].dtype == np.int32
        assert read["meta.json"] == {**sample.meta, "num_tokens": len(sample.ids)}


def test_the_index_points_at_the_payload_of_each_sample(shard_dir: Path, samples) -> None:
    manifest = load_manifest(shard_dir)
    index = load_index(shard_dir, manifest=manifest)
    assert list(index.num_tokens) == [len(sample.ids) for sample in samples]
    assert sorted(set(index.shard)) == list(range(len(manifest.shards))) and len(manifest.shards) > 2
    for number, sample in enumerate(samples):
        content = (shard_dir / manifest.shards[index.shard[number]].name).read_bytes()
        offset, size = index.ids_offset[number], index.ids_size[number]
        assert content[offset : offset + 6] == b"\x93NUMPY"
        end = np.frombuffer(content[offset : offset + size][-4 * len(sample.ids) :], dtype=np.int32)
        np.testing.assert_array_equal(end, sample.ids)


def test_the_manifest_counts_what_was_written(shard_dir: Path, samples) -> None:
    manifest = load_manifest(shard_dir)
    assert manifest.num_samples == len(samples) == sum(shard.num_samples for shard in manifest.shards)
    assert manifest.num_tokens == sum(len(sample.ids) for sample in samples)
    assert manifest.settings == {"sequence_length": 300}
    assert (manifest.vocab_size, manifest.tokenizer_fingerprint) == (1000, "f" * 64)
    for shard in manifest.shards:
        assert (shard_dir / shard.name).stat().st_size == shard.size_bytes


def test_the_same_samples_give_the_same_bytes_on_another_day(tmp_path: Path, samples, monkeypatch) -> None:
    for name, now in (("a", 1e9), ("b", 1.1e9)):
        monkeypatch.setattr("time.time", lambda now=now: now)
        write_shards(samples, output_dir=tmp_path / name, shard_bytes=5000, **OPTIONS)
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) > 3
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_the_fingerprint_sees_ids_and_cuts_but_not_shards_or_meta(tmp_path: Path, samples) -> None:
    def fingerprint(name: str, changed: list[Sample], shard_bytes: int = 5000) -> str:
        return write_shards(changed, output_dir=tmp_path / name, shard_bytes=shard_bytes, **OPTIONS).fingerprint

    original = fingerprint("original", samples)
    assert fingerprint("one shard", samples, 1 << 30) == original
    assert fingerprint("other meta", [Sample(s.ids, {"x": 1}) for s in samples]) == original
    assert fingerprint("other order", samples[::-1]) != original
    assert fingerprint("one id", [Sample(samples[0].ids ^ 1), *samples[1:]]) != original
    joined = Sample(np.concatenate([samples[0].ids, samples[1].ids]))
    assert fingerprint("joined", [joined, *samples[2:]]) != original


def test_indexing_a_shard_again_gives_the_index_on_disk(shard_dir: Path) -> None:
    manifest = load_manifest(shard_dir)
    index = load_index(shard_dir, manifest=manifest)
    again = [index_shard(shard_dir / shard.name, shard=n) for n, shard in enumerate(manifest.shards)]
    for name in ShardIndex.__dataclass_fields__:
        np.testing.assert_array_equal(getattr(index, name), np.concatenate([getattr(part, name) for part in again]))


def test_a_cut_off_tar_file_cannot_be_indexed(shard_dir: Path) -> None:
    path = shard_dir / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError) as caught:
        index_shard(path, shard=0)
    assert "shard-000000.tar" in caught.value.where
    path.write_bytes(b"not a tar file" * 100)
    with pytest.raises(DataError, match="cannot be read"):
        index_shard(path, shard=0)


def test_a_folder_that_holds_something_is_refused_and_left_alone(tmp_path: Path, samples) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        write_shards(samples, output_dir=tmp_path / "out", shard_bytes=5000, **OPTIONS)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "precious"]


def test_an_existing_empty_folder_is_filled(tmp_path: Path, samples) -> None:
    (tmp_path / "out").mkdir()
    write_shards(samples, output_dir=tmp_path / "out", shard_bytes=5000, **OPTIONS)
    assert load_manifest(tmp_path / "out").num_samples == len(samples)


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path, samples) -> None:
    def interrupted() -> Iterator[Sample]:
        yield from samples
        assert [path for path in tmp_path.iterdir() if path.name != "out"], "the work goes on next to the output"
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(interrupted(), output_dir=tmp_path / "out", shard_bytes=500, **OPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (np.array([1, 1000]), "token id 1000 is outside"),
        (np.array([-1, 5]), "token id -1 is outside"),
        (np.array([], dtype=np.int64), "list of token ids"),
        (np.array([[1]]), "list of token ids"),
        (np.array([0.5]), "list of token ids"),
    ],
)
def test_a_sample_that_makes_no_sense_is_refused_by_number(tmp_path: Path, bad: np.ndarray, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint) as caught:
        write_shards(
            [Sample(np.array([1])), Sample(bad, {"document": "d.txt"})],
            output_dir=tmp_path / "out",
            shard_bytes=500,
            **OPTIONS,
        )
    assert "sample 1" in caught.value.where and "d.txt" in caught.value.where
    assert not list(tmp_path.iterdir())


def test_no_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sample"):
        write_shards([], output_dir=tmp_path / "out", shard_bytes=500, **OPTIONS)


def test_a_key_sorts_as_its_sample(shard_dir: Path) -> None:
    with tarfile.open(shard_dir / "shard-000001.tar") as tar:
        names = tar.getnames()
    assert names == sorted(names) and all(member.isascii() and len(member) < 100 for member in names)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda m: m.update(version=99), "version 99"),
        (lambda m: m.update(format="something else"), "something else"),
        (lambda m: m.pop("shards"), "damaged"),
        (lambda m: m.pop("version"), "damaged"),
        (lambda m: m.update(num_samples=3), "damaged"),
        (lambda m: m.update(surprise=3), "damaged"),
        (lambda m: m["shards"][0].update(name="../../secret.tar"), "not the name of a file"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(shard_dir: Path, change, complaint: str) -> None:
    path = shard_dir / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
    with pytest.raises(DataError, match=complaint) as caught:
        load_manifest(shard_dir)
    assert caught.value.where == str(path) and caught.value.way_out


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_manifest_that_is_no_json_object_is_refused(shard_dir: Path, content: str) -> None:
    (shard_dir / "manifest.json").write_text(content)
    with pytest.raises(DataError, match="damaged"):
        load_manifest(shard_dir)


def test_the_folder_above_the_shards_is_refused_with_a_hint(shard_dir: Path) -> None:
    with pytest.raises(DataError, match="perhaps you mean .*shards"):
        load_manifest(shard_dir.parent)
