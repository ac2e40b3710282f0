"""What the user reads while training: a progress bar on a terminal, one line a step in the log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from comet_megatron.train.records import (
    BadSamples,
    Callback,
    FailedSave,
    RunEnd,
    RunStart,
    SaveRecord,
    SkipRecord,
    StepRecord,
)
from comet_megatron.train.step import BatchResult

LOG_FILE = "log.txt"


def start_logging(folder: Path) -> logging.Logger:
    """The run's logger, to RUN/log.txt."""
    logger = logging.getLogger("comet_megatron.run")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    to_file = logging.FileHandler(folder / LOG_FILE)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    logger.addHandler(to_file)
    return logger


class Progress(Callback):
    """Writes the log, a line a step; on a terminal it shows a bar with loss and tokens/s, else lines.

    Args:
        log_every: steps between lines on stdout; the first and the last step always have one.
    """

    def __init__(self, logger: logging.Logger, *, log_every: int) -> None:
        self.logger, self.log_every = logger, log_every
        self.bar: tqdm | None = None
        self.steps = 0
        self.losses: list[float] = []
        self.held_out: list[float] = []

    def _say(self, text: str) -> None:
        self.logger.info(text)
        if self.bar is not None:
            self.bar.write(text, file=sys.stdout)
        else:
            print_line(text)

    def on_start(self, start: RunStart) -> None:
        for line in start.summary:
            self._say(line)
        self.steps = start.steps
        if sys.stderr.isatty():
            self.bar = tqdm(total=start.steps, initial=start.steps_done, unit="step", dynamic_ncols=True)

    def on_step(self, record: StepRecord) -> None:
        result = record.result
        self.losses.append(result.loss)
        line = (
            f"step {record.step}/{self.steps}  loss {result.loss:.4f}  lr {record.learning_rate:.2e}  "
            f"grad norm {result.grad_norm:.3f}  {record.tokens_per_second:,.0f} tokens/s  {record.seconds:.2f} s  "
            f"peak {record.peak_memory_bytes / 2**30:.2f} GiB"
        )
        if result.bubble:
            line += f"  bubble {result.bubble:.1%}"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {result.loss:.3f}, {record.tokens_per_second:,.0f} tokens/s", refresh=False)
            self.bar.update(record.step - self.bar.n)
        self.logger.info(line)
        if self.bar is None and (record.step % self.log_every == 0 or record.step in (1, self.steps)):
            print_line(line)

    def on_evaluation(self, step: int, result: BatchResult) -> None:
        self.held_out.append(result.loss)
        self._say(f"step {step}/{self.steps}  held-out loss {result.loss:.4f}")

    def on_skip(self, record: SkipRecord) -> None:
        if self.bar is not None:
            self.bar.update(record.step - self.bar.n)
        counted = f"{record.in_a_row} in a row, {record.in_all} in all"
        self._say(f"step {record.step}/{self.steps}  SKIPPED ({counted}): {record.why}")

    def on_bad_samples(self, bad: BadSamples) -> None:
        for number, why in enumerate(bad.why, start=bad.in_all - len(bad.why) + 1):
            self._say(f"step {bad.step}/{self.steps}  LEFT OUT ({number} in all): {why}")

    def on_checkpoint(self, record: SaveRecord) -> None:
        times = f"training waited {record.blocking_s:.2f} s for it; written in {record.writing_s:.2f} s"
        self._say(f"step {record.step}/{self.steps}  checkpoint {record.folder}  ({times})")

    def on_failed_save(self, failed: FailedSave) -> None:
        self._say(
            f"step {failed.step}/{self.steps}  NOT SAVED ({failed.in_all} in all), training goes on: {failed.why}"
        )

    def on_warning(self, text: str) -> None:
        self._say(f"WARNING  {text}")

    def on_profile(self, step: int, picture: Path) -> None:
        self._say(
            f"step {step}/{self.steps}  its ops: {picture} and {picture.with_suffix('.json').name} (ui.perfetto.dev)"
        )

    def on_stop(self, step: int, end: RunEnd) -> None:
        self._close_bar()
        self._say(f"stopped on request after step {step}; --resume goes on")

    def on_end(self, end: RunEnd) -> None:
        self._close_bar()
        for line in (
            "",
            *(_fall("training loss", self.losses), _fall("held-out loss", self.held_out)),
            f"done. The run is in {end.folder}: {LOG_FILE}, metrics.jsonl, loss_curve.png, config.yaml, checkpoints/",
            "next:",
            f"  python tools/convert_to_hf.py --checkpoint {end.checkpoint} --output {end.folder / 'hf'}",
            f"  tensorboard --logdir {end.folder / 'tensorboard'}",
        ):
            self._say(line)

    def close(self) -> None:
        self._close_bar()

    def _close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def print_line(text: str) -> None:
    """To stdout, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _fall(name: str, losses: Sequence[float]) -> str:
    """How far a loss fell, first to last."""
    if len(losses) < 2:
        return f"{name}: measured {len(losses)} times"
    first, last = losses[0], losses[-1]
    change = f"{abs(last - first):.2f} ({abs(last / first - 1):.0%})" if first else f"{abs(last - first):.2f}"
    return f"{name} {'fell' if last < first else 'rose'} from {first:.2f} to {last:.2f}, by {change}"
