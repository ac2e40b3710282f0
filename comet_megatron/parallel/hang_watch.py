"""Ends a run that another process holds up: says who waits for what and what every rank did last, on every rank.

A thread looks at this process's Activity. When an op or a phase lasts too long, or when the process finds out that
another is gone, it tells all others through the store of torch.distributed, gathers what they did last, and exits; so
do they. A process that is dead or stopped gives no answer, and is named for it.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

import torch.distributed as dist

from comet_megatron.errors import PeerError
from comet_megatron.parallel.activity import Activity

EXIT_CODE = PeerError.exit_code
ANSWER_S = 3.0  # how long the first to notice waits for what the others did last
_REASON, _NOTICED = "reason", "noticed"
_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket closed")


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
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch while inside. An error that says that a process is gone ends all processes."""
        self._thread.start()
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
            self._stopping.set()

    def _watch(self) -> None:
        pause_s = min(1.0, self.timeout_s / 10)
        while not self._stopping.wait(pause_s):
            state = self.activity.state
            if state.limited and time.monotonic() - state.since_s > self.timeout_s:
                self.stop_all(
                    f"{self.name_of(self.rank)}: {self.activity.describe()}; parallel.timeout_s={self.timeout_s:g}"
                )
            elif (reason := self._others_reason()) is not None:
                self._answer()
                self._say(reason)
                os._exit(EXIT_CODE)

    def _others_reason(self) -> str | None:
        """Why another process has stopped the run."""
        try:
            return self.store.get(_REASON).decode() if self.store.check([_REASON]) else None
        except RuntimeError:
            return None if self._stopping.is_set() else "the store of torch.distributed is gone: rank 0 or its machine"

    def _answer(self) -> None:
        with suppress(RuntimeError):  # the store is gone: nobody is left to ask
            self.store.set(f"last/{self.rank}", self.activity.describe())

    def stop_all(self, reason: str) -> NoReturn:
        """Tell all processes why the run ends, and end this one. The first to notice says what every rank did last."""
        with self._lock:  # the thread and the process itself may notice at once; the loser never returns
            self._answer()
            try:
                is_first = self.store.add(_NOTICED, 1) == 1
                if is_first:
                    self.store.set(_REASON, reason)
                    reason += "\n" + self._what_all_did()
                else:
                    reason = self._wait_for_reason() or reason
            except RuntimeError:
                reason += "\n(the store of torch.distributed is gone: no word of the others)"
            self._say(reason)
            os._exit(EXIT_CODE)

    def _wait_for_reason(self) -> str | None:
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            if (reason := self._others_reason()) is not None:
                time.sleep(ANSWER_S / 3)  # let the first one gather its answers before launchers see an exit
                return reason
            time.sleep(0.05)
        return None

    def _what_all_did(self) -> str:
        deadline = time.monotonic() + ANSWER_S
        missing = set(range(self.world_size))
        while missing and time.monotonic() < deadline:
            missing -= {rank for rank in missing if self.store.check([f"last/{rank}"])}
            time.sleep(0.05)
        lines = ["what every rank did last:"]
        for rank in range(self.world_size):
            answer = "NO ANSWER: dead or stopped" if rank in missing else self.store.get(f"last/{rank}").decode()
            lines.append(f"  {self.name_of(rank)}: {answer}")
        return "\n".join(lines)

    def _say(self, reason: str) -> None:
        sys.stdout.flush()
        print(f"rank {self.rank}: {PeerError.kind}: {reason}", file=sys.stderr, flush=True)


def sign_of_a_lost_process(error: RuntimeError) -> str:
    """The words of torch.distributed that say that another process is gone or silent; "" for other errors."""
    text = str(error)
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Timed out waiting",
        "Socket closed",
    )
    is_nccl = isinstance(error, dist.DistBackendError)
    return next((sign for sign in signs if sign in text), text.splitlines()[0] if is_nccl else "")
