"""The files for clusters: torchrun and the launcher take their commands, and the Slurm job runs here, with stand-ins.

Slurm and Kubernetes themselves are not here. The Slurm file is run as it stands with stand-ins for two of Slurm's
commands, which start real agents with real processes: `srun` one task for each of two machines, `scontrol` a list.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

from comet_megatron.launch.main import parse_arguments
from comet_megatron.launch.settings import read_given

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
NODE, SBATCH = EXAMPLES / "torchrun_node.sh", EXAMPLES / "slurm" / "finetune_comet_128k.sbatch"
JOB = EXAMPLES / "kubernetes" / "pytorchjob.yaml"
LAUNCHER = "finetune_comet_128k.sh"
IN_IMAGE = "/opt/comet-megatron/"

_spec = importlib.util.spec_from_file_location("launcher_tests", Path(__file__).with_name("test_launcher.py"))
launcher_tests = sys.modules.setdefault("launcher_tests", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(launcher_tests)


@pytest.mark.parametrize("path", [NODE, SBATCH], ids=lambda p: p.name)
def test_bash_reads_the_file_and_shellcheck_finds_nothing(path):
    assert subprocess.run(["bash", "-n", path], capture_output=True, text=True).stderr == ""
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed; bash -n passed")
    found = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


# --- Kubernetes ------------------------------------------------------------------------------------------------------


@pytest.fixture
def job() -> dict:
    return yaml.safe_load(JOB.read_text())


def pod_of(job: dict) -> dict:
    return job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]


def test_its_command_is_one_that_torchrun_and_the_launcher_take(job):
    container = pod_of(job)["containers"][0]
    for path in (container["command"][1], container["args"][9]):
        assert (REPOSITORY / path.removeprefix(IN_IMAGE)).exists(), path
    assert container["command"][1] == f"{IN_IMAGE}examples/{NODE.name}"
    given = get_args_parser().parse_args(container["args"])
    assert given.training_script == f"{IN_IMAGE}examples/{LAUNCHER}"
    replicas = sum(spec["replicas"] for spec in job["spec"]["pytorchReplicaSpecs"].values())
    assert int(given.nnodes) == replicas
    assert int(given.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    launched = parse_arguments(given.training_script_args)
    assert (launched.resume, launched.overrides) == ("auto", [])


def test_its_pods_find_each_other_by_the_name_the_operator_gives_the_first(job):
    given = get_args_parser().parse_args(pod_of(job)["containers"][0]["args"])
    assert given.rdzv_endpoint.split(":")[0] == f"{job['metadata']['name']}-master-0"


def test_its_settings_are_the_launchers(job):
    values = {entry["name"]: entry.get("value", "") for entry in pod_of(job)["containers"][0]["env"]}
    given = read_given(values, [])
    assert set(values) - set(given.settings) == {"RUN", "POD"}
    assert values["RUN"] == f"{values['OUTPUT']}/train"


def test_a_pod_has_time_to_save_memory_to_share_and_no_rights(job):
    pod = pod_of(job)
    assert pod["terminationGracePeriodSeconds"] >= 300
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    assert job["spec"]["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] == "ExitCode"  # 143 is started again


# --- Slurm -----------------------------------------------------------------------------------------------------------

SRUN = """#!/usr/bin/env bash
while [[ $1 == -* ]]; do
  if [[ $1 == --output ]]; then output=$2; shift; fi
  shift
done
tasks=()
for number in 0 1; do
  SLURM_NODEID=$number "$@" > "${output/'%n'/$number}" 2>&1 &
  tasks+=($!)
done
echo "${tasks[@]}" > "$TASKS"
code=0
for task in "${tasks[@]}"; do wait "$task" || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
  show) echo localhost ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
esac
"""


def directives() -> dict[str, str]:
    """#SBATCH options of the file."""
    lines = [line.removeprefix("#SBATCH --") for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (line.partition("=") for line in lines)}


def test_the_job_asks_for_its_signal_and_for_being_queued_again():
    found = directives()
    assert "requeue" in found and found["ntasks-per-node"] == "1" and found["open-mode"] == "append"
    name, _, seconds = found["signal"].partition("@")
    assert name == "USR1" and int(seconds) >= 300


@pytest.fixture
def cluster(tmp_path) -> dict[str, str]:
    """The environment of a job on two machines of two processes each, and a recipe of seconds."""
    commands = tmp_path / "commands"
    commands.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    launcher_tests.small_recipe(tmp_path, train={"steps": 12, "save_every": 4})
    text = Path(os.__file__).read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[:20_000], encoding="utf-8")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    settings = {
        "CONFIG": str(tmp_path / "small.yaml"),
        "DATA": str(tmp_path / "text.txt"),
        "OUTPUT": str(tmp_path / "out"),
        "PYTHON": sys.executable,
        "PORT": str(port),
        "TASKS": str(tmp_path / "tasks"),
        "REQUEUED": str(tmp_path / "requeued"),
        "SLURM_SUBMIT_DIR": str(REPOSITORY),
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "machine[1-2]",
        "SLURM_GPUS_ON_NODE": "2",
    }
    environment = launcher_tests.environment_of(settings)
    return {**environment, "PATH": f"{commands}{os.pathsep}{environment['PATH']}"}


def start_job(cluster: dict[str, str], folder: Path, **settings: str) -> subprocess.Popen:
    with open(folder / "job.log", "a") as log:
        return subprocess.Popen(
            ["timeout", "-k", "10", "400", "bash", str(SBATCH)],
            cwd=folder,
            env={**cluster, **settings},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def logs_of(folder: Path) -> str:
    return "\n".join(p.read_text() for p in sorted((folder / "out" / "logs").glob("*/*.log")))[-6000:]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_slurm_asks_to_stop_is_queued_again_and_ends_its_run(cluster, tmp_path):
    metrics = tmp_path / "out" / "train" / "metrics.jsonl"
    job = start_job(cluster, tmp_path)
    try:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            assert job.poll() is None, logs_of(tmp_path)
            time.sleep(0.1)
        for task in (tmp_path / "tasks").read_text().split():  # as Slurm does: the tasks, not what they started
            os.kill(int(task), signal.SIGUSR1)
        assert job.wait(200) == 143, logs_of(tmp_path)
        assert (tmp_path / "requeued").read_text().split() == ["77"]
        assert "stopped on request after step" in logs_of(tmp_path)
        job = start_job(cluster, tmp_path, SLURM_RESTART_COUNT="1")
        assert job.wait(300) == 0, logs_of(tmp_path)
    finally:
        job.terminate()
    assert (tmp_path / "out" / "train" / "checkpoints" / "step_0000012" / "complete").exists()
    assert (tmp_path / "requeued").read_text().split() == ["77"]
    assert metrics.read_text().count("\n") == 12
    logs = tmp_path / "out" / "logs"
    assert {p.name for p in logs.iterdir()} == {"77-0", "77-1"}
    ranks = {p.parent.name for p in (logs / "77-1").rglob("stdout.log")}
    assert ranks == {"0", "1"} and len(list((logs / "77-1").rglob("stdout.log"))) == 4
