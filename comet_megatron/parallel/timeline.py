"""A timeline for people: the picture of the diagonal, and a trace that Perfetto and chrome://tracing open."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from comet_megatron.parallel.schedule import Kind
from comet_megatron.parallel.simulator import Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One hue per sequence, told apart with colour-blind eyes too; then they repeat.
_HUES = ("#3b6fb6", "#d1782c", "#2f9272", "#a34f93", "#b0992b", "#c14953", "#3f9cc2", "#7b6a58")
_NEUTRAL = "#7f7f7f"
# How light (above 0, towards white) or dark (below 0, towards black) an op is.
_SHADES = {
    Kind.FORWARD: 0.62,
    Kind.RECOMPUTE: 0.28,
    Kind.BACKWARD: -0.32,
    Kind.HIDDEN_GRADIENT: -0.12,
    Kind.WEIGHT_GRADIENT: -0.50,
}
_NAMES = {Kind.RECOMPUTE: "recomputation"}
_LANE, _INK, _QUIET_INK = "#f3f3f1", "#222222", "#6b6b6b"
_LEGEND_SEQUENCES = 6

# Inches.
_MARGINS = {"left": 0.9, "right": 0.25, "above": 0.86, "below": 0.58}
_WIDTH, _WIDEST = 13.0, 20.0
_BAND_GAP = 0.42
# Points, 72 an inch.
_OP_WIDTH = 6.0  # on average; where a row would need more than there is, it goes on in another band
_FONT_SIZES = (4.2, 8.5)  # of chunk numbers: not written where they would be smaller
_ROWS_OF_BANDS = 12  # rows of all bands together, at most
_BOX_HEIGHT = 0.84  # of a row
_DOTS_PER_INCH = 150


@dataclass(frozen=True)
class _Paper:
    """How a timeline lies on the picture; inches.

    Attributes:
        bands: pieces that the time is cut into, one below the other, so that few rows do not make one thin line.
        band_time: of the timeline's time, in each.
    """

    width: float
    row_height: float
    rows: int
    bands: int
    band_time: float

    @property
    def band_width(self) -> float:
        return self.width - _MARGINS["left"] - _MARGINS["right"]

    @property
    def band_height(self) -> float:
        return self.row_height * self.rows

    @property
    def height(self) -> float:
        bands = self.bands * self.band_height + (self.bands - 1) * _BAND_GAP
        return bands + _MARGINS["above"] + _MARGINS["below"]

    @property
    def points_per_unit(self) -> float:
        """Of the timeline's time."""
        return self.band_width * 72 / self.band_time

    def place(self, band: int) -> tuple[float, float, float, float]:
        """Left, bottom, width and height of a band, as shares of the picture."""
        bottom = self.height - _MARGINS["above"] - (band + 1) * self.band_height - band * _BAND_GAP
        left, width = _MARGINS["left"] / self.width, self.band_width / self.width
        return left, bottom / self.height, width, self.band_height / self.height


def _plan_paper(timeline: Timeline) -> _Paper:
    rows = max(len(timeline.spans), 1)
    row_height = 0.46 if rows <= 8 else 0.30
    needed = max((len(process) for process in timeline.spans), default=0) * _OP_WIDTH / 72
    bands = max(1, min(math.ceil(needed / _WIDTH), _ROWS_OF_BANDS // rows))
    width = min(max(needed / bands, _WIDTH), _WIDEST)
    return _Paper(width, row_height, rows, bands, (timeline.makespan or 1.0) / bands)


def draw_timeline(timeline: Timeline, path: Path, *, title: str, time_label: str = "time") -> None:
    """Draw what every process did as PNG: time across, a row per process, a hue per sequence, a shade per kind of op.

    Where there is room a box bears its chunk's number. Waiting is blank. A long timeline of few processes is drawn in
    bands, one below the other.

    Args:
        title: one line.
        time_label: what the time axis counts.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paper = _plan_paper(timeline)
    figure = plt.figure(figsize=(paper.width, paper.height))
    font_sizes = _font_sizes(timeline, paper)
    for band in range(paper.bands):
        axes = figure.add_axes(paper.place(band))
        axes.set_xlim(band * paper.band_time, (band + 1) * paper.band_time)
        _draw_rows(axes, timeline)
        _draw_boxes(axes, timeline, paper)
        _write_chunks(axes, timeline, font_sizes)
    axes.set_xlabel(time_label, color=_QUIET_INK, fontsize=9)
    _write_head(figure, timeline, paper, title=title)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.png")
    try:
        figure.savefig(temporary, dpi=_DOTS_PER_INCH)
        temporary.replace(path)
    finally:
        plt.close(figure)
        temporary.unlink(missing_ok=True)


def write_chrome_trace(timeline: Timeline, path: Path, *, seconds_per_unit: float = 1.0) -> None:
    """Write the timeline as JSON in Chrome's trace event format: open it at ui.perfetto.dev.

    Args:
        seconds_per_unit: of the timeline's time.
    """
    microseconds = 1e6 * seconds_per_unit
    events: list[dict] = [_metadata("process_name", name="pipeline")]
    for process, spans in enumerate(timeline.spans):
        events.append(_metadata("thread_name", thread=process, name=process_label(timeline, process)))
        events.append(_metadata("thread_sort_index", thread=process, sort_index=process))
        for span in spans:
            op = span.op
            events.append(
                {
                    "ph": "X",
                    "name": f"{op.kind.value} {op.chunk}",
                    "cat": op.kind.value,
                    "pid": 0,
                    "tid": process,
                    "ts": (span.start - timeline.start) * microseconds,
                    "dur": span.duration * microseconds,
                    "args": {"stage": op.stage, "sequence": op.sequence, "chunk": op.chunk},
                }
            )
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def process_label(timeline: Timeline, process: int) -> str:
    """`stage 2`, or `stages 0-3` of a process that holds several."""
    stages = sorted({span.op.stage for span in timeline.spans[process]})
    if len(stages) < 2:
        return f"stage {stages[0]}" if stages else f"process {process}"
    is_block = stages[-1] - stages[0] == len(stages) - 1
    return f"stages {stages[0]}-{stages[-1]}" if is_block else f"stages {', '.join(map(str, stages))}"


def _metadata(kind: str, *, thread: int = 0, **arguments: object) -> dict:
    return {"ph": "M", "name": kind, "pid": 0, "tid": thread, "args": arguments}


def _write_head(figure: Figure, timeline: Timeline, paper: _Paper, *, title: str) -> None:
    """Title and figures on the left, legends on the right."""
    from matplotlib.patches import Patch

    left, right = _MARGINS["left"] / paper.width, 1 - _MARGINS["right"] / paper.width
    first, second = 1 - 0.30 / paper.height, 1 - 0.60 / paper.height
    told = f"makespan {_short(timeline.makespan)}, bubble {timeline.bubble:.1%}: the share of time in which stages wait"
    figure.text(left, first, title, fontsize=13, fontweight="bold", color=_INK, va="center")
    figure.text(left, second, told, fontsize=9.5, color=_QUIET_INK, va="center")

    found = {span.op.kind for spans in timeline.spans for span in spans}
    sequences = sorted({span.op.sequence for spans in timeline.spans for span in spans})
    kinds = [
        Patch(color=_shaded(_NEUTRAL, _SHADES[kind]), label=_NAMES.get(kind, kind.value))
        for kind in Kind
        if kind in found
    ]
    hues = [Patch(color=_hue(number), label=f"sequence {number}") for number in sequences[:_LEGEND_SEQUENCES]]
    if len(sequences) > _LEGEND_SEQUENCES:
        hues.append(Patch(color="none", label=f"to {sequences[-1]}"))
    for patches, height in ((kinds, first), (hues if len(sequences) > 1 else [], second)):
        if patches:
            figure.legend(
                handles=patches,
                loc="center right",
                bbox_to_anchor=(right, height),
                ncols=len(patches),
                frameon=False,
                fontsize=8.5,
                labelcolor=_INK,
                handlelength=1.1,
                handleheight=1.0,
                handletextpad=0.5,
                columnspacing=1.3,
                borderpad=0,
                borderaxespad=0,
            )


def _draw_rows(axes: Axes, timeline: Timeline) -> None:
    """A lane and a label for each process, the first on top."""
    processes = len(timeline.spans)
    axes.set_ylim(processes - 0.5, -0.5)
    axes.barh(range(processes), timeline.makespan, height=_BOX_HEIGHT, color=_LANE, linewidth=0, zorder=0)
    labels = [process_label(timeline, process) for process in range(processes)]
    axes.set_yticks(range(processes), labels, fontsize=9 if processes <= 8 else 7.5, color=_INK)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8, colors=_QUIET_INK, length=3)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")


def _draw_boxes(axes: Axes, timeline: Timeline, paper: _Paper) -> None:
    """All boxes of one colour as one collection: ten thousand take a moment."""
    import numpy as np
    from matplotlib.collections import PolyCollection

    groups: dict[tuple[int, Kind], list[tuple[float, float, int]]] = defaultdict(list)
    for process, spans in enumerate(timeline.spans):
        for span in spans:
            start = span.start - timeline.start
            groups[span.op.sequence, span.op.kind].append((start, start + span.duration, process))
    for (sequence, kind), boxes in groups.items():
        start, end, row = np.array(boxes).T
        low, high = row - _BOX_HEIGHT / 2, row + _BOX_HEIGHT / 2
        corners = np.stack([np.stack([x, y], -1) for x, y in ((start, low), (end, low), (end, high), (start, high))], 1)
        # A white seam between neighbours, thin beside thin boxes, so that they keep their colour.
        seam = min(0.7, 0.12 * float(np.median(end - start)) * paper.points_per_unit)
        colour = _shaded(_hue(sequence), _SHADES[kind])
        axes.add_collection(
            PolyCollection(corners, facecolors=colour, edgecolors="white", linewidths=seam), autolim=False
        )


def _font_sizes(timeline: Timeline, paper: _Paper) -> dict[tuple[int, Kind], float]:
    """Points in which the longest chunk number fits the usual box, by process and kind; none if that is too small."""
    durations: dict[tuple[int, Kind], list[float]] = defaultdict(list)
    digits = 1
    for process, spans in enumerate(timeline.spans):
        for span in spans:
            durations[process, span.op.kind].append(span.duration)
            digits = max(digits, len(str(span.op.chunk)))
    smallest, largest = _FONT_SIZES
    sizes = {
        row: min(_size_that_fills(median(of_row), digits, paper.points_per_unit), largest)
        for row, of_row in durations.items()
    }
    return {row: size for row, size in sizes.items() if size >= smallest}


def _size_that_fills(duration: float, digits: int, points_per_unit: float) -> float:
    """A digit is 0.64 of the font size wide, and some air is around the number."""
    return duration * points_per_unit / (0.64 * digits + 0.35)


def _write_chunks(axes: Axes, timeline: Timeline, font_sizes: Mapping[tuple[int, Kind], float]) -> None:
    """Each box's chunk number, where it fits."""
    begin, end = axes.get_xlim()
    tolerance = 1e-6 * (end - begin)
    points_per_unit = axes.get_position().width * axes.figure.get_figwidth() * 72 / (end - begin)
    for process, spans in enumerate(timeline.spans):
        for span in spans:
            size = font_sizes.get((process, span.op.kind), 0.0)
            text = str(span.op.chunk)
            left, right = span.start - timeline.start, span.end - timeline.start
            is_whole = begin <= left + tolerance and right - tolerance <= end
            fits = size <= _size_that_fills(span.duration, len(text), points_per_unit) * 1.05
            if size and fits and is_whole:
                ink = _INK if _SHADES[span.op.kind] > 0.5 else "white"
                axes.text(
                    (left + right) / 2,
                    process,
                    text,
                    fontsize=size,
                    color=ink,
                    ha="center",
                    va="center_baseline",
                    clip_on=True,
                )


def _hue(sequence: int) -> str:
    return _HUES[sequence % len(_HUES)]


def _shaded(colour: str, shade: float) -> tuple[float, float, float]:
    """A colour mixed with white (shade above 0) or black (below)."""
    from matplotlib.colors import to_rgb

    towards = 1.0 if shade > 0 else 0.0
    red, green, blue = (part + abs(shade) * (towards - part) for part in to_rgb(colour))
    return red, green, blue


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
