"""Training as a whole, by its command: resume, layouts, precision, what is trained, and what stops it."""

from __future__ import annotations

import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

from comet_megatron.checkpoint.model_folder import read_description
from comet_megatron.checkpoint.run_folder import checkpoint_folder
from comet_megatron.checkpoint.sharded import load_training_state, save_checkpoint
from comet_megatron.config.schema import OptimizerSection
from comet_megatron.model.build import build_stage
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.testing.runs import run_command, weights_of, write_config, write_data, write_start
from comet_megatron.testing.tiny import (
    build_oracle,
    layout_of,
    load_hf_tensors,
    oracle_tensors,
    tiny_architecture,
    tiny_memory,
    tiny_sequences,
    whole_tensors,
)
from comet_megatron.train.model import build_trainable
from comet_megatron.train.optimizer import MEMORY_MARK, build_optimizer, build_schedule
from comet_megatron.train.step import train_step

# Chunks of 16 tokens: 5, 9, 1, 9 chunks and so on, so that no two steps call a parameter equally often.
LENGTHS = (80, 75, 130, 140, 9, 16, 137, 144, 50, 33)


def make_start(folder: Path, pool, *, tie_embeddings: bool = False) -> None:
    """FOLDER/start and FOLDER/data."""
    write_data(folder / "data", tiny_sequences(LENGTHS))
    pool(1).run(
        write_start,
        folder / "start",
        tiny_architecture(tie_embeddings=tie_embeddings, num_layers=2),
        tiny_memory(),
    )


def train(pool, world: int, config: Path, *arguments: str) -> tuple[str, str]:
    """Run the command on `world` processes; output of the main one."""
    results = pool(world).run(run_command, "--config", str(config), *arguments)
    code, out, err = results[0]
    assert code == 0, err
    return out, err


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(torch.equal(a[k], b[k]) for k in a)


LAYOUTS = {
    "TP1": (1, {"parallel": {"zero1": False}}),
    "TP1 as ZeRO-1": (1, {}),
    "DP2 ZeRO-1": (2, {}),
    "TP2+SP": (2, {"parallel": {"tp": 2, "sequence_parallel": True, "zero1": False}}),
    "DP2 ZeRO-1 bf16": (2, {"model": {"precision": "bf16"}}),
    "TP2 bf16": (2, {"model": {"precision": "bf16"}, "parallel": {"tp": 2, "zero1": False}}),
    "DP2 ZeRO-1, memory only": (2, {"train": {"trainable": "memory"}}),
    "PP2": (2, {"parallel": {"pp": 2, "zero1": False}}),
    "PP2 x DP2 ZeRO-1 bf16, recompute": (
        4,
        {"parallel": {"pp": 2}, "model": {"precision": "bf16"}, "train": {"recompute": "full"}},
    ),
}


MINUTES = ("TP1 as ZeRO-1", "DP2 ZeRO-1 bf16", "TP2 bf16")  # together; what they are about is in the others too


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in MINUTES else ()) for name in LAYOUTS]
)
def test_ten_steps_equal_five_steps_stop_resume_five_steps_bit_for_bit(name, tmp_path, pool):
    world, sections = LAYOUTS[name]
    make_start(tmp_path, pool)
    sections = {**sections, "optimizer": {"decay_steps": 10}}
    train_section = {"steps": 10, **sections.pop("train", {})}
    whole = write_config(tmp_path / "whole.yaml", tmp_path, **sections, train=train_section)
    train(pool, world, whole)
    halves_train = {**train_section, "output": str(tmp_path / "halves")}
    halves = write_config(tmp_path / "halves.yaml", tmp_path, **sections, train=halves_train)
    train(pool, world, halves, "train.steps=5")
    out, _ = train(pool, world, halves, "--resume")
    assert "resume   after step 5" in out
    (first,) = pool(1).run(weights_of, checkpoint_folder(tmp_path / "run", 10))
    (second,) = pool(1).run(weights_of, checkpoint_folder(tmp_path / "halves", 10))
    (halfway,) = pool(1).run(weights_of, checkpoint_folder(tmp_path / "halves", 5))
    assert equal(first, second)
    assert not equal(first, halfway)


@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    "world,parallel",
    [(1, {}), (2, {"tp": 2, "sequence_parallel": True}), (2, {"tp": 2, "zero1": False}), (2, {"pp": 2})],
)
def test_training_the_memory_only_leaves_the_backbone_bit_equal(world, parallel, tie_embeddings, tmp_path, pool):
    make_start(tmp_path, pool, tie_embeddings=tie_embeddings)
    config = write_config(tmp_path / "c.yaml", tmp_path, train={"trainable": "memory"}, parallel=parallel)
    out, _ = train(pool, world, config)
    (before,) = pool(1).run(weights_of, tmp_path / "start")
    (after,) = pool(1).run(weights_of, checkpoint_folder(tmp_path / "run", 4))
    new = tiny_memory().new_ids
    for name, old in before.items():
        if "_memory_net." in name:
            assert not torch.equal(old, after[name]), name
        elif name == "model.embed_tokens.weight":
            kept = [i for i in range(len(old)) if i not in new]
            assert torch.equal(old[kept], after[name][kept])
            trained = list(new)[1:]  # the memory token itself is never embedded
            assert not torch.isclose(old[trained], after[name][trained]).all(dim=1).any()
        else:
            assert torch.equal(old, after[name]), name


def optimizer_state_sizes(process, zero1: bool, precision: str):
    """On each rank: optimizer state numbers when only the memory is trained, and how many such weights there are."""
    layout = layout_of(process)
    stage = build_stage(tiny_architecture(), tiny_memory(), layout.groups, precision=precision)
    load_hf_tensors(stage, oracle_tensors(build_oracle(tiny_architecture(), tiny_memory())))
    stage.freeze_backbone()
    model = build_trainable(stage, layout, zero1=zero1)
    optimizer = build_optimizer(model, OptimizerSection(), precision=precision, zero1=zero1)
    train_step(model, optimizer, tiny_sequences((50,)), layout, settings=BackwardSettings(), step=1)
    states = optimizer.optimizer.state.values()
    held = sum(s["exp_avg"].numel() for s in states)
    trained = [p for n, p in stage.named_parameters() if "_memory_net." in n or n == "new_rows"]
    return held, sum(p.numel() for p in trained)


@pytest.mark.parametrize("zero1,precision", [(False, "fp32"), (True, "fp32"), (False, "bf16")])
def test_the_frozen_part_has_no_optimizer_state(zero1, precision, pool):
    ((held, trained),) = pool(1).run(optimizer_state_sizes, zero1, precision)
    assert held == trained


def train_three_steps(process, tp: int, sequence_parallel: bool, zero1: bool, settings, tensors, sequences):
    """Whole weights after three steps on batches of 5, 9 + 1, 9 chunks; a large eps, so that Adam does not blow up
    differences of gradients that are nearly zero."""
    layout = layout_of(process, tp=tp)
    stage = build_stage(tiny_architecture(), tiny_memory(), layout.groups, sequence_parallel=sequence_parallel)
    load_hf_tensors(stage, tensors)
    model = build_trainable(stage, layout, zero1=zero1)
    section = OptimizerSection(lr=1e-2, eps=1e-2, warmup_steps=0, weight_decay=0.1, clip_grad=0.5)
    optimizer = build_optimizer(model, section, precision="fp32", zero1=zero1)
    schedule = build_schedule(optimizer, section, steps=3, steps_done=0)
    norms = []
    for step in range(1, 4):
        schedule.step(increment=1)
        batch = sequences[2 * step - 2 : 2 * step]
        mine = np.array_split(np.arange(2), layout.dp)[layout.dp_rank]
        result = train_step(model, optimizer, [batch[i] for i in mine], layout, settings=settings, step=step)
        norms.append(result.grad_norm)
    return whole_tensors(stage, {n: p.detach() for n, p in stage.named_parameters()}), norms


@pytest.mark.parametrize(
    "world,tp,sequence_parallel,zero1",
    [(2, 1, False, True), (2, 1, False, False), (2, 2, False, True), (2, 2, True, False), (4, 2, True, True)],
    ids=["DP2 ZeRO-1", "DP2", "TP2", "TP2+SP", "TP2+SP x DP2 ZeRO-1"],
)
def test_steps_with_varying_numbers_of_chunks_train_the_same_weights_on_every_layout(
    world, tp, sequence_parallel, zero1, pool
):
    tensors = oracle_tensors(build_oracle(tiny_architecture(), tiny_memory()))
    sequences = tiny_sequences((80, 75, 140, 9, 16, 137))
    arguments = (BackwardSettings(), tensors, sequences)
    ((want, want_norms),) = pool(1).run(train_three_steps, 1, False, False, *arguments)
    for found, norms in pool(world).run(train_three_steps, tp, sequence_parallel, zero1, *arguments):
        assert norms == pytest.approx(want_norms, rel=1e-4)
        for name, value in want.items():
            # One step moves a weight by up to 1e-2: the agreement is of the updates, not of unchanged weights.
            assert (found[name] - value).abs().max() < 2e-5, name
            assert (tensors[name] - value).abs().max() > 1e-4, name


def test_bf16_trains_with_fp32_master_weights(tmp_path, pool):
    make_start(tmp_path, pool)
    train_section = {"steps": 30, "global_batch_size": 4}
    config = write_config(
        tmp_path / "c.yaml",
        tmp_path,
        model={"precision": "bf16"},
        optimizer={"lr": 3e-3, "warmup_steps": 5},
        train=train_section,
    )
    out, _ = train(pool, 2, config)
    losses = [float(line.split()[3]) for line in out.splitlines() if line.startswith("step ") and " loss " in line]
    assert losses[-1] < losses[0] - 0.2


def master_weight_dtypes(process, zero1: bool):
    layout = layout_of(process)
    stage = build_stage(tiny_architecture(), tiny_memory(), layout.groups, precision="bf16")
    load_hf_tensors(stage, oracle_tensors(build_oracle(tiny_architecture(), tiny_memory())))
    model = build_trainable(stage, layout, zero1=zero1)
    optimizer = build_optimizer(model, OptimizerSection(), precision="bf16", zero1=zero1)
    masters = [p for group in optimizer.optimizer.param_groups for p in group["params"]]
    return (
        {p.dtype for p in stage.parameters()},
        {p.dtype for p in masters},
        {p.main_grad.dtype for p in stage.parameters()},
    )


@pytest.mark.parametrize("zero1", [False, True])
def test_under_bf16_weights_are_bf16_and_masters_and_gradients_fp32(zero1, pool):
    ((weights, masters, grads),) = pool(1).run(master_weight_dtypes, zero1)
    assert (weights, masters, grads) == ({torch.bfloat16}, {torch.float32}, {torch.float32})


def learning_rates(process, folder: Path):
    """(learning rate, lr_mult, names of shapes) of each group, fresh and after loading a checkpoint."""
    layout = layout_of(process)
    description = read_description(folder)
    stage = build_stage(description.architecture, description.memory, layout.groups)
    model = build_trainable(stage, layout, zero1=True)
    section = OptimizerSection(lr=1e-3, warmup_steps=0, weight_decay=0.1)
    optimizer = build_optimizer(model, section, precision="fp32", zero1=True)
    load_training_state(folder, stage, optimizer, layout)
    build_schedule(optimizer, section, steps=100, steps_done=1)
    return sorted((g["lr_mult"], g["wd_mult"], g["lr"]) for g in optimizer.param_groups)


def test_memory_nets_train_at_five_times_the_rate_also_after_a_resume(tmp_path, pool):
    make_start(tmp_path, pool)
    train(pool, 1, write_config(tmp_path / "c.yaml", tmp_path))
    (groups,) = pool(1).run(learning_rates, checkpoint_folder(tmp_path / "run", 4))
    assert [(mult, decay) for mult, decay, _ in groups] == [
        (1.0, 0.0),
        (1.0, 1.0),
        (MEMORY_MARK, 0.0),
        (MEMORY_MARK, 1.0),
    ]
    backbone = groups[0][2]
    assert backbone == pytest.approx(1e-3, rel=1e-2)
    assert [rate for _, _, rate in groups] == pytest.approx([backbone, backbone, 5 * backbone, 5 * backbone])


def log_of(run: Path) -> dict[int, str]:
    """The log's line of each step."""
    lines = (line.split(" ", 2)[2] for line in (run / "log.txt").read_text().splitlines() if " loss " in line)
    return {int(line.split()[1].split("/")[0]): line for line in lines if line.startswith("step ") and " lr " in line}


def test_a_resumed_run_takes_its_rates_from_the_config(tmp_path, pool):
    make_start(tmp_path, pool)
    config = write_config(tmp_path / "c.yaml", tmp_path, optimizer={"decay_steps": 100})
    train(pool, 1, config)
    smaller = ("optimizer.lr=1e-5", "optimizer.memory_lr_mult=1", "train.steps=6")
    train(pool, 1, config, *smaller, "--resume")
    lines = log_of(tmp_path / "run")
    assert sorted(lines) == [1, 2, 3, 4, 5, 6]
    assert "lr 9.9" in lines[4] and "e-04" in lines[4]
    assert "lr 9.9" in lines[5] and "e-06" in lines[5]
    before, after = (pool(1).run(weights_of, checkpoint_folder(tmp_path / "run", n))[0] for n in (4, 6))
    for name, value in before.items():
        assert (after[name] - value).abs().max() < 1e-4, name  # two steps of 1e-5, memory nets no faster
        assert not torch.equal(after[name], value), name


@pytest.mark.parametrize("tie_embeddings", [pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
def test_a_start_and_a_run_of_one_process_go_on_at_a_tp_that_pads_the_vocabulary_otherwise(
    tie_embeddings, tmp_path, pool
):
    """230 ids are 256 rows at TP1 and 512 at TP4."""
    make_start(tmp_path, pool, tie_embeddings=tie_embeddings)
    one = write_config(tmp_path / "1.yaml", tmp_path, optimizer={"decay_steps": 4, "eps": 1e-3})
    train(pool, 1, one, "train.steps=2")
    shutil.copytree(tmp_path / "run", tmp_path / "run4")
    four = ("parallel.tp=4", f"train.output={tmp_path / 'run4'}")
    train(pool, 4, one, *four, "--resume")
    train(pool, 1, one, "--resume")
    fresh = (f"train.output={tmp_path / 'fresh'}", "parallel.tp=4")
    train(pool, 4, one, *fresh)
    (want,) = pool(1).run(weights_of, checkpoint_folder(tmp_path / "run", 4))
    for run in ("run4", "fresh"):
        (found,) = pool(1).run(weights_of, checkpoint_folder(tmp_path / run, 4))
        assert all((found[name] - value).abs().max() < 2e-5 for name, value in want.items())


def resave(process, tp: int, source: Path, target: Path):
    """Load a run's checkpoint on this layout, save it again."""
    layout = layout_of(process, tp=tp)
    description = read_description(source)
    stage = build_stage(description.architecture, description.memory, layout.groups, sequence_parallel=tp > 1)
    model = build_trainable(stage, layout, zero1=True)
    optimizer = build_optimizer(model, OptimizerSection(), precision="fp32", zero1=True)
    load_training_state(source, stage, optimizer, layout)
    tokenizer = source / "tokenizer"
    save_checkpoint(target, stage, layout, description=description, tokenizer=tokenizer, optimizer=optimizer)


def test_a_checkpoint_goes_from_layout_to_layout_and_trains_on(tmp_path, pool):
    """DP2 → TP2 → TP2 x DP2 → one process: weights bit-equal, and the next steps equal those of the run itself."""
    make_start(tmp_path, pool)
    config = write_config(tmp_path / "c.yaml", tmp_path, optimizer={"decay_steps": 6, "eps": 1e-3})
    train(pool, 2, config)
    origin = checkpoint_folder(tmp_path / "run", 4)
    pool(2).run(resave, 2, origin, tmp_path / "tp2")
    pool(4).run(resave, 2, tmp_path / "tp2", tmp_path / "tp2dp2")
    pool(1).run(resave, 1, tmp_path / "tp2dp2", tmp_path / "alone")
    (before,) = pool(1).run(weights_of, origin)
    (after,) = pool(1).run(weights_of, tmp_path / "alone")
    assert equal(before, after)
    moved = tmp_path / "moved"
    shutil.copytree(tmp_path / "run", moved)
    shutil.rmtree(checkpoint_folder(moved, 4))
    shutil.copytree(tmp_path / "alone", checkpoint_folder(moved, 4))
    shutil.copyfile(origin / "progress.json", checkpoint_folder(moved, 4) / "progress.json")
    train(pool, 2, config, "--resume", "train.steps=6")
    train(pool, 1, config, "--resume", "train.steps=6", f"train.output={moved}")
    (one,) = pool(1).run(weights_of, checkpoint_folder(tmp_path / "run", 6))
    (other,) = pool(1).run(weights_of, checkpoint_folder(moved, 6))
    assert all((one[k] - other[k]).abs().max() < 1e-5 for k in one)


def poison(process, source: Path, target: Path, parameter: str):
    """A copy of a starting checkpoint with one weight that is not a number."""
    layout = layout_of(process)
    description = read_description(source)
    stage = build_stage(description.architecture, description.memory, layout.groups)
    from comet_megatron.checkpoint.sharded import load_weights

    load_weights(source, stage, layout)
    with torch.no_grad():
        dict(stage.named_parameters())[parameter].view(-1)[0] = torch.nan
    save_checkpoint(target, stage, layout, description=description, tokenizer=source / "tokenizer")


@pytest.mark.parametrize(
    "parameter,place",
    [
        ("decoder.layers.1.mlp.linear_fc2.weight", "in layer 1, chunk 0"),
        ("decoder.layers.0.global_memory_net.g_proj.weight", "in layer 0, chunk 1"),
        ("decoder.final_layernorm.weight", "in the head, chunk 0"),
    ],
)
@pytest.mark.parametrize("world,tp,pp", [(1, 1, 1), (2, 2, 1), (2, 1, 1), (2, 1, 2)], ids=["TP1", "TP2", "DP2", "PP2"])
def test_a_loss_that_is_not_finite_names_step_layer_and_chunk_and_stops(
    parameter, place, world, tp, pp, tmp_path, pool
):
    make_start(tmp_path, pool)
    pool(1).run(poison, tmp_path / "start", tmp_path / "bad", parameter)
    config = write_config(
        tmp_path / "c.yaml", tmp_path, model={"path": str(tmp_path / "bad")}, parallel={"tp": tp, "pp": pp}
    )
    results = pool(world).run(run_command, "--config", str(config), "train.global_batch_size=10")
    assert {code for code, _, _ in results} == {2}
    message = results[0][2]
    assert "the loss of step 1 is not finite" in message and place in message
    assert "Traceback" not in message
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_evaluation_and_metrics_are_written(tmp_path, pool):
    make_start(tmp_path, pool)
    write_data(tmp_path / "held_out", tiny_sequences((50, 40, 60), seed=9))
    config = write_config(
        tmp_path / "c.yaml",
        tmp_path,
        data={"eval": str(tmp_path / "held_out")},
        train={"eval_every": 2, "save_every": 2},
        logging={"tensorboard": True},
    )
    out, _ = train(pool, 2, config)
    run = tmp_path / "run"
    assert out.count("  held-out loss ") == 3
    assert {p.name for p in run.iterdir()} >= {
        "log.txt",
        "metrics.jsonl",
        "loss_curve.png",
        "config.yaml",
        "checkpoints",
    }
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == ["step_0000002", "step_0000004"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert tags >= {
        "train/loss",
        "train/learning_rate",
        "train/gradient_norm",
        "speed/text_tokens_per_second",
        "speed/step_seconds",
        "speed/peak_memory_gib",
        "memory_gate_mean/layer_01",
        "memory_state_norm/layer_00",
        "loss_by_chunk/chunk_0004",
        "eval/loss",
    }
    assert [e.step for e in events.Scalars("eval/loss")] == [0, 2, 4]
    gates = [e.value for e in events.Scalars("memory_gate_mean/layer_01")]
    assert all(0 < g < 1 for g in gates)


def test_steps_of_adam_lie_where_its_kernel_wants_them_after_a_load(pool):
    pool(1).run(check_steps_after_a_load)


def check_steps_after_a_load(process) -> None:
    """A state that was saved unfused comes to an optimizer whose groups are fused, and the other way round."""
    from comet_megatron.train import optimizer as module

    layout = layout_of(process)
    stage = build_stage(tiny_architecture(num_layers=1), tiny_memory(), layout.groups)
    optimizer = build_optimizer(
        build_trainable(stage, layout, zero1=True), OptimizerSection(), precision="fp32", zero1=True
    )
    inner = getattr(optimizer, "chained_optimizers", [optimizer])[0].optimizer
    asked = []

    def step_device(group, param):
        asked.append(bool(group.get("fused")))
        return torch.device("meta") if group.get("fused") else torch.device("cpu")

    for fused in (True, False):
        for group in inner.param_groups:
            group["fused"] = fused
            for param in group["params"]:
                inner.state[param]["step"] = torch.zeros(())
        with mock.patch.object(module, "step_device", step_device), module.keep_settings(optimizer):
            for group in inner.param_groups:  # as a load leaves it
                group["fused"] = None
        steps = [inner.state[param]["step"] for group in inner.param_groups for param in group["params"]]
        assert steps and {step.device.type for step in steps} == {"meta" if fused else "cpu"}
    assert set(asked) == {True, False}
