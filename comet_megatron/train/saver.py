"""A run's checkpoints: one at a time on its way to the disk, old ones deleted, failures counted or raised."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron.core.optimizer.optimizer import MegatronOptimizer

from comet_megatron.checkpoint.run_folder import checkpoint_folder, delete_old, step_of
from comet_megatron.checkpoint.saving import Contents, Saving
from comet_megatron.config.schema import TrainSection
from comet_megatron.errors import OutputError
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.layout import Layout
from comet_megatron.train.records import FailedSave, SaveRecord

Tell = Callable[..., None]


@dataclass
class Saver:
    """Every rank has one and calls the same methods in the same order; all communicate on the world.

    Attributes:
        tell: says an event to the callbacks.
        saved: the last checkpoint that is whole, of this process's time.
        failed: saves that went wrong.
    """

    run: Path
    stage: CometStage
    optimizer: MegatronOptimizer
    layout: Layout
    settings: TrainSection
    tell: Tell
    saved: Path | None = None
    failed: int = 0
    _under_way: Saving | None = None

    def save(self, step: int, contents: Contents, *, must: bool) -> None:
        """Start to write a checkpoint; wait for it with `must`, or where saving is not asynchronous.

        Raises:
            OutputError: it failed, and it must not or train.on_failed_save=stop; else that is told.
        """
        self.finish()  # one at a time: two copies of the state would be held
        folder = checkpoint_folder(self.run, step)
        try:
            self._under_way = Saving.start(folder, self.stage, self.optimizer, self.layout, contents=contents)
        except OutputError as error:
            self._report(error, step, must=must)
        if must or not self.settings.async_save:
            self.finish(must=must)

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is still at it."""
        return self._under_way is not None and not self._under_way.is_written()

    @property
    def has_begun(self) -> bool:
        """Whether there is a checkpoint to finish; the same on every rank."""
        return self._under_way is not None

    def finish(self, *, must: bool = False) -> None:
        """Make the checkpoint that is under way whole, and delete old ones; nothing to do where there is none.

        Raises:
            OutputError: see `save`.
        """
        if (saving := self._under_way) is None:
            return
        self._under_way = None
        step = step_of(saving.folder)
        try:
            saving.finish()
        except OutputError as error:
            self._report(error, step, must=must)
            return
        self.saved = saving.folder
        self.tell("on_checkpoint", SaveRecord(step, saving.folder, saving.blocking_s, saving.writing_s))
        if self.layout.is_main:
            self._delete_old(saving.folder)

    def _delete_old(self, newest: Path) -> None:
        try:
            delete_old(newest, keep_last=self.settings.keep_last, keep_every=self.settings.keep_every)
        except OSError as error:
            self.tell("on_warning", f"an old checkpoint cannot be deleted: {error}")

    def _report(self, error: OutputError, step: int, *, must: bool) -> None:
        self.failed += 1
        if must or self.settings.on_failed_save == "stop":
            raise error
        self.tell("on_failed_save", FailedSave(step, str(error), self.failed))
