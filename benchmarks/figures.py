"""What benchmarks share: figures beside their reach, ratios of alternating runs, the peak of a process's memory."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path


class Report:
    """Prints figures beside their reach and counts those that miss it."""

    def __init__(self) -> None:
        self.figures = self.missed = 0

    def figure(self, name: str, value: str, reach: str, met: bool) -> None:
        """One line."""
        self.figures += 1
        self.missed += not met
        print(f"  {name:<66} {value:>10}   reach {reach:<8} {'met' if met else 'MISSED'}", flush=True)

    def close(self, *, only_print: bool) -> int:
        """The last line; the exit code."""
        missed = f"{self.missed} of {self.figures} figures miss their reach"
        print(f"\n{missed if self.missed else 'all figures reach their mark'}")
        return 0 if only_print else min(self.missed, 1)


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median of the ratios of neighbouring runs."""
    return statistics.median(s / f for s, f in zip(slow, fast, strict=True))


def spread(values: Sequence[float]) -> float:
    """How noisy: (largest - smallest) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def resident_bytes() -> int:
    """Of this process, now (Linux)."""
    return _status_bytes("VmRSS")


def forget_peak() -> None:
    """Let the high-water mark of this process's resident memory start anew (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_resident_bytes() -> int:
    """High-water mark since `forget_peak` (Linux)."""
    return _status_bytes("VmHWM")


def _status_bytes(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024
