"""Environment variables that the project sets: all of them are here, with the reason. What the user has set stays."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping

# For every command: warnings and progress bars that a user cannot act on.
QUIET = {
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# For runs of several processes, before the first CUDA call.
RUN = {
    # One hardware queue: work starts in the order it was given, so a collective begun before a GEMM runs beside it.
    # Megatron asks for it with tensor or sequence parallelism before Blackwell.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # A failing link is told in words; nothing is printed while all is well.
    "NCCL_DEBUG": "WARN",
}
# What else changes how the processes of a run talk to each other or share the machine: printed if the user set it.
USERS = ("NCCL_", "TORCH_NCCL_", "GLOO_", "NVTE_", "UCX_", "PYTORCH_ALLOC", "PYTORCH_CUDA_ALLOC", "CUDA_VISIBLE")
CPU_ONLY = ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")


def set_quiet(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what keeps libraries quiet, where the user has not set it."""
    for name, value in QUIET.items():
        environment.setdefault(name, value)


def set_environment(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set what runs need, where the user has not set it. A second call changes nothing."""
    for name, value in RUN.items():
        environment.setdefault(name, value)


def describe_environment(environment: Mapping[str, str] = os.environ, *, on_gpu: bool) -> str:
    """One line for the start of a run: every variable that counts on this device, and its value."""
    if on_gpu:
        names = [*RUN, *sorted(n for n in environment if n.startswith(USERS) and n not in RUN)]
    else:
        names = [name for name in CPU_ONLY if name in environment]
    shown = []
    for name in names:
        value = environment.get(name, "")
        is_ours = RUN.get(name) == value
        shown.append(f"{name}={value}" + ("" if is_ours or name == "OMP_NUM_THREADS" else " (yours)"))
    return ", ".join(shown)
