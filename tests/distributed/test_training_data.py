"""What the trainer makes of its data: tokens without loss are no labels, cuts are as drawn, on every layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from comet_megatron.chunking import IGNORE_LABEL, next_token_labels
from comet_megatron.data.cuts import CutPlan, parse_ways
from comet_megatron.data.sampler import sample_index
from comet_megatron.data.shard_writer import write_shards
from comet_megatron.data.shards import Sample
from comet_megatron.testing.runs import run_command, write_config, write_start
from comet_megatron.testing.tiny import TEXT_IDS, build_oracle, tiny_architecture, tiny_memory, tiny_sequences

LENGTHS = (50, 37, 41, 20)
SEED = 1234  # of the order, by default


def prepare(tmp_path: Path, pool, masks: list[np.ndarray | None]) -> list[np.ndarray]:
    sequences = tiny_sequences(LENGTHS)
    samples = (Sample(ids, {"name": str(i)}, mask) for i, (ids, mask) in enumerate(zip(sequences, masks, strict=True)))
    write_shards(
        samples,
        output_dir=tmp_path / "data",
        tokenizer_fingerprint="none",
        vocab_size=TEXT_IDS,
        shard_bytes=1 << 14,
        settings={},
    )
    pool(1).run(write_start, tmp_path / "start", tiny_architecture(), tiny_memory())
    return sequences


def first_loss(tmp_path: Path, pool, processes: int, name: str, **sections) -> float:
    train = {"output": str(tmp_path / name), "steps": 1, "global_batch_size": 2}
    optimizer = {"warmup_steps": 0}
    config = write_config(tmp_path / f"{name}.yaml", tmp_path, train=train, optimizer=optimizer, **sections)
    for code, _, err in pool(processes).run(run_command, "--config", str(config)):
        assert code == 0, err
    return json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"]


@torch.no_grad()
def oracle_loss(sequences, labels, cuts) -> float:
    """Mean over the labels of the first two positions, each piece of a sequence a chunk of its own."""
    oracle, total, count = build_oracle(tiny_architecture(), tiny_memory()), 0.0, 0
    for position in range(2):
        epoch, number = sample_index(position, num_samples=len(LENGTHS), seed=SEED)
        text, wanted = torch.from_numpy(sequences[number].astype(np.int64))[None], torch.from_numpy(labels[number])
        drawn = cuts.cut(sequences[number], epoch=epoch, sample=number)
        oracle.config.temp_beacon_stride = drawn.stride
        memory, start = None, 0
        for length in drawn.lengths:
            piece = text[:, start : start + length]
            out = oracle(piece, memory=memory, return_memory=True)
            logits, targets = out.logits[0], wanted[start : start + length]
            total += float(F.cross_entropy(logits, targets, ignore_index=IGNORE_LABEL, reduction="sum"))
            memory, start = out.memory, start + length
        count += int((wanted != IGNORE_LABEL).sum())
    return total / count


def masks_of(sequences_lengths) -> list[np.ndarray | None]:
    """Loss on the last third, on every second token, on all, and on a stretch in the middle."""
    masks = [np.zeros(n, dtype=bool) for n in sequences_lengths]
    masks[0][-len(masks[0]) // 3 :] = True
    masks[1][::2] = True
    masks[3][5:9] = True
    return [masks[0], masks[1], None, masks[3]]


@pytest.mark.parametrize(
    ("ways", "max_stride"),
    [("fixed", 0), ("random:0.5, right:0.5", 0), ("uniform", 16)],
    ids=["fixed", "mix", "strides"],
)
def test_the_first_loss_is_the_oracles_on_the_labels_and_cuts_of_the_data(ways, max_stride, tmp_path, pool):
    masks = masks_of(LENGTHS)
    sequences = prepare(tmp_path, pool, masks)
    labels = [next_token_labels(ids, mask) for ids, mask in zip(sequences, masks, strict=True)]
    memory = tiny_memory()
    cuts = CutPlan(parse_ways(ways), memory.chunk_size, memory.stride, SEED, max_stride)
    want = oracle_loss(sequences, labels, cuts)
    data = {"train": str(tmp_path / "data"), "chunks": ways, "max_stride": max_stride}
    assert first_loss(tmp_path, pool, 1, "alone", data=data) == pytest.approx(want, abs=1e-5)
    # No rank decides what is drawn.
    assert first_loss(tmp_path, pool, 2, "dp2", data=data) == pytest.approx(want, abs=1e-5)
    assert first_loss(tmp_path, pool, 2, "pp2", data=data, parallel={"pp": 2}) == pytest.approx(want, abs=1e-5)
    # Control: without the masks it is another loss.
    plain = [next_token_labels(ids) for ids in sequences]
    assert abs(oracle_loss(sequences, plain, cuts) - want) > 1e-3


def test_a_run_that_is_resumed_with_other_cuts_is_refused(tmp_path, pool):
    prepare(tmp_path, pool, [None] * 4)
    first_loss(tmp_path, pool, 1, "run", data={"train": str(tmp_path / "data"), "chunks": "right"})
    again = ("--config", str(tmp_path / "run.yaml"), "--resume", "train.steps=2")
    code, _, err = pool(1).run(run_command, *again, "data.chunks=fixed")[0]
    assert code == 2 and "cut in another way" in err
    code, _, err = pool(1).run(run_command, *again)[0]
    assert code == 0, err


def test_an_unknown_way_of_cutting_is_refused_before_anything_is_made(tmp_path, pool):
    prepare(tmp_path, pool, [None] * 4)
    config = write_config(tmp_path / "c.yaml", tmp_path, data={"chunks": "fixd"})
    code, _, err = pool(1).run(run_command, "--config", str(config))[0]
    assert code == 2 and "'fixd' is no way of cutting" in err and not (tmp_path / "run").exists()
