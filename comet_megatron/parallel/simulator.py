"""Replay of op lists with costs: when every op would start and end, without running anything. Pure, no torch.

Any lists can be replayed, not only plan_schedule's: an op starts when its process is free and all it needs is there.
Costs are in any unit of time; hops between processes take `latency`.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from comet_megatron.parallel.schedule import Kind, Op, Workload

Cost = Callable[[Op], float]

_LAST_USE = (Kind.BACKWARD, Kind.WEIGHT_GRADIENT)  # after it nothing of the chunk is kept


class ScheduleError(AssertionError):
    """Op lists that cannot be run: a cycle of waits, or ops that are missing or there twice."""


@dataclass(frozen=True)
class Span:
    """An op and when it ran."""

    op: Op
    start: float
    end: float

    @property
    def duration(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Timeline:
    """What every process did, and when; simulated or recorded.

    Attributes:
        spans: of each process, in its order.
    """

    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def start(self) -> float:
        return min((s.start for process in self.spans for s in process), default=0.0)

    @cached_property
    def end(self) -> float:
        return max((s.end for process in self.spans for s in process), default=0.0)

    @property
    def makespan(self) -> float:
        """From the first op's start to the last one's end."""
        return self.end - self.start

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Time that each process spends in ops."""
        return tuple(sum(s.duration for s in process) for process in self.spans)

    @property
    def bubble(self) -> float:
        """Share of all processes' time in which they wait."""
        return 1 - sum(self.busy) / (len(self.spans) * self.makespan) if self.makespan else 0.0

    def live_chunks(self, process: int) -> int:
        """Most chunks that a process held at once, from the start of the forward to the end of the backward."""
        live = most = 0
        for span in self.spans[process]:
            live += span.op.kind is Kind.FORWARD
            most = max(most, live)
            live -= span.op.kind in _LAST_USE
        return most


def replay(op_lists: Sequence[Sequence[Op]], work: Workload, *, cost: Cost, latency: float = 0.0) -> Timeline:
    """Run every process's list as early as its order and all dependencies allow.

    Args:
        op_lists: of each process; a process may hold several stages.
        cost: time of an op.
        latency: time of a hop from one process to another.

    Raises:
        ScheduleError: the lists wait for each other in a cycle, or do not hold each op once.
    """
    home = {op.stage: process for process, ops in enumerate(op_lists) for op in ops}
    _check_ops(op_lists, work)
    done: dict[Op, Span] = {}
    waiting: dict[Op, list[int]] = defaultdict(list)
    spans: list[list[Span]] = [[] for _ in op_lists]
    runnable = list(range(len(op_lists)))
    while runnable:
        process = runnable.pop()
        while len(spans[process]) < len(op_lists[process]):
            op = op_lists[process][len(spans[process])]
            needed = work.dependencies(op)
            if missing := next((n for n in needed if n not in done), None):
                waiting[missing].append(process)
                break
            arrivals = [done[n].end + (latency if home[n.stage] != process else 0.0) for n in needed]
            start = max([spans[process][-1].end if spans[process] else 0.0, *arrivals])
            done[op] = Span(op, start, start + cost(op))
            spans[process].append(done[op])
            runnable += waiting.pop(op, ())
    stuck = [str(ops[len(s)]) for ops, s in zip(op_lists, spans, strict=True) if len(s) < len(ops)]
    if stuck:
        raise ScheduleError(f"these ops wait for each other: {'; '.join(stuck)}")
    return Timeline(tuple(tuple(s) for s in spans))


def _check_ops(op_lists: Sequence[Sequence[Op]], work: Workload) -> None:
    """Each op once, a stage in one process only; lists without any backward are of evaluation."""
    found = Counter(op for ops in op_lists for op in ops)
    forward_only = all(op.kind is Kind.FORWARD for op in found)
    for stage in range(work.num_stages):
        for op in work.ops(stage):
            if not (forward_only and op.kind is not Kind.FORWARD) and found.pop(op, 0) != 1:
                raise ScheduleError(f"{op} is not in the lists exactly once")
    if found:
        raise ScheduleError(f"{next(iter(found))} is in the lists and not in the work")
    homes = Counter(stage for ops in op_lists for stage in {op.stage for op in ops})
    if (split := next((stage for stage, count in homes.items() if count > 1), None)) is not None:
        raise ScheduleError(f"stage {split} is in the lists of several processes")


def lower_bound(work: Workload, *, cost: Cost, latency: float = 0.0) -> float:
    """No order that begins with the first sequence, one stage per process, can be faster; 0 without work.

    A stage starts when the stages before it have done the first chunk, does all its work, and is followed by the
    backward of a first chunk through the stages before it, which its weight gradients may fill. With one segment it
    also waits, from its last forward to its first backward, for the stages behind it, which recomputation may fill.
    """

    def of(kinds: tuple[Kind, ...], stages: range, sequence: int, chunk: int) -> float:
        return sum(cost(Op(kind, j, sequence, chunk)) + latency for j in stages for kind in kinds)

    back = (Kind.HIDDEN_GRADIENT,) if work.split_backward else (Kind.BACKWARD,)
    one_segment = len(work.segments) == 1
    bound = 0.0
    if not work.chunks:
        return bound
    for stage in range(work.num_stages):
        ops = list(work.ops(stage))
        before, behind = range(stage), range(stage + 1, work.num_stages)
        last = work.chunks[0] - 1
        first_arrival = of((Kind.FORWARD,), before, 0, 0)
        drain = min(of(back, before, s, first) for s, first, _ in work.segments)
        drain -= sum(cost(op) for op in ops if op.kind is Kind.WEIGHT_GRADIENT)
        gap = 0.0
        if one_segment and behind:
            gap = of((Kind.FORWARD, *back), behind, 0, last)
            gap -= sum(cost(op) for op in ops if op.kind is Kind.RECOMPUTE)
        bound = max(bound, first_arrival + sum(map(cost, ops)) + max(0.0, gap) + max(0.0, drain))
    return bound


def merge_op_lists(op_lists: Sequence[Sequence[Op]], work: Workload) -> list[Op]:
    """One list for one process that holds all stages: each stage's order is kept, and every dependency."""
    timeline = replay(op_lists, work, cost=lambda op: 1.0)
    spans = sorted((s for process in timeline.spans for s in process), key=lambda s: (s.start, s.op.stage))
    return [s.op for s in spans]


def cost_by_kind(costs: Mapping[Kind, float]) -> Cost:
    """The same cost on every stage and for every chunk."""
    return lambda op: costs[op.kind]
