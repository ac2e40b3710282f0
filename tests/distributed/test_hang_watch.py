"""A process that dies or stops ends the run: every other one says who is missing, and exits by itself."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from comet_megatron.testing.runs import write_config, write_data, write_start
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory, tiny_sequences
from comet_megatron.train.callbacks.curve import METRICS_FILE

STAGES = 3
TIMEOUT_S = 8.0  # of an op; a step takes a fraction of a second
LIMIT_S = TIMEOUT_S + 30  # until all have exited: noticing, asking the others, two busy cores


@pytest.fixture(scope="module")
def config(tmp_path_factory, pool) -> Path:
    """Of a run that goes on for ever."""
    folder = tmp_path_factory.mktemp("hang")
    write_data(folder / "data", tiny_sequences((80, 75, 130, 140)))
    pool(1).run(write_start, folder / "start", tiny_architecture(), tiny_memory())
    parallel = {"pp": STAGES, "timeout_s": TIMEOUT_S}
    return write_config(folder / "c.yaml", folder, parallel=parallel, train={"steps": 10**6})


@contextmanager
def running(config: Path, output: Path, *overrides: str) -> Iterator[list[subprocess.Popen]]:
    """The stages, each a process that no launcher looks after; they are past the first step."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(STAGES), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "comet_megatron.train", "--config", str(config), f"train.output={output}"]
    processes = []
    for rank in range(STAGES):
        environment = {**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "3"}
        with open(f"{output}.{rank}", "w") as log:
            processes.append(
                subprocess.Popen([*command, *overrides], env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
    try:
        deadline = time.monotonic() + 120
        while not (output / METRICS_FILE).exists() or not (output / METRICS_FILE).read_text().strip():
            assert time.monotonic() < deadline and all(p.poll() is None for p in processes), said(output)
            time.sleep(0.2)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def said(output: Path) -> list[str]:
    """By rank."""
    return [Path(f"{output}.{rank}").read_text() for rank in range(STAGES)]


def wait_for_the_others(processes: list[subprocess.Popen], lost: int) -> list[int]:
    """Exit codes of all but the lost one."""
    deadline = time.monotonic() + LIMIT_S
    return [p.wait(max(deadline - time.monotonic(), 0.1)) for rank, p in enumerate(processes) if rank != lost]


def kill(process: subprocess.Popen) -> None:
    process.kill()


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGSTOP)


LOST = {
    "killed": (kill, 1),
    "stopped": (stop, 1),
    "killed, the first stage, which holds the store": (kill, 0),
    "stopped, the first stage, which holds the store": (stop, 0),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if "first" in name or name == "stopped" else ()) for name in LOST],
)
def test_all_others_exit_and_name_the_stage_that_is_lost(name, config, tmp_path):
    lose, lost = LOST[name]
    output = tmp_path / "run"
    with running(config, output) as processes:
        lose(processes[lost])
        codes = wait_for_the_others(processes, lost)
    assert codes == [1, 1], said(output)
    for rank, text in enumerate(said(output)):
        if rank != lost:
            assert f"rank {rank}: run stopped: " in text
            assert f"stage {lost}" in text, text
            assert "Traceback" not in text, text
    if lost == 1:  # the store is there: the first to notice tells what every rank did
        (report,) = [text for text in said(output) if "what every rank did last" in text]
        assert "no answer within 3 s from rank 1 (stage 1): dead, stopped or very busy" in report
        assert "rank 0 (stage 0): " in report and "rank 1 (stage 1): NO ANSWER" in report
    if lose is stop and lost == 1:
        assert f"parallel.timeout_s={TIMEOUT_S:g}" in report


def test_an_op_that_waits_too_long_says_for_what_and_from_whom(tmp_path):
    """Without another process: the words of a wait, and that time in which this process was stopped does not count."""
    script = tmp_path / "wait.py"
    script.write_text(
        "import sys, time\n"
        "import torch.distributed as dist\n"
        "from comet_megatron.parallel.activity import Activity\n"
        "from comet_megatron.parallel.hang_watch import HangWatch\n"
        "from comet_megatron.parallel.p2p import Message\n"
        "from comet_megatron.parallel.schedule import Kind, Op\n"
        "activity = Activity()\n"
        "named = lambda rank: f'rank {rank} (stage 2)'\n"
        "options = dict(rank=0, world_size=1, timeout_s=float(sys.argv[1]), name_of=named, store=dist.HashStore())\n"
        "with HangWatch(activity, **options).watching(), activity.op(Op(Kind.FORWARD, 2, 1, 5)):\n"
        "    with activity.waiting(Message(False, 1, 1, 5)):\n"
        "        print('waiting', flush=True)\n"
        "        time.sleep(float(sys.argv[2]))\n"
    )
    hung = subprocess.run([sys.executable, script, "1", "60"], capture_output=True, text=True, timeout=60)
    assert hung.returncode == 1
    assert "on stage 2 waits for the hidden states of sequence 1 chunk 5 from stage 1" in hung.stderr
    suspended = subprocess.Popen([sys.executable, script, "3", "4"], stdout=subprocess.PIPE, text=True)
    suspended.stdout.readline()
    suspended.send_signal(signal.SIGSTOP)
    time.sleep(5)
    suspended.send_signal(signal.SIGCONT)
    assert suspended.wait(30) == 0


@pytest.mark.slow
def test_under_torchrun_a_lost_stage_is_named_before_the_launcher_ends_the_others(config, tmp_path):
    output = tmp_path / "run"
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(STAGES)]
    command += ["-m", "comet_megatron.train", "--config", str(config), f"train.output={output}"]
    run = subprocess.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while not (output / METRICS_FILE).exists() or not (output / METRICS_FILE).read_text().strip():
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.2)
        children = psutil.Process(run.pid).children()
        next(c for c in children if c.environ().get("RANK") == "1").kill()
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 1
    assert ": run stopped: stage 1 (rank 1) is gone" in errors or "another process is gone" in errors, errors
