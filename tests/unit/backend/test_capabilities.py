"""What a machine has is found without it, and why something is missing is said in words."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from comet_megatron.backend.capabilities import Capabilities, Found, probe_apex, probe_capabilities, probe_te

REPOSITORY = Path(__file__).parents[3]


def run_python(program: str, *paths: Path) -> str:
    """Output of a program in a process of its own, with folders before all others on the path."""
    path = ":".join(str(p) for p in (*paths, REPOSITORY))
    command = [sys.executable, "-W", "ignore", "-c", program]
    found = subprocess.run(command, env={"PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stderr
    return found.stdout


def write_package(folder: Path, name: str, source: str, **modules: str) -> None:
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source)
    for module, text in modules.items():
        (package / f"{module}.py").write_text(text)


def test_this_machine_is_described_without_a_gpu():
    found = probe_capabilities()
    assert not found.cuda.is_there and found.cuda.why_not
    assert found.gpus == ()
    assert all(not recipe.is_there and recipe.why_not == found.cuda.why_not for recipe in found.fp8.values())
    assert found.adamw.startswith("AdamW: ")


def test_nothing_optional_is_imported_by_the_adapter_itself():
    program = "import comet_megatron.backend.capabilities, sys; print('torch' in sys.modules)"
    assert run_python(program).strip() == "False"


BROKEN = {
    "undefined symbol": "raise ImportError('te.so: undefined symbol: _ZN3c104cuda9SetDeviceEi')",
    "library missing": "raise OSError('libcudart.so.13: cannot open shared object file')",
    "version assertion": "assert False, 'Minimum torch version 2.1 required'",
    "file missing": "raise FileNotFoundError('Could not find shared object file')",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_transformer_engine_built_for_another_torch_is_named_and_megatron_still_imports(name, tmp_path):
    write_package(tmp_path, "transformer_engine", "", pytorch=BROKEN[name])
    program = """
from comet_megatron.backend.capabilities import probe_te
print(probe_te())
import megatron.core.optimizer, megatron.core.extensions.transformer_engine as extension
print(extension.HAVE_TE)
"""
    told = run_python(program, tmp_path)
    reason = BROKEN[name].split("'")[1]
    assert "is_there=False" in told and reason in told and "must be built for torch" in told
    assert told.splitlines()[-1] == "False"


def test_the_other_package_called_apex_is_not_taken_for_nvidias(tmp_path):
    write_package(tmp_path, "apex", "")
    program = "from comet_megatron.backend.capabilities import probe_apex; print(probe_apex('amp_C').why_not)"
    assert "a package apex is installed, but not its compiled amp_C" in run_python(program, tmp_path)


def test_what_is_not_installed_is_said_to_be_so():
    assert probe_apex("amp_C") == Found(False, why_not="not installed")
    assert probe_te() == Found(False, why_not="not installed")


def test_the_optimizer_is_named_with_the_reason():
    missing, there = Found(False, why_not="not installed"), Found(True, "2.11.0")

    def machine(te: Found, apex: Found) -> Capabilities:
        return Capabilities(there, (), te, apex, missing, {})

    assert machine(there, there).adamw == "AdamW: Transformer Engine's, fused"
    assert machine(missing, there).adamw == "AdamW: apex's, fused"
    assert machine(missing, missing).adamw.startswith("AdamW: torch's, fused; no Transformer Engine (not installed)")
