"""What a run tells its callbacks, and the callbacks' interface."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from comet_megatron.train.step import BatchResult


@dataclass(frozen=True)
class RunStart:
    """Said once, before the first step.

    Attributes:
        folder: of the run.
        steps: at the end of the run.
        steps_done: by the run that this one continues; 0 for a new one.
        summary: lines for the user: model, layout, data.
        bad_rows: of JSONL, that were left out when it was prepared.
    """

    folder: Path
    steps: int
    steps_done: int
    summary: tuple[str, ...]
    bad_rows: int = 0


@dataclass(frozen=True)
class StepRecord:
    """Said after each step.

    Attributes:
        step: from 1.
        learning_rate: of the backbone.
        seconds: wall time of the step.
        peak_memory_bytes: the most that any rank has held so far.
        reading_s: of `seconds`, how long the main process waited for its batch.
    """

    step: int
    result: BatchResult
    learning_rate: float
    seconds: float
    peak_memory_bytes: int
    reading_s: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.result.text_tokens / self.seconds


@dataclass(frozen=True)
class SkipRecord:
    """Said instead of a StepRecord after a step that changed nothing but the place in the data.

    Attributes:
        why: with layer and chunk.
        in_a_row, in_all: skipped steps up to this one.
    """

    step: int
    why: str
    in_a_row: int
    in_all: int


@dataclass(frozen=True)
class BadSamples:
    """Said before a step that is computed without some sequences of its batch.

    Attributes:
        why: of each, with shard and sample.
        in_all: sequences left out up to this step.
    """

    step: int
    why: tuple[str, ...]
    in_all: int


@dataclass(frozen=True)
class SaveRecord:
    """Said once a checkpoint is whole, which may be steps later.

    Attributes:
        step: of the checkpoint.
        blocking_s: how long training waited for it.
        writing_s: how long it was written, beside training if that is asked for.
    """

    step: int
    folder: Path
    blocking_s: float
    writing_s: float


@dataclass(frozen=True)
class FailedSave:
    """Said when a checkpoint could not be written and training goes on.

    Attributes:
        in_all: failed saves since the start of this process.
    """

    step: int
    why: str
    in_all: int


@dataclass(frozen=True)
class RunEnd:
    """Said once, after the last step and its checkpoint."""

    folder: Path
    checkpoint: Path


class Callback:
    """One job beside training. Only the main process has callbacks."""

    def on_start(self, start: RunStart) -> None:
        """Before the first step."""

    def on_step(self, record: StepRecord) -> None:
        """After each step."""

    def on_evaluation(self, step: int, result: BatchResult) -> None:
        """After an evaluation on held-out data; step 0 is before training."""

    def on_skip(self, record: SkipRecord) -> None:
        """After a step that was skipped, instead of on_step."""

    def on_bad_samples(self, bad: BadSamples) -> None:
        """Before a step from whose batch damaged samples are left out."""

    def on_checkpoint(self, record: SaveRecord) -> None:
        """After a checkpoint is whole."""

    def on_failed_save(self, failed: FailedSave) -> None:
        """After a checkpoint could not be written."""

    def on_warning(self, text: str) -> None:
        """After something that needs the user's eye, but does not stop the run."""

    def on_profile(self, step: int, picture: Path) -> None:
        """After the ops of a step were drawn."""

    def on_stop(self, step: int, end: RunEnd) -> None:
        """After a step at which the run was asked to stop, and its checkpoint."""

    def on_end(self, end: RunEnd) -> None:
        """After the last step."""

    def close(self) -> None:
        """Always called last, after an error too."""
