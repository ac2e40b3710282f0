"""What stands at each position: mixed by weights, packed, and the same however it is read."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from comet_megatron.data.cuts import CutPlan
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.read_ahead import BatchReader
from comet_megatron.data.shard_writer import write_shards
from comet_megatron.data.shards import Sample
from comet_megatron.data.training_data import TrainingData, TrainingSequence
from comet_megatron.errors import DamagedSample, DataError


def made(folder: Path, lengths: list[int], *, first_id: int, shard_bytes: int = 4000) -> ShardDataset:
    """Samples whose ids tell which one it is."""
    samples = [Sample(np.full(n, first_id + i)) for i, n in enumerate(lengths)]
    write_shards(
        samples,
        output_dir=folder,
        tokenizer_fingerprint="",
        vocab_size=10_000,
        shard_bytes=shard_bytes,
        settings={},
    )
    return ShardDataset(folder)


@pytest.fixture
def two(tmp_path: Path) -> list[ShardDataset]:
    return [made(tmp_path / "a", [5, 6, 7], first_id=0), made(tmp_path / "b", [9] * 10, first_id=100)]


def test_sequences_come_by_weight_and_each_data_set_goes_on_through_its_epochs(two) -> None:
    data = TrainingData(two, weights=(3.0, 1.0), seed=7)
    read = [data.at(position)[0].ids[0] for position in range(4096)]
    of_a = [n for n in read if n < 100]
    assert len(of_a) == 3072  # exactly three quarters of each block
    assert set(Counter(of_a).values()) == {1024}  # whole epochs, each sample once in each
    assert all(sorted(of_a[i : i + 3]) == [0, 1, 2] for i in range(0, 3072, 3))
    counts = Counter(n for n in read if n >= 100)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_order_does_not_depend_on_how_samples_lie_in_shards(tmp_path) -> None:
    lengths = list(range(3, 40))
    few = TrainingData([made(tmp_path / "few", lengths, first_id=0)], seed=1)
    many = TrainingData([made(tmp_path / "many", lengths, first_id=0, shard_bytes=1)], seed=1)
    assert few.fingerprint == many.fingerprint
    for position in range(100):
        np.testing.assert_array_equal(few.at(position)[0].ids, many.at(position)[0].ids)


def test_packed_sequences_hold_whole_documents_each_with_its_labels_and_cuts(two) -> None:
    cuts = CutPlan({"random": 1.0}, chunk_size=4, stride=-1, seed=3)
    data = TrainingData(two, weights=(1.0, 1.0), seed=3, cuts=cuts, pack_tokens=30)
    assert len(data) == len(data.packs[0]) + len(data.packs[1]) and data.num_documents == 13
    for position in range(50):
        documents = data.at(position)
        assert sum(map(len, documents)) <= 30 and [len(d) for d in documents] == data.lengths_at(position)
        for document in documents:
            assert len(set(document.ids)) == 1 and document.labels[-1] == -100
            np.testing.assert_array_equal(document.labels[:-1], document.ids[1:])
            assert sum(document.chunk_lengths) == len(document)
    assert any(len(data.at(position)) > 1 for position in range(50))


def test_the_fingerprint_tells_data_weights_packing_and_cuts_apart(two) -> None:
    def fingerprint(datasets=tuple(two), weights=(1.0, 1.0), **more) -> str:
        return TrainingData(datasets, weights=weights, seed=0, **more).fingerprint

    cuts = CutPlan({"right": 1.0}, chunk_size=4, stride=-1, seed=3)
    all_of_them = [
        fingerprint(),
        fingerprint(two[:1], (1.0,)),
        fingerprint(two[::-1]),
        fingerprint(weights=(1.0, 2.0)),
        fingerprint(pack_tokens=20),
        fingerprint(pack_tokens=21),
        fingerprint(cuts=cuts),
    ]
    assert len(set(all_of_them)) == len(all_of_them)
    assert fingerprint(two[:1], (1.0,)) == two[0].fingerprint  # as runs before there were mixtures have it
    assert fingerprint(weights=(1.0, 1.0)) == fingerprint(weights=(2.0, 2.0))  # only ratios matter


def plan(step: int) -> range | None:
    return range(3 * step, 3 * step + 3) if step < 5 else None


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_read_ahead_are_those_read_when_they_are_asked_for(two, workers) -> None:
    data = TrainingData(two, weights=(1.0, 1.0), seed=3, pack_tokens=30)
    plain, ahead = BatchReader(data, plan, num_workers=0), BatchReader(data, plan, num_workers=workers)
    try:
        for step in (1, 2, 3, 4):  # a resumed run does not begin with the first
            for here, there in zip(plain.read(step), ahead.read(step), strict=True):
                assert here.position == there.position and len(here.documents) == len(there.documents) >= 1
                for one, other in zip(here.documents, there.documents, strict=True):
                    np.testing.assert_array_equal(one.ids, other.ids)
                    np.testing.assert_array_equal(one.labels, other.labels)
    finally:
        ahead.close()


def test_a_shard_that_is_gone_is_an_error_and_no_damage_so_that_it_is_not_skipped(two) -> None:
    (Path(two[1].place) / "shard-000000.tar").rename(Path(two[1].place) / "elsewhere")
    reader = BatchReader(TrainingData([two[1]], seed=3), lambda step: range(2), num_workers=0)
    errors = [error for read in reader.read(0) for error in read.errors.values()]
    assert len(errors) == 2 and all(type(error) is DataError for error in errors)


def test_of_documents_that_share_a_sequence_only_the_damaged_one_is_missing(two) -> None:
    shard = Path(two[1].place) / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[int(two[1]._index.ids_offset[4] + two[1]._index.ids_size[4]) - 1] ^= 1
    shard.write_bytes(content)
    reader = BatchReader(TrainingData([two[1]], seed=3, pack_tokens=90), lambda step: range(1), num_workers=0)
    (read,) = reader.read(0)
    assert len(read.documents) == 10 and list(read.errors) == [(0, [*read.documents].index(*read.errors.values()))]


def test_many_data_sets_do_not_sort_their_orders_anew_at_every_position(tmp_path, monkeypatch) -> None:
    from comet_megatron.data import sampler

    sorted_orders, real = [], sampler._permutation
    monkeypatch.setattr(sampler, "_permutation", lambda *given: sorted_orders.append(given) or real(*given))
    datasets = [made(tmp_path / str(n), [5] * 100, first_id=100 * n) for n in range(9)]
    data = TrainingData(datasets, weights=(1.0,) * 9, seed=1)
    for position in range(800):
        data.lengths_at(position)
    assert len(sorted_orders) <= 2 * 9  # two epochs of each at most


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_sample_is_told_with_its_position_and_the_others_are_read(two, workers) -> None:
    shard = Path(two[1].place) / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[int(two[1]._index.ids_offset[4] + two[1]._index.ids_size[4]) - 1] ^= 1
    shard.write_bytes(content)
    reader = BatchReader(TrainingData([two[1]], seed=3), lambda step: range(10), num_workers=workers)
    try:
        batch = reader.read(0)
    finally:
        reader.close()
    (error,) = [error for read in batch for error in read.errors.values()]
    assert isinstance(error, DamagedSample) and "checksum" in error.what and error.where == f"{shard}, sample 4"
    assert sum(isinstance(d, TrainingSequence) for read in batch for d in read.documents) == 9


def test_a_reading_process_that_dies_is_told(two, monkeypatch) -> None:
    reader = BatchReader(TrainingData(two[:1], seed=3), plan, num_workers=1)
    try:
        reader.read(0)
        for process in reader._pool._processes.values():
            process.kill()
            process.join()
        reader._ahead.clear()
        (first, *_) = reader.read(1)
        (error,) = first.errors.values()
        assert "died" in error.what and "data.workers=0" in error.way_out
        assert not isinstance(error, DamagedSample)  # it may not be skipped: the data are whole
    finally:
        reader.close()
