"""FLOPs are those that torch counts in the real model, and every op of a step has its part of them."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from comet_megatron.chunking import next_token_labels, plan_chunks
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.model.build import build_stage
from comet_megatron.model.chunk_tensors import build_chunk_tensors
from comet_megatron.model.loss import head_loss, head_loss_backward
from comet_megatron.model.memory import carry_memory
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.parallel.schedule import Kind, Op
from comet_megatron.planning.costs import (
    embedding_flops,
    full_attention_flops,
    head_flops,
    layer_flops,
    plan_costs,
    prefill_flops,
    training_flops,
)
from comet_megatron.testing.tiny import layout_alone, tiny_architecture, tiny_memory, tiny_sequences
from comet_megatron.train.sequence import train_sequence

MODEL = dataclasses.replace(tiny_architecture(num_layers=2), vocab_size=256)  # a vocabulary without padding
MEMORY = tiny_memory(chunk_size=64, budget=24)
TOKENS = 200  # chunks without slots, with a filling and a full FIFO, and a ragged one


def attention_flops(plan):
    """Scores and their product with values, a row seeing the slots, the rows before it and half of itself."""
    pairs = sum(plan.num_slots + row + 0.5 for row in range(plan.num_rows))
    return 2 * 2 * MODEL.num_attention_heads * MODEL.head_dim * pairs


def memory_net_flops(plan):
    """Of a layer: adapters of the global state read and of the new entries, and the gate. layer_flops omits them."""
    adapted = plan.global_slots + (plan.num_beacons if plan.writes_memory else 0)
    gated = plan.num_global_beacons if plan.global_slots else 0
    return adapted * 4 * MODEL.hidden_size * MEMORY.adapter_rank + gated * 4 * MODEL.hidden_size


@pytest.fixture(scope="module")
def stage():
    built = build_stage(MODEL, MEMORY, layout_alone().groups)
    with torch.no_grad():
        for param in built.parameters():
            param.fill_(0.01)
    return built


def chunks_of(stage):
    ids = tiny_sequences([TOKENS])[0]
    labels = next_token_labels(ids)
    for plan in plan_chunks(TOKENS, MEMORY):
        yield build_chunk_tensors(plan, ids[None], labels[None], MEMORY, shards=stage.shards, device=stage.device)


@torch.no_grad()
def test_layers_have_the_matrix_products_that_torch_counts(stage):
    memory, slots = stage.empty_memory(), []
    for chunk in chunks_of(stage):
        with FlopCounterMode(display=False) as counter:  # counts no attention: the kernel is torch's CPU one
            _, written = stage(chunk, memory)
        ours = layer_flops(MODEL, chunk.plan) - attention_flops(chunk.plan) + memory_net_flops(chunk.plan)
        assert counter.get_total_flops() == pytest.approx(MODEL.num_layers * ours, rel=1e-12)
        memory = [carry_memory(m, w, budget=MEMORY.budget) for m, w in zip(memory, written, strict=True)]
        slots.append(chunk.plan.num_slots)
    assert slots == [0, 22, 30, 30]


def test_a_backward_has_twice_the_products_of_the_forward(stage):
    chunk = next(chunks_of(stage))
    with FlopCounterMode(display=False) as forward:
        hidden, written = stage(chunk, stage.empty_memory())
    outputs = [hidden, *(t for w in written for t in w[:2])]
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
    assert backward.get_total_flops() == 2 * forward.get_total_flops()


def test_the_head_costs_its_product_once_forward_and_three_times_with_backward(stage):
    chunk = next(chunks_of(stage))
    hidden = torch.randn(chunk.num_rows, 1, MODEL.hidden_size)
    with FlopCounterMode(display=False) as forward:
        head_loss(stage, hidden, chunk, slice_tokens=50)
    assert forward.get_total_flops() == head_flops(MODEL, chunk.num_labels)
    with FlopCounterMode(display=False) as both:
        head_loss_backward(stage, hidden, chunk, scale=1.0, slice_tokens=50)
    assert both.get_total_flops() == 3 * head_flops(MODEL, chunk.num_labels)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_sequence_has_the_products_that_torch_counts(recompute, stage):
    ids = tiny_sequences([TOKENS])[0]
    labels = next_token_labels(ids)
    plans = plan_chunks(TOKENS, MEMORY)
    counts = [int((labels[p.text_start : p.text_end] >= 0).sum()) for p in plans]
    settings = BackwardSettings(recompute=recompute)
    with FlopCounterMode(display=False) as counter:
        train_sequence(stage, ids[None], labels[None], scale=1.0, settings=settings)
    ours = training_flops(MODEL, plans, counts)
    uncounted = 3 * MODEL.num_layers * sum(attention_flops(p) for p in plans)
    nets = 3 * MODEL.num_layers * sum(memory_net_flops(p) for p in plans)
    again = sum(MODEL.num_layers * layer_flops(MODEL, p) for p in plans[:-1]) / ours if recompute else 0
    # Memories that no loss reads have no backward, and the gradient of beacons' ids is of no product.
    assert counter.get_total_flops() == pytest.approx(ours * (1 + again) - uncounted + nets, rel=0.02 + 0.1 * recompute)


def test_full_attention_is_a_chunk_without_memory():
    (plan,) = plan_chunks(100, tiny_memory(chunk_size=100, global_slots=0, stride=-1))
    assert full_attention_flops(MODEL, 100).total == MODEL.num_layers * layer_flops(MODEL, plan)
    assert prefill_flops(MODEL, [plan]) == full_attention_flops(MODEL, 100)


def test_reading_a_million_tokens_takes_a_23rd_of_full_attentions_work_with_qwen3_4b():
    memory = MemorySizes(2048, 8, 2048, 0, 1, tuple(range(2, 514)), 0)
    plans = plan_chunks(2**20, memory, keep_last_memory=True)
    ratio = full_attention_flops(FOUR_B, 2**20).total / prefill_flops(FOUR_B, plans).total
    assert ratio == pytest.approx(23, abs=1)


def qwen3(num_layers, hidden, ffn, heads):
    return Architecture("qwen3", num_layers, hidden, ffn, heads, 8, 128, 151936, 1e-6, 1e6, False)


FOUR_B = qwen3(36, 2560, 9728, 32)


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        (FOUR_B, 2.05),
        (qwen3(36, 4096, 12288, 32), 1.94),
        (qwen3(64, 5120, 25600, 64), 1.01),
    ],
    ids=["4B", "8B", "32B"],
)
def test_the_head_of_qwen3_weighs_as_much_as_that_many_layers(architecture, layers):
    memory = MemorySizes(2048, 8, 2048, 0, 1, tuple(range(2, 514)), 0)
    steady = plan_chunks(2048 * 20, memory)[10]
    assert (steady.num_rows, steady.num_slots) == (2048 + 256 + 512, 512 + 2048)
    assert head_flops(architecture, 2048) / layer_flops(architecture, steady) == pytest.approx(layers, abs=0.01)


def step_costs(split, tokens, labels=None):
    plans = [plan_chunks(count, MEMORY) for count in tokens]
    labels = labels or [[plan.num_text for plan in sequence] for sequence in plans]
    return plans, plan_costs(MODEL, plans, labels, split)


def test_each_op_has_its_part_of_the_work():
    (plans,), cost = step_costs((3, 2, 1), [130], [[64, 0, 2]])
    layer, head = layer_flops(MODEL, plans[0]), head_flops(MODEL, 64)
    embedding = embedding_flops(MODEL, plans[0])

    def of(kind, stage, chunk=0):
        return cost(Op(kind, stage, 0, chunk))

    for kind in (Kind.FORWARD, Kind.RECOMPUTE):
        assert [of(kind, stage) for stage in range(3)] == [3 * layer + embedding, 2 * layer, layer]
    assert [of(Kind.BACKWARD, stage) for stage in range(3)] == [6 * layer, 4 * layer, 2 * layer + 3 * head]
    assert [of(Kind.HIDDEN_GRADIENT, stage) for stage in range(3)] == [3 * layer, 2 * layer, layer + 2 * head]
    assert [of(Kind.WEIGHT_GRADIENT, stage) for stage in range(3)] == [3 * layer, 2 * layer, layer + head]
    assert of(Kind.BACKWARD, 2, chunk=1) == 2 * layer_flops(MODEL, plans[1])  # no label, no head


@given(st.lists(st.integers(1, 4), min_size=1, max_size=5), st.lists(st.integers(1, 300), min_size=1, max_size=3))
def test_the_split_moves_work_and_changes_none(split, tokens):
    plans, cost = step_costs(split, tokens)
    plans_alone, cost_alone = step_costs([sum(split)], tokens)

    def total(cost, stages, kinds):
        ops = [(s, t) for s, sequence in enumerate(plans) for t in range(len(sequence))]
        return sum(cost(Op(kind, stage, s, t)) for kind in kinds for stage in range(stages) for s, t in ops)

    for kinds in ((Kind.FORWARD,), (Kind.BACKWARD,), (Kind.HIDDEN_GRADIENT, Kind.WEIGHT_GRADIENT)):
        assert total(cost, len(split), kinds) == pytest.approx(total(cost_alone, 1, kinds))
    assert total(cost, len(split), (Kind.BACKWARD,)) == pytest.approx(
        total(cost, len(split), (Kind.HIDDEN_GRADIENT, Kind.WEIGHT_GRADIENT))
    )
