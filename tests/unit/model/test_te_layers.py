"""Our calls of Transformer Engine, through Megatron's own modules, against a stand-in that computes in torch.

The checks (stand_in/checks.py) run in a process of their own, in which `import transformer_engine` finds the stand-in.
What the real one computes is for tests/gpu.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

STAND_IN = Path(__file__).parent / "stand_in"
CHECKS = STAND_IN / "checks.py"
NAMES = re.findall(r"^def (test_\w+)", CHECKS.read_text(), flags=re.MULTILINE)


@pytest.fixture(scope="module")
def outcome() -> tuple[dict[str, list[str]], str]:
    """Outcomes of each check, one for each of its cases, and all that was printed."""
    repository = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": f"{STAND_IN}:{repository}", "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(CHECKS),
        "--noconftest",
        "-rA",
        "--tb=short",
        "-p",
        "no:cacheprovider",
    ]
    found = subprocess.run(command, env=environment, cwd=repository, capture_output=True, text=True, timeout=900)
    outcomes: dict[str, list[str]] = {name: [] for name in NAMES}
    for word, name in re.findall(r"^(PASSED|FAILED|ERROR) \S+::(test_\w+)", found.stdout, flags=re.MULTILINE):
        outcomes[name].append(word)
    return outcomes, found.stdout + found.stderr


@pytest.mark.parametrize("name", NAMES)
def test_with_the_stand_in(name, outcome):
    outcomes, printed = outcome
    assert outcomes[name] and set(outcomes[name]) == {"PASSED"}, printed[-8000:]
