"""A step whose gradient cannot be used: skipped as if it had not been, counted, and after too many the run stops."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from comet_megatron.checkpoint.checksums import read_checksums
from comet_megatron.checkpoint.model_folder import read_progress
from comet_megatron.checkpoint.run_folder import checkpoint_folder
from comet_megatron.testing.runs import run_command, weights_of, write_config
from comet_megatron.train.callbacks.curve import read_metrics
from comet_megatron.train.model import TrainableModel

LAYOUTS = {"DP2 ZeRO-1": {}, "TP2": {"tp": 2, "zero1": False}, "PP2": {"pp": 2, "zero1": False}}


@pytest.fixture
def config(start, tmp_path) -> Path:
    train = {"output": str(tmp_path / "run"), "steps": 6, "save_every": 1, "on_nonfinite": "skip"}
    return write_config(
        tmp_path / "c.yaml",
        start,
        train=train,
        optimizer={"decay_steps": 10, "warmup_steps": 0},
        logging={"tensorboard": True},
    )


def run_with_scaled_gradients(process, factors: dict[int, float], *arguments: str):
    """The command, the gradient of some steps (counted from 1 by this process) multiplied."""
    real, count = TrainableModel.finish_reduction, 0

    def scaled(self, layout):
        nonlocal count
        count += 1
        real(self, layout)
        if count in factors:
            for stage in self.stages:
                for param in stage.parameters():
                    if getattr(param, "main_grad", None) is not None:
                        param.main_grad.mul_(factors[count])

    TrainableModel.finish_reduction = scaled
    try:
        return run_command(process, *arguments)
    finally:
        TrainableModel.finish_reduction = real


def tensor_sums(run: Path, step: int) -> dict:
    """Of weights and optimizer state."""
    sums = read_checksums(checkpoint_folder(run, step))
    return {name: total for name, total in sums.items() if name.endswith(".distcp")}


def rates(run: Path) -> dict[int, float]:
    return {r["step"]: r["learning_rate"] for r in read_metrics(run) if "loss" in r}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_skipped_step_changes_nothing_but_the_place_in_the_data(layout, config, tmp_path, pool):
    run = tmp_path / "run"
    arguments = ("--config", str(config), *(f"parallel.{k}={v}" for k, v in LAYOUTS[layout].items()))
    results = pool(2).run(run_with_scaled_gradients, {3: torch.inf}, *arguments)
    assert {code for code, _, _ in results} == {0}, results[0][2]
    assert "step 3/6  SKIPPED (1 in a row, 1 in all): the gradient of step 3 is not finite" in results[0][1]
    assert tensor_sums(run, 3) == tensor_sums(run, 2) != tensor_sums(run, 4)
    assert sorted(rates(run)) == [1, 2, 4, 5, 6]
    assert [read_progress(checkpoint_folder(run, n)).skipped for n in (2, 3, 6)] == [0, 1, 1]
    # The rates are those of a run that was not disturbed, one step later.
    other = ("train.output=" + str(tmp_path / "other"), "train.save_every=0", "train.steps=5")
    assert pool(2).run(run_command, *arguments, *other)[0][0] == 0
    assert list(rates(run).values()) == list(rates(tmp_path / "other").values())


def test_a_run_resumed_behind_a_skipped_step_is_bit_equal_to_one_that_never_stopped(config, tmp_path, pool):
    parts = str(tmp_path / "parts")
    arguments = ("--config", str(config), "train.spike_guard=8")
    assert pool(2).run(run_with_scaled_gradients, {3: torch.nan}, *arguments)[0][0] == 0
    first = (*arguments, f"train.output={parts}", "train.steps=4")
    assert pool(2).run(run_with_scaled_gradients, {3: torch.nan}, *first)[0][0] == 0
    assert pool(2).run(run_command, *arguments, f"train.output={parts}", "--resume")[0][0] == 0
    assert tensor_sums(Path(parts), 6) == tensor_sums(tmp_path / "run", 6)
    progress = [read_progress(checkpoint_folder(folder, 6)) for folder in (Path(parts), tmp_path / "run")]
    assert progress[0] == progress[1]


def test_a_spike_is_skipped_and_counted_and_the_step_after_it_is_not(config, tmp_path, pool):
    arguments = ("--config", str(config), "train.spike_guard=20", "train.steps=25", "train.save_every=0")
    results = pool(2).run(run_with_scaled_gradients, {22: 1000.0, 24: 1000.0}, *arguments)
    out = results[0][1]
    assert {code for code, _, _ in results} == {0}, results[0][2]
    assert "step 22/25  SKIPPED (1 in a row, 1 in all): the gradient norm " in out
    assert "step 24/25  SKIPPED (1 in a row, 2 in all)" in out and "train.spike_guard" in out
    assert "step 23/25  loss" in out and "step 25/25  loss" in out
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/skipped_steps")] == [(22, 1.0), (24, 2.0)]


def test_spikes_are_used_without_the_guard(config, tmp_path, pool):
    arguments = ("--config", str(config), "train.steps=23", "train.save_every=0")
    assert "SKIPPED" not in pool(1).run(run_with_scaled_gradients, {22: 1000.0}, *arguments)[0][1]


def test_too_many_skipped_in_a_row_stop_the_run_and_name_the_place(config, tmp_path, pool):
    arguments = ("--config", str(config), "train.max_skips=2")
    results = pool(2).run(run_with_scaled_gradients, {2: torch.inf, 4: torch.inf, 5: torch.inf}, *arguments)
    assert {code for code, _, _ in results} == {2}
    out, message = results[0][1], results[0][2]
    assert "step 2/6  SKIPPED" in out and "step 4/6  SKIPPED (1 in a row, 2 in all)" in out
    assert "2 steps in a row were skipped (train.max_skips)" in message
    assert "first in the gradient of " in message and "--resume" in message
    assert checkpoint_folder(tmp_path / "run", 4).exists() and not checkpoint_folder(tmp_path / "run", 5).exists()
    # As many as before, in a row across a resume, count on.
    results = pool(2).run(run_with_scaled_gradients, {1: torch.inf}, *arguments, "--resume")
    assert {code for code, _, _ in results} == {2}


def test_by_default_the_run_stops_with_the_weights_untouched(config, tmp_path, pool):
    arguments = ("--config", str(config), "train.on_nonfinite=stop")
    results = pool(2).run(run_with_scaled_gradients, {3: torch.inf}, *arguments)
    assert {code for code, _, _ in results} == {2}
    assert "the gradient of step 3 is not finite" in results[0][2]
    (kept,) = pool(1).run(weights_of, checkpoint_folder(tmp_path / "run", 2))  # its save was under way
    assert all(value.isfinite().all() for value in kept.values())
