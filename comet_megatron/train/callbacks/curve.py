"""The loss curve: every step in RUN/metrics.jsonl, a picture in RUN/loss_curve.png at the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comet_megatron.train.records import BadSamples, Callback, RunEnd, RunStart, SkipRecord, StepRecord
from comet_megatron.train.step import BatchResult

METRICS_FILE = "metrics.jsonl"
PICTURE = "loss_curve.png"


class Curve(Callback):
    """Writes the metrics as they come, and draws them at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = None

    def on_start(self, start: RunStart) -> None:
        path = self.folder / METRICS_FILE
        # A resumed run repeats the steps after its checkpoint: drop what the interrupted one wrote of them.
        kept = [r for r in read_metrics(self.folder) if r["step"] <= start.steps_done] if path.exists() else []
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        temporary.replace(path)
        self.file = path.open("a", buffering=1)

    def _write(self, **values: Any) -> None:
        self.file.write(json.dumps(values) + "\n")

    def on_step(self, record: StepRecord) -> None:
        self._write(
            step=record.step,
            loss=record.result.loss,
            learning_rate=record.learning_rate,
            grad_norm=record.result.grad_norm,
            tokens_per_second=round(record.tokens_per_second, 1),
            seconds=round(record.seconds, 4),
            reading_seconds=round(record.reading_s, 5),
            peak_memory_bytes=record.peak_memory_bytes,
            **({"bubble": round(record.result.bubble, 5)} if record.result.bubble else {}),
        )

    def on_skip(self, record: SkipRecord) -> None:
        self._write(step=record.step, skipped=record.why)

    def on_bad_samples(self, bad: BadSamples) -> None:
        self._write(step=bad.step, bad_samples=list(bad.why))

    def on_stop(self, step: int, end: RunEnd) -> None:
        self.on_end(end)

    def on_evaluation(self, step: int, result: BatchResult) -> None:
        self._write(step=step, eval_loss=result.loss)

    def on_end(self, end: RunEnd) -> None:
        draw_curve(read_metrics(self.folder), self.folder / PICTURE)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Records of a run, oldest first; a line cut off by a crash is left out."""
    records = []
    for line in (folder / METRICS_FILE).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def draw_curve(records: list[dict[str, Any]], path: Path) -> None:
    """Training loss and held-out loss over steps, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    train = [(r["step"], r["loss"]) for r in records if "loss" in r]
    held_out = [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    if train:
        axes.plot(*zip(*train, strict=True), color="#4477aa", linewidth=1.2, label="training")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="#cc6677", marker="o", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title="CoMeT fine-tuning")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    temporary = path.with_suffix(".tmp.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)
