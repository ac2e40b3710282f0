"""Mixtures, packed documents, damaged samples: what is trained on is the oracle's, on every layout."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from comet_megatron.checkpoint.model_folder import read_progress
from comet_megatron.checkpoint.run_folder import checkpoint_folder
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.training_data import TrainingData, sequence_of
from comet_megatron.testing.runs import run_and_record, run_command, write_config, write_data, write_start
from comet_megatron.testing.tiny import build_oracle, tiny_architecture, tiny_memory, tiny_sequences

SEED = 1234  # of the order, by default
PACK = 80
LAYOUTS = {"alone": (1, {}), "dp2": (2, {}), "pp2": (2, {"pp": 2}), "tp2": (2, {"tp": 2})}


@pytest.fixture(scope="module")
def ready(tmp_path_factory, pool) -> Path:
    """A start and two data sets, one of short documents."""
    folder = tmp_path_factory.mktemp("mixed")
    write_data(folder / "short", tiny_sequences((9, 16, 20, 30, 12, 25, 33, 18)))
    write_data(folder / "long", tiny_sequences((70, 50, 61)))
    pool(1).run(write_start, folder / "start", tiny_architecture(), tiny_memory())
    return folder


def mixture(ready: Path) -> list[list[object]]:
    return [[str(ready / "short"), 1.0], [str(ready / "long"), 2.0]]


def config_of(ready: Path, path: Path, *, data: dict[str, object], **sections: dict[str, object]) -> Path:
    train = {"output": str(path.with_suffix("")), "steps": 3, "global_batch_size": 4, **sections.pop("train", {})}
    return write_config(path, ready, data=data, train=train, optimizer={"warmup_steps": 0}, **sections)


@torch.no_grad()
def oracle_loss(documents) -> float:
    """Mean over the labels of documents, each read from its beginning with an empty memory."""
    oracle, total, count = build_oracle(tiny_architecture(), tiny_memory()), 0.0, 0
    for document in documents:
        logits = oracle(torch.from_numpy(document.ids.astype(np.int64))[None]).logits[0]
        labels = torch.from_numpy(document.labels)
        total += float(F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels >= 0).sum())
    return total / count


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in r]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_documents_that_share_a_sequence_are_computed_as_if_each_were_alone(layout, ready, tmp_path, pool):
    """The loss of the first step, whose batch packs documents of two data sets, is the oracle's."""
    processes, parallel = LAYOUTS[layout]
    datasets = [ShardDataset(ready / "short"), ShardDataset(ready / "long")]
    data = TrainingData(datasets, weights=(1.0, 2.0), seed=SEED, pack_tokens=PACK)
    documents = [document for position in range(4) for document in data.at(position)]
    assert len(documents) > 4 and {len(d) for d in documents} & {70, 50, 61}
    given = {"train": mixture(ready), "pack_tokens": PACK}
    config = config_of(ready, tmp_path / "run.yaml", data=given, parallel=parallel)
    for code, _, err in pool(processes).run(run_command, "--config", str(config)):
        assert code == 0, err
    assert losses(tmp_path / "run")[0] == pytest.approx(oracle_loss(documents), abs=1e-5)
    # Control: as one text without borders it is another loss.
    joined = [type(documents[0])(*(np.concatenate([getattr(d, n) for d in documents]) for n in ("ids", "labels")))]
    assert abs(oracle_loss(joined) - oracle_loss(documents)) > 1e-3


def test_every_layout_trains_on_the_same_mixture_and_a_resume_goes_on_in_it(ready, tmp_path, pool):
    given = {"train": mixture(ready), "pack_tokens": PACK}
    config = config_of(ready, tmp_path / "whole.yaml", data=given, train={"save_every": 1})
    whole = pool(2).run(run_and_record, "--config", str(config))
    assert {code for code, *_ in whole} == {0}, whole[0][1]
    by_step = [[h for *_, read in sorted(whole, key=lambda r: r[2]) for h in read[step]] for step in (1, 2, 3)]
    alone = pool(1).run(run_and_record, "--config", str(config), f"train.output={tmp_path / 'alone'}")
    assert [alone[0][3][step] for step in (1, 2, 3)] == by_step
    parts = f"train.output={tmp_path / 'parts'}"
    assert pool(2).run(run_command, "--config", str(config), parts, "train.steps=1")[0][0] == 0
    rest = pool(1).run(run_and_record, "--config", str(config), parts, "--resume")
    assert rest[0][0] == 0, rest[0][1]
    assert [rest[0][3][step] for step in (2, 3)] == by_step[1:]


@pytest.mark.parametrize(
    "change",
    ["data.pack_tokens=64", "data.train=[[{0}/short,1],[{0}/long,1]]", "data.train={0}/short"],
)
def test_another_mixture_or_packing_is_refused_on_resume(change, ready, tmp_path, pool):
    given = {"train": mixture(ready), "pack_tokens": PACK}
    config = config_of(ready, tmp_path / "run.yaml", data=given, train={"steps": 1})
    assert pool(1).run(run_command, "--config", str(config))[0][0] == 0
    again = ("--config", str(config), "--resume", "train.steps=2")
    code, _, err = pool(1).run(run_command, *again, change.format(ready))[0]
    assert code == 2 and "is not the data the run was started with" in err
    assert ("data.pack_tokens=64, was 80" in err) == ("pack" in change)


# --- damaged samples --------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(ready, tmp_path) -> tuple[Path, int]:
    """Data in which the third sequence of the first step has a flipped byte, and that sample's number."""
    write_data(tmp_path / "data", tiny_sequences((40, 41, 42, 43, 44, 45, 46, 47)))
    dataset = ShardDataset(tmp_path / "data")
    _, _, victim = TrainingData([dataset], seed=SEED).mixture.at(2)
    path = tmp_path / "data" / dataset._shard_of(victim)
    content = bytearray(path.read_bytes())
    content[int(dataset._index.ids_offset[victim] + dataset._index.ids_size[victim]) - 1] ^= 1
    path.write_bytes(content)
    return tmp_path / "data", victim


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_a_damaged_sample_stops_all_ranks_with_one_message_and_what_to_do(layout, damaged, ready, tmp_path, pool):
    folder, victim = damaged
    config = config_of(ready, tmp_path / "run.yaml", data={"train": str(folder)}, parallel=LAYOUTS[layout][1])
    results = pool(2).run(run_command, "--config", str(config))
    assert {code for code, _, _ in results} == {2}
    message = results[0][2]
    assert "its checksum is wrong" in message and f"sample {victim}" in message and "on_bad_sample=skip" in message


@pytest.mark.parametrize("layout", ["alone", "dp2", "pp2"])
def test_a_damaged_sample_is_left_out_counted_and_named_where_that_is_asked_for(layout, damaged, ready, tmp_path, pool):
    (folder, victim), (processes, parallel) = damaged, LAYOUTS[layout]
    data = {"train": str(folder), "on_bad_sample": "skip"}
    logging = {"tensorboard": True}
    config = config_of(ready, tmp_path / "run.yaml", data=data, parallel=parallel, logging=logging)
    results = pool(processes).run(run_command, "--config", str(config))
    assert {code for code, _, _ in results} == {0}, results[0][2]
    out = results[0][1]
    assert "step 1/3  LEFT OUT (1 in all): the sample is damaged: its checksum is wrong" in out
    assert f"sample {victim})" in out
    whole = TrainingData([ShardDataset(folder)], seed=SEED)
    rest = [document for position in (0, 1, 3) for document in whole.at(position)]
    assert losses(tmp_path / "run")[0] == pytest.approx(oracle_loss(rest), abs=1e-5)
    # The second epoch begins with step 3 and may meet it again.
    again = [p for p in range(4, 12) if whole.mixture.at(p).sample == victim]
    assert read_progress(checkpoint_folder(tmp_path / "run", 3)).bad_samples == 1 + len(again)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("data/bad_samples")][0] == (1, 1.0)


def test_a_step_without_one_good_sample_ends_the_run(ready, tmp_path, pool):
    write_data(tmp_path / "data", tiny_sequences((40, 41)))
    (shard,) = (tmp_path / "data").glob("*.tar")
    dataset = ShardDataset(tmp_path / "data")
    content = bytearray(shard.read_bytes())
    for number in range(2):
        content[int(dataset._index.ids_offset[number] + dataset._index.ids_size[number]) - 1] ^= 1
    shard.write_bytes(content)
    data = {"train": str(tmp_path / "data"), "on_bad_sample": "skip"}
    config = config_of(ready, tmp_path / "run.yaml", data=data, train={"global_batch_size": 2})
    results = pool(2).run(run_command, "--config", str(config))
    assert {code for code, _, _ in results} == {2} and "no sample of step 1 can be used" in results[0][2]


def test_damage_in_held_out_data_is_said_and_not_counted_as_trainings(damaged, ready, tmp_path, pool):
    folder, victim = damaged
    data = {"train": str(ready / "long"), "eval": str(folder), "on_bad_sample": "skip"}
    train = {"steps": 2, "eval_every": 2, "global_batch_size": 2}
    config = config_of(ready, tmp_path / "run.yaml", data=data, train=train)
    results = pool(2).run(run_command, "--config", str(config))
    assert {code for code, _, _ in results} == {0}, results[0][2]
    out = results[0][1]
    assert out.count("WARNING  left out of the evaluation: the sample is damaged") == 2 and f"sample {victim})" in out
    assert read_progress(checkpoint_folder(tmp_path / "run", 2)).bad_samples == 0
    rest = [sequence_of(ShardDataset(folder), n) for n in range(8) if n != victim]
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["eval_loss"] == pytest.approx(oracle_loss(rest), abs=1e-5)


def test_of_a_packed_sequence_only_the_damaged_document_is_left_out(damaged, ready, tmp_path, pool):
    folder, victim = damaged
    data = {"train": str(folder), "pack_tokens": 200, "on_bad_sample": "skip"}
    config = config_of(ready, tmp_path / "run.yaml", data=data, train={"global_batch_size": 2, "steps": 1})
    results = pool(2).run(run_command, "--config", str(config))
    assert {code for code, _, _ in results} == {0}, results[0][2]
    packed = TrainingData([ShardDataset(folder)], seed=SEED, pack_tokens=200)
    documents = [p.sample for position in range(2) for p in packed._places(position)]
    assert victim in documents and len(documents) == 8
    rest = [sequence_of(ShardDataset(folder), n) for n in documents if n != victim]
    assert losses(tmp_path / "run")[0] == pytest.approx(oracle_loss(rest), abs=1e-5)


def test_a_shard_that_cannot_be_read_now_stops_the_run_whatever_may_be_skipped(ready, tmp_path, pool):
    write_data(tmp_path / "data", tiny_sequences((40, 41, 42, 43)))
    data = {"train": str(tmp_path / "data"), "on_bad_sample": "skip"}
    config = config_of(ready, tmp_path / "run.yaml", data=data)
    results = pool(2).run(command_on_a_vanishing_shard, tmp_path / "data", "--config", str(config))
    assert {code for code, _, _ in results} == {2}
    assert "the shard cannot be read: No such file" in results[0][2] and "LEFT OUT" not in results[0][1]


def command_on_a_vanishing_shard(process, folder: Path, *arguments: str):
    """The command; after the data was opened its shard is gone."""
    from comet_megatron.data import dataset

    real = dataset.ShardDataset._check_shards

    def check_and_remove(self) -> None:
        real(self)
        self._folder.place = str(folder / "gone")

    with mock.patch.object(dataset.ShardDataset, "_check_shards", check_and_remove):
        return run_command(process, *arguments)
