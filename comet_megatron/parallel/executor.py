"""Runs the op lists of the stages that this process holds, with real tensors.

Each chunk has its own autograd graph on each stage. What it hands on becomes detached leaves: the hidden states that
enter the next stage, and the memory that enters the next chunk. A backward starts from the gradients that came back to
those leaves. The content of the FIFO is the last few leaves themselves, so a leaf gathers the gradients of all chunks
that read it, and the reverse order of backwards makes them complete when its own chunk's turn comes. Live at once: the
graphs of the chunks in flight, or with recomputation only their inputs and the graph of one chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import Tensor

from comet_megatron.backend.precision import Visit
from comet_megatron.chunking import ChunkPlan, live_tokens, plan_chunks
from comet_megatron.config.schema import MemorySizes
from comet_megatron.model.chunk_tensors import ChunkTensors, build_chunk_tensors
from comet_megatron.model.loss import head_loss, head_loss_backward
from comet_megatron.model.memory import LayerMemory, WrittenMemory, carry_memory
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.activity import Activity
from comet_megatron.parallel.p2p import Expected, LocalTransport, Message, Room, Transport
from comet_megatron.parallel.schedule import (
    Kind,
    Op,
    Workload,
    max_in_flight_of,
    plan_forwards,
    plan_stage,
    recompute_everything,
    recompute_nothing,
    without_needless_recompute,
)
from comet_megatron.parallel.simulator import merge_op_lists

Planner = Callable[[Workload, int, int], Sequence[Op]]  # (work, stage, slack) -> that stage's ops


@dataclass(frozen=True)
class BackwardSettings:
    """How sequences are trained on.

    Attributes:
        bptt_chunks: chunks that a gradient flows through the memory, or "all".
        recompute: keep only the inputs of a chunk and compute it again in its backward.
        slice_tokens: rows of logits that exist at once.
        slack: of the schedule (schedule.plan_schedule).
    """

    bptt_chunks: int | str = "all"
    recompute: bool = False
    slice_tokens: int = 1024
    slack: int = 1

    @property
    def window(self) -> int | None:
        """Chunks of a window of truncated backpropagation; None: whole sequences."""
        return None if self.bptt_chunks == "all" else int(self.bptt_chunks)


@dataclass(frozen=True)
class Microbatch:
    """Sequences that go through the pipeline together.

    Attributes:
        token_ids: [b, tokens], text ids.
        labels: [b, tokens], next-token labels (chunking.next_token_labels).
        sizes: of the model's memory.
        chunk_lengths: text tokens of each chunk; None: full chunks.
        stride: text tokens per beacon; None: the model's.
    """

    token_ids: np.ndarray
    labels: np.ndarray
    sizes: MemorySizes
    chunk_lengths: tuple[int, ...] | None = None
    stride: int | None = None

    @cached_property
    def plans(self) -> tuple[ChunkPlan, ...]:
        """Its chunks, up to the last label of any of its sequences."""
        live = max(live_tokens(row) for row in self.labels)
        return plan_chunks(live, self.sizes, lengths=self.chunk_lengths, stride=self.stride)

    @cached_property
    def num_labels(self) -> tuple[int, ...]:
        """Labels of each chunk."""
        return tuple(int((self.labels[:, p.text_start : p.text_end] >= 0).sum()) for p in self.plans)


@dataclass(frozen=True)
class SequenceResult:
    """What a microbatch gave on the stages of this process, on the device and without gradient.

    Attributes:
        losses: fp32 [chunks], summed cross entropy of each chunk; zeros where the head is elsewhere.
        labels: labels of each chunk.
        layers: numbers of this process's layers in the whole model.
        gate_mean: fp32 [layers], over chunks and slots; empty where no gate was used.
        state_norm: fp32 [layers], of a global slot's state after the sequence, mean over slots; empty where there
            is no global memory.
    """

    losses: Tensor
    labels: tuple[int, ...]
    layers: tuple[int, ...]
    gate_mean: Tensor
    state_norm: Tensor


class Executor:
    """The stages of this process, and its way to the others.

    Args:
        stages: by their number in the pipeline. With a LocalTransport, all of them.
        num_stages: of the whole pipeline.
        transport: to the other stages.
        activity: told of every op and wait.
    """

    def __init__(
        self,
        stages: Mapping[int, CometStage],
        *,
        num_stages: int | None = None,
        transport: Transport | None = None,
        activity: Activity | None = None,
    ) -> None:
        self.stages = dict(sorted(stages.items()))
        self.num_stages = num_stages or len(self.stages)
        self.transport = transport or LocalTransport()
        first = next(iter(self.stages.values()))
        self.device, self.memory_sizes = first.device, first.memory_sizes
        self.activity = activity or Activity(self.device)
        self.planner: Planner = plan_training

    @property
    def has_head(self) -> bool:
        """Losses are computed in this process."""
        return self.num_stages - 1 in self.stages

    def microbatch(
        self,
        token_ids: np.ndarray,
        labels: np.ndarray,
        *,
        chunk_lengths: tuple[int, ...] | None = None,
        stride: int | None = None,
    ) -> Microbatch:
        """[b, tokens] each, as a microbatch of this model; see Microbatch for the rest."""
        return Microbatch(token_ids, labels, self.memory_sizes, chunk_lengths, stride)

    def train(
        self,
        batch: Sequence[Microbatch],
        *,
        scale: float,
        settings: BackwardSettings,
        after_last_backward: Callable[[int], None] = lambda stage: None,
    ) -> list[SequenceResult]:
        """Accumulate the gradient of `scale` * (summed loss) in the stages' parameters.

        Args:
            scale: of the loss; 1 / labels of the whole step, so that the loss does not depend on how the batch is
                split.
            after_last_backward: called with a stage's number when its parameters' gradients are complete.

        Raises:
            PeerError: another stage is gone.
        """
        work = self._work(batch, settings)
        lists = {stage: list(self.planner(work, stage, settings.slack)) for stage in self.stages}
        run = _Run(self, batch, settings=settings, scale=scale, lists=lists)
        remaining = {stage: sum(op.kind is Kind.BACKWARD for op in ops) for stage, ops in lists.items()}
        for stage in (s for s, count in remaining.items() if not count):
            after_last_backward(stage)
        for op in _one_list(lists, work):
            run.do(op)
            if op.kind is Kind.BACKWARD:
                remaining[op.stage] -= 1
                if not remaining[op.stage]:
                    after_last_backward(op.stage)
        return run.finish()

    @torch.no_grad()
    def evaluate(self, batch: Sequence[Microbatch], *, settings: BackwardSettings) -> list[SequenceResult]:
        """Losses without gradients; memory and time as in the forwards of training."""
        work = self._work(batch, settings)
        lists = {stage: plan_forwards(work)[stage] for stage in self.stages}
        run = _Run(self, batch, settings=settings, scale=None, lists=lists)
        for op in _one_list(lists, work):
            run.do(op)
        return run.finish()

    def _work(self, batch: Sequence[Microbatch], settings: BackwardSettings) -> Workload:
        return Workload(
            self.num_stages,
            tuple(len(m.plans) for m in batch if m.plans),
            bptt_chunks=settings.window,
            recompute=recompute_everything if settings.recompute else recompute_nothing,
        )


@lru_cache(maxsize=64)
def plan_training(work: Workload, stage: int, slack: int) -> Sequence[Op]:
    """The ops of a stage as they are run: a graph that is needed at once is not computed again."""
    return tuple(without_needless_recompute(plan_stage(work, stage, slack=slack)))


def _one_list(lists: Mapping[int, Sequence[Op]], work: Workload) -> Sequence[Op]:
    """The order of a process's ops: its only stage's, or all stages' merged."""
    if len(lists) == 1:
        return next(iter(lists.values()))
    again = {(op.stage, op.sequence, op.chunk) for ops in lists.values() for op in ops if op.kind is Kind.RECOMPUTE}
    as_listed = Workload(work.num_stages, work.chunks, work.bptt_chunks, recompute=lambda *chunk: chunk in again)
    return merge_op_lists(list(lists.values()), as_listed)


@dataclass
class _Record:
    """What is kept of a chunk on a stage between its forward and its backward.

    Attributes:
        entering: memory that entered.
        leaves: the memory it wrote, detached, gathering gradients.
        hidden_in: leaf; None where the embedding is.
        hidden, written: the graph's outputs; None while it is not there.
    """

    chunk: ChunkTensors
    entering: list[LayerMemory]
    leaves: list[WrittenMemory]
    hidden_in: Tensor | None
    hidden: Tensor | None
    written: list[WrittenMemory] | None


@dataclass
class _Observed:
    """What is reported of one sequence on one stage."""

    gates: list[list[Tensor]] = field(default_factory=list)
    state_norms: list[Tensor] = field(default_factory=list)

    def gate_mean(self) -> list[Tensor]:
        return list(torch.stack([torch.stack(g) for g in self.gates]).mean(0)) if self.gates else []


class _Run:
    """One pass over a batch. `scale` None: without gradients.

    The batch's sequences without a label have no chunks and no ops; ops count the others.
    """

    def __init__(
        self,
        executor: Executor,
        batch: Sequence[Microbatch],
        *,
        settings: BackwardSettings,
        scale: float | None,
        lists: Mapping[int, Sequence[Op]],
    ) -> None:
        self.executor, self.settings, self.scale = executor, settings, scale
        self.batch, self.worked = batch, [m for m in batch if m.plans]
        self.last_stage = executor.num_stages - 1
        self.recomputed = {
            (op.stage, op.sequence, op.chunk) for ops in lists.values() for op in ops if op.kind is Kind.RECOMPUTE
        }
        self.memory: dict[tuple[int, int], list[LayerMemory]] = {}  # (stage, sequence) -> what enters its next chunk
        self.records: dict[tuple[int, int, int], _Record] = {}  # (stage, sequence, chunk)
        self.losses: dict[tuple[int, int], Tensor] = {}  # (sequence, chunk)
        self.observed = {(s, m): _Observed() for s in executor.stages for m in range(len(self.worked))}
        self.todo = {Kind.FORWARD: self._forward, Kind.RECOMPUTE: self._recompute, Kind.BACKWARD: self._backward}
        executor.activity.clear()
        for stage in executor.stages.values():
            stage.begin_pass()
        expected = [e for stage, ops in lists.items() for e in self._expected(stage, ops)]
        executor.transport.start(expected, max_in_flight=max_in_flight_of(settings.slack))

    def _expected(self, stage: int, ops: Sequence[Op]) -> list[Expected]:
        expected = []
        for op in ops:
            if message := self._message_for(op):
                microbatch, model = self.worked[op.sequence], self.executor.stages[stage]
                rows = model.shards.rows_per_rank(microbatch.plans[op.chunk].num_rows)
                shape = (rows, len(microbatch.token_ids), model.config.hidden_size)
                expected.append(Expected(message, shape, model.config.params_dtype))
        return expected

    def _message_for(self, op: Op) -> Message | None:
        """What an op waits for."""
        if op.kind is Kind.FORWARD and op.stage > 0:
            return Message(False, op.stage - 1, op.sequence, op.chunk)
        if op.kind is Kind.BACKWARD and op.stage < self.last_stage:
            return Message(True, op.stage, op.sequence, op.chunk)
        return None

    def do(self, op: Op) -> None:
        """Run one op."""
        with self.executor.activity.op(op):
            self.todo[op.kind](op, self.executor.stages[op.stage])

    def finish(self) -> list[SequenceResult]:
        """Results of the whole batch, by microbatch."""
        assert not self.records, "chunks without a backward"
        with self.executor.activity.phase("the last messages of the step"):
            self.executor.transport.finish()
        numbers = iter(range(len(self.worked)))
        return [self._result(m, next(numbers) if m.plans else None) for m in self.batch]

    # --- ops ----------------------------------------------------------------------------------------------------------

    def _receive(self, op: Op) -> Tensor | None:
        message = self._message_for(op)
        if message is None:
            return None
        with self.executor.activity.waiting(message):
            return self.executor.transport.receive(message)

    def _send(self, message: Message, tensor: Tensor) -> None:
        with self.executor.activity.waiting(Room(message), after_work=True):
            self.executor.transport.send(message, tensor)

    def _forward(self, op: Op, stage: CometStage) -> None:
        microbatch = self.worked[op.sequence]
        chunk = build_chunk_tensors(
            microbatch.plans[op.chunk],
            microbatch.token_ids,
            microbatch.labels,
            stage.memory_sizes,
            shards=stage.shards,
            device=stage.device,
            has_embedding=stage.has_embedding,
            has_head=stage.has_head,
        )
        entering = self._entering(op, stage)
        hidden_in = self._receive(op)
        trains = self.scale is not None
        keeps_graph = trains and op[1:] not in self.recomputed
        if trains and hidden_in is not None:
            hidden_in.requires_grad_()
        with torch.set_grad_enabled(keeps_graph) if trains else nullcontext():
            visit = Visit.FIRST if trains and not keeps_graph else Visit.ONLY
            hidden, written = stage(chunk, entering, hidden_in, visit=visit)
        if op.stage < self.last_stage:
            self._send(Message(False, op.stage, op.sequence, op.chunk), hidden.detach())
        elif not trains:
            loss = head_loss(stage, hidden, chunk, slice_tokens=self.settings.slice_tokens)
            self.losses[op.sequence, op.chunk] = loss
        leaves = [_as_leaves(w) for w in written] if trains else written
        self._carry(op, stage, entering, leaves)
        if trains:
            graph = (hidden, written) if keeps_graph else (None, None)
            self.records[op[1:]] = _Record(chunk, entering, leaves, hidden_in, *graph)

    def _entering(self, op: Op, stage: CometStage) -> list[LayerMemory]:
        """The memory that enters a chunk; cut from its gradient where a window begins."""
        if op.chunk == 0:
            return stage.empty_memory()
        memory = self.memory.pop(op[1:3])
        if self.settings.window and op.chunk % self.settings.window == 0:
            memory = [_without_gradient(m) for m in memory]
        return memory

    def _carry(self, op: Op, stage: CometStage, entering: list[LayerMemory], written: list[WrittenMemory]) -> None:
        """Keep the memory for the next chunk, and what is reported of it."""
        budget = stage.memory_sizes.budget
        memory = [carry_memory(m, w, budget=budget) for m, w in zip(entering, written, strict=True)]
        observed = self.observed[op[1:3]]
        if gates := [w.gate_mean for w in written if w.gate_mean is not None]:
            observed.gates.append(gates)
        if op.chunk + 1 < len(self.worked[op.sequence].plans):
            self.memory[op[1:3]] = memory
        else:
            states = [m.global_state.detach() for m in memory if m.global_state is not None]
            observed.state_norms = [s.norm(dim=-1).mean() for s in states]

    def _recompute(self, op: Op, stage: CometStage) -> None:
        record = self.records[op[1:]]
        with torch.enable_grad():
            chunk, entering, hidden = record.chunk, record.entering, record.hidden_in
            record.hidden, record.written = stage(chunk, entering, hidden, visit=Visit.AGAIN)

    def _backward(self, op: Op, stage: CometStage) -> None:
        record = self.records.pop(op[1:])
        gradient = self._receive(op)
        if op.stage == self.last_stage:
            loss, gradient = head_loss_backward(
                stage, record.hidden, record.chunk, scale=self.scale, slice_tokens=self.settings.slice_tokens
            )
            self.losses[op.sequence, op.chunk] = loss
        outputs = [(record.hidden, gradient)]
        for written, leaves in zip(record.written, record.leaves, strict=True):
            for tensor, leaf in zip(written[:2], leaves[:2], strict=True):
                outputs.append((tensor, None if leaf is None else leaf.grad))
        # No gradient: evicted before anybody read it, or nothing labelled came after.
        pairs = [(t, g) for t, g in outputs if g is not None and t.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        if op.stage > 0:
            leaf = record.hidden_in
            # The stage before expects a message whatever the labels.
            gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            self._send(Message(True, op.stage - 1, op.sequence, op.chunk), gradient)

    # --- results ------------------------------------------------------------------------------------------------------

    def _result(self, microbatch: Microbatch, number: int | None) -> SequenceResult:
        """`number`: of the sequence among those with chunks."""
        nothing = torch.zeros(0, device=self.executor.device)
        losses, gates, norms = nothing, [], []
        if number is not None:
            losses = torch.zeros(len(microbatch.plans), device=self.executor.device)
            if self.executor.has_head:
                losses = torch.stack([self.losses[number, t] for t in range(len(microbatch.plans))])
            for stage in self.executor.stages:
                gates += self.observed[stage, number].gate_mean()
                norms += self.observed[stage, number].state_norms
        return SequenceResult(
            losses=losses,
            labels=microbatch.num_labels,
            layers=tuple(n for stage in self.executor.stages.values() for n in stage.decoder.layer_range),
            gate_mean=torch.stack(gates) if gates else nothing,
            state_norm=torch.stack(norms) if norms else nothing,
        )


def _as_leaves(written: WrittenMemory) -> WrittenMemory:
    """The same values, detached, gathering gradients of their own."""
    state, entry = (None if t is None else t.detach().requires_grad_() for t in (written.global_state, written.entry))
    return WrittenMemory(state, entry, written.gate_mean)


def _without_gradient(memory: LayerMemory) -> LayerMemory:
    """Cut at the border of a backpropagation window."""
    state = None if memory.global_state is None else memory.global_state.detach()
    return LayerMemory(state, tuple(e.detach() for e in memory.entries))
