"""The parallel layout of a run: sizes, this process's ranks, and its process groups, passed and never global."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from comet_megatron.backend.device import Device
from comet_megatron.parallel.p2p import DistributedTransport, Link, LocalTransport, Transport, build_links
from comet_megatron.parallel.process import ProcessRank


@dataclass(frozen=True)
class Layout:
    """Sizes and ranks of each parallel axis.

    Attributes:
        pp_rank: this process's pipeline stage.
        groups: Megatron's process groups.
        links: to the neighbouring stages, by boundary.
    """

    tp: int
    pp: int
    dp: int
    rank: int
    world_size: int
    pp_rank: int
    dp_rank: int
    device: Device
    groups: ProcessGroupCollection
    links: Mapping[int, Link] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        """The process that talks to the user."""
        return self.rank == 0

    def name_of(self, rank: int) -> str:
        """Words for a rank of the world: stages are the outermost axis."""
        return f"rank {rank} (stage {rank // (self.world_size // self.pp)})" if self.pp > 1 else f"rank {rank}"

    def build_transport(self) -> Transport:
        """The way to the neighbouring stages."""
        return DistributedTransport(self.links, self.device.torch_device) if self.pp > 1 else LocalTransport()


def build_layout(
    process: ProcessRank, device: Device, *, tp: int, seed: int, pp: int = 1, timeout_s: float = 600
) -> Layout:
    """Start torch.distributed and all process groups. Communicates on the world.

    Args:
        tp, pp: tensor-parallel size, pipeline stages; data parallelism takes the rest.
        seed: of Megatron's random states.
        timeout_s: after which hang_watch.py ends a run; torch.distributed itself waits longer, for it says less.
    """
    timeout_s = 2 * timeout_s + 60
    timeout = timedelta(seconds=timeout_s)
    if not dist.is_initialized():
        if process.world_size == 1 and "MASTER_ADDR" not in os.environ:
            store = dist.HashStore()  # alone: no port is needed
            dist.init_process_group(device.collectives, store=store, rank=0, world_size=1)
        else:
            dist.init_process_group(device.collectives, timeout=timeout)
    close_layout()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        distributed_timeout_minutes=max(1, round(timeout_s / 60)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    torch.manual_seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stage = groups.pp.rank()
    links = build_links(dist.get_process_group_ranks(groups.pp), stage, timeout_s=timeout_s)
    _links.update(links)
    layout = Layout(
        tp=tp,
        pp=pp,
        dp=groups.dp.size(),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        pp_rank=stage,
        dp_rank=groups.dp.rank(),
        device=device,
        groups=groups,
        links=links,
    )
    if links:
        # No communicator is made inside an op, while a message posted ahead may already occupy the device.
        for group in (groups.tp, groups.dp, groups.pp, groups.embd):
            if group is not None and dist.get_rank() in dist.get_process_group_ranks(group):
                dist.all_reduce(torch.zeros(1, device=device.torch_device), group=group)
        DistributedTransport(links, device.torch_device).warm_up()
    return layout


# Megatron's groups are global, so the links that belong to them are remembered here, to be taken down with them.
_links: dict[int, Link] = {}


def close_layout() -> None:
    """Take down all groups but the world, so that another layout can be built on the same processes.

    Megatron forgets its groups without destroying them; each of gloo's keeps threads and sockets until it is destroyed.
    """
    groups = [group for link in _links.values() for group in (link.forward, link.backward)]
    _links.clear()
    if parallel_state.model_parallel_is_initialized():
        groups += parallel_state._global_process_group_list or ()
        parallel_state.destroy_model_parallel()
    for group in groups:
        with contextlib.suppress(ValueError, AssertionError):  # the world, or one that is listed twice
            if group is not None and group is not dist.group.WORLD:
                dist.destroy_process_group(group)
