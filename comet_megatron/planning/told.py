"""How plans tell bytes, counts and tables to people."""

from __future__ import annotations

from collections.abc import Sequence

UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def unit_of(count: float) -> str:
    """In which bytes are told to people."""
    return next(unit for unit, factor in reversed(UNITS.items()) if count >= factor or factor == 1)


def scaled(count: float, unit: str) -> str:
    """Bytes as a number of `unit`."""
    return f"{count / UNITS[unit]:,.{0 if unit == 'B' else 2}f}"


def size(count: float) -> str:
    """Bytes for people: `14.42 MB`."""
    return f"{scaled(count, unit_of(count))} {unit_of(count)}"


def counted(count: int, noun: str) -> str:
    """`1 layer`, `2 processes`."""
    plural = "es" if noun.endswith("s") else "s"
    return f"{count:,} {noun}{plural if count != 1 else ''}"


def listed(values: Sequence[int], joint: str) -> str:
    """All the values if they are few, else how they range."""
    if len(values) <= 8:
        return joint.join(map(str, values))
    return f"{min(values)} to {max(values)} a sequence"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table whose first row is its head."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return [head, "|" + "---|" * len(rows[0]), *body]
