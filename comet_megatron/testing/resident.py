"""Resident memory of this process, and its high-water mark since a moment (Linux)."""

from __future__ import annotations

from pathlib import Path


def resident_bytes() -> int:
    """Now."""
    return _status_bytes("VmRSS")


def forget_peak() -> None:
    """Let the high-water mark start anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """High-water mark since `forget_peak`."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024
