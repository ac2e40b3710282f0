"""Inside a step: what is computed how often, what is reported, how the update is made, and which samples it takes."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from comet_megatron.chunking import IGNORE_LABEL, next_token_labels
from comet_megatron.config.schema import OptimizerSection
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.sampler import plan_positions, sample_index
from comet_megatron.errors import TrainingError
from comet_megatron.model.build import build_stage
from comet_megatron.model.chunk_tensors import ChunkTensors
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.executor import BackwardSettings, Executor, SequenceResult
from comet_megatron.testing.runs import run_command, write_config, write_data, write_start
from comet_megatron.testing.tiny import (
    build_oracle,
    layout_alone,
    layout_of,
    load_hf_tensors,
    oracle_tensors,
    tiny_architecture,
    tiny_memory,
    tiny_sequences,
    whole_tensors,
)
from comet_megatron.train import model as model_module
from comet_megatron.train import trainer as trainer_module
from comet_megatron.train.callbacks.curve import read_metrics
from comet_megatron.train.model import build_trainable
from comet_megatron.train.optimizer import build_optimizer, build_schedule
from comet_megatron.train.sequence import evaluate_sequence, train_sequence
from comet_megatron.train.step import evaluate, train_step

NUM_CHUNKS, TOKENS = 5, 75  # chunks of 16 tokens, the last one ragged
ALL_WAYS = {
    "whole": BackwardSettings(),
    "recompute": BackwardSettings(recompute=True, slice_tokens=7),
    "windows": BackwardSettings(bptt_chunks=2),
    "windows, recompute": BackwardSettings(bptt_chunks=2, recompute=True, slice_tokens=7),
}
ways = pytest.mark.parametrize("settings", ALL_WAYS.values(), ids=ALL_WAYS)


def build_pair():
    """The oracle, and the stage with its weights in this process."""
    oracle = build_oracle(tiny_architecture(), tiny_memory())
    stage = build_stage(tiny_architecture(), tiny_memory(), layout_alone().groups)
    load_hf_tensors(stage, oracle_tensors(oracle))
    return oracle, stage


def two_sequences() -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels of a microbatch, [2, tokens] each; every chunk has labels."""
    ids = np.stack(tiny_sequences((TOKENS, TOKENS)))
    return ids, np.stack([next_token_labels(row) for row in ids])


def train_and_evaluate(stage: CometStage, ids, labels, settings: BackwardSettings) -> list[SequenceResult]:
    scale = 1.0 / (labels != IGNORE_LABEL).sum()
    return [
        train_sequence(stage, ids, labels, scale=scale, settings=settings),
        evaluate_sequence(stage, ids, labels, settings=settings),
    ]


@dataclass
class Watch:
    """What a training pass computes and holds.

    Attributes:
        calls: forward calls of the first layer by chunk.
        alive: tensors held for backward whenever a chunk enters the stage, by order of the calls.
        grown: whether that call left more of them.
        held: now.
    """

    calls: Counter = field(default_factory=Counter)
    alive: list[int] = field(default_factory=list)
    grown: list[bool] = field(default_factory=list)
    held: int = 0

    def enter_stage(self, module, arguments) -> None:
        self.alive.append(self.held)

    def leave_stage(self, module, arguments, output) -> None:
        self.grown.append(self.held > self.alive[-1])

    def enter_layer(self, module, arguments, keywords) -> None:
        self.calls[keywords["chunk"].plan.index] += 1


class Held:
    """A tensor saved for backward, counted as long as its graph keeps it."""

    def __init__(self, watch: Watch, tensor: Tensor) -> None:
        self.watch, self.tensor = watch, tensor.detach()  # not its graph: a node may save its own output
        watch.held += 1

    def __del__(self) -> None:
        self.watch.held -= 1


def watch_training(settings: BackwardSettings) -> Watch:
    _, stage = build_pair()
    watch = Watch()
    stage.register_forward_pre_hook(watch.enter_stage)
    stage.register_forward_hook(watch.leave_stage)
    stage.decoder.layers[0].register_forward_pre_hook(watch.enter_layer, with_kwargs=True)
    ids, labels = two_sequences()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: Held(watch, t), lambda held: held.tensor):
        train_sequence(stage, ids, labels, scale=1.0, settings=settings)
    assert watch.held == 0
    return watch


def test_without_recomputation_every_chunk_is_computed_once_and_its_graph_waits_for_the_backward():
    watch = watch_training(BackwardSettings())
    assert watch.calls == dict.fromkeys(range(NUM_CHUNKS), 1)
    assert watch.alive[0] == 0 and np.all(np.diff(watch.alive) > 10)


WITHOUT, WITH = False, True  # a graph
EACH_CALL = {
    "all": ((2, 2, 2, 2, 1), [*[WITHOUT] * 4, *[WITH] * 5]),
    # chunk 2 is computed after the backward of chunk 1, before that of chunk 0: a pipeline never stops between windows
    2: ((2, 1, 2, 1, 1), [WITHOUT, WITH, WITHOUT, WITH, WITH, WITH, WITH]),
    1: ((1, 1, 1, 1, 1), [WITH] * 5),
}


@pytest.mark.parametrize("window", EACH_CALL)
def test_recomputation_computes_all_but_the_last_chunk_of_a_window_twice_and_keeps_no_graph(window):
    computed, graphs = EACH_CALL[window]
    watch = watch_training(BackwardSettings(bptt_chunks=window, recompute=True))
    assert tuple(watch.calls[i] for i in range(NUM_CHUNKS)) == computed
    assert watch.grown == graphs
    assert watch.alive == [0] * sum(computed)  # the graph of one chunk at a time: none while another one begins


def test_no_more_graphs_are_kept_than_a_window_has_chunks():
    alive = watch_training(BackwardSettings(bptt_chunks=2)).alive
    two_graphs = watch_training(BackwardSettings()).alive[2]
    assert [held > 0 for held in alive] == [False, True, True, True, False]
    assert max(alive) < two_graphs  # one, when the second one begins


@ways
def test_logits_exist_for_one_slice_of_labelled_rows_at_a_time_and_none_without_labels(settings):
    _, stage = build_pair()
    ids, labels = two_sequences()
    labels[:, 0:16] = labels[:, 32:48] = IGNORE_LABEL  # chunks 0 and 2 have none, nor has what follows chunk 3
    labels[0, 20:24] = labels[:, 30:32] = labels[:, 60:] = IGNORE_LABEL
    made: list[int] = []
    asked: list[int] = []
    whole_logits, whole_rows = stage.logits, stage.labelled_hidden

    def logits(hidden: Tensor) -> Tensor:
        made.append(len(hidden))
        return whole_logits(hidden)

    def labelled_hidden(hidden: Tensor, chunk: ChunkTensors) -> Tensor:
        asked.append(chunk.plan.index)
        return whole_rows(hidden, chunk)

    stage.logits, stage.labelled_hidden = logits, labelled_hidden
    by_chunk = {1: [14], 3: [12]} if settings.slice_tokens > 16 else {1: [7, 7], 3: [7, 5]}
    train_sequence(stage, ids, labels, scale=1.0, settings=settings)
    windowed = settings.bptt_chunks != "all"
    assert made == (by_chunk[1] + by_chunk[3] if windowed else by_chunk[3] + by_chunk[1])
    assert sorted(asked) == [1, 3]
    made.clear()
    asked.clear()
    evaluate_sequence(stage, ids, labels, settings=settings)
    assert made == by_chunk[1] + by_chunk[3]
    assert asked == [1, 3]


@ways
def test_losses_are_those_of_each_chunk_in_order(settings):
    oracle, stage = build_pair()
    ids, labels = two_sequences()
    labels[:, 50:55] = labels[0, 3:30] = IGNORE_LABEL
    with torch.no_grad():
        logits = oracle(torch.from_numpy(ids.astype(np.int64))).logits
    targets = torch.from_numpy(labels.astype(np.int64))
    want = [
        F.cross_entropy(part.flatten(0, 1), target.flatten(), ignore_index=IGNORE_LABEL, reduction="sum").item()
        for part, target in zip(logits.split(16, dim=1), targets.split(16, dim=1), strict=True)
    ]
    assert np.abs(np.diff(want)).min() > 1  # so that another order would be seen
    for result in train_and_evaluate(stage, ids, labels, settings):
        assert result.losses.tolist() == pytest.approx(want, rel=1e-5)
        assert result.labels == tuple((part != IGNORE_LABEL).sum().item() for part in targets.split(16, dim=1))


@ways
def test_gate_and_state_norm_are_those_of_the_oracle(settings):
    oracle, stage = build_pair()
    ids, labels = two_sequences()
    nets = [layer.global_memory_net for layer in oracle.model.layers]
    gates, states = ([[] for _ in nets] for _ in range(2))
    for net, gate, state in zip(nets, gates, states, strict=True):
        net.g_proj.register_forward_hook(lambda module, inputs, output, gate=gate: gate.append(output.sigmoid()))
        net.register_forward_hook(lambda module, inputs, output, state=state: state.append(output))
    with torch.no_grad():
        oracle(torch.from_numpy(ids.astype(np.int64)))
    assert [len(gate) for gate in gates] == [NUM_CHUNKS - 2] * 3  # none in the first chunk, no writing in the last
    want_gates = [torch.stack(gate).mean().item() for gate in gates]
    want_norms = [state[-1].norm(dim=-1).mean().item() for state in states]
    assert not np.allclose(want_norms, [state[-2].norm(dim=-1).mean().item() for state in states], rtol=1e-4)
    for result in train_and_evaluate(stage, ids, labels, settings):
        assert result.gate_mean.tolist() == pytest.approx(want_gates, rel=1e-5)
        assert result.state_norm.tolist() == pytest.approx(want_norms, rel=1e-5)


def step_on_a_bad_gradient(process, tp: int, zero1: bool, clip_grad: float, name: str, bad: float):
    """On each rank: the error of step 7, and the weights before and after it, optimizer state numbers included."""
    layout = layout_of(process, tp=tp)
    stage = build_stage(tiny_architecture(), tiny_memory(), layout.groups)
    load_hf_tensors(stage, oracle_tensors(build_oracle(tiny_architecture(), tiny_memory())))
    model = build_trainable(stage, layout, zero1=zero1)
    section = OptimizerSection(clip_grad=clip_grad)
    optimizer = build_optimizer(model, section, precision="fp32", zero1=zero1)
    (ids,) = tiny_sequences((50,), seed=process.rank if tp == 1 else 0)
    arguments = {"layout": layout, "settings": BackwardSettings()}
    train_step(model, optimizer, [ids], step=6, **arguments)
    right = model_module.finalize_model_grads

    def finalize(*args, **kwargs) -> None:
        right(*args, **kwargs)
        dict(stage.named_parameters())[name].main_grad.view(-1)[0] = bad

    def snapshot() -> list[Tensor]:
        moments = [v for state in optimizer.optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
        return [t.detach().clone() for t in (*stage.parameters(), *moments)]

    before = snapshot()
    model_module.finalize_model_grads = finalize
    try:
        train_step(model, optimizer, [ids], step=7, **arguments)
        message = ""
    except TrainingError as error:
        message = str(error)
    finally:
        model_module.finalize_model_grads = right
    after = snapshot()
    train_step(model, optimizer, [ids], step=7, **arguments)
    return message, before, after, snapshot()


@pytest.mark.parametrize(
    "name", ["decoder.layers.1.mlp.linear_fc2.weight", "decoder.layers.2.temp_memory_net.0.weight"]
)
@pytest.mark.parametrize(
    "world,tp,zero1,clip_grad,bad",
    [
        (1, 1, False, 1.5, math.inf),
        (1, 1, True, 1.5, math.nan),
        (1, 1, False, 0.0, -math.inf),
        (1, 1, True, 0.0, math.inf),
        (2, 1, True, 1.5, math.inf),
        (2, 2, False, 1.5, math.inf),
    ],
    ids=["fp32", "ZeRO-1", "no clipping", "ZeRO-1, no clipping", "DP2 ZeRO-1", "TP2"],
)
def test_a_gradient_that_is_not_finite_stops_the_step_before_it_changes_anything(
    world, tp, zero1, clip_grad, bad, name, pool
):
    results = pool(world).run(step_on_a_bad_gradient, tp, zero1, clip_grad, name, bad)
    for message, before, after, next_step in results:
        assert "the gradient of step 7 is not finite" in message and f"in the gradient of {name}" in message
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(before[:5], next_step[:5], strict=True))
        assert all(t.isfinite().all() for t in next_step)


SECTION = OptimizerSection(
    lr=2e-3,
    min_lr=4e-4,
    warmup_steps=2,
    decay_steps=4,
    betas=(0.7, 0.9),
    eps=1e-3,
    weight_decay=0.3,
    clip_grad=0.5,
    memory_lr_mult=5.0,
)
STEPS = 4


def rate(step: int) -> float:
    """Of the backbone, of its highest: linear up to it, then half a cosine to the lowest right after the last step."""
    if step <= SECTION.warmup_steps:
        return step / SECTION.warmup_steps
    lowest = SECTION.min_lr / SECTION.lr
    done = (step - SECTION.warmup_steps) / (STEPS + 1 - SECTION.warmup_steps)
    return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2


def oracle_steps(oracle, batches, *, memory_rate=5.0, decay_vectors=False, betas=(0.7, 0.9), eps=1e-3, clip=0.5):
    """Weights after torch's AdamW on the oracle, and the norms of the gradients."""
    params = dict(oracle.named_parameters())
    groups = []
    for is_memory in (False, True):
        for is_matrix in (False, True):
            own = [p for n, p in params.items() if ("_memory_net." in n, p.dim() > 1) == (is_memory, is_matrix)]
            decay = 0.3 if is_matrix or decay_vectors else 0.0
            groups.append({"params": own, "weight_decay": decay, "mult": memory_rate if is_memory else 1.0})
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=eps)
    norms = []
    for step, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        count = sum(len(ids) - 1 for ids in batch)
        for ids in batch:
            row = torch.from_numpy(ids.astype(np.int64))[None]
            (oracle(row, labels=row).loss * (len(ids) - 1) / count).backward()
        for param in params.values():  # a weight that nothing reads decays nevertheless
            param.grad = torch.zeros_like(param) if param.grad is None else param.grad
        norms.append(torch.nn.utils.clip_grad_norm_(params.values(), clip).item())
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * rate(step) * group["mult"]
        optimizer.step()
    return {n: p.detach().clone() for n, p in params.items()}, norms


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[n] - b[n]).abs().max().item() for n in a)


@pytest.mark.parametrize("zero1", [False, True], ids=["fp32", "ZeRO-1"])
@pytest.mark.parametrize("tie_embeddings", [False, True], ids=["untied", "tied"])
def test_steps_are_those_of_adamw_on_the_oracle(tie_embeddings, zero1):
    layout, architecture = layout_alone(), tiny_architecture(tie_embeddings=tie_embeddings)
    oracle = build_oracle(architecture, tiny_memory())
    start = {n: t.clone() for n, t in oracle_tensors(oracle).items()}
    sequences = tiny_sequences((75, 9, 40, 50, 16, 33, 60, 20))
    batches = [sequences[i : i + 2] for i in range(0, 2 * STEPS, 2)]
    stage = build_stage(architecture, tiny_memory(), layout.groups)
    load_hf_tensors(stage, start)
    model = build_trainable(stage, layout, zero1=zero1)
    optimizer = build_optimizer(model, SECTION, precision="fp32", zero1=zero1)
    schedule = build_schedule(optimizer, SECTION, steps=100, steps_done=0)
    norms, by_step = [], []
    for step, batch in enumerate(batches, 1):
        schedule.step(increment=1)
        result = train_step(model, optimizer, batch, layout, settings=BackwardSettings(), step=step)
        norms.append(result.grad_norm)
        by_step.append(whole_tensors(stage, {n: p.detach().clone() for n, p in stage.named_parameters()}))

    def restart() -> None:
        with torch.no_grad():
            for name, param in oracle.named_parameters():
                param.copy_(start[name])

    first, _ = oracle_steps(oracle, batches[:1])
    assert largest_difference(by_step[0], first) < 1e-6
    restart()
    last, want_norms = oracle_steps(oracle, batches)
    assert norms == pytest.approx(want_norms, rel=1e-4) and min(norms) > SECTION.clip_grad
    assert largest_difference(by_step[-1], last) < 2e-6
    for wrong in (
        {"memory_rate": 1.0},
        {"decay_vectors": True},
        {"betas": (0.9, 0.9)},
        {"betas": (0.7, 0.999)},
        {"eps": 1e-4},
        {"clip": 1e9},
    ):
        restart()
        other, _ = oracle_steps(oracle, batches, **wrong)
        assert largest_difference(by_step[-1], other) > 1e-4, wrong


def held_out_losses(process, tensors, sequences):
    """By `evaluate`, every rank having a part of the sequences."""
    layout = layout_of(process)
    stage = build_stage(tiny_architecture(), tiny_memory(), layout.groups)
    load_hf_tensors(stage, tensors)
    mine = sequences[layout.dp_rank :: layout.dp]
    return evaluate(Executor({0: stage}), mine, layout, settings=BackwardSettings())


@pytest.mark.parametrize("lengths", [(75, 9, 40, 50, 33), (40,)], ids=["5 sequences", "a rank without any"])
def test_an_evaluation_over_two_ranks_is_that_of_one_process(lengths, pool):
    arguments = oracle_tensors(build_oracle(tiny_architecture(), tiny_memory())), tiny_sequences(lengths)
    (alone,) = pool(1).run(held_out_losses, *arguments)
    for result in pool(2).run(held_out_losses, *arguments):
        assert result.loss == pytest.approx(alone.loss, abs=1e-6)
        assert result.text_tokens == alone.text_tokens == sum(lengths)
        for name in ("chunk_losses", "gate_means", "state_norms"):
            assert len(getattr(alone, name)) > 0
            assert getattr(result, name) == pytest.approx(getattr(alone, name), abs=1e-5), name


def spied_command(process, *arguments: str):
    """On each rank: exit code, (folder, number) of every sample read, and the ids that each step trained on."""
    read, trained = [], []
    right_read, right_step = ShardDataset.__getitem__, trainer_module.train_step

    def read_sample(dataset: ShardDataset, number: int) -> np.ndarray:
        read.append((Path(dataset.place).name, int(number)))
        return right_read(dataset, number)

    def spied_step(model, optimizer, sequences, *args, **kwargs):
        trained.append([sequence.ids.copy() for sequence in sequences])
        return right_step(model, optimizer, sequences, *args, **kwargs)

    ShardDataset.__getitem__, trainer_module.train_step = read_sample, spied_step
    try:
        code, _, err = run_command(process, *arguments)
    finally:
        ShardDataset.__getitem__, trainer_module.train_step = right_read, right_step
    return code, err, read, trained


def test_a_run_trains_on_the_planned_samples_and_evaluates_the_same_ones_on_any_number_of_ranks(tmp_path, pool):
    """7 samples, 4 a step: the second step reaches into the next epoch. 5 of 6 held-out sequences on 2 ranks."""
    data, held_out = tiny_sequences((40, 33, 9, 20, 50, 16, 18)), tiny_sequences((40, 50, 9, 33, 20, 75), seed=9)
    write_data(tmp_path / "data", data)
    write_data(tmp_path / "held_out", held_out)
    oracle = build_oracle(tiny_architecture(num_layers=2), tiny_memory())
    pool(1).run(write_start, tmp_path / "start", tiny_architecture(num_layers=2), tiny_memory())
    losses = {}
    for world in (1, 2):
        output = tmp_path / f"run{world}"
        config = write_config(
            tmp_path / "c.yaml",
            tmp_path,
            data={"eval": str(tmp_path / "held_out"), "seed": 3},
            optimizer={"eps": 1e-3},
            train={
                "output": str(output),
                "steps": 2,
                "global_batch_size": 4,
                "eval_every": 2,
                "eval_sequences": 5,
            },
        )
        evaluated = []
        results = pool(world).run(spied_command, "--config", str(config))
        for rank, (code, err, read, trained) in enumerate(results):
            assert code == 0, err
            positions = [plan_positions(s, global_batch_size=4, dp_rank=rank, dp_size=world) for s in range(2)]
            planned = [[sample_index(p, num_samples=7, seed=3)[1] for p in of_step] for of_step in positions]
            assert [n for folder, n in read if folder == "data"] == sum(planned, [])
            for numbers, sequences in zip(planned, trained, strict=True):
                assert [ids.tolist() for ids in sequences] == [data[n].tolist() for n in numbers]
            evaluated += [n for folder, n in read if folder == "held_out"]
        assert sorted(evaluated) == sorted(2 * [*range(5)])  # before training and after it
        losses[world] = [r["eval_loss"] for r in read_metrics(output) if "eval_loss" in r]
    rows = [torch.from_numpy(ids.astype(np.int64))[None] for ids in held_out[:5]]
    with torch.no_grad():
        total = sum(oracle(row, labels=row).loss.item() * (row.shape[1] - 1) for row in rows)
    want = total / sum(row.shape[1] - 1 for row in rows)
    assert losses[1][0] == pytest.approx(want, abs=1e-5)
    assert losses[2] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[1][1] - losses[1][0]) > 1e-4  # two steps of training lie between
