"""The folder of a training run: where checkpoints lie, and which is the newest whole one."""

from __future__ import annotations

import re
from pathlib import Path

from comet_megatron.checkpoint.model_folder import COMPLETE
from comet_megatron.errors import CheckpointError, OutputError

CHECKPOINTS = "checkpoints"
_STEP = re.compile(r"step_(\d+)")


def checkpoint_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / CHECKPOINTS / f"step_{step:07d}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Checkpoints written to the end, oldest first."""
    found = (run / CHECKPOINTS).glob("step_*")
    whole = [p for p in found if _STEP.fullmatch(p.name) and (p / COMPLETE).exists()]
    return sorted(whole, key=lambda p: int(_STEP.fullmatch(p.name).group(1)))


def newest_checkpoint(run: Path) -> Path:
    """
    Raises:
        CheckpointError: there is none; training never starts from zero by itself.
    """
    whole = complete_checkpoints(run)
    if not whole:
        raise CheckpointError(f"nothing to resume in {run}", way_out="leave out --resume to start a new run")
    return whole[-1]


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
