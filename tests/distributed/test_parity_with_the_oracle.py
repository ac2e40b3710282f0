"""The Megatron model equals the oracle: loss and every gradient, on every layout and with every switch."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from comet_megatron.chunking import IGNORE_LABEL, next_token_labels
from comet_megatron.config.schema import Architecture
from comet_megatron.model.build import build_stage
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.parallel.layout import Layout
from comet_megatron.testing.tiny import (
    build_oracle,
    gather_zero1_gradients,
    gradients,
    layout_of,
    load_hf_tensors,
    oracle_tensors,
    tiny_architecture,
    tiny_memory,
    tiny_sequences,
    whole_tensors,
)
from comet_megatron.train.model import TrainableModel, build_trainable
from comet_megatron.train.step import accumulate_gradients, evaluate

LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-5  # of each tensor's largest value
# Longer than the FIFO's budget; exactly two chunks; ragged; shorter than a chunk.
LENGTHS = (75, 32, 50, 9)


@dataclass(frozen=True)
class Case:
    """One layout and its switches; `world` processes."""

    world: int = 1
    tp: int = 1
    layers_per_stage: tuple[int, ...] = ()  # empty: one stage
    in_one_process: bool = False  # all stages, with messages that never leave it
    sequence_parallel: bool = False
    zero1: bool = False
    settings: BackwardSettings = field(default_factory=BackwardSettings)
    tie_embeddings: bool = False
    memory: dict[str, Any] = field(default_factory=dict)
    family: str = "qwen3"

    @property
    def architecture(self) -> Architecture:
        """A tiny one with the layers of all stages."""
        layers = sum(self.layers_per_stage) or 3
        return tiny_architecture(self.family, tie_embeddings=self.tie_embeddings, num_layers=layers)


TP2 = {"world": 2, "tp": 2}
SP2 = {**TP2, "sequence_parallel": True}
PP2 = {"world": 2, "layers_per_stage": (2, 1)}
PP2_OF_3 = {"world": 2, "layers_per_stage": (1, 2)}  # as many layers as without stages
PP4 = {"world": 4, "layers_per_stage": (1, 1, 2, 1)}
RECOMPUTE = BackwardSettings(recompute=True, slice_tokens=7)
NO_GLOBAL, NO_TEMPORARY = {"global_slots": 0}, {"stride": -1}
CASES = {
    "TP1": Case(),
    "TP1 tied": Case(tie_embeddings=True),
    "TP1 recompute, loss in small slices": Case(settings=RECOMPUTE),
    "TP1 no global memory": Case(memory=NO_GLOBAL),
    "TP1 no temporary memory": Case(memory=NO_TEMPORARY),
    "TP1 no memory at all": Case(memory={**NO_GLOBAL, **NO_TEMPORARY}),
    "TP1 stride that does not divide": Case(memory={"stride": 5, "budget": 7}),
    "TP2": Case(**TP2),
    "TP2 tied": Case(**TP2, tie_embeddings=True),
    "TP2 recompute": Case(**TP2, settings=RECOMPUTE),
    "TP2 no global memory": Case(**TP2, memory=NO_GLOBAL),
    "TP2 no temporary memory": Case(**TP2, memory=NO_TEMPORARY),
    "TP1 qwen2: biases": Case(family="qwen2"),
    "TP1 llama: rope scaling": Case(family="llama"),
    "TP1 mistral": Case(family="mistral"),
    "TP2 qwen2": Case(**TP2, family="qwen2"),
    "TP2+SP qwen2 recompute": Case(**SP2, family="qwen2", settings=RECOMPUTE),
    "TP2+SP llama": Case(**SP2, family="llama"),
    "PP2 qwen2 tied": Case(**PP2, family="qwen2", tie_embeddings=True),
    "TP2+SP": Case(**SP2),
    "TP2+SP tied": Case(**SP2, tie_embeddings=True),
    "TP2+SP recompute": Case(**SP2, settings=RECOMPUTE),
    "TP2+SP no global memory": Case(**SP2, memory=NO_GLOBAL),
    "TP2+SP no temporary memory": Case(**SP2, memory=NO_TEMPORARY),
    "TP2+SP stride that does not divide": Case(**SP2, memory={"stride": 5, "budget": 7}),
    "DP2": Case(world=2),
    "DP2 ZeRO-1": Case(world=2, zero1=True),
    "DP2 ZeRO-1 tied, recompute": Case(world=2, zero1=True, tie_embeddings=True, settings=RECOMPUTE),
    "PP2": Case(**PP2),
    "PP2 tied": Case(**PP2, tie_embeddings=True),
    "PP2 recompute": Case(**PP2, settings=RECOMPUTE),
    "PP2 no slack": Case(**PP2, settings=BackwardSettings(slack=0)),
    "PP2 no global memory": Case(**PP2, memory=NO_GLOBAL),
    "PP2 no temporary memory": Case(**PP2, memory=NO_TEMPORARY),
    "PP4": Case(**PP4),
    "PP4 tied, recompute, slack 2": Case(**PP4, tie_embeddings=True, settings=replace(RECOMPUTE, slack=2)),
    "TP2 x PP2": Case(**{**PP2, "world": 4}, tp=2),
    "TP2 x PP2 tied, recompute": Case(**{**PP2, "world": 4}, tp=2, tie_embeddings=True, settings=RECOMPUTE),
    "TP2+SP x PP2": Case(**{**PP2, "world": 4}, tp=2, sequence_parallel=True),
    "TP2+SP x PP2 tied, recompute": Case(
        **{**PP2, "world": 4}, tp=2, sequence_parallel=True, tie_embeddings=True, settings=RECOMPUTE
    ),
    "PP2 x DP2 ZeRO-1": Case(**{**PP2, "world": 4}, zero1=True),
    "PP2 x DP2 ZeRO-1 tied, recompute": Case(
        **{**PP2, "world": 4}, zero1=True, tie_embeddings=True, settings=RECOMPUTE
    ),
    "PP2 x DP2": Case(**{**PP2, "world": 4}),
    "3 stages in one process": Case(layers_per_stage=(1, 1, 1), in_one_process=True),
    "3 stages in one process, tied, recompute": Case(
        layers_per_stage=(1, 2, 1), in_one_process=True, tie_embeddings=True, settings=RECOMPUTE
    ),
    "2 stages in one process, TP2+SP": Case(**SP2, layers_per_stage=(2, 1), in_one_process=True),
    "TP2+SP x DP2 ZeRO-1": Case(world=4, tp=2, sequence_parallel=True, zero1=True),
    "TP4+SP": Case(world=4, tp=4, sequence_parallel=True),
}


def build_model(process, case: Case, tensors) -> tuple[TrainableModel, Layout]:
    """This process's part of the model; it has as many layers as the stages together."""
    num_stages = max(len(case.layers_per_stage), 1)
    layout = layout_of(process, tp=case.tp, pp=1 if case.in_one_process else num_stages)
    own = range(num_stages) if case.in_one_process else [layout.pp_rank]
    stages = {}
    for number in own:
        stages[number] = build_stage(
            case.architecture,
            tiny_memory(**case.memory),
            layout.groups,
            stage=number,
            layers_per_stage=case.layers_per_stage,
            sequence_parallel=case.sequence_parallel,
        )
        load_hf_tensors(stages[number], tensors)
    return build_trainable(stages, layout, zero1=case.zero1), layout


def loss_and_gradients(process, case: Case, tensors, sequences):
    """On each rank: the batch's loss, the whole gradients, and the loss by `evaluate`."""
    model, layout = build_model(process, case, tensors)
    mine = np.array_split(np.arange(len(sequences)), layout.dp)[layout.dp_rank]
    batch = [sequences[i] for i in mine]
    evaluated = evaluate(model.executor, batch, layout, settings=case.settings)
    result = accumulate_gradients(model, batch, layout, settings=case.settings, step=1)
    if case.zero1:
        gather_zero1_gradients(model)
    return result.loss, whole_tensors(model.stages, gradients(model.stages)), evaluated.loss


def oracle_loss_and_gradients(oracle, sequences) -> tuple[float, dict[str, torch.Tensor]]:
    """One graph over all sequences; the mean over all labels."""
    count = sum(len(s) - 1 for s in sequences)
    total = 0.0
    for ids in sequences:
        row = torch.from_numpy(ids.astype(np.int64))[None]
        total = total + oracle(row, labels=row).loss * (len(ids) - 1) / count
    total.backward()
    return total.item(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in oracle.named_parameters()}


def worst_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """Largest difference over all tensors, relative to the tensor's largest value.

    A key's bias moves all scores of a query alike but for the rotation, so that its gradient is what is left of large
    terms: it counts a quarter.
    """
    assert found.keys() == wanted.keys()
    errors = []
    for name, want in wanted.items():
        scale = want.abs().max().item()
        difference = (found[name] - want).abs().max().item()
        share = 0.25 if name.endswith("k_proj.bias") else 1.0
        errors.append((share * difference / scale if scale else difference, name))
    return max(errors)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_oracle(name, pool):
    case = CASES[name]
    oracle = build_oracle(case.architecture, tiny_memory(**case.memory))
    sequences = tiny_sequences(LENGTHS)
    want_loss, want = oracle_loss_and_gradients(oracle, sequences)
    results = pool(case.world).run(loss_and_gradients, case, oracle_tensors(oracle), sequences)
    for loss, found, evaluated in results:
        assert loss == pytest.approx(want_loss, abs=LOSS_TOLERANCE)
        assert evaluated == pytest.approx(want_loss, abs=LOSS_TOLERANCE)
        error, parameter = worst_error(found, want)
        assert error < GRADIENT_TOLERANCE, parameter


PIPELINES = {
    "PP2": Case(**PP2),
    "PP4": Case(**PP4),
    "TP2 x PP2": Case(**{**PP2, "world": 4}, tp=2),
    "PP2 x DP2 ZeRO-1": Case(**{**PP2, "world": 4}, zero1=True),
    "TP2+SP x PP2": Case(**{**PP2, "world": 4}, tp=2, sequence_parallel=True),
}
OF_A_PIPELINE = {"one sequence": (75,), "three, one shorter than a chunk": (75, 9, 40)}


@pytest.mark.parametrize("lengths", OF_A_PIPELINE)
@pytest.mark.parametrize("name", PIPELINES)
def test_one_and_three_sequences_in_a_pipeline_equal_the_oracle(name, lengths, pool):
    case = replace(PIPELINES[name], settings=BackwardSettings(recompute="three" in lengths))
    pipelines = case.world // (case.tp * len(case.layers_per_stage))
    sequences = tiny_sequences(OF_A_PIPELINE[lengths] * pipelines)
    oracle = build_oracle(case.architecture, tiny_memory())
    want_loss, want = oracle_loss_and_gradients(oracle, sequences)
    for loss, found, _ in pool(case.world).run(loss_and_gradients, case, oracle_tensors(oracle), sequences):
        assert loss == pytest.approx(want_loss, abs=LOSS_TOLERANCE)
        error, parameter = worst_error(found, want)
        assert error < GRADIENT_TOLERANCE, parameter


def gradients_of_one(process, case: Case, tensors, ids, labels):
    """On each rank: its part of the result, and the whole gradients, of one microbatch with labels of its own."""
    model, layout = build_model(process, case, tensors)
    microbatch = model.executor.microbatch(ids, labels)
    scale = 1.0 / (labels != IGNORE_LABEL).sum()
    with model.accumulating():
        (result,) = model.executor.train(
            [microbatch], scale=scale, settings=case.settings, after_last_backward=model.start_reduction
        )
    model.finish_reduction(layout)
    return result, whole_tensors(model.stages, gradients(model.stages))


@pytest.mark.parametrize(
    "case",
    [Case(), Case(**SP2), Case(settings=RECOMPUTE), Case(**PP2_OF_3, settings=RECOMPUTE)],
    ids=["TP1", "TP2+SP", "recompute", "PP2 recompute"],
)
def test_a_batch_with_labels_in_few_chunks_equals_the_oracle(case, pool):
    """Two sequences in a microbatch; labels in chunks 1 and 2 of 5, not the same ones in both."""
    oracle = build_oracle(tiny_architecture(), tiny_memory())
    ids = np.stack(tiny_sequences((75, 75)))
    labels = np.stack([next_token_labels(row) for row in ids])
    labels[:, :20] = labels[:, 45:] = IGNORE_LABEL
    labels[0, 25:30] = IGNORE_LABEL
    shifted = torch.full((2, 75), IGNORE_LABEL, dtype=torch.int64)
    shifted[:, 1:] = torch.from_numpy(labels[:, :-1])
    loss = oracle(torch.from_numpy(ids.astype(np.int64)), labels=shifted).loss
    loss.backward()
    want = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in oracle.named_parameters()}
    results = pool(case.world).run(gradients_of_one, case, oracle_tensors(oracle), ids, labels)
    for result, found in results:
        assert sum(result.labels) == (labels != IGNORE_LABEL).sum()
        assert len(result.labels) == 3  # what follows the last label is not computed
        result = results[-1][0]  # losses are where the head is
        assert result.losses.sum().item() / sum(result.labels) == pytest.approx(loss.item(), abs=LOSS_TOLERANCE)
        error, parameter = worst_error(found, want)
        assert error < GRADIENT_TOLERANCE, parameter


def oracle_windowed_gradients(oracle, ids, window: int) -> dict[str, torch.Tensor]:
    """Truncated backpropagation by the oracle: the memory is cut every `window` chunks."""
    row = torch.from_numpy(ids.astype(np.int64))[None]
    chunk, memory = oracle.config.chunk_size, None
    for start in range(0, len(ids), window * chunk):
        end = min(start + window * chunk, len(ids))
        output = oracle(row[:, start:end], memory=memory, return_memory=True)
        labels = row[0, start + 1 : end + 1]
        loss = torch.nn.functional.cross_entropy(output.logits[0, : len(labels)], labels, reduction="sum")
        (loss / (len(ids) - 1)).backward()
        memory = type(output.memory)(
            type(layer)(*(None if t is None else t.detach() for t in layer)) for layer in output.memory
        )
    return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in oracle.named_parameters()}


WINDOWS = {
    f"{name}, window {window}{', recompute' * recompute}": Case(
        **where, settings=BackwardSettings(bptt_chunks=window, recompute=recompute)
    )
    for name, where in (
        ("TP1", {}),
        ("PP2", PP2_OF_3),
        ("TP2+SP x PP2", {**PP2_OF_3, "world": 4, "tp": 2, "sequence_parallel": True}),
    )
    for window in (1, 2, 3)
    for recompute in (False, True)
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_backpropagation_window_cuts_the_memory_gradient_at_its_border(name, pool):
    case = WINDOWS[name]
    oracle = build_oracle(case.architecture, tiny_memory())
    (ids,) = tiny_sequences((75,))
    want = oracle_windowed_gradients(oracle, ids, case.settings.bptt_chunks)
    arguments = (oracle_tensors(oracle), ids[None], next_token_labels(ids)[None])
    for _, found in pool(case.world).run(gradients_of_one, case, *arguments):
        error, parameter = worst_error(found, want)
        assert error < GRADIENT_TOLERANCE, parameter
    ((_, full),) = pool(1).run(gradients_of_one, Case(), *arguments)
    assert worst_error(full, want)[0] > 0.01  # so the cut is seen


def test_windows_without_any_label_pass_the_pipeline_and_have_no_gradient(pool):
    """Labels in the last window only: the stages still exchange what the plan says."""
    (ids,) = tiny_sequences((75,))
    labels = next_token_labels(ids)
    labels[:66] = IGNORE_LABEL
    case = Case(**PP2_OF_3, settings=BackwardSettings(bptt_chunks=2))
    arguments = (oracle_tensors(build_oracle(case.architecture, tiny_memory())), ids[None], labels[None])
    ((_, want),) = pool(1).run(gradients_of_one, replace(case, world=1, layers_per_stage=()), *arguments)
    for _, found in pool(2).run(gradients_of_one, case, *arguments):
        assert worst_error(found, want)[0] < GRADIENT_TOLERANCE


TRANSPORTS = {
    "PP2": Case(**PP2),
    "PP2 windows, recompute, tied": Case(
        **PP2, settings=BackwardSettings(bptt_chunks=2, recompute=True), tie_embeddings=True
    ),
    "PP4 recompute": Case(**PP4, settings=RECOMPUTE),
    "TP2+SP x PP2": Case(**{**PP2, "world": 4}, tp=2, sequence_parallel=True),
}


@pytest.mark.parametrize("name", TRANSPORTS)
def test_stages_in_one_process_give_the_same_bits_as_stages_in_several(name, pool):
    case = TRANSPORTS[name]
    tensors = oracle_tensors(build_oracle(case.architecture, tiny_memory()))
    arguments = (tensors, tiny_sequences(LENGTHS))
    apart = pool(case.world).run(loss_and_gradients, case, *arguments)
    together = pool(case.tp).run(loss_and_gradients, replace(case, world=case.tp, in_one_process=True), *arguments)
    want_loss, want, _ = together[0]
    for loss, found, _ in apart:
        assert loss == want_loss
        assert all(torch.equal(found[name], want[name]) for name in want)


def gradients_without_memory_reduction(process, case: Case, tensors, sequences):
    """As `loss_and_gradients`, but the memory's gradient is not summed over tensor parallelism: wrong."""
    from megatron.core import tensor_parallel

    right = tensor_parallel.copy_to_tensor_model_parallel_region
    tensor_parallel.copy_to_tensor_model_parallel_region = lambda x, group=None: x
    try:
        return loss_and_gradients(process, case, tensors, sequences)
    finally:
        tensor_parallel.copy_to_tensor_model_parallel_region = right


@pytest.mark.parametrize("case", [Case(**TP2), Case(**SP2)], ids=["TP2", "TP2+SP"])
def test_the_comparison_sees_a_memory_gradient_that_is_not_summed_over_tp(case, pool):
    oracle = build_oracle(tiny_architecture(), tiny_memory())
    sequences = tiny_sequences(LENGTHS)
    _, want = oracle_loss_and_gradients(oracle, sequences)
    for _, found, _ in pool(2).run(gradients_without_memory_reduction, case, oracle_tensors(oracle), sequences):
        assert worst_error(found, want)[0] > 1000 * GRADIENT_TOLERANCE
