"""What a run tells its user: the curve's file after a resume, groups of chunks, how far a loss fell."""

import math

import pytest

from comet_megatron.train.callbacks.curve import Curve, draw_curve, read_metrics
from comet_megatron.train.callbacks.progress import _fall
from comet_megatron.train.callbacks.tensorboard import group_by_chunk
from comet_megatron.train.records import RunStart, StepRecord
from comet_megatron.train.step import BatchResult


def record(step: int, loss: float) -> StepRecord:
    result = BatchResult(loss=loss, text_tokens=100, chunk_losses=(loss,), gate_means=(), state_norms=())
    return StepRecord(step=step, result=result, learning_rate=1e-3, seconds=0.5, peak_memory_bytes=1 << 20)


def test_a_resumed_run_replaces_the_steps_after_its_checkpoint(tmp_path):
    first = Curve(tmp_path)
    first.on_start(RunStart(tmp_path, 10, 0, ()))
    for step in range(1, 5):
        first.on_step(record(step, 5.0))
    first.close()
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 5, "lo')  # cut off by a crash
    second = Curve(tmp_path)
    second.on_start(RunStart(tmp_path, 10, 2, ()))
    second.on_step(record(3, 1.0))
    second.close()
    assert [(r["step"], r["loss"]) for r in read_metrics(tmp_path)] == [(1, 5.0), (2, 5.0), (3, 1.0)]
    draw_curve(read_metrics(tmp_path), tmp_path / "curve.png")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_later_chunks_are_grouped_and_those_without_labels_left_out():
    losses = [float(i) for i in range(40)]
    losses[3] = losses[17] = math.nan
    groups = group_by_chunk(losses)
    assert groups["chunk_0015"] == 15.0
    assert "chunk_0003" not in groups
    assert groups["chunks_0016-0031"] == pytest.approx((sum(range(16, 32)) - 17) / 15)
    assert groups["chunks_0032-0063"] == pytest.approx(sum(range(32, 40)) / 8)
    assert len(groups) == 15 + 2


@pytest.mark.parametrize(
    "losses,says",
    [
        ((8.0, 6.0, 4.0), "loss fell from 8.00 to 4.00, by 4.00 (50%)"),
        ((4.0, 5.0), "loss rose from 4.00 to 5.00, by 1.00 (25%)"),
        ((4.0,), "loss: measured 1 times"),
    ],
)
def test_the_end_says_how_far_a_loss_fell(losses, says):
    assert _fall("loss", losses) == says
