"""Most bytes that one rank holds at once in a step, item by item. Pure, no torch.

On CPU within 15 % of what training really takes (docs/planning.md). Not counted: the interpreter and its libraries, a
GPU's context, a checkpoint that is being written, what an allocator loses between tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

from comet_megatron.chunking import ChunkPlan
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.parallel.schedule import Kind, Op, max_in_flight_of
from comet_megatron.parallel.simulator import Timeline
from comet_megatron.planning.activations import (
    Shards,
    head_bytes,
    index_bytes,
    layer_backward_bytes,
    layer_graph_bytes,
    written_bytes,
)
from comet_megatron.planning.memory import (
    FP32_BYTES,
    StateBytes,
    checkpoint_bytes,
    message_bytes,
    padded_vocabulary,
)


@dataclass(frozen=True)
class RankBytes:
    """What a rank of a stage holds where a step needs most.

    Attributes:
        weights, gradients, optimizer: see StateBytes.
        chunks: of the chunks between forward and backward: their checkpoints, or without recomputation their graphs.
        chunk: with recomputation, the graph of the chunk in work.
        head: labelled rows, a slice of logits and the weight's gradient, where the head is.
        backward: what the backward of a layer or of the embedding needs for a moment.
        buffers: messages on their way, and the gradients of memory slots.
        update: what the optimizer's update needs for a moment, when the chunks are gone.
    """

    weights: int
    gradients: int
    optimizer: int
    chunks: int
    chunk: int
    head: int
    backward: int
    buffers: int
    update: int

    @classmethod
    def worst(cls, found: Sequence[RankBytes]) -> RankBytes:
        """Of each item the most."""
        return cls(**{field.name: max(getattr(one, field.name) for one in found) for field in fields(cls)})

    @property
    def state(self) -> int:
        """Kept from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def moment(self) -> int:
        """The head or a layer's backward, whichever needs more: never both at once."""
        return max(self.head, self.backward)

    @property
    def in_work(self) -> int:
        """Of the chunk whose backward runs, beside what is kept of all."""
        return self.chunk + self.moment

    @property
    def total(self) -> int:
        """The update's need counts only where it is more than that of the chunks."""
        return self.state + max(self.chunks + self.in_work + self.buffers, self.update)


@dataclass(frozen=True)
class StageSetup:
    """What the bytes of a stage depend on beside its chunks.

    Attributes:
        num_layers: of the stage.
        dtype_bytes: of a hidden state.
        shards: of one tensor-parallel rank.
        recompute: chunks keep their inputs only.
        slice_tokens: rows of logits that exist at once.
        slack: of the schedule.
        trains_backbone: weights of the backbone have gradients.
    """

    architecture: Architecture
    memory: MemorySizes
    num_layers: int
    is_first: bool
    is_last: bool
    dtype_bytes: int
    shards: Shards
    recompute: bool
    slice_tokens: int
    slack: int
    trains_backbone: bool = True

    def graph_bytes(self, plan: ChunkPlan) -> int:
        """A chunk's graph with its outputs, and without the memory that entered."""
        layer = layer_graph_bytes(
            self.architecture, self.memory, plan, dtype_bytes=self.dtype_bytes, shards=self.shards
        )
        outputs = self.num_layers * written_bytes(self.architecture, plan) + self.hidden_bytes(plan)
        return self.num_layers * layer + outputs

    def hidden_bytes(self, plan: ChunkPlan) -> int:
        """Hidden states of a chunk's rows on this rank."""
        return message_bytes(self.architecture, plan, dtype_bytes=self.dtype_bytes, sequence_shards=self.shards.of_rows)

    def kept_bytes(self, plan: ChunkPlan) -> int:
        """What is kept of a chunk from its forward to its backward."""
        index = index_bytes(plan, is_first=self.is_first, is_last=self.is_last)
        return index + (self.checkpoint_bytes(plan) if self.recompute else self.graph_bytes(plan))

    def checkpoint_bytes(self, plan: ChunkPlan) -> int:
        """What recomputation keeps of a chunk, or would keep."""
        return checkpoint_bytes(
            self.architecture,
            plan,
            self.num_layers,
            is_first=self.is_first,
            dtype_bytes=self.dtype_bytes,
            sequence_shards=self.shards.of_rows,
        )

    def in_work_bytes(self, plan: ChunkPlan) -> int:
        """What is there of a chunk beyond `kept_bytes` while its backward begins."""
        if not self.recompute:
            return 0
        return self.graph_bytes(plan) - (0 if self.is_first else self.hidden_bytes(plan))

    def head_bytes(self, plan: ChunkPlan) -> int:
        """0 but on the last stage; every text token is taken for labelled."""
        if not self.is_last:
            return 0
        return head_bytes(
            self.architecture,
            plan.num_text,
            dtype_bytes=self.dtype_bytes,
            shards=self.shards,
            slice_tokens=self.slice_tokens,
            trains_weights=self.trains_backbone,
        )

    def backward_bytes(self, plan: ChunkPlan) -> int:
        """Of a layer; or of the embedding, whose gradient comes when the chunk's graph is gone."""
        layer = layer_backward_bytes(
            self.architecture,
            plan,
            dtype_bytes=self.dtype_bytes,
            shards=self.shards,
            trains_weights=self.trains_backbone,
        )
        if not (self.is_first and self.trains_backbone):
            return layer
        return max(layer, self.vocabulary_weights * self.dtype_bytes - self.graph_bytes(plan))

    @property
    def vocabulary_weights(self) -> int:
        """Of the embedding, or of the head, on this rank."""
        rows = padded_vocabulary(self.architecture.vocab_size, tp=self.shards.tp) // self.shards.tp
        return rows * self.architecture.hidden_size

    def buffer_bytes(self, plan: ChunkPlan) -> int:
        """Messages posted and on their way, and gradients of the slots that a chunk has read."""
        ways_in = (not self.is_first) + (not self.is_last)  # one receive is posted ahead on each
        on_their_way = ways_in * max_in_flight_of(self.slack)
        slots = self.num_layers * plan.num_slots * self.architecture.hidden_size * FP32_BYTES
        return (ways_in + on_their_way) * self.hidden_bytes(plan) + slots

    def update_bytes(self, *, dp: int, zero1: bool) -> int:
        """Two fp32 tensors of the largest weight's share."""
        if not self.trains_backbone:
            return 0
        mlp = 2 * self.architecture.ffn_hidden_size // self.shards.tp * self.architecture.hidden_size
        largest = max(mlp, self.vocabulary_weights if self.is_first or self.is_last else 0)
        return 2 * FP32_BYTES * largest // (dp if zero1 else 1)

    def needs(self, state: StateBytes, *, kept: int, plans: Sequence[ChunkPlan], dp: int, zero1: bool) -> RankBytes:
        """Together.

        Args:
            kept: bytes of the chunks that live at once.
            plans: chunks, of which the largest counts.
        """
        return RankBytes(
            weights=state.weights,
            gradients=state.gradients,
            optimizer=state.optimizer,
            chunks=kept,
            chunk=max(map(self.in_work_bytes, plans)),
            head=max(map(self.head_bytes, plans)),
            backward=max(map(self.backward_bytes, plans)),
            buffers=max(map(self.buffer_bytes, plans)),
            update=self.update_bytes(dp=dp, zero1=zero1),
        )


def rank_bytes(
    setup: StageSetup,
    state: StateBytes,
    plans: Sequence[Sequence[ChunkPlan]],
    timeline: Timeline,
    stage: int,
    *,
    dp: int = 1,
    zero1: bool = True,
) -> RankBytes:
    """Of one rank of a stage, for chunks that live as long as the timeline says.

    Args:
        plans: chunks of each sequence of the step.
    """
    kept = {plan: setup.kept_bytes(plan) for sequence in plans for plan in sequence}
    shapes = {replace(plan, index=0, text_start=0, text_end=plan.num_text) for plan in kept}
    live = most_live_bytes(timeline, stage, lambda op: kept[plans[op.sequence][op.chunk]])
    return setup.needs(state, kept=live, plans=list(shapes), dp=dp, zero1=zero1)


def most_live_bytes(timeline: Timeline, process: int, bytes_of: Callable[[Op], int]) -> int:
    """Most bytes that a process holds at once, if it holds those of an op's chunk from its forward to its backward."""
    live = most = 0
    for span in timeline.spans[process]:
        if span.op.kind is Kind.FORWARD:
            live += bytes_of(span.op)
            most = max(most, live)
        elif span.op.kind in (Kind.BACKWARD, Kind.WEIGHT_GRADIENT):
            live -= bytes_of(span.op)
    return most
