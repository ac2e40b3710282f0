"""The layer-level pipeline schedule: what each stage computes, in which order. Pure: numbers in, lists out, no torch.

Stage i works on chunk t while stage i+1 works on chunk t-1. A layer's memory stays on its stage and goes from chunk to
chunk there; only hidden states, and their gradients on the way back, cross stages:

    forward(i, t)    needs forward(i-1, t), and forward(i, t-1) for the memory
    backward(i, t)   needs its graph (forward or recompute of (i, t)), backward(i+1, t), and backward(i, t+1) for the
                     memory's gradient, unless a window of truncated backpropagation ends with chunk t

so backward walks the chunks of a window in reverse. With no slack and sequences of equal length the order is that of
Seq1F1B (arXiv 2406.03488); slack lets a stage run further ahead, which absorbs ragged lengths and latency.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from comet_megatron.errors import ConfigError


class Kind(Enum):
    """What an op computes."""

    FORWARD = "forward"
    RECOMPUTE = "recompute"  # the forward again, from its inputs, to have its graph
    BACKWARD = "backward"
    HIDDEN_GRADIENT = "hidden gradient"  # a backward in two: first what other stages wait for,
    WEIGHT_GRADIENT = "weight gradient"  # then what only this stage needs


class Op(NamedTuple):
    """One chunk's work on one stage. Stages, sequences and chunks are counted from 0."""

    kind: Kind
    stage: int
    sequence: int
    chunk: int

    def __str__(self) -> str:
        return f"{self.kind.value} of sequence {self.sequence} chunk {self.chunk} on stage {self.stage}"


class Segment(NamedTuple):
    """Chunks `first` to `end` - 1 of a sequence, through which gradients flow: the sequence or a window of it."""

    sequence: int
    first: int
    end: int


Recompute = Callable[[int, int, int], bool]  # (stage, sequence, chunk) -> is it computed again


def recompute_nothing(stage: int, sequence: int, chunk: int) -> bool:
    """Keep every graph."""
    return False


def recompute_everything(stage: int, sequence: int, chunk: int) -> bool:
    """Keep a chunk's inputs only."""
    return True


@dataclass(frozen=True)
class Workload:
    """The work of one step.

    Attributes:
        num_stages: stages that the model is cut into.
        chunks: of each sequence.
        bptt_chunks: chunks of a window of truncated backpropagation; None: gradients flow through whole sequences.
        recompute: which chunks a stage computes again in its backward.
        split_backward: hidden gradients and weight gradients are ops of their own.
        whole_messages: a stage hands on a sequence only when it has done all of its chunks, as ordinary pipelines do
            that know no chunks (for comparison).

    Raises:
        ConfigError: no stage, a sequence without chunks, or a window below 1.
    """

    num_stages: int
    chunks: tuple[int, ...]
    bptt_chunks: int | None = None
    recompute: Recompute = recompute_nothing
    split_backward: bool = False
    whole_messages: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.num_stages < 1:
            problems.append(ConfigError(f"a pipeline of {self.num_stages} stages has none; use 1 or more"))
        if empty := [i for i, n in enumerate(self.chunks) if n < 1]:
            what = f"sequence {empty[0]} has {self.chunks[empty[0]]} chunks; leave out sequences without a label"
            problems.append(ConfigError(what))
        if self.bptt_chunks is not None and self.bptt_chunks < 1:
            problems.append(ConfigError(f"a backpropagation window of {self.bptt_chunks} chunks; use 1 or more"))
        if problems:
            raise ConfigError.collect(problems)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All windows of all sequences, in order."""
        return tuple(
            Segment(s, first, min(first + (self.bptt_chunks or n), n))
            for s, n in enumerate(self.chunks)
            for first in range(0, n, self.bptt_chunks or n)
        )

    def ends_window(self, sequence: int, chunk: int) -> bool:
        """No gradient comes from the chunk after this one."""
        end = chunk + 1
        return end == self.chunks[sequence] or (self.bptt_chunks is not None and end % self.bptt_chunks == 0)

    def backward_ops(self, stage: int, sequence: int, chunk: int) -> tuple[Op, ...]:
        """What turns a chunk's gradient into that of its inputs and weights, recomputation first."""
        kinds = (Kind.HIDDEN_GRADIENT, Kind.WEIGHT_GRADIENT) if self.split_backward else (Kind.BACKWARD,)
        if self.recompute(stage, sequence, chunk):
            kinds = (Kind.RECOMPUTE, *kinds)
        return tuple(Op(kind, stage, sequence, chunk) for kind in kinds)

    def ops(self, stage: int) -> Iterator[Op]:
        """Every op of a stage, in no particular order."""
        for sequence, chunks in enumerate(self.chunks):
            for chunk in range(chunks):
                yield Op(Kind.FORWARD, stage, sequence, chunk)
                yield from self.backward_ops(stage, sequence, chunk)

    def dependencies(self, op: Op) -> tuple[Op, ...]:
        """Ops that must be done before `op`."""
        kind, stage, sequence, chunk = op
        last = self.chunks[sequence] - 1
        if kind is Kind.RECOMPUTE:
            return (op._replace(kind=Kind.FORWARD),)
        if kind is Kind.WEIGHT_GRADIENT:
            return (op._replace(kind=Kind.HIDDEN_GRADIENT),)
        needed = []
        if kind is Kind.FORWARD:
            if stage > 0:
                needed.append(op._replace(stage=stage - 1, chunk=last if self.whole_messages else chunk))
            if chunk > 0:
                needed.append(op._replace(chunk=chunk - 1))
            return tuple(needed)
        graph = Kind.RECOMPUTE if self.recompute(stage, sequence, chunk) else Kind.FORWARD
        needed.append(op._replace(kind=graph))
        if stage < self.num_stages - 1:
            needed.append(op._replace(stage=stage + 1, chunk=0 if self.whole_messages else chunk))
        if not self.ends_window(sequence, chunk):
            needed.append(op._replace(chunk=chunk + 1))
        return tuple(needed)


def plan_schedule(work: Workload, *, slack: int = 1) -> list[list[Op]]:
    """The ops of every stage, in order.

    Segments are worked off first in, first out, and the chunks of a segment last in, first out. Before the backward of
    chunk number j (0: the last) of segment s, stage d has done the forwards of all segments up to s, the share j / n_s
    of the next one, and (1 + slack) * (stages behind it) more. That lead never grows along the pipeline and the order
    of forwards and of backwards is the same on every stage, so no cycle of waits can form. A chunk is recomputed
    before its gradient is waited for: it needs nothing from other stages.

    Args:
        slack: how much further ahead than needed a stage runs, in chunks per stage behind it; each costs that many
            more live chunks.

    Raises:
        ConfigError: slack is below 0.
    """
    return [plan_stage(work, stage, slack=slack) for stage in stages(work)]


def plan_stage(work: Workload, stage: int, *, slack: int = 1) -> list[Op]:
    """The ops of one stage; see `plan_schedule`."""
    if slack < 0:
        raise ConfigError(f"a schedule's slack of {slack} is below 0; use 0 or more")
    lead = (1 + slack) * (work.num_stages - 1 - stage)
    forwards = [Op(Kind.FORWARD, stage, s, t) for s, chunks in enumerate(work.chunks) for t in range(chunks)]
    segments = work.segments
    ops: list[Op] = []
    issued = through_segment = 0
    for number, (sequence, first, end) in enumerate(segments):
        length = end - first
        through_segment += length
        following = segments[number + 1] if number + 1 < len(segments) else Segment(sequence, end, end)
        for done, chunk in enumerate(reversed(range(first, end))):
            share_of_next = done * (following.end - following.first) // length
            target = min(len(forwards), through_segment + share_of_next + lead)
            ops += forwards[issued:target]
            issued = max(issued, target)
            ops += work.backward_ops(stage, sequence, chunk)
    return ops


def plan_whole_sequences(work: Workload) -> list[list[Op]]:
    """1F1B with sequences as microbatches, on every stage: what a pipeline does that knows no chunks.

    For comparison, with `work.whole_messages`.
    """
    plans = []
    for stage in stages(work):
        forwards = [[Op(Kind.FORWARD, stage, s, t) for t in range(n)] for s, n in enumerate(work.chunks)]
        backwards = [
            [op for t in reversed(range(n)) for op in work.backward_ops(stage, s, t)] for s, n in enumerate(work.chunks)
        ]
        ahead = min(work.num_stages - 1 - stage, len(forwards))
        ops = [op for sequence in forwards[:ahead] for op in sequence]
        for number, backward in enumerate(backwards):
            if ahead + number < len(forwards):
                ops += forwards[ahead + number]
            ops += backward
        plans.append(ops)
    return plans


def plan_forwards(work: Workload) -> list[list[Op]]:
    """Forwards only, on every stage: evaluation."""
    return [
        [Op(Kind.FORWARD, stage, s, t) for s, chunks in enumerate(work.chunks) for t in range(chunks)]
        for stage in stages(work)
    ]


def without_needless_recompute(ops: Sequence[Op]) -> list[Op]:
    """The same list, less each recomputation that directly follows its own forward: the graph may as well stay."""
    kept: list[Op] = []
    for op in ops:
        if op.kind is not Kind.RECOMPUTE or not kept or kept[-1] != op._replace(kind=Kind.FORWARD):
            kept.append(op)
    return kept


def live_chunks_bound(work: Workload, stage: int, *, slack: int = 1) -> int:
    """Chunks whose inputs a stage holds at once, at most, under `plan_schedule`."""
    longest = max((end - first for _, first, end in work.segments), default=0)
    return longest + (1 + slack) * (work.num_stages - 1 - stage)


def max_in_flight_of(slack: int) -> int:
    """Messages of one direction of a link that may be on their way before the sender waits for the oldest.

    Without a limit a stage whose forwards are quick would send all of a sequence ahead and hold all of it. A limit
    above 1 + slack cannot lock stages: two neighbours would have to wait to send to each other, stage d at forward i
    and stage d + 1 at backward k. The rule allows stage d forwards up to 1 + slack beyond those that stage d + 1 has
    done before its backward k, but i is beyond those by more than the limit.
    """
    return slack + 3


def stages(work: Workload) -> range:
    """All stages."""
    return range(work.num_stages)
