"""GPUs as their makers publish them. Pure, no torch.

Dense peaks: data sheets print FP16, BF16 and FP8 with structured sparsity, which is twice as much. Bandwidths are each
way. The network is one adapter for each GPU, as in NVIDIA's DGX systems. Sources: NVIDIA's data sheets of the A100,
H100, H200 (SXM) and DGX B200; networks from the DGX user guides (HDR 200 Gb/s on A100, NDR 400 Gb/s on the others).
"""

from __future__ import annotations

from dataclasses import dataclass

from comet_megatron.errors import ConfigError

GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Gpu:
    """One GPU in its machine.

    Attributes:
        memory_bytes: printed gigabytes as 10^9: what a driver reports is a little more.
        bf16_flops, fp8_flops: dense peak a second; fp8_flops 0: none.
        memory_bandwidth: bytes a second.
        nvlink_bandwidth: bytes a second each way, to any GPU of the machine.
        network_bandwidth: bytes a second each way, to other machines.
        per_machine: GPUs of a machine.
    """

    name: str
    memory_bytes: int
    bf16_flops: float
    fp8_flops: float
    memory_bandwidth: float
    nvlink_bandwidth: float
    network_bandwidth: float
    per_machine: int = 8


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80 * GB, 312 * TERA, 0.0, 2.039 * TERA, 300 * GB, 25 * GB),
        Gpu("h100", 80 * GB, 989.4 * TERA, 1978.9 * TERA, 3.35 * TERA, 450 * GB, 50 * GB),
        Gpu("h200", 141 * GB, 989.4 * TERA, 1978.9 * TERA, 4.8 * TERA, 450 * GB, 50 * GB),
        Gpu("b200", 180 * GB, 2250 * TERA, 4500 * TERA, 8.0 * TERA, 900 * GB, 50 * GB),
    )
}


def find_gpu(name: str) -> Gpu:
    """By its name, or by a name that a driver gives and that holds it: `NVIDIA H100 80GB HBM3`.

    Raises:
        ConfigError: it is not in the table.
    """
    words = name.lower().replace("-", " ").split()
    for known, gpu in GPUS.items():
        if known in words:
            return gpu
    raise ConfigError(f"GPU {name!r} is not in the table", way_out=f"use one of {', '.join(GPUS)}")
