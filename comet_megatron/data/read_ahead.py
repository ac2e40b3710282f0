"""Read the batches of the next steps in other processes, while this one trains: what is read does not depend on it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from comet_megatron.data.training_data import TrainingData, TrainingSequence
from comet_megatron.data.workers import end_with_parent, spawn_pool
from comet_megatron.errors import DataError

BATCHES_AHEAD = 2  # per process

_data: TrainingData  # of a reading process, which exists for this alone


@dataclass(frozen=True)
class ReadSequence:
    """What was found at a position: of each document its content, or why it cannot be used."""

    position: int
    documents: tuple[TrainingSequence | DataError, ...]

    @property
    def errors(self) -> dict[tuple[int, int], DataError]:
        """By position and number of the document."""
        found = enumerate(self.documents)
        return {(self.position, n): d for n, d in found if isinstance(d, DataError)}


def read_sequence(position: int, readers: Iterable[Callable[[], TrainingSequence]]) -> ReadSequence:
    """Read documents; what is wrong with one is returned and not raised."""
    found: list[TrainingSequence | DataError] = []
    for read in readers:
        try:
            found.append(read())
        except DataError as error:
            found.append(error)
    return ReadSequence(position, tuple(found))


class BatchReader:
    """The batches of one rank, in the order of the steps. To be closed.

    Args:
        data: what is read.
        plan: step, from 0 → the positions that this rank trains on; None behind the last step.
        num_workers: processes that read ahead; 0: this one reads when a batch is asked for.
    """

    def __init__(self, data: TrainingData, plan: Callable[[int], Sequence[int] | None], *, num_workers: int) -> None:
        self.data, self.plan, self.num_workers = data, plan, num_workers
        self._pool: ProcessPoolExecutor | None = None
        self._ahead: dict[int, Future[list[ReadSequence]]] = {}  # by step

    def read(self, step: int) -> list[ReadSequence]:
        """The batch of a step; then those of the next ones are begun. Where a process has died, its error."""
        positions = self.plan(step)
        assert positions is not None, step
        if not self.num_workers:
            return [read_sequence(position, self.data.readers_at(position)) for position in positions]
        if self._pool is None:
            self._pool = spawn_pool(self.num_workers, _start, self.data)
        try:
            for ahead in range(step, step + 1 + BATCHES_AHEAD * self.num_workers):
                if ahead not in self._ahead and (planned := self.plan(ahead)) is not None:
                    self._ahead[ahead] = self._pool.submit(_read, planned)
            return self._ahead.pop(step).result()
        except BrokenProcessPool:
            problem = DataError(
                "a process that reads data died",
                way_out="there may be too little memory: set data.workers=0; --resume goes on from the last checkpoint",
            )
            return [ReadSequence(position, (problem,)) for position in positions]

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None
        self._ahead.clear()


def _start(data: TrainingData) -> None:
    """Begin a reading process: signals that stop a run are for the main process, with which this one ends."""
    global _data
    _data = data
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()


def _read(positions: Sequence[int]) -> list[ReadSequence]:
    return [read_sequence(position, _data.readers_at(position)) for position in positions]
