"""The layout of a tool: one process that holds the whole model, or a pipeline of those that torchrun started."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from comet_megatron.backend.device import select_device
from comet_megatron.parallel.layout import Layout, build_layout, close_layout
from comet_megatron.parallel.process import ProcessRank


@contextmanager
def alone() -> Iterator[Layout]:
    """A Layout of one process on this machine's device; taken down at the end."""
    with _layout(ProcessRank(0, 1, 0, 1)) as layout:
        yield layout


@contextmanager
def as_pipeline() -> Iterator[Layout]:
    """A Layout in which each process of the world is a stage; one process is alone. Taken down at the end."""
    with _layout(ProcessRank.from_environment()) as layout:
        yield layout


@contextmanager
def _layout(process: ProcessRank) -> Iterator[Layout]:
    started = not dist.is_initialized()
    layout = build_layout(process, select_device(process.local_rank), tp=1, pp=process.world_size, seed=0)
    try:
        yield layout
    finally:
        close_layout()
        if started:
            dist.destroy_process_group()
