"""The ops of a step as they were really run, over all stages of a pipeline: a picture and a trace."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from comet_megatron.new_folder import make_folder
from comet_megatron.parallel.activity import Activity, Mark
from comet_megatron.parallel.layout import Layout
from comet_megatron.parallel.simulator import Timeline
from comet_megatron.parallel.timeline import draw_timeline, write_chrome_trace

PROFILE = "profile"


def write_profile(activity: Activity, layout: Layout, run: Path, *, step: int, since: Mark) -> Path | None:
    """RUN/profile/timeline_step_N.png and .json of the main process's pipeline. Every rank calls it; PP communicates.

    Args:
        since: mark of every stage's clock at the barrier before the step.

    Returns:
        The picture's path on the main process, else None.
    """
    timeline = gather_timeline(activity, layout, since=since)
    if not layout.is_main:
        return None
    make_folder(run / PROFILE)
    picture = run / PROFILE / f"timeline_step_{step}.png"
    draw_timeline(timeline, picture, title=f"step {step}, measured", time_label="seconds")
    write_chrome_trace(timeline, picture.with_suffix(".json"))
    return picture


def gather_timeline(activity: Activity, layout: Layout, *, since: Mark) -> Timeline:
    """Spans of all stages of this process's pipeline, in seconds since a mark. Communicates on PP."""
    of_stages: list = [None] * layout.pp
    dist.all_gather_object(of_stages, activity.spans(since=since), group=layout.groups.pp)
    return Timeline(tuple(tuple(spans) for spans in of_stages))
