"""Two machines rehearsed on one: two torchrun agents that meet on loopback, two gloo processes each.

A process, or a whole agent with its processes, is killed in the middle; the group starts again, with a new agent in the
place of the lost one, and the run ends with the same losses and the same bits as one that nobody disturbed.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from comet_megatron.checkpoint.checksums import read_checksums
from comet_megatron.checkpoint.model_folder import read_progress
from comet_megatron.checkpoint.run_folder import checkpoint_folder, newest_checkpoint
from comet_megatron.launch.is_over import main as is_over
from comet_megatron.testing.runs import run_command, write_config
from comet_megatron.train.callbacks.curve import read_metrics

REPOSITORY = Path(__file__).parents[2]
NODE = REPOSITORY / "examples" / "torchrun_node.sh"
STEPS = 16

_spec = importlib.util.spec_from_file_location("torchrun_of_faults", Path(__file__).with_name("torchrun.py"))
launcher = sys.modules.setdefault("torchrun_of_faults", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(launcher)


@pytest.fixture
def config(start, tmp_path) -> Path:
    """Two stages, two data-parallel ranks."""
    train = {"output": str(tmp_path / "run"), "steps": STEPS, "save_every": 4}
    return write_config(tmp_path / "c.yaml", start, train=train, parallel={"pp": 2})


@pytest.fixture
def agent(config, tmp_path):
    """Starts an agent of the group; all that are left are killed at the end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started: list[subprocess.Popen] = []

    def start_one() -> subprocess.Popen:
        command = ["bash", NODE, "--nnodes", 2, "--nproc-per-node", 2, "--rdzv-backend", "c10d", "--rdzv-id", "test"]
        command += ["--rdzv-endpoint", f"localhost:{port}", "--max-restarts", 3, "--monitor-interval", 0.2]
        command += ["-m", "comet_megatron.train", "--config", config, "--resume", "auto"]
        environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        environment["RUN"] = str(tmp_path / "run")
        with open(tmp_path / "log", "a") as log:
            started.append(
                subprocess.Popen([str(word) for word in command], env=environment, stdout=log, stderr=subprocess.STDOUT)
            )
        return started[-1]

    yield start_one
    for process in started:
        for one in family(process):
            one.kill()
        process.wait()


def family(node: subprocess.Popen) -> list[psutil.Process]:
    """An agent's shell and all that it has started."""
    try:
        shell = psutil.Process(node.pid)
        return [shell, *shell.children(recursive=True)]
    except psutil.Error:
        return []


def workers(node: subprocess.Popen) -> list[psutil.Process]:
    """The training processes of an agent; those that end meanwhile are left out."""
    found = []
    for process in family(node):
        try:
            if "RANK" in process.environ() and "LOCAL_RANK" in process.environ():
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(what: Callable[[], bool], node: subprocess.Popen, tmp_path: Path) -> None:
    launcher.wait_until(what, node, tmp_path / "log", limit_s=180)
    assert node.poll() is None, (tmp_path / "log").read_text()[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("lost", ["process", "machine"])
def test_a_run_on_two_machines_that_loses_one_ends_as_if_nothing_had_been(lost, agent, config, tmp_path, pool):
    run, nodes = tmp_path / "run", [agent(), agent()]
    wait_until(lambda: launcher.steps_done(run) > 5, nodes[0], tmp_path)
    if lost == "process":
        workers(nodes[1])[0].kill()
    else:
        # The agent that does not hold the store of the rendezvous: with that machine all would be lost.
        keeper = next((node for node in nodes if _listens(node)), nodes[0])
        gone = nodes[1 - nodes.index(keeper)]
        for process in family(gone):
            process.kill()
        nodes = [keeper, agent()]
    codes = [node.wait(400) for node in nodes]
    log = (tmp_path / "log").read_text()
    assert codes == [0, 0], log[-6000:]
    assert "resume   after step" in log
    whole = ("--config", str(config), f"train.output={tmp_path / 'whole'}")
    assert pool(4).run(run_command, *whole, timeout_s=200)[0][0] == 0
    losses = [[(r["step"], r["loss"]) for r in read_metrics(folder)] for folder in (run, tmp_path / "whole")]
    assert len(losses[0]) == STEPS and losses[0] == losses[1]
    first, second = (read_checksums(checkpoint_folder(folder, STEPS)) for folder in (run, tmp_path / "whole"))
    names = [name for name in first if name.endswith(".distcp")]
    assert names and all(first[name] == second[name] for name in names)


def _listens(node: subprocess.Popen) -> bool:
    """Whether the agent holds the store of the rendezvous: of its ports one is that of its own command line."""
    agent = next(p for p in family(node) if "torch.distributed.run" in " ".join(p.cmdline()))
    words = agent.cmdline()
    port = int(words[words.index("--rdzv-endpoint") + 1].split(":")[1])
    return any(c.laddr.port == port and c.status == psutil.CONN_LISTEN for c in agent.net_connections(kind="tcp"))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_machine_that_is_asked_to_stop_ends_all_with_a_checkpoint_and_143_until_the_run_is_over(
    number, agent, tmp_path
):
    run, nodes = tmp_path / "run", [agent(), agent()]
    wait_until(lambda: launcher.steps_done(run) > 1, nodes[0], tmp_path)
    nodes[1].send_signal(number)
    assert [node.wait(120) for node in nodes] == [143, 143], (tmp_path / "log").read_text()[-6000:]
    stopped = read_progress(newest_checkpoint(run)).step
    assert 1 < stopped < STEPS and is_over([str(run)]) == 1
    log = (tmp_path / "log").read_text()
    assert log.count("stopped on request after step") == 1 and "Traceback" not in log
    nodes = [agent(), agent()]
    assert [node.wait(300) for node in nodes] == [0, 0], (tmp_path / "log").read_text()[-6000:]
    assert is_over([str(run)]) == 0
    assert [r["step"] for r in read_metrics(run)] == list(range(1, STEPS + 1))
