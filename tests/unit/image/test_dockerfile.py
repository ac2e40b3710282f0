"""The image's parts agree: its constraints with setup.py, what it copies with its context, its steps with its promises.

The image itself is built where there is a Docker engine: docs/gpu.md.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from comet_megatron.doctor.frozen import FROZEN
from comet_megatron.doctor.gather import project_requirements

REPOSITORY = Path(__file__).parents[3]
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
IGNORE = (REPOSITORY / ".dockerignore").read_text()


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order: name and the rest, continued lines joined."""
    text = re.sub(r"\\\n", " ", re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE))
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def constraints() -> dict[str, Requirement]:
    """Of constraints/ngc.txt by name."""
    lines = (REPOSITORY / "constraints" / "ngc.txt").read_text().splitlines()
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out: the last pattern that matches it, or a folder of it, wins."""
    parts = path.split("/")
    prefixes = ["/".join(parts[: n + 1]) for n in range(len(parts))]
    ignored = False
    for line in IGNORE.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        pattern, wants = line.removeprefix("!"), not line.startswith("!")
        loose = pattern.removeprefix("**/")
        names = prefixes if loose == pattern else parts
        if any(name.count("/") == loose.count("/") and fnmatch(name, loose) for name in names):
            ignored = wants
    return ignored


def copied() -> list[Path]:
    """Files that COPY takes, as they are in the repository."""
    sources = [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]
    files = []
    for source in sources:
        path = REPOSITORY / source
        assert path.exists(), source
        files += [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return [p.relative_to(REPOSITORY) for p in files if "__pycache__" not in p.parts and ".egg-info" not in str(p)]


def test_constraints_name_nothing_that_is_the_images():
    assert not [name for name in constraints() if name in FROZEN or name.startswith(("transformer-engine", "nvidia-"))]


@pytest.mark.parametrize("text", [t for t in project_requirements()[0] if Requirement(t).name != "torch"])
def test_a_requirement_is_met_by_its_constraint(text):
    requirement = Requirement(text)
    constraint = constraints()[canonicalize_name(requirement.name)]
    pins = [s.version for s in constraint.specifier if s.operator == "=="]
    if pins:
        assert requirement.specifier.contains(pins[0], prereleases=True)
    else:  # what the image has is kept: the same range
        assert constraint.specifier == requirement.specifier


def test_constraints_agree_with_those_of_the_tests():
    lines = (REPOSITORY / "constraints" / "cpu.txt").read_text().splitlines()
    tested = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if "==" in line}
    for name, constraint in constraints().items():
        assert constraint.specifier.contains(tested[name], prereleases=True), name


def test_everything_that_is_copied_is_in_the_context():
    files = copied()
    assert len(files) > 100
    assert [str(p) for p in files if is_ignored(p.as_posix())] == []


def test_the_context_is_small():
    sizes = [p.stat().st_size for p in (REPOSITORY / path for path in copied())]
    assert sum(sizes) < 8e6
    for path in (
        ".git/config",
        "tests/conftest.py",
        "runs/a/b",
        ".venv/bin/python",
        "tools/__pycache__/a.pyc",
        "docs/a",
    ):
        assert is_ignored(path), path


def test_the_image_is_pinned_and_runs_as_a_user_without_rights():
    steps = instructions()
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3", steps[0][1])
    users = [rest for name, rest in steps if name == "USER"]
    assert users and users[-1].isdigit() and int(users[-1]) > 0


def test_the_install_is_between_the_two_looks_at_what_it_must_not_change():
    step = next(rest for name, rest in instructions() if name == "RUN" and "ngc.txt" in rest)
    parts = ["--freeze", "pip install", "-c constraints/ngc.txt", "--unchanged", "doctor.py --strict --no-gpu"]
    assert [step.index(part) for part in parts] == sorted(step.index(part) for part in parts)
    assert re.search(r"--freeze (\S+)", step).group(1) == re.search(r"--unchanged (\S+)", step).group(1)


def test_apex_comes_from_nvidia_at_a_commit_and_never_from_the_index():
    installs = [rest for name, rest in instructions() if name == "RUN" and "apex" in rest]
    assert len(installs) == 1 and "git+https://github.com/NVIDIA/apex@${APEX_COMMIT}" in installs[0]
    assert re.search(r"^ARG APEX_COMMIT=[0-9a-f]{40}$", DOCKERFILE, re.MULTILINE)
