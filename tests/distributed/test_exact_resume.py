"""A resume is exact at every step that a run may stop at: losses and final state equal an uninterrupted run's bits."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from comet_megatron.checkpoint.checksums import FileSum, read_checksums
from comet_megatron.checkpoint.model_folder import Progress, read_progress
from comet_megatron.checkpoint.run_folder import checkpoint_folder, complete_checkpoints, step_of
from comet_megatron.testing.runs import run_command, run_with_signal, write_config, write_data, write_start
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory, tiny_sequences
from comet_megatron.train.callbacks.curve import read_metrics

STEPS = 6
LENGTHS = (80, 75, 130, 140, 9, 16, 137, 144, 50, 33)  # 1 to 9 chunks; an epoch ends within a run


@pytest.fixture(scope="module")
def config(tmp_path_factory, pool) -> Path:
    """DP2 with ZeRO-1, drawn cuts and strides, an evaluation every second step, a checkpoint after every one."""
    folder = tmp_path_factory.mktemp("exact")
    write_data(folder / "data", tiny_sequences(LENGTHS))
    write_data(folder / "held_out", tiny_sequences((50, 40, 60), seed=9))
    pool(1).run(write_start, folder / "start", tiny_architecture(num_layers=2), tiny_memory())
    return write_config(
        folder / "c.yaml",
        folder,
        data={
            "eval": str(folder / "held_out"),
            "chunks": "fixed:0.3, right:0.2, uniform:0.2, random:0.3",
            "max_stride": 16,
        },
        train={"steps": STEPS, "save_every": 1, "eval_every": 2, "spike_guard": 3.0},
    )


@pytest.fixture(scope="module")
def whole(config, pool) -> Path:
    """The run that was never stopped."""
    run = config.parent / "run"
    assert {code for code, _, _ in pool(2).run(run_command, "--config", str(config))} == {0}
    assert [step_of(path) for path in complete_checkpoints(run)] == list(range(1, STEPS + 1))
    return run


def losses(run: Path) -> list[dict]:
    """All that is computed, step by step; what is measured of time and memory left out."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss", "skipped")
    return [{key: record[key] for key in kept if key in record} for record in read_metrics(run)]


def state(run: Path, step: int = STEPS) -> tuple[dict[str, FileSum], Progress]:
    """Sums of the files with weights and optimizer; all that is kept of the progress."""
    folder = checkpoint_folder(run, step)
    sums = read_checksums(folder)
    assert sums is not None
    return {name: total for name, total in sums.items() if name.endswith((".distcp", ".pt"))}, read_progress(folder)


def test_the_run_draws_cuts_and_strides_and_evaluates(whole):
    assert len({record["loss"] for record in losses(whole) if "loss" in record}) == STEPS
    assert [record["step"] for record in losses(whole) if "eval_loss" in record] == [0, 2, 4, 6]
    assert {"weights/common.pt", "weights/__0_0.distcp"} <= set(state(whole)[0])


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_run_resumed_after_any_step_ends_bit_equal(stop, whole, config, tmp_path, pool):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in range(stop + 1, STEPS + 1):
        shutil.rmtree(checkpoint_folder(run, step))
    results = pool(2).run(run_command, "--config", str(config), "--resume", f"train.output={run}")
    assert {code for code, _, _ in results} == {0}, results[0][2]
    assert f"resume   after step {stop}" in results[0][1]
    assert losses(run) == losses(whole)
    for step in range(stop + 1, STEPS + 1):
        assert state(run, step) == state(whole, step), step


@pytest.mark.parametrize("stop", [2, 4])  # both have an evaluation due, which a signal does not wait for
def test_a_run_that_a_signal_stopped_between_two_saves_ends_bit_equal(stop, whole, config, tmp_path, pool):
    run = tmp_path / "run"
    arguments = ("--config", str(config), f"train.output={run}", "train.save_every=3")
    results = pool(2).run(run_with_signal, signal.SIGTERM, 1, stop, *arguments)
    assert {code for code, _, _ in results} == {0}, results[0][2]
    assert f"stopped on request after step {stop}" in results[0][1]
    results = pool(2).run(run_command, *arguments, "--resume")
    assert {code for code, _, _ in results} == {0}, results[0][2]
    trained = [[record for record in losses(folder) if "eval_loss" not in record] for folder in (run, whole)]
    assert trained[0] == trained[1]
    assert state(run) == state(whole)
