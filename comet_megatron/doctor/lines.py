"""Doctor's lines: ok, missing or wrong, what was found, and the one command that mends it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OK, MISSING, WRONG = "ok", "missing", "wrong"
NAME_WIDTH = 18


@dataclass(frozen=True)
class Line:
    """One finding.

    Attributes:
        state: OK, MISSING or WRONG.
        mend: what to type.
        is_needed: nothing runs without it; else it is for GPUs, or for speed.
    """

    state: str
    name: str
    what: str
    mend: str = ""
    is_needed: bool = False

    def __str__(self) -> str:
        return f"{self.state:<9}{self.name:<{NAME_WIDTH}} {self.what}"


def show(lines: Sequence[Line]) -> str:
    """All lines, each followed by what mends it; what mends neighbours stands once, after the last of them."""
    shown = []
    for line, after in zip(lines, [*lines[1:], None], strict=True):
        shown.append(str(line))
        if line.mend and (after is None or after.mend != line.mend):
            shown.append(f"{'':<9}{'':<{NAME_WIDTH}} mend: {line.mend}")
    return "\n".join(shown)


def exit_code(lines: Sequence[Line], *, strict: bool) -> int:
    """0: as it should be; 1: something is wrong, or missing though needed, or with `strict` missing at all."""
    return int(any(_is_bad(line, strict=strict) for line in lines))


def summarize(lines: Sequence[Line], *, strict: bool) -> str:
    """All lines in one."""
    counts = ", ".join(f"{sum(line.state == state for line in lines)} {state}" for state in (OK, MISSING, WRONG))
    if bad := [line.name for line in lines if _is_bad(line, strict=strict)]:
        return f"{counts}; to mend: {', '.join(bad)}"
    if any(line.state == MISSING for line in lines):
        return f"{counts}; what is missing is for GPUs: on CPU everything runs"
    return counts


def _is_bad(line: Line, *, strict: bool) -> bool:
    return line.state == WRONG or line.state == MISSING and (strict or line.is_needed)


def merge_hosts(by_host: Mapping[str, Sequence[Line]]) -> list[Line]:
    """The lines of several machines: those all have in common once, the others with the machine's name."""
    hosts = list(by_host)
    merged: list[Line] = []
    for number, line in enumerate(by_host[hosts[0]]):
        same = [by_host[host][number] for host in hosts]
        if all(other == line for other in same):
            merged.append(line)
        else:
            merged += [
                Line(other.state, other.name, f"{host}: {other.what}", other.mend, other.is_needed)
                for host, other in zip(hosts, same, strict=True)
            ]
    return merged
