"""What a run goes on from: its newest checkpoint that is sound, or step 0, and then only when that was asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from comet_megatron.checkpoint.run_folder import (
    check_is_new_run,
    check_is_run,
    find_checkpoints,
    nothing_to_resume,
    remove_left_overs,
    set_aside,
)
from comet_megatron.errors import CheckpointError, CometError, ConfigError

if TYPE_CHECKING:  # loads torch, which is not done before a configuration is checked
    from comet_megatron.parallel.layout import Layout

NO, LAST, AUTO = "no", "last", "auto"  # --resume


@dataclass(frozen=True)
class Continuation:
    """Decided from names, sizes and small files; the weights are read later, by all ranks together.

    Attributes:
        checkpoints: that look sound, newest first; empty: from step 0.
        told: lines for the user.
        damaged: what is wrong with other checkpoints of the run.
        sets_aside: what the run folder holds is moved away first.
    """

    checkpoints: tuple[Path, ...] = ()
    told: tuple[str, ...] = ()
    damaged: tuple[CometError, ...] = ()
    sets_aside: bool = False

    @property
    def newest(self) -> Path | None:
        return self.checkpoints[0] if self.checkpoints else None


def plan_continuation(run: Path, *, resume: str, fresh: bool, restarts: int) -> Continuation:
    """
    Args:
        resume: NO, LAST or AUTO; AUTO starts a run that has no checkpoint yet.
        fresh: start from step 0 whatever is there.
        restarts: how often torchrun has started this run again; then `fresh` was done before.

    Raises:
        CheckpointError: there is nothing to resume, or all of it is damaged.
        OutputError: the folder holds something else than the run.
        ConfigError: `resume` and `fresh` contradict each other.
    """
    if fresh and resume == LAST:
        what = "--resume goes on with the run that is there, --fresh starts anew"
        raise ConfigError(what, way_out="give one of the two")
    if fresh and restarts == 0:
        check_is_run(run)
        return Continuation(sets_aside=True)
    if resume == NO and not fresh:
        check_is_new_run(run)
        return Continuation()
    found = find_checkpoints(run)
    told = tuple(_tell(error) for error in found.damaged)
    if found.sound:
        return Continuation(found.sound, told, found.damaged)
    if found.damaged or resume == LAST:
        raise nothing_to_resume(run, found.damaged)
    check_is_run(run)
    return Continuation(told=(f"NEW RUN  {run} holds no checkpoint: this run starts from step 0",))


def restarts_by_torchrun() -> int:
    """How often torchrun has started the processes again (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def choose_checkpoint(run: Path, plan: Continuation, layout: Layout) -> tuple[Path, list[str]]:
    """The newest checkpoint whose every file is what was written, and lines for the user.

    Communicates on the world.

    Raises:
        CheckpointError: on all ranks: all are damaged.
    """
    import torch.distributed as dist

    from comet_megatron.checkpoint.agreement import find_damage

    candidates: list[Sequence[Path]] = [plan.checkpoints]
    dist.broadcast_object_list(candidates, src=0)  # what the main rank saw counts
    damaged: list[CometError] = []
    for checkpoint in candidates[0]:
        if (problem := find_damage(checkpoint, layout)) is None:
            return checkpoint, [*(_tell(error) for error in damaged), *plan.told]
        damaged.append(problem)
    raise nothing_to_resume(run, [*damaged, *plan.damaged])


def prepare_run_folder(run: Path, plan: Continuation, layout: Layout) -> list[str]:
    """Move aside what --fresh asks for, and delete what a killed run left half written. Communicates on the world."""
    from comet_megatron.checkpoint.agreement import failing_together

    told = []
    with failing_together(run, what="the run folder cannot be prepared"):
        if layout.is_main:
            remove_left_overs(run)
            if plan.sets_aside and (aside := set_aside(run)):
                told = [f"NEW RUN  --fresh: starts from step 0; what was in {run} is in {aside}"]
    return told


def _tell(error: CometError) -> str:
    assert isinstance(error, CheckpointError), error
    return f"DAMAGED  {error.what}; the checkpoint before it is used"
