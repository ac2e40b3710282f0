"""The picture shows as much of each colour as there is time of each kind; the trace holds every span."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from comet_megatron.parallel.schedule import Kind, Op, Workload, plan_schedule, recompute_everything
from comet_megatron.parallel.simulator import Span, Timeline, cost_by_kind, replay
from comet_megatron.parallel.timeline import (
    _HUES,
    _LANE,
    _SHADES,
    _shaded,
    draw_timeline,
    process_label,
    write_chrome_trace,
)

COSTS = {Kind.FORWARD: 1, Kind.RECOMPUTE: 1, Kind.BACKWARD: 2}


def simulated(stages, chunks) -> Timeline:
    work = Workload(stages, chunks, recompute=recompute_everything)
    return replay(plan_schedule(work), work, cost=cost_by_kind(COSTS))


def pixels_of(picture: np.ndarray, colour: tuple[float, float, float]) -> int:
    """How many pixels have a colour, up to rounding."""
    return int((np.abs(picture[..., :3] - np.array(colour)) < 1.5 / 255).all(-1).sum())


@pytest.mark.parametrize(
    ("stages", "chunks"), [(4, (16,)), (16, (12, 12)), (2, (40, 33, 52))], ids=["plain", "tall", "in bands"]
)
def test_areas_are_as_times(stages, chunks, tmp_path):
    timeline = simulated(stages, chunks)
    draw_timeline(timeline, tmp_path / "t.png", title="A step")
    picture = imread(tmp_path / "t.png")
    waiting = len(timeline.spans) * timeline.makespan * timeline.bubble
    times = {_shaded(_LANE, 0.0): waiting}
    for sequence, count in enumerate(chunks):
        for kind, cost in COSTS.items():
            times[_shaded(_HUES[sequence], _SHADES[kind])] = stages * count * cost
    areas = {colour: pixels_of(picture, colour) for colour in times}
    # Seams and numbers take some of a box.
    per_time = [areas[colour] / time for colour, time in times.items() if time > 0.05 * sum(times.values())]
    assert min(per_time) > 0.6 * max(per_time)
    assert sum(areas.values()) > 0.25 * picture[..., 0].size


def test_nothing_but_the_picture_is_left_and_an_old_one_is_replaced(tmp_path):
    (tmp_path / "t.png").write_text("old")
    draw_timeline(simulated(2, (3,)), tmp_path / "t.png", title="A step", time_label="seconds")
    assert [path.name for path in tmp_path.iterdir()] == ["t.png"]
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")


def test_a_timeline_without_ops_is_drawn_too(tmp_path):
    draw_timeline(Timeline(((), ())), tmp_path / "t.png", title="Nothing")
    assert (tmp_path / "t.png").stat().st_size > 0


def test_the_trace_holds_every_span_in_microseconds_from_the_first(tmp_path):
    ops = [Op(Kind.FORWARD, 0, 1, 2), Op(Kind.BACKWARD, 0, 1, 2), Op(Kind.FORWARD, 1, 1, 2)]
    timeline = Timeline(((Span(ops[0], 10.0, 10.5), Span(ops[1], 12.0, 13.0)), (Span(ops[2], 10.5, 11.0),)))
    write_chrome_trace(timeline, tmp_path / "t.json", seconds_per_unit=2.0)
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    spans = [
        (e["tid"], e["name"], e["cat"], e["ts"], e["dur"], e["args"])
        for e in events
        if e["ph"] == "X" and e["pid"] == 0
    ]
    first, second = ({"stage": stage, "sequence": 1, "chunk": 2} for stage in range(2))
    assert spans == [
        (0, "forward 2", "forward", 0.0, 1e6, first),
        (0, "backward 2", "backward", 4e6, 2e6, first),
        (1, "forward 2", "forward", 1e6, 1e6, second),
    ]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {0: "stage 0", 1: "stage 1"}
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]


def test_a_process_is_named_after_the_stages_it_holds():
    def label(*stages):
        return process_label(Timeline((tuple(Span(Op(Kind.FORWARD, s, 0, 0), 0, 1) for s in stages),)), 0)

    assert [label(), label(3), label(0, 1, 2, 0), label(0, 4)] == ["process 0", "stage 3", "stages 0-2", "stages 0, 4"]
