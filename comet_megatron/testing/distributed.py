"""Run a function on N real gloo processes. The processes of a world size are started once and reused.

A function is sent by file and name, so it must stand at the top level of its file; arguments and results are pickled.
It is called on every rank as `function(process, *arguments)` with a ProcessRank; a rank that raises fails the test.
"""

from __future__ import annotations

import importlib.util
import inspect
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from comet_megatron.parallel.process import ProcessRank


class RankFailed(AssertionError):
    """A rank raised, died or did not answer in time."""


class ProcessPool:
    """N worker processes in one gloo world.

    Args:
        world_size: number of processes.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._workers: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory | None = None

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120) -> list[Any]:
        """Results of `function(process, *arguments)` by rank.

        Raises:
            RankFailed: with the tracebacks of the ranks that failed; the processes are then started anew.
        """
        self._start()
        file = inspect.getsourcefile(inspect.unwrap(function))
        for _, connection in self._workers:
            connection.send((file, function.__qualname__, arguments))
        deadline = time.monotonic() + timeout_s
        results: list[Any] = [None] * self.world_size
        problems = []
        for rank, (process, connection) in enumerate(self._workers):
            # After one rank has failed, the others may wait for it in a collective: do not wait as long for them.
            left = 5.0 if problems else max(deadline - time.monotonic(), 0.1)
            try:
                if not connection.poll(left):
                    problems.append(f"rank {rank} did not answer within {timeout_s:.0f} s")
                    continue
                failed, value = connection.recv()
            except EOFError:
                process.join(1)
                problems.append(f"rank {rank} died with exit code {process.exitcode}")
                continue
            if failed:
                problems.append(f"rank {rank}:\n{value}")
            results[rank] = value
        if problems:
            self.close()
            raise RankFailed("\n".join(problems))
        return results

    def _start(self) -> None:
        if self._workers:
            return
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            worker = context.Process(target=_work, args=(theirs, rank, self.world_size, store), daemon=True)
            worker.start()
            theirs.close()
            self._workers.append((worker, ours))

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _work(connection: Connection, rank: int, world_size: int, store: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    from comet_megatron.backend.quiet import quiet_libraries

    quiet_libraries()
    import torch
    import torch.distributed as dist

    from comet_megatron.backend.device import select_device

    select_device(rank)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    process = ProcessRank(rank, world_size, rank, world_size)
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # as torchrun sets them, for whole commands
    os.environ |= {k: str(v) for k, v in zip(names, (rank, world_size, rank, world_size), strict=True)}
    while True:
        try:
            file, name, arguments = connection.recv()
        except EOFError:
            return
        torch.set_num_threads(1)  # a command may have set more, which changes the last bits of what comes after it
        try:
            connection.send((False, getattr(_load(file), name)(process, *arguments)))
        except BaseException:
            connection.send((True, traceback.format_exc()))


@cache
def _load(file: str) -> Any:
    name = f"_sent_{Path(file).stem}"
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
