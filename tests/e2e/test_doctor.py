"""tools/doctor.py as a user starts it: alone, under torchrun with two processes, with mistakes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
DOCTOR = REPOSITORY / "tools" / "doctor.py"
NEEDED = ("Python", "torch", "megatron-core", "psutil", "other packages")


def run(*command: object) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        environment.pop(name, None)
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=200
    )
    return done.returncode, done.stdout, done.stderr


def test_this_machine_has_what_cpu_runs_need(tmp_path):
    code, out, err = run(DOCTOR, "--no-gpu")
    assert code == 0 and err == "", out + err
    for name in NEEDED:
        assert re.search(rf"^ok +{name} ", out, re.MULTILINE), out
    assert "open files" not in out and "driver" not in out.split("\n\n")[0]
    assert re.fullmatch(r"\d+ ok, \d+ missing, 0 wrong.*", out.splitlines()[-1])


def test_two_processes_measure_their_link():
    code, out, err = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, DOCTOR)
    assert code in (0, 1), err  # limits of the machine may be wrong
    assert "Traceback" not in err or code == 1  # torchrun's report
    assert re.search(r"^ok +all-reduce +gloo, 2 processes on 1 machine: [\d.,]+ GB/s", out, re.MULTILINE), out + err
    assert re.search(r"^ok +clocks +all processes are on one machine$", out, re.MULTILINE)
    assert re.search(r"^0 - 1  .*[\d.,]+ GB/s +[\d.,]+ us$", out, re.MULTILINE), out
    assert out.count("megatron-core      ") == 1


def test_mistakes_are_told_with_exit_code_2(tmp_path):
    for arguments, told in (
        (("--unchanged", tmp_path / "nothing"), "cannot be read"),
        (("--freeze", tmp_path / "no" / "file"), "cannot write"),
        (("--seconds", "0"), "must be more than 0"),
    ):
        code, _, err = run(DOCTOR, *arguments)
        assert code == 2 and told in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []
