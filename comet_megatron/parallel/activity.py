"""What this process does now, since when, and what it did last; how long its ops took and waited.

Written by the executor, read by hang_watch.py from another thread, and by whoever wants times. On a GPU times are
CUDA events, read after the step, so that nothing waits for the device inside it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from comet_megatron.parallel.schedule import Op
from comet_megatron.parallel.simulator import Span

Mark = float | torch.cuda.Event


@dataclass(frozen=True)
class State:
    """What a process does at one moment; replaced as a whole, so that another thread reads no mixture.

    Attributes:
        doing: an op, or a phase of a step in words; "" between steps.
        waits_for: what another process has to send first, for example a message; "" while computing.
        since_s: of this state, time.monotonic().
        limited: may not last for ever.
    """

    doing: object = ""
    waits_for: object = ""
    since_s: float = 0.0
    limited: bool = False


@dataclass
class _Timed:
    op: Op
    start: Mark
    end: Mark | None = None
    waits: list[tuple[Mark, Mark, object]] = field(default_factory=list)  # before the work, and for what
    waits_after: list[tuple[Mark, Mark, object]] = field(default_factory=list)


class Activity:
    """One process's present and its last steps.

    Args:
        device: where ops run.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._on_gpu = device is not None and device.type == "cuda"
        self.state = State()
        self.last_done: object = "nothing yet"
        self._zero = self.mark()
        self._timed: list[_Timed] = []

    # --- what is done -------------------------------------------------------------------------------------------------

    @contextmanager
    def op(self, op: Op) -> Iterator[None]:
        """Do an op inside."""
        self.state = State(op, since_s=time.monotonic(), limited=True)
        timed = _Timed(op, self.mark())
        self._timed.append(timed)
        yield
        timed.end = self.mark()
        self.last_done = op
        self.state = State(since_s=time.monotonic())

    @contextmanager
    def waiting(self, what: object, *, after_work: bool = False) -> Iterator[None]:
        """Wait inside, in an op, for `what` (read with str() only if somebody asks).

        Args:
            after_work: the op's work is done, else it has not begun.
        """
        before = self.state
        self.state = State(before.doing, what, time.monotonic(), True)
        start = self.mark()
        yield
        if self._timed and self._timed[-1].end is None:
            timed = self._timed[-1]
            (timed.waits_after if after_work else timed.waits).append((start, self.mark(), what))
        self.state = State(before.doing, since_s=time.monotonic(), limited=before.limited)

    @contextmanager
    def phase(self, name: str, *, limited: bool = True) -> Iterator[None]:
        """A part of a step, in words; one that is not limited may take until torch.distributed's own limit."""
        self.state = State(name, since_s=time.monotonic(), limited=limited)
        yield
        self.last_done = name
        self.state = State(since_s=time.monotonic())

    def describe(self) -> str:
        """One line for people: what is done or waited for, since when, or what was done last."""
        state, now = self.state, time.monotonic()
        seconds = f"{now - state.since_s:.0f} s"
        if state.waits_for:
            return f"the {state.doing} waits for {state.waits_for}, for {seconds}"
        if on_gpu := self._unfinished_on_gpu():
            return f"{on_gpu} on the GPU; this process: {state.doing or 'between steps'} for {seconds}"
        doing = f"in {state.doing} for {seconds}" if state.doing else f"between steps for {seconds}"
        return f"{doing}; before that: {self.last_done}"

    def _unfinished_on_gpu(self) -> str:
        """The first op that the GPU has not finished, and what it waits for; the process itself runs ahead of it."""
        if not self._on_gpu:
            return ""
        for timed in list(self._timed):
            if timed.end is None or not timed.end.query():
                waits = (w for w in (*timed.waits, *timed.waits_after) if w[0].query() and not w[1].query())
                return next((f"the {timed.op} waits for {w[2]}" for w in waits), f"the {timed.op} is not finished")
        return ""

    # --- what was done ------------------------------------------------------------------------------------------------

    def clear(self) -> None:
        """Forget the times of earlier ops, and what an error left undone; times count from now."""
        self._zero, self._timed, self.state = self.mark(), [], State(since_s=time.monotonic())

    def spans(self, *, since: Mark | None = None) -> list[Span]:
        """Ops since `clear`, in seconds since then or since a mark, without their waiting.

        On a GPU this waits for the device.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
        zero = self._zero if since is None else since
        return [Span(t.op, self._begin(t, zero), self._finish(t, zero)) for t in self._timed]

    def _begin(self, timed: _Timed, zero: Mark) -> float:
        return self._seconds(zero, timed.start) + sum(self._seconds(a, b) for a, b, _ in timed.waits)

    def _finish(self, timed: _Timed, zero: Mark) -> float:
        return self._seconds(zero, timed.end) - sum(self._seconds(a, b) for a, b, _ in timed.waits_after)

    def mark(self) -> Mark:
        """Now, on the clock of the ops."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Mark, end: Mark) -> float:
        if self._on_gpu:
            return start.elapsed_time(end) / 1000  # type: ignore[union-attr,arg-type]
        return end - start  # type: ignore[operator]
