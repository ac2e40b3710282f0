"""Which device a rank computes on, its collective backend, and the peak memory it has used."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

import torch

from comet_megatron.backend.capabilities import probe_capabilities
from comet_megatron.backend.torch_adam import mend_torch_adam
from comet_megatron.errors import DeviceError

_M_MMAP_THRESHOLD = -3  # malloc.h


@dataclass(frozen=True)
class Device:
    """What one process computes on.

    Attributes:
        kind: "cuda" or "cpu".
        torch_device: where tensors live.
        collectives: torch.distributed backend: nccl or gloo.
    """

    kind: str
    torch_device: torch.device
    collectives: str


def select_device(local_rank: int, *, wanted: str = "auto") -> Device:
    """CUDA where there is a device, else CPU; prepares Megatron-Core for what was chosen.

    Args:
        local_rank: rank of this process on its machine.
        wanted: cuda, cpu or auto.

    Raises:
        DeviceError: more processes than GPUs, or another device is there than is wanted.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        what = f"train.device=cuda, and there is no GPU: {probe_capabilities().cuda.why_not}"
        raise DeviceError(what, way_out="use train.device=auto to run on CPU, or see what nvidia-smi says")
    if wanted == "cpu" and torch.cuda.is_available():
        what = "train.device=cpu, and there is a GPU, for which Megatron-Core prepares itself"
        raise DeviceError(what, way_out="hide it: start with CUDA_VISIBLE_DEVICES= in the environment")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"process {local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
                way_out="start as many processes as there are GPUs, or run on CPU with CUDA_VISIBLE_DEVICES=",
            )
        torch.cuda.set_device(local_rank)
        mend_torch_adam()
        return Device("cuda", torch.device("cuda", local_rank), "nccl")
    from comet_megatron.backend.cpu import run_megatron_on_cpu

    run_megatron_on_cpu()
    return Device("cpu", torch.device("cpu"), "gloo")


def set_cpu_threads(threads: int | str, *, processes_on_this_machine: int) -> int:
    """Set torch's threads; "auto" shares the machine's cores among its processes. Returns the number."""
    if threads == "auto":
        threads = max(1, len(os.sched_getaffinity(0)) // processes_on_this_machine)
    torch.set_num_threads(int(threads))
    return int(threads)


def keep_large_tensors_apart(kept_bytes: int) -> bool:
    """On CPU, give large tensors mappings of their own; whether this machine's malloc can (glibc).

    By itself it does so from 128 KiB on, until the first large one is freed: then what a chunk leaves behind for its
    backward lies between larger tensors that come and go, and none of their memory can be given back. Mapping costs
    time where tensors are small. Figures: docs/performance.md.

    Args:
        kept_bytes: of one such piece (planning.memory.kept_piece_bytes). It and all that is larger is mapped; if it is
            small, only what is large.
    """
    threshold = kept_bytes if kept_bytes >= 128 * 1024 else 1024 * 1024
    try:
        return bool(ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, threshold))
    except (OSError, AttributeError):
        return False


def peak_memory_bytes(device: Device) -> int:
    """Most memory this process has held: allocated on the GPU, resident on a CPU."""
    if device.kind == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
