"""The layout of a tool: one process that holds the whole model."""

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
    started = not dist.is_initialized()
    layout = build_layout(ProcessRank(0, 1, 0, 1), select_device(0), tp=1, seed=0)
    try:
        yield layout
    finally:
        close_layout()
        if started:
            dist.destroy_process_group()
