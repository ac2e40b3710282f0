"""SIGTERM or SIGUSR1, to one rank or to the launcher: a checkpoint at the next step border, then exit code 0."""

from __future__ import annotations

import importlib.util
import signal
import sys
from pathlib import Path

import pytest

from comet_megatron.checkpoint.checksums import read_checksums
from comet_megatron.checkpoint.model_folder import read_progress
from comet_megatron.checkpoint.run_folder import checkpoint_folder, newest_checkpoint
from comet_megatron.testing.runs import run_command, run_with_signal, write_config

_spec = importlib.util.spec_from_file_location("torchrun_of_faults", Path(__file__).with_name("torchrun.py"))
launcher = sys.modules.setdefault("torchrun_of_faults", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(launcher)


@pytest.fixture
def config(start, tmp_path) -> Path:
    train = {"output": str(tmp_path / "run"), "steps": 7, "save_every": 3}
    return write_config(tmp_path / "c.yaml", start, train=train, optimizer={"decay_steps": 7})


@pytest.mark.parametrize(
    ("step", "number"),  # 4: the checkpoint of step 3 may still be on its way
    [
        (2, signal.SIGTERM),
        (4, signal.SIGUSR1),
        pytest.param(2, signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(4, signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_one_rank_stops_all_with_a_checkpoint_and_the_run_goes_on_bit_equal(
    step, number, config, tmp_path, pool
):
    arguments = ("--config", str(config))
    results = pool(2).run(run_with_signal, number, 1, step, *arguments)
    assert {code for code, _, _ in results} == {0}, results[0][2]
    assert f"stopped on request after step {step}; --resume goes on" in results[0][1]
    assert read_progress(newest_checkpoint(tmp_path / "run")).step == step
    assert pool(2).run(run_command, *arguments, "--resume", "auto")[0][0] == 0
    assert pool(2).run(run_command, *arguments, f"train.output={tmp_path / 'whole'}")[0][0] == 0
    first, second = (read_checksums(checkpoint_folder(tmp_path / name, 7)) for name in ("run", "whole"))
    names = [name for name in first if name.endswith(".distcp")]
    assert names and all(first[name] == second[name] for name in names)


def test_a_signal_in_the_last_step_ends_the_run_as_usual(config, pool):
    results = pool(2).run(run_with_signal, signal.SIGTERM, 0, 7, "--config", str(config))
    assert {code for code, _, _ in results} == {0}
    assert "done. The run is in" in results[0][1] and "stopped on request" not in results[0][1]


@pytest.mark.faults
def test_torchrun_passes_sigterm_on_and_leaves_time_for_the_checkpoint(config, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    with launcher.torchrun(config, log, "train.steps=1000000", "train.save_every=0") as command:
        launcher.wait_until(lambda: launcher.steps_done(run) > 3, command, log)
        command.send_signal(signal.SIGTERM)
        command.wait(60)
    assert "stopped on request after step" in log.read_text(), log.read_text()[-3000:]
    assert read_progress(newest_checkpoint(run)).step >= 3
