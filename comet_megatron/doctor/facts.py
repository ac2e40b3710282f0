"""What doctor knows of an installation and of a machine: plain data, so that judging needs neither."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

UNLIMITED = -1  # a limit of the system that is none
APEX_SYMBOLS = {  # compiled module: what Megatron-Core uses it for
    "amp_C": "fused optimizers, gradient clipping",
    "fused_weight_gradient_mlp_cuda": "gradients added to their sum in the GEMM",
}


@dataclass(frozen=True)
class TorchFacts:
    """The installed torch.

    Attributes:
        cuda: version it was built for, such as "13.0"; empty: a build for CPU.
        nccl: version it was built with; empty: none.
        has_flash: its scaled_dot_product_attention has the flash kernel.
        error: why it cannot be imported.
    """

    cuda: str = ""
    nccl: str = ""
    has_flash: bool = False
    error: str = ""


@dataclass(frozen=True)
class TeFacts:
    """The installed Transformer Engine.

    Attributes:
        core_cuda: CUDA majors its prebuilt core packages are for, such as "13"; empty: built from source.
        error: the last line of what importing it says; empty: it was imported.
    """

    core_cuda: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class ApexFacts:
    """What answers to the name apex.

    Attributes:
        is_there: a package of that name can be imported or is installed.
        is_nvidias: it has the parts that NVIDIA's has.
        symbols: compiled modules that are there, of those in APEX_SYMBOLS.
    """

    is_there: bool = False
    is_nvidias: bool = False
    symbols: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """One GPU: its name, its memory, and its compute capability times ten."""

    name: str
    memory_bytes: int
    capability: int


@dataclass(frozen=True)
class Software:
    """What is installed, the same on every machine that starts this image or environment.

    Attributes:
        python: its version.
        requirements: the project's own, as in setup.py.
        gpu_requirements: of its extra `gpu`.
        versions: installed packages by normalised name.
    """

    python: tuple[int, int, int]
    requirements: tuple[str, ...] = ()
    gpu_requirements: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    torch: TorchFacts = TorchFacts()
    te: TeFacts = TeFacts()
    apex: ApexFacts = ApexFacts()


@dataclass(frozen=True)
class Machine:
    """One machine, as its first process sees it.

    Attributes:
        devices: NVIDIA GPUs that are built in, whether they can be used or not.
        driver: version of NVIDIA's driver; empty: none.
        driver_cuda: newest CUDA that the driver knows, such as "13.0".
        gpus: those that torch can use.
        processes: of this run on this machine.
        shared_bytes: size of /dev/shm; None: there is none.
        open_files: limit of one process.
        locked_bytes: memory that a process may lock, for RDMA.
        has_rdma: there is an RDMA device.
    """

    host: str
    devices: int = 0
    driver: str = ""
    driver_cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    processes: int = 1
    shared_bytes: int | None = None
    open_files: int = UNLIMITED
    locked_bytes: int = UNLIMITED
    has_rdma: bool = False


@dataclass(frozen=True)
class LinkFacts:
    """A link between two ranks as it was measured, sending one way after the other.

    Attributes:
        is_local: both are on one machine.
        bytes_per_s: of large messages; 0: what arrived was not what was sent.
        latency_s: half of a round trip of a few bytes.
    """

    first: int
    second: int
    is_local: bool
    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class GroupFacts:
    """The run's processes together.

    Attributes:
        backend: nccl or gloo.
        hosts: of each rank.
        gpu_names: of each rank; empty on CPU.
        versions: of each rank: torch, megatron-core and the like, in one line.
        clock_offset_s: of the first rank on each other machine against rank 0.
        clock_error_s: the largest half round trip with which an offset was measured.
        all_reduce_bytes_per_s: bus bandwidth of large all-reduces; 0: a sum was wrong.
        all_reduce_latency_s: of a small one.
        links: those that were measured within the time.
        links_left_out: for want of time.
    """

    backend: str
    hosts: tuple[str, ...]
    gpu_names: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    clock_offset_s: Mapping[str, float] = field(default_factory=dict)
    clock_error_s: float = 0.0
    all_reduce_bytes_per_s: float = 0.0
    all_reduce_latency_s: float = 0.0
    links: tuple[LinkFacts, ...] = ()
    links_left_out: int = 0
