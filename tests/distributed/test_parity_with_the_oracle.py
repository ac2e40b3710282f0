"""The Megatron model equals the oracle: loss and every gradient, on every layout and with every switch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.distributed.finalize_model_grads import finalize_model_grads

from comet_megatron.chunking import IGNORE_LABEL, next_token_labels
from comet_megatron.model.build import build_stage
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
from comet_megatron.train.optimizer import wrap_in_ddp
from comet_megatron.train.sequence import BackwardSettings, train_sequence
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
    sequence_parallel: bool = False
    zero1: bool = False
    settings: BackwardSettings = field(default_factory=BackwardSettings)
    tie_embeddings: bool = False
    memory: dict[str, Any] = field(default_factory=dict)


TP2 = {"world": 2, "tp": 2}
SP2 = {**TP2, "sequence_parallel": True}
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
    "TP2+SP": Case(**SP2),
    "TP2+SP tied": Case(**SP2, tie_embeddings=True),
    "TP2+SP recompute": Case(**SP2, settings=RECOMPUTE),
    "TP2+SP no global memory": Case(**SP2, memory=NO_GLOBAL),
    "TP2+SP no temporary memory": Case(**SP2, memory=NO_TEMPORARY),
    "TP2+SP stride that does not divide": Case(**SP2, memory={"stride": 5, "budget": 7}),
    "DP2": Case(world=2),
    "DP2 ZeRO-1": Case(world=2, zero1=True),
    "DP2 ZeRO-1 tied, recompute": Case(world=2, zero1=True, tie_embeddings=True, settings=RECOMPUTE),
    "TP2+SP x DP2 ZeRO-1": Case(world=4, tp=2, sequence_parallel=True, zero1=True),
    "TP4+SP": Case(world=4, tp=4, sequence_parallel=True),
}


def loss_and_gradients(process, case: Case, tensors, sequences):
    """On each rank: the batch's loss, the whole gradients, and the loss by `evaluate`."""
    layout = layout_of(process, tp=case.tp)
    stage = build_stage(
        tiny_architecture(tie_embeddings=case.tie_embeddings),
        tiny_memory(**case.memory),
        layout.groups,
        sequence_parallel=case.sequence_parallel,
    )
    load_hf_tensors(stage, tensors)
    model = wrap_in_ddp(stage, zero1=case.zero1)
    mine = np.array_split(np.arange(len(sequences)), layout.dp)[layout.dp_rank]
    batch = [sequences[i] for i in mine]
    evaluated = evaluate(stage, batch, layout, settings=case.settings)
    result = accumulate_gradients(model, batch, layout, settings=case.settings, step=1)
    if case.zero1:
        gather_zero1_gradients(model)
    return result.loss, whole_tensors(stage, gradients(stage)), evaluated.loss


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
    """Largest difference over all tensors, relative to the tensor's largest value."""
    assert found.keys() == wanted.keys()
    errors = []
    for name, want in wanted.items():
        scale = want.abs().max().item()
        difference = (found[name] - want).abs().max().item()
        errors.append((difference / scale if scale else difference, name))
    return max(errors)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_the_oracle(name, pool):
    case = CASES[name]
    architecture, memory = tiny_architecture(tie_embeddings=case.tie_embeddings), tiny_memory(**case.memory)
    oracle = build_oracle(architecture, memory)
    sequences = tiny_sequences(LENGTHS)
    want_loss, want = oracle_loss_and_gradients(oracle, sequences)
    results = pool(case.world).run(loss_and_gradients, case, oracle_tensors(oracle), sequences)
    for loss, found, evaluated in results:
        assert loss == pytest.approx(want_loss, abs=LOSS_TOLERANCE)
        assert evaluated == pytest.approx(want_loss, abs=LOSS_TOLERANCE)
        error, parameter = worst_error(found, want)
        assert error < GRADIENT_TOLERANCE, parameter


def gradients_of_one(process, case: Case, tensors, ids, labels):
    """On each rank: whole gradients of one microbatch with labels of its own."""
    layout = layout_of(process, tp=case.tp)
    stage = build_stage(tiny_architecture(), tiny_memory(), layout.groups, sequence_parallel=case.sequence_parallel)
    load_hf_tensors(stage, tensors)
    model = wrap_in_ddp(stage, zero1=False)
    scale = 1.0 / (labels != IGNORE_LABEL).sum()
    result = train_sequence(stage, ids, labels, scale=scale, settings=case.settings)
    finalize_model_grads([model], pg_collection=layout.groups)
    return result, whole_tensors(stage, gradients(stage))


@pytest.mark.parametrize("case", [Case(), Case(**SP2), Case(settings=RECOMPUTE)], ids=["TP1", "TP2+SP", "recompute"])
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
    for result, found in pool(case.world).run(gradients_of_one, case, oracle_tensors(oracle), ids, labels):
        assert sum(result.labels) == (labels != IGNORE_LABEL).sum()
        assert len(result.labels) == 3  # what follows the last label is not computed
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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_backpropagation_window_cuts_the_memory_gradient_at_its_border(window, recompute, pool):
    oracle = build_oracle(tiny_architecture(), tiny_memory())
    (ids,) = tiny_sequences((75,))
    want = oracle_windowed_gradients(oracle, ids, window)
    settings = BackwardSettings(bptt_chunks=window, recompute=recompute)
    arguments = (Case(settings=settings), oracle_tensors(oracle), ids[None], next_token_labels(ids)[None])
    ((_, found),) = pool(1).run(gradients_of_one, *arguments)
    error, parameter = worst_error(found, want)
    assert error < GRADIENT_TOLERANCE, parameter
    ((_, full),) = pool(1).run(gradients_of_one, Case(), *arguments[1:])
    assert worst_error(full, want)[0] > 0.01  # so the cut is seen


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
