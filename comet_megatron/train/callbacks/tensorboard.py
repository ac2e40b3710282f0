"""TensorBoard: loss, rates and speed, and per layer what the memory does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from comet_megatron.train.records import BadSamples, Callback, FailedSave, RunStart, SaveRecord, SkipRecord, StepRecord
from comet_megatron.train.step import BatchResult


class TensorBoard(Callback):
    """Scalars of every step under RUN/tensorboard."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.writer: SummaryWriter | None = None

    def on_start(self, start: RunStart) -> None:
        # After a resume, what the interrupted run wrote beyond its checkpoint is hidden.
        self.writer = SummaryWriter(str(self.folder), purge_step=start.steps_done + 1 if start.steps_done else None)
        if start.bad_rows:
            self._write({"data/bad_rows": start.bad_rows}, start.steps_done)

    def on_step(self, record: StepRecord) -> None:
        result = record.result
        scalars = {
            "train/loss": result.loss,
            "train/learning_rate": record.learning_rate,
            "train/gradient_norm": result.grad_norm,
            "speed/text_tokens_per_second": record.tokens_per_second,
            "speed/step_seconds": record.seconds,
            "speed/reading_seconds": record.reading_s,
            "speed/peak_memory_gib": record.peak_memory_bytes / 2**30,
        }
        if result.bubble:
            scalars["speed/pipeline_bubble"] = result.bubble
        scalars |= {f"loss_by_chunk/{name}": loss for name, loss in group_by_chunk(result.chunk_losses).items()}
        scalars |= {f"memory_gate_mean/layer_{i:02d}": gate for i, gate in enumerate(result.gate_means)}
        scalars |= {f"memory_state_norm/layer_{i:02d}": norm for i, norm in enumerate(result.state_norms)}
        self._write(scalars, record.step)

    def on_evaluation(self, step: int, result: BatchResult) -> None:
        self._write({"eval/loss": result.loss}, step)

    def on_skip(self, record: SkipRecord) -> None:
        self._write({"train/skipped_steps": record.in_all}, record.step)

    def on_bad_samples(self, bad: BadSamples) -> None:
        self._write({"data/bad_samples": bad.in_all}, bad.step)

    def on_checkpoint(self, record: SaveRecord) -> None:
        times = {"speed/save_blocking_seconds": record.blocking_s, "speed/save_writing_seconds": record.writing_s}
        self._write(times, record.step)

    def on_failed_save(self, failed: FailedSave) -> None:
        self._write({"train/failed_saves": failed.in_all}, failed.step)

    def _write(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


def group_by_chunk(losses: Sequence[float]) -> dict[str, float]:
    """Loss by chunk index: the first 16 chunks alone, later ones in groups that double, so that curves stay few.

    The mean of a group is over its chunks that have a label.
    """
    groups = {f"chunk_{i:04d}": [loss] for i, loss in enumerate(losses[:16])}
    start = 16
    while start < len(losses):
        groups[f"chunks_{start:04d}-{2 * start - 1:04d}"] = list(losses[start : 2 * start])
        start *= 2
    known = {name: [v for v in values if not math.isnan(v)] for name, values in groups.items()}
    return {name: sum(values) / len(values) for name, values in known.items() if values}
