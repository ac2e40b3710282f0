"""kill -9 of a random rank at a random moment: torchrun starts the run again, and the result is bit-equal."""

from __future__ import annotations

import importlib.util
import random
import sys
import time
from pathlib import Path

import pytest

from comet_megatron.checkpoint.checksums import read_checksums
from comet_megatron.checkpoint.run_folder import CHECKPOINTS, checkpoint_folder
from comet_megatron.testing.runs import run_command, write_config
from comet_megatron.train.callbacks.curve import read_metrics

_spec = importlib.util.spec_from_file_location("torchrun_of_faults", Path(__file__).with_name("torchrun.py"))
launcher = sys.modules.setdefault("torchrun_of_faults", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(launcher)

STEPS_PER_KILL = 12


def killed_again_and_again(config: Path, run: Path, log: Path, kills: int) -> list[str]:
    """Train to the end under kills; what was being done at each."""
    chance, told = random.Random(kills), []
    with launcher.torchrun(config, log, "--resume", "auto", restarts=3 * kills) as command:
        for number in range(kills):
            behind = launcher.steps_done(run) + chance.randint(0, STEPS_PER_KILL // 2)
            if inside_a_save := number % 2 == 0:
                unfinished = f".step_{'?' * 7}.unfinished"
                launcher.wait_until(lambda at=behind: launcher.steps_done(run) >= at, command, log)
                launcher.wait_until(lambda: any((run / CHECKPOINTS).glob(unfinished)), command, log)  # noqa: B023
                time.sleep(chance.uniform(0, 0.02))
            else:
                launcher.wait_until(lambda at=behind: launcher.steps_done(run) > at, command, log)
                time.sleep(chance.uniform(0, 0.2))
            if command.poll() is not None or len(ranks := launcher.children(command)) < 2:
                continue
            before = {process.pid for process in ranks}
            chance.choice(ranks).kill()
            told.append("a save" if inside_a_save else "training")
            launcher.wait_until(
                lambda: len(now := launcher.children(command)) == 2 and not before & {p.pid for p in now},  # noqa: B023
                command,
                log,
            )
        assert command.wait(240) == 0, log.read_text()[-5000:]
    return told


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(2, marks=pytest.mark.slow),
        pytest.param(20, marks=[pytest.mark.faults, pytest.mark.timeout(1800)]),
    ],
)
def test_a_run_killed_at_random_moments_ends_bit_equal_to_one_that_was_not(kills, start, tmp_path, pool):
    run, steps = tmp_path / "run", STEPS_PER_KILL * (kills + 1)
    train = {"output": str(run), "steps": steps, "save_every": 3, "keep_last": 2}
    config = write_config(tmp_path / "c.yaml", start, train=train)
    told = killed_again_and_again(config, run, tmp_path / "log", kills)
    assert len(told) >= 0.9 * kills and {"a save", "training"} == set(told), told
    whole = ("--config", str(config), f"train.output={tmp_path / 'whole'}")
    assert pool(2).run(run_command, *whole, timeout_s=600)[0][0] == 0
    first, second = (read_checksums(checkpoint_folder(folder, steps)) for folder in (run, tmp_path / "whole"))
    names = [name for name in first if name.endswith(".distcp")]
    assert names and all(first[name] == second[name] for name in names)
    losses = [[(r["step"], r["loss"]) for r in read_metrics(folder)] for folder in (run, tmp_path / "whole")]
    assert losses[0] == losses[1]
