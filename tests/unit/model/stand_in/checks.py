"""Layers of Transformer Engine, computed by the stand-in beside this file; test_te_layers.py runs this."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformer_engine as stand_in

from comet_megatron.backend.precision import Fp8
from comet_megatron.checkpoint.model_folder import ModelDescription, Progress
from comet_megatron.checkpoint.sharded import load_training_state, load_weights, save_checkpoint
from comet_megatron.config.schema import OptimizerSection
from comet_megatron.model.build import build_stage
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.testing.tiny import (
    build_oracle,
    gradients,
    layout_alone,
    load_hf_tensors,
    oracle_tensors,
    tiny_architecture,
    tiny_memory,
    tiny_sequences,
    whole_tensors,
)
from comet_megatron.train.model import build_trainable
from comet_megatron.train.optimizer import build_optimizer
from comet_megatron.train.step import accumulate_gradients, evaluate, train_step

ARCHITECTURE = replace(tiny_architecture(num_layers=4), hidden_size=128, ffn_hidden_size=128)
MEMORY = tiny_memory()
LENGTHS = (75, 32, 50, 9)  # 5, 2, 4 and 1 chunks, ragged
RECIPES = ("tensorwise", "mxfp8", "blockwise")
SECTION = OptimizerSection(lr=1e-3, warmup_steps=0)


@pytest.fixture(autouse=True)
def clean():
    stand_in.LOG.clear()
    stand_in.ROUNDS = False
    yield
    assert not stand_in.FP8GlobalStateManager.FIRSTS, "first halves without a second"


def build(backend: str, precision: str, *, recipe: str = "", split: tuple[int, ...] = (), ends: int = 1):
    """A trainable model with the oracle's weights, all stages in this process."""
    layout, stages = layout_alone(), {}
    tensors = oracle_tensors(build_oracle(ARCHITECTURE, MEMORY))
    for number in range(max(len(split), 1)):
        stages[number] = build_stage(
            ARCHITECTURE,
            MEMORY,
            layout.groups,
            stage=number,
            layers_per_stage=split,
            precision=precision,
            backend=backend,
            fp8=Fp8(recipe, ends) if recipe else None,
        )
        load_hf_tensors(stages[number], tensors)
    return build_trainable(stages, layout, zero1=False)


def gradients_of(model, *, recompute: bool):
    settings = BackwardSettings(recompute=recompute, slice_tokens=7)
    result = accumulate_gradients(model, tiny_sequences(LENGTHS), layout_alone(), settings=settings, step=1)
    return result.loss, whole_tensors(model.stages, gradients(model.stages))


def losses_of(
    model, precision: str, *, steps: int, recompute: bool, evaluates: bool = False, lr: float = 1e-3
) -> list[float]:
    optimizer = build_optimizer(model, SECTION, precision=precision, zero1=False)
    for group in optimizer.param_groups:
        group["lr"] = lr
    settings, layout = BackwardSettings(recompute=recompute), layout_alone()
    found = []
    for step in range(steps):
        batch = tiny_sequences(LENGTHS)
        found.append(train_step(model, optimizer, batch, layout, settings=settings, step=step).loss)
        if evaluates:
            evaluate(model.executor, batch[:2], layout, settings=settings)
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("split", [(), (1, 3)])
def test_te_layers_in_fp32_equal_the_oracle(split, recompute):
    oracle = build_oracle(ARCHITECTURE, MEMORY)
    sequences = tiny_sequences(LENGTHS)
    count, total = sum(len(s) - 1 for s in sequences), 0.0
    for ids in sequences:
        row = torch.from_numpy(ids.astype("int64"))[None]
        total = total + oracle(row, labels=row).loss * (len(ids) - 1) / count
    total.backward()
    loss, found = gradients_of(build("te", "fp32", split=split), recompute=recompute)
    assert loss == pytest.approx(total.item(), abs=1e-5)
    for name, param in oracle.named_parameters():
        error = (found[name] - param.grad).abs().max() / param.grad.abs().max()
        assert error < 1e-5, name
    assert stand_in.LOG and not any(call["fp8"] for call in stand_in.LOG)


def test_both_backends_store_the_same_tensors_under_the_same_names():
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": layout_alone().groups.dp_cp}
    stored = []
    for backend, recipe in (("torch", ""), ("te", ""), ("te", "tensorwise")):
        (stage,) = build(backend, "fp8" if recipe else "bf16", recipe=recipe).stages
        states = stage.sharded_state_dict(metadata=metadata)
        assert all(param.data_ptr() for param in stage.parameters())
        flat = {k: s.build() if hasattr(s, "build") else s for k, s in states.items()}
        stored.append({k: [(t.key, t.global_shape, t.dtype) for t in _leaves(s)] for k, s in flat.items()})
    assert stored[0] == stored[1] == stored[2]
    assert not any("_extra_state" in key for key in stored[0])


def _leaves(state):
    if isinstance(state, dict):
        return [leaf for inner in state.values() for leaf in _leaves(inner)]
    return [leaf for inner in state for leaf in _leaves(inner)] if isinstance(state, list) else [state]


@pytest.mark.parametrize(("first", "second"), [("te", "torch"), ("torch", "te")])
def test_a_run_goes_on_with_the_other_backend(first, second, tmp_path):
    layout, settings = layout_alone(), BackwardSettings()
    (tmp_path / "tokenizer").mkdir()
    description = ModelDescription(ARCHITECTURE, MEMORY, {"model_type": "qwen3", "eos_token_id": 0}, "none")
    runs = {}
    for backend in (first, second):
        model = build(backend, "bf16")
        runs[backend] = model, build_optimizer(model, SECTION, precision="bf16", zero1=False)
    model, optimizer = runs[first]
    train_step(model, optimizer, tiny_sequences(LENGTHS), layout, settings=settings, step=1)
    progress = Progress(step=1, data_fingerprint="", data_seed=0, global_batch_size=4, trainable="all", zero1=False)
    save_checkpoint(
        tmp_path / "saved",
        model.stages[0],
        layout,
        description=description,
        tokenizer=tmp_path / "tokenizer",
        optimizer=optimizer,
        progress=progress,
    )
    other, other_optimizer = runs[second]
    load_training_state(tmp_path / "saved", other.stages[0], other_optimizer, layout)
    ours, theirs = (whole_tensors(m.stages, dict(m.stages[0].named_parameters())) for m in (model, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    batch = tiny_sequences(LENGTHS)
    both = [train_step(m, o, batch, layout, settings=settings, step=2) for m, o in runs.values()]
    assert both[0].loss == pytest.approx(both[1].loss, rel=2e-3)  # another attention kernel in bf16
    load_weights(tmp_path / "saved", build(second, "bf16").stages[0], layout)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("split", [(), (2, 2)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_that_rounds_nothing_trains_as_bf16_does(recipe, split, recompute):
    """Several sequences, chunks, stages, steps and evaluations between them: a stale weight or a missing half shows."""
    want = losses_of(build("te", "bf16", split=split), "bf16", steps=3, recompute=recompute)
    stand_in.LOG.clear()
    model = build("te", "fp8", recipe=recipe, split=split)
    found = losses_of(model, "fp8", steps=3, recompute=recompute, evaluates=True)
    assert found == pytest.approx(want, rel=1e-3)
    assert any(call["fp8"] for call in stand_in.LOG)
    assert abs(want[-1] - want[0]) > 0.1  # it learnt, so weights differ from step to step


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_rows_are_padded_only_where_they_enter_a_product(recipe):
    model = build("te", "fp8", recipe=recipe, ends=1)
    gradients_of(model, recompute=True)
    layers = model.stages[0].decoder.layers
    at_ends = {m for layer in (layers[0], layers[-1]) for m in layer.modules()}
    multiple = {"tensorwise": 16, "mxfp8": 32, "blockwise": 128}[recipe]
    for call in stand_in.LOG:
        assert call["fp8"] == (call["module"] not in at_ends)
        assert not call["fp8"] or call["rows"] % multiple == 0
    plain = {call["rows"] for call in stand_in.LOG if not call["fp8"]}
    assert any(rows % 16 for rows in plain)  # ragged chunks are not padded elsewhere


def test_fp8_weights_are_made_anew_in_the_first_call_of_each_pass_only():
    model = build("te", "fp8", recipe="tensorwise")
    module = model.stages[0].decoder.layers[1].mlp.linear_fc1
    for recompute in (True, False):
        stand_in.LOG.clear()
        gradients_of(model, recompute=recompute)
        firsts = [call["first"] for call in stand_in.LOG if call["module"] is module]
        assert firsts[0] is True and len(firsts) > 5 and not any(firsts[1:])


def test_gradients_in_fp8_are_the_same_when_chunks_are_computed_again():
    stand_in.ROUNDS = True
    (loss, plain), (again_loss, again) = (
        gradients_of(build("te", "fp8", recipe="tensorwise"), recompute=recompute) for recompute in (False, True)
    )
    assert loss == again_loss
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_emulated_fp8_learns_as_bf16_does():
    """Rounding to FP8 changes the losses, by less than 2 %."""
    stand_in.ROUNDS = True
    want = losses_of(build("te", "bf16"), "bf16", steps=12, recompute=True, lr=3e-4)
    found = losses_of(build("te", "fp8", recipe="tensorwise"), "fp8", steps=12, recompute=True, lr=3e-4)
    assert found != want and found == pytest.approx(want, rel=0.02)
    assert want[-1] < 0.9 * want[0]


def test_weight_gradients_are_fused_only_where_nothing_else_uses_the_weight():
    (stage,) = build("te", "bf16").stages
    stage.fuse_weight_gradients()
    fused = {n for n, m in stage.named_modules() if getattr(m, "fuse_wgrad_accumulation", False)}
    assert len(fused) == 3 * ARCHITECTURE.num_layers
    assert not any("linear_qkv" in name or "output_layer" in name for name in fused)
    stage.freeze_backbone()
    stage.fuse_weight_gradients()
    assert not any(getattr(m, "fuse_wgrad_accumulation", False) for m in stage.modules())
