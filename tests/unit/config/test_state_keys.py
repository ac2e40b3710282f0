"""Settings of checkpoints and skipped steps: what they must be, and which combinations would do nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comet_megatron.config.rules import check_config
from comet_megatron.config.schema import Config, DataSection, ModelSection, TrainSection


def problems(**train: object) -> str:
    section = replace(TrainSection(output="run", steps=10), **train)
    config = Config(model=ModelSection(path="start"), data=DataSection(train="data"), train=section)
    return "\n".join(map(str, check_config(config)))


@pytest.mark.parametrize(
    "train,says",
    [
        ({"on_failed_save": "retry"}, "train.on_failed_save='retry' must be go_on or stop"),
        ({"on_nonfinite": "ignore"}, "train.on_nonfinite='ignore' must be stop or skip"),
        ({"spike_guard": -1.0}, "train.spike_guard=-1.0 must be 0 or a number above"),
        ({"spike_guard": float("nan")}, "train.spike_guard=nan must be"),
        ({"max_skips": 0}, "train.max_skips=0 must be 1 or more"),
        ({"keep_last": -1}, "train.keep_last=-1 must be 0 or more"),
        ({"keep_every": 4, "save_every": 2}, "train.keep_every=4 changes nothing"),
        ({"keep_every": 3, "save_every": 2, "keep_last": 1}, "use a multiple of 2"),
        ({"keep_every": 3, "keep_last": 1}, "set train.save_every"),
    ],
)
def test_what_cannot_work_is_refused(train, says):
    assert says in problems(**train)


def test_what_works_is_taken():
    assert not problems()
    assert not problems(keep_last=2, keep_every=4, save_every=2, on_nonfinite="skip", spike_guard=6.0)
