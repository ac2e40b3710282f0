"""Bytes that a chunk's graph keeps on one rank, and what its backward needs for a moment. Pure, no torch.

Counted from the tensors that autograd saves in model/, of the torch layers without Transformer Engine. On a GPU the
unfused gate of the MLP keeps two tensors more; the rest is taken to be the same. Shapes: n rows, m slots, h hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from comet_megatron.chunking import ChunkPlan
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.planning.memory import FP32_BYTES, padded_vocabulary

INDEX_BYTES = 8
_CPU_GATE, _CUDA_GATE = 3, 5  # tensors as wide as the MLP that its gate and second product keep


@dataclass(frozen=True)
class Shards:
    """What one tensor-parallel rank has of a chunk.

    Attributes:
        tp: ranks that share heads, MLP and vocabulary.
        sequence_parallel: they share the rows outside attention and MLP too.
        on_cuda: the tensors are those of a GPU.
    """

    tp: int = 1
    sequence_parallel: bool = False
    on_cuda: bool = False

    @property
    def of_rows(self) -> int:
        """Ranks that share a chunk's rows."""
        return self.tp if self.sequence_parallel else 1

    def rows(self, plan: ChunkPlan) -> int:
        """Of one rank, with the padding."""
        return -(-plan.num_rows // self.of_rows)


def layer_graph_bytes(
    architecture: Architecture, memory: MemorySizes, plan: ChunkPlan, *, dtype_bytes: int, shards: Shards
) -> int:
    """What autograd saves in one layer, less the memory that enters it: that is kept by the chunks that wrote it."""
    local, slots = shards.rows(plan), plan.num_slots
    rows, hidden = local * shards.of_rows, architecture.hidden_size
    heads, groups = architecture.num_attention_heads // shards.tp, architecture.num_query_groups // shards.tp
    queries, keys = heads * architecture.head_dim, groups * architecture.head_dim
    mlp = architecture.ffn_hidden_size // shards.tp
    numbers = 4 * local * hidden  # into both norms, and out of them into the products
    numbers += 2 * rows * queries + 2 * (slots + rows) * keys  # into attention, and out of it
    numbers += (_CUDA_GATE if shards.on_cuda else _CPU_GATE) * rows * mlp
    numbers += 2 * slots * hidden + (2 * keys * hidden if slots else 0)  # the slots; the K and V rows of the weight
    statistics = 2 * local + slots + rows * heads  # of the norms and of softmax
    if architecture.qk_norm:
        numbers += rows * (queries + 2 * keys) + 2 * slots * keys + (rows * queries if heads > groups else 0)
        statistics += rows * (heads + groups) + slots * groups
    numbers_fp32 = statistics + _memory_graph_numbers(memory, plan, hidden)
    if dtype_bytes < FP32_BYTES:
        numbers_fp32 += _memory_weight_numbers(memory, plan, hidden)
    return numbers * dtype_bytes + numbers_fp32 * FP32_BYTES


def _memory_weight_numbers(memory: MemorySizes, plan: ChunkPlan, hidden: int) -> int:
    """Weights of the memory nets that a chunk uses: they compute in fp32, with copies of weights that are not."""
    adapter = 2 * hidden * memory.adapter_rank
    numbers = adapter if plan.global_slots else 0
    if plan.writes_memory:
        numbers += hidden + adapter if plan.num_beacons else 0
        numbers += hidden if plan.num_global_beacons else 0
        numbers += 2 * hidden if plan.num_global_beacons and plan.global_slots else 0
    return numbers


def _memory_graph_numbers(memory: MemorySizes, plan: ChunkPlan, hidden: int) -> int:
    """fp32 numbers that reading and writing memory keep in one layer."""
    numbers = plan.global_slots * memory.adapter_rank
    if not plan.writes_memory:
        return numbers
    globals_, beacons = plan.num_global_beacons, plan.num_beacons
    numbers += (globals_ + beacons) * hidden  # into the norms
    numbers += beacons * (hidden + memory.adapter_rank)
    if plan.global_slots:  # candidate and old state for the gate, candidate
        numbers += globals_ * 3 * hidden
    return numbers


def written_bytes(architecture: Architecture, plan: ChunkPlan) -> int:
    """The memory that one layer writes in a chunk: fp32 and whole on each rank."""
    written = plan.num_beacons + plan.num_global_beacons if plan.writes_memory else 0
    return written * architecture.hidden_size * FP32_BYTES


def index_bytes(plan: ChunkPlan, *, is_first: bool, is_last: bool) -> int:
    """Ids, labels and numbers of rows, kept with a chunk as long as it lives."""
    beacons = 2 * (plan.num_beacons + plan.num_global_beacons)
    return INDEX_BYTES * (beacons + (plan.num_rows if is_first else 0) + (2 * plan.num_text if is_last else 0))


def layer_backward_bytes(
    architecture: Architecture, plan: ChunkPlan, *, dtype_bytes: int, shards: Shards, trains_weights: bool = True
) -> int:
    """Most that the backward of one layer needs beside the graph: gradients of its MLP and of its largest weight."""
    local = shards.rows(plan)
    rows, hidden, mlp = local * shards.of_rows, architecture.hidden_size, architecture.ffn_hidden_size // shards.tp
    numbers = 3 * rows * mlp + 2 * rows * hidden
    if trains_weights:
        numbers += 2 * mlp * hidden
    return numbers * dtype_bytes


def head_bytes(
    architecture: Architecture,
    num_labels: int,
    *,
    dtype_bytes: int,
    shards: Shards,
    slice_tokens: int,
    trains_weights: bool = True,
) -> int:
    """Head and loss of a chunk, forward and backward: the labelled rows, a slice of logits, the weight's gradient.

    Logits are fp32, computed in place down to their gradient; under bf16 they exist in bf16 beside it.
    """
    vocabulary, hidden = padded_vocabulary(architecture.vocab_size, tp=shards.tp) // shards.tp, architecture.hidden_size
    of_logit = FP32_BYTES + (dtype_bytes if dtype_bytes < FP32_BYTES else 0)
    numbers = 3 * num_labels * hidden + (vocabulary * hidden if trains_weights else 0)
    return min(num_labels, slice_tokens) * vocabulary * of_logit + numbers * dtype_bytes
