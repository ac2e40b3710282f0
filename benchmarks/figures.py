"""What benchmarks share: figures beside their reach, ratios of alternating runs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


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
