"""Bytes that a stage keeps on each rank and bytes that a link carries, from sizes. Pure, no torch.

Here: weights, gradients, the optimizer's state, what recomputation keeps of a chunk, hidden states that cross a link.
The graph of a chunk and a slice of logits are in activations.py; all together in footprint.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from comet_megatron.chunking import ChunkPlan
from comet_megatron.config.schema import Architecture, MemorySizes

BYTES = {"fp32": 4, "bf16": 2, "fp8": 2}  # of a weight and of a hidden state
FP32_BYTES = 4  # of gradients, moments, master weights and the memory's state
_VOCABULARY_MULTIPLE = 128  # rows of the embedding on each tensor-parallel rank, as model/architectures.py pads them


@dataclass(frozen=True)
class Parameters:
    """How many weights there are on one rank.

    Attributes:
        all: in all.
        trained: of them, those with a gradient.
    """

    all: int
    trained: int

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.all + other.all, self.trained + other.trained)


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a stage's state on one rank, from the first step on.

    Attributes:
        weights: in the parameter dtype.
        gradients: fp32, whole on each data-parallel rank.
        optimizer: two fp32 moments, and fp32 master weights under bf16 and fp8.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def count_parameters(
    architecture: Architecture,
    memory: MemorySizes,
    num_layers: int,
    *,
    tp: int = 1,
    is_first: bool = True,
    is_last: bool = True,
    trainable: str = "all",
) -> Parameters:
    """Weights of a stage of `num_layers` layers on one tensor-parallel rank.

    The last stage of a model with tied embeddings has its own copy of the embedding, unless it is the first as well.

    Args:
        trainable: "all", or "memory": the memory nets and, where the embedding is, the rows added for CoMeT.
    """
    train_backbone = trainable == "all"
    hidden = architecture.hidden_size
    vocabulary = padded_vocabulary(architecture.vocab_size, tp=tp) // tp * hidden
    backbone = num_layers * _count_backbone_layer(architecture, tp=tp)
    matrices = int(is_first) + int(is_last and not (is_first and architecture.tie_embeddings))
    backbone += matrices * vocabulary + (hidden if is_last else 0)  # the final norm is with the head
    nets = num_layers * _count_memory_nets(memory, hidden)
    found = Parameters(backbone, backbone if train_backbone else 0) + Parameters(nets, nets)
    has_embedding = is_first or (is_last and architecture.tie_embeddings)
    if not train_backbone and has_embedding:
        new_rows = len(memory.new_ids) * hidden
        found += Parameters(new_rows, new_rows)
    return found


def _count_backbone_layer(architecture: Architecture, *, tp: int) -> int:
    """Attention, gated MLP and norms; the norms are whole on each tensor-parallel rank."""
    hidden = architecture.hidden_size
    heads_width = architecture.num_attention_heads * architecture.head_dim
    groups_width = architecture.num_query_groups * architecture.head_dim
    matrices = hidden * (2 * heads_width + 2 * groups_width + 3 * architecture.ffn_hidden_size)
    query_and_key_norms = 2 * architecture.head_dim if architecture.qk_norm else 0
    biases = heads_width + 2 * groups_width if architecture.qkv_bias else 0
    return (matrices + biases) // tp + 2 * hidden + query_and_key_norms


def _count_memory_nets(memory: MemorySizes, hidden: int) -> int:
    """Of one layer: norm and adapter for each memory, and the global memory's gate. Whole on each rank."""
    norm_and_adapter = hidden + 2 * hidden * memory.adapter_rank
    count = norm_and_adapter + 2 * hidden if memory.global_slots else 0
    return count + (norm_and_adapter if memory.stride > 0 else 0)


def padded_vocabulary(vocab_size: int, *, tp: int) -> int:
    """Rows of the embedding over all tensor-parallel ranks."""
    multiple = _VOCABULARY_MULTIPLE * tp
    return -(-vocab_size // multiple) * multiple


def state_bytes(parameters: Parameters, *, precision: str, dp: int = 1, zero1: bool = True) -> StateBytes:
    """Bytes of weights, gradients and the optimizer's state on one rank.

    Args:
        parameters: of the stage on one tensor-parallel rank.
        precision: fp32, bf16 or fp8 (weights as in bf16; what Transformer Engine keeps of them in fp8 is not counted).
        dp: data-parallel ranks; with `zero1` they share the optimizer's state.
    """
    copies = 2 if precision == "fp32" else 3
    optimizer = copies * FP32_BYTES * parameters.trained
    return StateBytes(
        weights=parameters.all * BYTES[precision],
        gradients=parameters.trained * FP32_BYTES,
        optimizer=-(-optimizer // dp) if zero1 else optimizer,
    )


def kept_piece_bytes(architecture: Architecture, memory: MemorySizes) -> int:
    """The smaller of what one layer writes in one full chunk: new temporary entries, new global state; fp32."""
    beacons = -(-memory.chunk_size // memory.stride) if memory.stride > 0 else 0
    pieces = [slots * architecture.hidden_size * 4 for slots in (beacons, memory.global_slots) if slots]
    return min(pieces, default=0)


def message_bytes(architecture: Architecture, plan: ChunkPlan, *, dtype_bytes: int, sequence_shards: int = 1) -> int:
    """Hidden states of a chunk's rows, as one rank sends them to the next stage; their gradient is as large.

    Args:
        dtype_bytes: of a hidden state.
        sequence_shards: tensor-parallel ranks that share the rows: their number with sequence parallelism, else 1.
    """
    rows = -(-plan.num_rows // sequence_shards)
    return rows * architecture.hidden_size * dtype_bytes


def checkpoint_bytes(
    architecture: Architecture,
    plan: ChunkPlan,
    num_layers: int,
    *,
    is_first: bool,
    dtype_bytes: int,
    sequence_shards: int = 1,
) -> int:
    """What recomputation keeps of a chunk on one rank of a stage: its hidden states and the memory it wrote.

    The first stage embeds again and keeps no hidden states. Written memory is fp32 and whole on each rank.

    Args:
        num_layers: of the stage.
        dtype_bytes: of a hidden state.
        sequence_shards: as for `message_bytes`.
    """
    written = plan.num_beacons + plan.num_global_beacons if plan.writes_memory else 0
    memory = num_layers * written * architecture.hidden_size * FP32_BYTES
    if is_first:
        return memory
    return memory + message_bytes(architecture, plan, dtype_bytes=dtype_bytes, sequence_shards=sequence_shards)
