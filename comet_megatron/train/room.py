"""Compares the plan of a run with the memory that is there, before anything is loaded."""

from __future__ import annotations

import psutil
import torch
import torch.distributed as dist

from comet_megatron.checkpoint.model_folder import ModelDescription
from comet_megatron.config.schema import Config
from comet_megatron.errors import ConfigError
from comet_megatron.parallel.layout import Layout
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.planning.fit import check_fits_device, plan_run, what_fits
from comet_megatron.planning.told import size


def check_room(
    config: Config, description: ModelDescription, layout: Layout, process: ProcessRank, *, longest: int
) -> list[str]:
    """Lines for the user: on a CPU a warning where the plan is more than the free memory. Communicates on the world.

    Args:
        longest: text tokens of the longest sequence.

    Raises:
        ConfigError: the plan is more than a GPU has free; the same on every rank.
    """
    on_cuda = layout.device.kind == "cuda"
    architecture, memory = description.architecture, description.memory
    free = torch.cuda.mem_get_info()[0] if on_cuda else psutil.virtual_memory().available // process.local_world_size
    least = torch.tensor(free, device=layout.device.torch_device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    available = int(least)
    stages = plan_run(config, architecture, memory, longest=longest, dp=layout.dp, on_cuda=on_cuda)
    name = torch.cuda.get_device_name() if on_cuda else "this process's share of the machine's memory"
    problem = check_fits_device(stages, available, device=name)
    if problem is None:
        return []
    if not on_cuda:
        return [f"warning  {problem.what}"]
    way_out = what_fits(
        config,
        architecture,
        memory,
        longest=longest,
        world_size=layout.world_size,
        available_bytes=available,
        gpu=name,
    )
    raise ConfigError(problem.what, way_out=f"{way_out} of {size(available)} (tools/plan.py --advise)")
