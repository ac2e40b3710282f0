"""benchmarks/gpu.py without a GPU: one message; its rehearsal runs the same code and calls nothing a figure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280)


def test_without_a_gpu_there_is_one_message_and_exit_code_2():
    found = run()
    assert found.returncode == 2 and found.stdout == ""
    assert found.stderr.startswith("no GPU: ") and len(found.stderr.splitlines()) == 1


def test_the_rehearsal_runs_and_is_labelled_as_such(tmp_path):
    found = run("--cpu-rehearsal", "--repetitions", "1", "--json", str(tmp_path / "lines.jsonl"))
    assert found.returncode == 0, found.stderr
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert all(line["rehearsal"] for line in lines)
    ran = [line for line in lines if "tokens_per_s" in line]
    assert {line["stages"] for line in ran} == {1, 2} and all(line["mfu"] is None for line in ran)
    assert [line["name"] for line in lines if "not_run" in line] == ["tiny 1k fp8 recompute"]
    assert sum(line["kind"] == "prefill" for line in lines) == 3
    assert "MISSED" not in found.stdout and "reach" not in found.stdout
    assert found.stdout.splitlines()[-1] == "REHEARSAL: it ran; nothing above is a figure"
