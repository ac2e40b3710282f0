"""A checkpoint of one backend loads in the other, weights and state of the same AdamW, and training goes on."""

from __future__ import annotations

import pytest
import torch

from comet_megatron.checkpoint.model_folder import ModelDescription, Progress
from comet_megatron.checkpoint.sharded import load_training_state, save_checkpoint
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.testing.gpu import ARCHITECTURE, MEMORY, batch, optimizer_of
from comet_megatron.testing.tiny import layout_alone, weights
from comet_megatron.train.step import train_step

KINDS = {
    "torch": ("torch", "bf16", ""),
    "te": ("te", "bf16", ""),
    "te fp8": ("te", "fp8", "tensorwise"),
}


@pytest.mark.parametrize(
    ("first", "second"),
    [("te", "torch"), ("torch", "te"), ("te fp8", "torch"), ("torch", "te fp8"), ("torch", "torch")],
)
def test_a_run_goes_on_with_the_other_backend(first, second, tmp_path, build):
    layout, settings = layout_alone(), BackwardSettings()
    runs = []
    for name in (first, second):
        backend, precision, recipe = KINDS[name]
        model = build(backend, precision, recipe=recipe)
        runs.append((model, optimizer_of(model, precision, lr=1e-3)))
    (model, optimizer), (other, other_optimizer) = runs
    for step in range(3):
        train_step(model, optimizer, batch(seed=step), layout, settings=settings, step=step)
    (tmp_path / "tokenizer").mkdir()
    save_checkpoint(
        tmp_path / "saved",
        model.stages[0],
        layout,
        description=ModelDescription(ARCHITECTURE, MEMORY, {"model_type": "qwen3", "eos_token_id": 0}, "none"),
        tokenizer=tmp_path / "tokenizer",
        optimizer=optimizer,
        progress=Progress(3, "", 0, 4, "all", True),
    )
    load_training_state(tmp_path / "saved", other.stages[0], other_optimizer, layout)
    ours, theirs = weights(model.stages), weights(other.stages)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    tolerance = 0.02 if "fp8" in first + second else 2e-3
    for step in (3, 4, 5):
        one, two = (train_step(m, o, batch(seed=step), layout, settings=settings, step=step).loss for m, o in runs)
        assert one == pytest.approx(two, rel=tolerance)
