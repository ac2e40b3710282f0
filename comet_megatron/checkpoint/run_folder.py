"""The folder of a training run: where checkpoints lie, which are whole, and which of them are kept.

RUN/
  checkpoints/step_N            a checkpoint
  checkpoints/.step_N.unfinished  one that is being written, or was when the run was killed
  checkpoints/replaced_step_N_K   a damaged one, whose step was trained again
  before_fresh_K/               what was here before --fresh
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comet_megatron.checkpoint.checksums import check_quickly
from comet_megatron.checkpoint.model_folder import COMPLETE, TOKENIZER, check_is_complete
from comet_megatron.errors import CheckpointError, CometError, OutputError
from comet_megatron.new_folder import make_folder

CHECKPOINTS = "checkpoints"
_OF_A_RUN = (CHECKPOINTS, TOKENIZER, "tensorboard", "profile", "log.txt", "metrics.jsonl", "config.yaml")
_OF_A_RUN += ("loss_curve.png", "metrics.tmp")
_STEP = re.compile(r"step_(\d+)")
_LEFT_OVER = re.compile(r"\.step_\d+\.(unfinished|deleted)")


@dataclass(frozen=True)
class Found:
    """Checkpoints of a run.

    Attributes:
        sound: written to the end and not visibly damaged, newest first.
        damaged: what is wrong with the others, newest first.
    """

    sound: tuple[Path, ...]
    damaged: tuple[CometError, ...]


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINTS / f"step_{step:07d}"


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    match = _STEP.fullmatch(checkpoint.name)
    assert match is not None
    return int(match.group(1))


def all_checkpoints(run: Path) -> list[Path]:
    """Whole or not, oldest first."""
    return sorted((p for p in (run / CHECKPOINTS).glob("step_*") if _STEP.fullmatch(p.name)), key=step_of)


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoints written to the end, oldest first."""
    return [path for path in all_checkpoints(run) if (path / COMPLETE).exists()]


def find_checkpoints(run: Path) -> Found:
    """Look at all checkpoints as `check_quickly` does; the weights are not read."""
    sound, damaged = [], []
    for path in reversed(all_checkpoints(run)):
        try:
            check_is_complete(path)
            check_quickly(path)
            sound.append(path)
        except CometError as error:
            damaged.append(error)
    return Found(tuple(sound), tuple(damaged))


def newest_checkpoint(run: Path) -> Path:
    """The newest that is sound.

    Raises:
        CheckpointError: there is none; training never starts from zero by itself.
    """
    found = find_checkpoints(run)
    if not found.sound:
        raise nothing_to_resume(run, found.damaged)
    return found.sound[0]


def nothing_to_resume(run: Path, damaged: Sequence[CometError]) -> CheckpointError:
    """Why a run cannot go on."""
    if not damaged:
        return CheckpointError(f"nothing to resume in {run}", way_out="leave out --resume to start a new run")
    listed = "\n".join(f"- {error.what}" for error in damaged)
    return CheckpointError(
        f"no checkpoint in {run} is whole:\n{listed}",
        way_out="bring one back from a copy; to start from step 0 on purpose use --fresh, which keeps these aside",
    )


def check_is_new_run(run: Path) -> None:
    """
    Raises:
        OutputError: the folder holds something.
    """
    if run.exists() and (not run.is_dir() or any(run.iterdir())):
        way_out = "give train.output a new folder"
        if run.is_dir() and complete_checkpoints(run):
            way_out = "add --resume to continue the run that is there, or give train.output a new folder"
        raise OutputError(f"train.output={run} is not empty", way_out=way_out)


def check_is_run(run: Path) -> None:
    """
    Raises:
        OutputError: the folder is a file, or holds something, and nothing of it is of a training run.
    """
    if run.exists() and not run.is_dir():
        raise OutputError(f"train.output={run} is a file", way_out="give train.output a new folder")
    present = sorted(p.name for p in run.iterdir()) if run.exists() else []
    if present and not any(name in _OF_A_RUN or name.startswith("before_fresh_") for name in present):
        what = f"train.output={run} is not empty, and holds {present[0]} but no training run"
        raise OutputError(what, way_out="give train.output a new folder")


def set_aside(run: Path) -> Path | None:
    """Move all that a run has written into a folder of its own within the run's; None where there is nothing."""
    present = [run / name for name in _OF_A_RUN if (run / name).exists()]
    if not present:
        return None
    number = 1
    while (aside := run / f"before_fresh_{number}").exists():
        number += 1
    make_folder(aside)
    for path in present:
        path.rename(aside / path.name)
    return aside


def remove_left_overs(run: Path) -> None:
    """Delete what a run that was killed has left of checkpoints it was writing or deleting."""
    for path in (run / CHECKPOINTS).glob(".step_*"):
        if _LEFT_OVER.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def delete_old(newest: Path, *, keep_last: int, keep_every: int) -> list[Path]:
    """Delete checkpoints before `newest`, which is whole, but the last ones and those of certain steps.

    Args:
        keep_last: how many stay, with the newest; 0: all.
        keep_every: checkpoints of steps that it divides stay; 0: none of them.

    Returns:
        What was deleted.

    Raises:
        OSError: one cannot be deleted; it is not there as a checkpoint any more, or still whole.
    """
    if keep_last == 0:
        return []
    run, step = newest.parent.parent, step_of(newest)
    before = [path for path in complete_checkpoints(run) if step_of(path) < step]
    old = before[: max(len(before) - (keep_last - 1), 0)]
    old = [path for path in old if not (keep_every and step_of(path) % keep_every == 0)]
    for path in old:
        doomed = path.with_name(f".{path.name}.deleted")
        path.rename(doomed)  # a folder that is half deleted must not look like a checkpoint
        shutil.rmtree(doomed)
    return old
