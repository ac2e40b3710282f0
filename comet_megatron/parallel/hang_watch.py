"""Ends a run that another process holds up: every rank says who waits for what, and who is missing, and exits.

A thread looks at this process's Activity. When an op or a phase lasts too long, or when the process finds out that
another is gone, it tells all others through the store of torch.distributed, gathers what they did last, and exits; so
do they. A process that is dead or stopped gives no answer, and is named for it. The store itself may be on the lost
process, so nothing here waits for it without a limit.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

import torch.distributed as dist

from comet_megatron.errors import PeerError
from comet_megatron.parallel.activity import Activity
from comet_megatron.parallel.p2p import sign_of_a_lost_process

ANSWER_S = 3.0  # how long the first to notice waits for what the others did last
_NOTICED, _REASON, _REPORT = "noticed", "reason", "report"


class HangWatch:
    """Watches one process.

    Args:
        activity: what it does.
        rank, world_size: of this process.
        timeout_s: the longest that an op or phase may last.
        name_of: words for a rank, such as "rank 3 (stage 1)".
        store: shared by all processes.
    """

    def __init__(
        self,
        activity: Activity,
        *,
        rank: int,
        world_size: int,
        timeout_s: float,
        name_of: Callable[[int], str],
        store: dist.Store,
    ) -> None:
        self.activity, self.rank, self.world_size, self.timeout_s = activity, rank, world_size, timeout_s
        self.name_of = name_of
        # A connection of its own: the process's may be held by whatever hangs.
        self.store = dist.PrefixStore("hang_watch", store.clone() if hasattr(store, "clone") else store)
        self._pause_s = min(1.0, timeout_s / 10)
        self._over = threading.Event()
        self._others_reason = ""  # why another process stops the run
        self._stopping = threading.Lock()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while inside. An error that says that a process is gone ends all processes."""
        threads = [
            threading.Thread(target=target, name="hang watch", daemon=True)
            for target in (self._watch_activity, self._watch_store)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        except PeerError as error:
            self.stop_all(str(error))
        except RuntimeError as error:
            if not (sign := sign_of_a_lost_process(error)):
                raise
            doing = self.activity.state.doing or "between steps"
            self.stop_all(f"{self.name_of(self.rank)}, {doing}: another process is gone: {sign}")
        finally:
            self._over.set()
            for thread in threads:  # one that is inside a call of the store when Python ends would abort the process
                thread.join(ANSWER_S)

    def _watch_activity(self) -> None:
        state, lasted_s, looked_s = self.activity.state, 0.0, time.monotonic()
        while not self._over.wait(self._pause_s):
            now_s, now = time.monotonic(), self.activity.state
            # A look that comes much too late: this process itself was stopped or had no core, which is no hang.
            lasted_s = lasted_s + min(now_s - looked_s, 3 * self._pause_s) if now is state else 0.0
            state, looked_s = now, now_s
            if state.limited and lasted_s > self.timeout_s:
                what = f"{self.name_of(self.rank)}: {self._describe()}"
                self.stop_all(f"{what}; parallel.timeout_s={self.timeout_s:g}")
            elif self._others_reason:
                self.stop_all(self._others_reason)

    def _watch_store(self) -> None:
        """In a thread of its own: a store whose process is stopped does not return."""
        while not self._over.wait(self._pause_s) and not self._others_reason:
            try:
                if self.store.check([_REASON]):
                    self._others_reason = self.store.get(_REASON).decode()
            except RuntimeError:
                if not self._over.is_set():
                    self._others_reason = self._store_is("is gone")

    def stop_all(self, reason: str) -> NoReturn:
        """Tell all processes why the run ends, and end this one. The first to notice says what every rank did last."""
        self._stopping.acquire()  # the threads and the process itself may notice at once; only one goes on
        self._say(reason)  # at once: a launcher that sees another process end will not let this one talk on
        said: list[str] = []
        consultation = threading.Thread(target=lambda: said.append(self._consult(reason)), daemon=True)
        consultation.start()
        consultation.join(2 * ANSWER_S)
        if more := said[0] if said else self._store_is("does not answer"):
            self._say(more)
        os._exit(PeerError.exit_code)

    def _say(self, text: str) -> None:
        sys.stdout.flush()
        print(f"rank {self.rank}: {PeerError.kind}: {text}", file=sys.stderr, flush=True)

    def _consult(self, reason: str) -> str:
        """What else to say, after the others were told and asked."""
        try:
            self.store.set(f"last/{self.rank}", self._describe())
            if self.store.add(_NOTICED, 1) > 1:
                return self._wait_for(_REPORT)
            self.store.set(_REASON, reason)
            answers = self._gather_answers()
            report = "all ranks answer"
            if missing := [self.name_of(rank) for rank, answer in enumerate(answers) if not answer]:
                report = f"no answer within {ANSWER_S:g} s from {', '.join(missing)}: dead, stopped or very busy"
            self.store.set(_REPORT, report)
            time.sleep(2 * self._pause_s)  # should this process hold the store: the others read it meanwhile
            lines = [f"  {self.name_of(r)}: {answer or 'NO ANSWER'}" for r, answer in enumerate(answers)]
            return "\n".join([report, "what every rank did last:", *lines])
        except RuntimeError:
            return self._store_is("is gone")

    def _describe(self) -> str:
        try:
            return self.activity.describe()
        except RuntimeError as error:  # a GPU that is lost cannot be asked either
            return f"in {self.activity.state.doing}: {error}"

    def _gather_answers(self) -> list[str]:
        """Of every rank, "" of those that gave none."""
        deadline = time.monotonic() + ANSWER_S
        answers = [""] * self.world_size
        while not all(answers) and time.monotonic() < deadline:
            for rank, answer in enumerate(answers):
                if not answer and self.store.check([f"last/{rank}"]):
                    answers[rank] = self.store.get(f"last/{rank}").decode()
            time.sleep(0.05)
        return answers

    def _wait_for(self, key: str, *, limit_s: float = 1.5 * ANSWER_S) -> str:
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.store.check([key]):
                return self.store.get(key).decode()
            time.sleep(0.05)
        return ""

    def _store_is(self, what: str) -> str:
        return f"the store of torch.distributed {what}; {self.name_of(0)} or its launcher holds it"
