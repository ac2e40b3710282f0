"""Facts as they are here, and of packages made for the test; what an image brings is compared before and after."""

from __future__ import annotations

import importlib
import importlib.metadata
import sys
from pathlib import Path

import pytest

from comet_megatron.doctor import gather
from comet_megatron.doctor.frozen import compare_frozen, describe_frozen, freeze, read_frozen
from comet_megatron.doctor.lines import OK, WRONG
from comet_megatron.errors import ConfigError, OutputError


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A folder that Python looks for packages in, first."""
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()


def install(site: Path, name: str, version: str, *files: str, listed: str = "") -> None:
    """A package as pip leaves it: its modules and its metadata."""
    for file in files:
        path = site / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(listed or "\n".join(files))
    importlib.invalidate_caches()


def test_what_is_installed_here_is_what_the_libraries_say_themselves():
    import megatron.core
    import torch

    software = gather.gather_software()
    assert software.versions["torch"] == torch.__version__
    assert software.versions["megatron-core"] == megatron.core.__version__
    assert software.torch.cuda == (torch.version.cuda or "")
    assert "torch>=2.6" in software.requirements
    assert software.gpu_requirements[0].startswith("transformer-engine")


def test_requirements_of_an_installation_are_those_of_setup_py(monkeypatch, site):
    from_setup = gather.project_requirements()
    lines = [f"Requires-Dist: {text}" for text in from_setup[0]]
    lines += [f'Requires-Dist: {text}; extra == "gpu"' for text in from_setup[1]]
    install(site, "comet_megatron", "0.0")
    metadata = site / "comet_megatron-0.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text() + "\n".join(lines) + "\nProvides-Extra: gpu\n")
    monkeypatch.setattr(gather, "SETUP", site / "setup.py")
    installed = gather.project_requirements()
    assert [sorted(part) for part in map(_normal, installed)] == [sorted(part) for part in map(_normal, from_setup)]


def _normal(requirements: tuple[str, ...]) -> list[str]:
    from packaging.requirements import Requirement

    return [str(Requirement(text)) for text in requirements]


def test_the_unrelated_apex_is_known_by_what_it_lacks_and_nvidias_by_its_parts(site):
    assert not gather._apex({}).is_there
    install(site, "apex", "0.9.10", "apex/__init__.py", "apex/models.py")
    (site / "apex" / "__init__.py").write_text("raise SystemExit('imported')")
    found = gather._apex(gather.installed_versions())
    assert found.is_there and not found.is_nvidias and found.symbols == ()
    install(site, "apex", "0.9.10", "apex/multi_tensor_apply/__init__.py", "amp_C.py")
    found = gather._apex({})
    assert found.is_nvidias and found.symbols == ("amp_C",)


def test_a_module_that_fails_or_ends_python_is_told_in_one_line(site, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(site))
    (site / "fails.py").write_text("raise ImportError('x.so: undefined symbol: y')")
    (site / "dies.py").write_text("import os; os.abort()")
    assert gather.import_error("json") == ""
    assert gather.import_error("fails") == "ImportError: x.so: undefined symbol: y"
    assert gather.import_error("dies") != ""


def test_cuda_majors_of_transformer_engines_core_packages_are_found(monkeypatch):
    monkeypatch.setattr(gather, "import_error", lambda module: "")
    versions = {"transformer-engine": "2.9", "transformer-engine-cu12": "2.9", "transformer-engine-torch": "2.9"}
    assert gather._te(versions).core_cuda == ("12",)


def test_limits_of_this_machine_are_those_of_the_system():
    import resource
    import shutil

    machine = gather.gather_machine(processes=3)
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert machine.open_files == soft and machine.processes == 3
    assert machine.shared_bytes == shutil.disk_usage("/dev/shm").total


def test_what_no_install_changed_is_unchanged_and_a_change_is_named(site, tmp_path):
    file = tmp_path / "image.json"
    install(site, "transformer_engine", "2.9.0+abc", listed="a")
    freeze(file)
    before = read_frozen(file)
    assert {line.state for line in compare_frozen(before, describe_frozen())} == {OK}
    assert before["torch"].startswith(importlib.metadata.version("torch"))
    install(site, "transformer_engine", "2.9.0+abc", listed="b")
    install(site, "apex", "0.9.10")
    lines = {line.name: line for line in compare_frozen(before, describe_frozen())}
    assert lines["torch"].state == OK
    assert lines["transformer-engine"].what == "2.9.0+abc was installed again"
    assert lines["apex"].what == "was not installed, is 0.9.10"
    assert {line.state for name, line in lines.items() if name != "torch"} == {WRONG}


def test_a_file_that_is_not_there_or_not_frozen_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_frozen(tmp_path / "nothing")
    (tmp_path / "other").write_text("[1]")
    with pytest.raises(ConfigError, match="is not a file of --freeze"):
        read_frozen(tmp_path / "other")
    with pytest.raises(OutputError, match="cannot write"):
        freeze(tmp_path / "no folder" / "file")
