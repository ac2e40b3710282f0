"""What an image brings and no install may change: torch, Transformer Engine, apex, written to a file and compared."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from pathlib import Path

from packaging.utils import canonicalize_name

from comet_megatron.doctor.lines import OK, WRONG, Line
from comet_megatron.errors import ConfigError, OutputError

FROZEN = ("torch", "transformer-engine", "apex")  # with what starts so: transformer-engine-torch, -cu12, ...
ABSENT = "not installed"


def describe_frozen() -> dict[str, str]:
    """Name to version and a sum over what was installed, of every package that starts like one of FROZEN's.

    The sum is of the list of files that its installation left; a package installed again has another one.
    """
    found = dict.fromkeys(FROZEN, ABSENT)
    for distribution in importlib.metadata.distributions():
        name = canonicalize_name(distribution.metadata["Name"] or "")
        if name in FROZEN or name.startswith("transformer-engine-"):
            listed = distribution.read_text("RECORD") or distribution.read_text("SOURCES.txt") or ""
            found[name] = f"{distribution.version} {hashlib.sha256(listed.encode()).hexdigest()[:12]}"
    return found


def freeze(path: Path) -> dict[str, str]:
    """Write what is installed now.

    Raises:
        OutputError: the file cannot be written.
    """
    found, unfinished = describe_frozen(), path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(json.dumps(found, indent=1) + "\n")
        os.replace(unfinished, path)
    except OSError as error:
        what = f"--freeze cannot write {path}: {error.strerror or error}"
        raise OutputError(what, way_out="name a file in a folder that is there and may be written") from error
    return found


def read_frozen(path: Path) -> dict[str, str]:
    """What `freeze` wrote.

    Raises:
        ConfigError: there is no such file, or it holds something else.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        what = f"--unchanged {path} cannot be read: {getattr(error, 'strerror', '') or error}"
        raise ConfigError(what, way_out=f"python tools/doctor.py --freeze {path}   # before the install") from error
    if not (isinstance(found, dict) and all(isinstance(value, str) for value in found.values())):
        raise ConfigError(f"--unchanged {path} is not a file of --freeze")
    return found


def compare_frozen(before: dict[str, str], now: dict[str, str]) -> list[Line]:
    """One line a package, of all that were or are there."""
    lines = []
    for name in sorted({*before, *now}):
        was, is_now = before.get(name, ABSENT), now.get(name, ABSENT)
        if was == is_now:
            lines.append(Line(OK, name, f"unchanged: {_version(was)}"))
            continue
        what = f"was {_version(was)}, is {_version(is_now)}"
        if _version(was) == _version(is_now):
            what = f"{_version(was)} was installed again"
        mend = "pip install -c constraints/ngc.txt ...   # in a fresh image: nothing may pull in another"
        lines.append(Line(WRONG, name, what, mend))
    return lines


def _version(value: str) -> str:
    return value if value == ABSENT else value.split(" ")[0]
