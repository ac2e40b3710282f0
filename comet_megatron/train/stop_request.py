"""SIGTERM and SIGUSR1 ask a run to stop: remembered here, obeyed at the next step border by all ranks together."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop; a signal may reach one rank only."""

    def __init__(self) -> None:
        self.was_made = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while inside; the handlers before come back at the end."""
        if threading.current_thread() is not threading.main_thread():  # Python gives signals to that one only
            yield
            return
        before = {number: signal.signal(number, self._remember) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.was_made = True
