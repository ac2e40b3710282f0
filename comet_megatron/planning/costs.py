"""FLOPs of a chunk's work on each stage, from the shapes of the matrix products. Pure, no torch.

A product of [m, k] with [k, n] counts 2 m k n forward and twice that backward; attention counts the causal half. Norms,
rotation and the memory nets (rank 8 on a few hundred rows) are not counted. These are FLOPs of the whole model; tensor
parallelism divides all of them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from comet_megatron.chunking import ChunkPlan
from comet_megatron.config.schema import Architecture
from comet_megatron.parallel.schedule import Kind, Op
from comet_megatron.parallel.simulator import Cost

# Times the forward of the layers, times the forward of the head: the head runs where its gradient is asked for.
_BACKWARD = {Kind.BACKWARD: (2, 3), Kind.HIDDEN_GRADIENT: (1, 2), Kind.WEIGHT_GRADIENT: (1, 1)}


class Flops(NamedTuple):
    """Of matrix products and of attention, which run at different rates.

    Attributes:
        products: with weights.
        attention: scores and their product with the values.
    """

    products: float
    attention: float

    @property
    def total(self) -> float:
        return self.products + self.attention


def split_layer_flops(architecture: Architecture, *, rows: float, slots: float) -> Flops:
    """Forward of one layer. Memory slots have keys and values only: no queries, no MLP.

    Args:
        rows: each sees the slots and, on average, half of the rows.
    """
    hidden = architecture.hidden_size
    heads_width = architecture.num_attention_heads * architecture.head_dim
    groups_width = architecture.num_query_groups * architecture.head_dim
    per_row = 2 * hidden * (2 * heads_width + 2 * groups_width + 3 * architecture.ffn_hidden_size)
    per_slot = 2 * hidden * 2 * groups_width
    return Flops(rows * per_row + slots * per_slot, 4 * heads_width * rows * (slots + rows / 2))


def layer_flops(architecture: Architecture, plan: ChunkPlan) -> float:
    """Forward of one layer on one chunk."""
    return split_layer_flops(architecture, rows=plan.num_rows, slots=plan.num_slots).total


def prefill_flops(architecture: Architecture, plans: Sequence[ChunkPlan]) -> Flops:
    """Forward of all layers on the chunks of a text, without the head; of a text in full attention, see
    `full_attention_flops`."""
    parts = [split_layer_flops(architecture, rows=plan.num_rows, slots=plan.num_slots) for plan in plans]
    layers = architecture.num_layers
    return Flops(layers * sum(p.products for p in parts), layers * sum(p.attention for p in parts))


def full_attention_flops(architecture: Architecture, tokens: int) -> Flops:
    """Forward of all layers of the backbone on a text in which each token sees all before it, without the head."""
    products, attention = split_layer_flops(architecture, rows=tokens, slots=0)
    return Flops(architecture.num_layers * products, architecture.num_layers * attention)


def training_flops(architecture: Architecture, plans: Sequence[ChunkPlan], labels: Sequence[int]) -> float:
    """Forward and backward of one sequence: what model FLOPs utilisation counts. What recomputation does again is no
    work of the model's.

    Args:
        labels: of each chunk.
    """
    layers = architecture.num_layers * sum(layer_flops(architecture, plan) for plan in plans)
    return 3 * (layers + sum(head_flops(architecture, count) for count in labels))


def head_flops(architecture: Architecture, num_labels: float) -> float:
    """Forward of the head: only rows with a label have logits."""
    return 2.0 * num_labels * architecture.hidden_size * architecture.vocab_size


def embedding_flops(architecture: Architecture, plan: ChunkPlan) -> float:
    """Forward of the embedding: a lookup, next to nothing."""
    return 2.0 * plan.num_rows * architecture.hidden_size


def plan_costs(
    architecture: Architecture,
    plans: Sequence[Sequence[ChunkPlan]],
    labels: Sequence[Sequence[int]],
    layers_per_stage: Sequence[int],
) -> Cost:
    """FLOPs of every op of a step.

    Args:
        plans: chunks of each sequence.
        labels: labels of each chunk of each sequence.
        layers_per_stage: layers of each stage, the embedding on the first, the head on the last.
    """
    layer = [[layer_flops(architecture, plan) for plan in sequence] for sequence in plans]
    embedding = [[embedding_flops(architecture, plan) for plan in sequence] for sequence in plans]
    head = [[head_flops(architecture, count) for count in sequence] for sequence in labels]
    last_stage = len(layers_per_stage) - 1

    def cost(op: Op) -> float:
        layers = layers_per_stage[op.stage] * layer[op.sequence][op.chunk]
        if op.kind in (Kind.FORWARD, Kind.RECOMPUTE):
            return layers + (embedding[op.sequence][op.chunk] if op.stage == 0 else 0.0)
        times_layers, times_head = _BACKWARD[op.kind]
        return times_layers * layers + (times_head * head[op.sequence][op.chunk] if op.stage == last_stage else 0.0)

    return cost
