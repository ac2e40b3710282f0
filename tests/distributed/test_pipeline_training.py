"""Training through a pipeline, by its command: checkpoints that change layout, the split, its report, its profile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from comet_megatron.checkpoint.run_folder import checkpoint_folder
from comet_megatron.testing.runs import run_command, weights_of, write_config, write_data, write_start
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory, tiny_sequences
from comet_megatron.train.callbacks.curve import read_metrics

# Chunks of 16 tokens: 5, 9, 1, 9 chunks and so on; some shorter than a chunk.
LENGTHS = (80, 75, 130, 140, 9, 16, 137, 144, 50, 33)
LAYERS = 4
TOLERANCE = 1e-5  # of losses


@pytest.fixture
def place(tmp_path, pool) -> Path:
    """A folder with data and a start of four layers, tied: the embedding is on two stages."""
    write_data(tmp_path / "data", tiny_sequences(LENGTHS))
    architecture = tiny_architecture(tie_embeddings=True, num_layers=LAYERS)
    pool(1).run(write_start, tmp_path / "start", architecture, tiny_memory())
    return tmp_path


def train(pool, world: int, config: Path, *arguments: str) -> str:
    """Run the command on `world` processes; what the main one prints."""
    code, out, err = pool(world).run(run_command, "--config", str(config), *arguments)[0]
    assert code == 0, err
    return out


def losses(run: Path) -> list[float]:
    """Of every step."""
    return [record["loss"] for record in read_metrics(run) if "loss" in record]


def config_in(place: Path, **sections) -> Path:
    """A large eps, so that Adam does not blow up differences of gradients that are nearly zero."""
    settings = {"optimizer": {"decay_steps": 6, "eps": 1e-3}, "train": {"steps": 6}, **sections}
    return write_config(place / "c.yaml", place, **settings)


MOVES = {
    "PP4 -> one process": ((4, {"pp": 4}), (1, {})),
    "TP2 x PP2 -> DP2": ((4, {"tp": 2, "pp": 2}), (2, {})),
    "one process -> PP2": ((1, {}), (2, {"pp": 2})),
    "PP2 x DP2 -> TP2+SP x PP2": ((4, {"pp": 2}), (4, {"tp": 2, "pp": 2, "sequence_parallel": True})),
    "PP2 by cost -> PP2 as given": ((2, {"pp": 2}), (2, {"pp": 2, "layers_per_stage": "[1, 3]"})),
}


MINUTES = ("one process -> PP2", "PP2 x DP2 -> TP2+SP x PP2")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in MINUTES else ()) for name in MOVES]
)
def test_a_run_goes_on_at_another_layout_with_the_same_losses(name, place, pool):
    (world, before), (other_world, after) = ([w, [f"parallel.{k}={v}" for k, v in p.items()]] for w, p in MOVES[name])
    config = config_in(place, train={"steps": 6, "save_every": 3})
    train(pool, world, config, *before)
    moved = place / "moved"
    shutil.copytree(place / "run", moved)
    shutil.rmtree(checkpoint_folder(moved, 6))
    train(pool, other_world, config, *after, "--resume", f"train.output={moved}")
    assert losses(moved) == pytest.approx(losses(place / "run"), abs=TOLERANCE)
    assert len(set(np.round(losses(moved), 4))) > 3
    (want,) = pool(1).run(weights_of, checkpoint_folder(place / "run", 6))
    (found,) = pool(1).run(weights_of, checkpoint_folder(moved, 6))
    assert all((found[name] - value).abs().max() < TOLERANCE for name, value in want.items())


def test_the_start_of_a_run_tells_the_split_and_the_steps_their_bubble(place, pool):
    out = train(pool, 2, config_in(place, parallel={"pp": 2, "layers_per_stage": [1, 3]}))
    assert "PP 2, DP 1" in out
    assert "stages   PP 2: 1 + 3 layers (as given: " in out
    bubbles = [record["bubble"] for record in read_metrics(place / "run") if "loss" in record]
    assert len(bubbles) == 6 and all(0 < bubble < 1 for bubble in bubbles)
    assert out.count("  bubble ") == 6


def test_without_stages_no_bubble_is_told(place, pool):
    out = train(pool, 1, config_in(place))
    assert "  bubble " not in out and "stages  " not in out


def test_a_profile_is_the_picture_and_the_trace_of_one_step(place, pool):
    config = config_in(place, parallel={"pp": 2}, profile={"timeline": True}, train={"steps": 2, "recompute": "full"})
    out = train(pool, 2, config)
    picture = place / "run" / "profile" / "timeline_step_2.png"
    assert picture.read_bytes().startswith(b"\x89PNG") and str(picture) in out
    events = json.loads(picture.with_suffix(".json").read_text())["traceEvents"]
    ops = [event for event in events if event["ph"] == "X"]
    assert {event["tid"] for event in ops} == {0, 1}
    chunks = sum(-(-(LENGTHS[i] - 1) // 16) for i in batch_of_step(2))  # the last token has no label
    for stage in (0, 1):
        forwards = [e for e in ops if e["tid"] == stage and e["cat"] == "forward"]
        assert len(forwards) == chunks
        ends = [e["ts"] + e["dur"] for e in sorted((e for e in ops if e["tid"] == stage), key=lambda e: e["ts"])]
        assert ends == sorted(ends)


def batch_of_step(step: int) -> list[int]:
    """Numbers of the samples."""
    from comet_megatron.data.sampler import plan_positions, sample_index

    positions = plan_positions(step - 1, global_batch_size=2, dp_rank=0, dp_size=1)
    return [sample_index(p, num_samples=len(LENGTHS), seed=1234)[1] for p in positions]
