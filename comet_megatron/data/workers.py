"""Tokenise in several processes, in order: what comes out does not depend on their number."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection

from comet_megatron.data.documents import JsonLine, RawDocument
from comet_megatron.data.tokenise import DocumentTokeniser, Tokenised
from comet_megatron.errors import PeerError

_BATCH_BYTES = 1 << 18  # handed to a process at a time: long enough to hide the handing over
_BATCHES_AHEAD = 3  # per process, read but not written yet
WORTH_WORKERS_BYTES = 16 << 20  # below, starting processes takes longer than it saves

_tokenise: DocumentTokeniser  # of a worker process, which exists for this alone


def tokenise_all(
    documents: Iterable[RawDocument], tokenise: DocumentTokeniser, *, num_workers: int
) -> Iterator[Tokenised]:
    """What `tokenise` makes of each document, in their order; num_workers 1 works in this process.

    At most a few MB of input for each process are read ahead. Processes end with this one, even if it is killed.

    Raises:
        PeerError: a process died, for example of too little memory.
        CometError: as `tokenise`.
    """
    if num_workers == 1:
        yield from map(tokenise, documents)
        return
    pool = spawn_pool(num_workers, _start, tokenise)
    pending: deque[Future[list[Tokenised]]] = deque()
    try:
        for batch in _batches(documents):
            pending.append(pool.submit(_tokenise_batch, batch))
            if len(pending) > _BATCHES_AHEAD * num_workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise PeerError(
            "a process that tokenised died",
            way_out="there may be too little memory: use fewer --workers; the same command continues",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _batches(documents: Iterable[RawDocument]) -> Iterator[list[RawDocument]]:
    batch: list[RawDocument] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.line if isinstance(document, JsonLine) else getattr(document, "text", ""))
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start(tokenise: DocumentTokeniser) -> None:
    """Begin a worker process: it leaves Ctrl-C to the main one, and ends with it."""
    global _tokenise
    _tokenise = tokenise
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core is all there is
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def spawn_pool(num_workers: int, start: Callable[..., None], *arguments: object) -> ProcessPoolExecutor:
    """Processes that begin with `start(*arguments)`."""
    context = multiprocessing.get_context("spawn")  # a fork copies locks that other threads hold
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=start, initargs=arguments)


def end_with_parent() -> None:
    """Let this process end with the one that started it, even if that one is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def end() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=end, daemon=True).start()


def _tokenise_batch(batch: list[RawDocument]) -> list[Tokenised]:
    return [_tokenise(document) for document in batch]


def auto_workers(num_bytes: int) -> int:
    """Processes that are worth starting to tokenise so much input: all cores, or this one process."""
    return len(os.sched_getaffinity(0)) if num_bytes >= WORTH_WORKERS_BYTES else 1
