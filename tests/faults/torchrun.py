"""The train command under torchrun, for tests that send signals to its processes."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from comet_megatron.train.callbacks.curve import METRICS_FILE


@contextmanager
def torchrun(config: Path, log: Path, *arguments: str, restarts: int = 0) -> Iterator[subprocess.Popen]:
    """Two processes of the command; what they say goes to a file. All are ended at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.2"]
    command += ["-m", "comet_megatron.train", "--config", str(config), *arguments]
    with open(log, "a") as out:
        run = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        yield run
    finally:
        for process in [*children(run), run]:
            process.kill()
        run.wait()


def children(run: subprocess.Popen) -> list[psutil.Process]:
    """The training processes, by rank; those that end meanwhile are left out."""
    ranks: dict[int, psutil.Process] = {}
    try:
        for child in psutil.Process(run.pid).children():
            ranks[int(child.environ()["RANK"])] = child
    except (psutil.Error, KeyError):
        pass
    return [ranks[rank] for rank in sorted(ranks)]


def steps_done(run: Path) -> int:
    """Lines of the run's metrics."""
    path = run / METRICS_FILE
    return path.read_text().count("\n") if path.exists() else 0


def wait_until(what: Callable[[], bool], run: subprocess.Popen, log: Path, *, limit_s: float = 120) -> None:
    """Return when `what` is true, or torchrun has ended."""
    deadline = time.monotonic() + limit_s
    while not what() and run.poll() is None:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.005)
