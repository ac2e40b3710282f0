"""The parallel layout of a run: sizes, this process's ranks, and Megatron's process groups, passed and never global."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from comet_megatron.backend.device import Device
from comet_megatron.parallel.process import ProcessRank


@dataclass(frozen=True)
class Layout:
    """Sizes and ranks of each parallel axis.

    Attributes:
        groups: Megatron's process groups.
    """

    tp: int
    dp: int
    rank: int
    world_size: int
    dp_rank: int
    device: Device
    groups: ProcessGroupCollection

    @property
    def is_main(self) -> bool:
        """The process that talks to the user."""
        return self.rank == 0


def build_layout(process: ProcessRank, device: Device, *, tp: int, seed: int, timeout_s: float = 600) -> Layout:
    """Start torch.distributed and Megatron's process groups. Communicates on the world.

    Args:
        tp: tensor-parallel size; data parallelism takes the rest.
        seed: of Megatron's random states.
    """
    if not dist.is_initialized():
        if process.world_size == 1 and "MASTER_ADDR" not in os.environ:
            store = dist.HashStore()  # alone: no port is needed
            dist.init_process_group(device.collectives, store=store, rank=0, world_size=1)
        else:
            dist.init_process_group(device.collectives, timeout=timedelta(seconds=timeout_s))
    close_layout()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Layout(
        tp=tp,
        dp=groups.dp.size(),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        dp_rank=groups.dp.rank(),
        device=device,
        groups=groups,
    )


def close_layout() -> None:
    """Take down Megatron's groups, so that another layout can be built on the same processes.

    Megatron forgets its groups without destroying them; each of gloo's keeps threads and sockets until it is destroyed.
    """
    if parallel_state.model_parallel_is_initialized():
        groups = parallel_state._global_process_group_list or ()
        parallel_state.destroy_model_parallel()
        for group in groups:
            with contextlib.suppress(ValueError, AssertionError):  # the world, or one that is listed twice
                if group is not None and group is not dist.group.WORLD:
                    dist.destroy_process_group(group)
