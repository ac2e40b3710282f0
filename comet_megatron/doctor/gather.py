"""Gather the facts of this installation and this machine; nothing is judged here, and nothing changed."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import importlib.metadata
import importlib.util
import re
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from comet_megatron.doctor.facts import APEX_SYMBOLS, UNLIMITED, ApexFacts, Gpu, Machine, Software, TeFacts, TorchFacts

DISTRIBUTION = "comet-megatron"
SETUP = Path(__file__).parents[2] / "setup.py"
IMPORT_LIMIT_S = 120
_CORE = re.compile(r"transformer-engine-cu(\d+)")


def gather_software() -> Software:
    """What is installed."""
    requirements, gpu_requirements = project_requirements()
    versions = installed_versions()
    return Software(
        python=sys.version_info[:3],
        requirements=requirements,
        gpu_requirements=gpu_requirements,
        versions=versions,
        torch=_torch(),
        te=_te(versions),
        apex=_apex(versions),
    )


def installed_versions() -> dict[str, str]:
    """Packages by normalised name; of one that is there twice, the version that is imported."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if name:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def project_requirements() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The project's requirements and those of its extra `gpu`: of setup.py beside this file, or as installed."""
    if SETUP.exists():
        values = {
            target.id: ast.literal_eval(node.value)
            for node in ast.parse(SETUP.read_text()).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name) and target.id in ("REQUIRES", "EXTRAS")
        }
        return tuple(values["REQUIRES"]), tuple(values["EXTRAS"]["gpu"])
    try:
        stated = [Requirement(text) for text in importlib.metadata.requires(DISTRIBUTION) or ()]
    except importlib.metadata.PackageNotFoundError:
        return (), ()
    plain, gpu = [], []
    for requirement in stated:
        marker, requirement.marker = requirement.marker, None
        if marker is None or marker.evaluate({"extra": ""}):
            plain.append(str(requirement))
        elif marker.evaluate({"extra": "gpu"}):
            gpu.append(str(requirement))
    return tuple(plain), tuple(gpu)


def _torch() -> TorchFacts:
    try:
        import torch
    except (ImportError, OSError) as error:
        return TorchFacts(error=_last_line(str(error)))
    nccl = ""
    if torch.version.cuda and torch.distributed.is_nccl_available():
        with contextlib.suppress(RuntimeError, AttributeError):
            nccl = ".".join(map(str, torch.cuda.nccl.version()))
    flash = getattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    return TorchFacts(cuda=torch.version.cuda or "", nccl=nccl, has_flash=bool(flash()))


def _te(versions: dict[str, str]) -> TeFacts:
    if "transformer-engine" not in versions:
        return TeFacts()
    cores = [match.group(1) for name in versions if (match := _CORE.fullmatch(name))]
    return TeFacts(core_cuda=tuple(sorted(cores)), error=import_error("transformer_engine.pytorch"))


def import_error(module: str) -> str:
    """The last line of what importing a module says, in a process of its own, which it may end; empty if it works."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True, timeout=IMPORT_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return f"importing {module} takes longer than {IMPORT_LIMIT_S} s"
    if done.returncode == 0:
        return ""
    return _last_line(done.stderr) or f"importing {module} ends Python with {done.returncode}"


def _apex(versions: dict[str, str]) -> ApexFacts:
    """Nothing of apex is imported: the unrelated package may do anything."""
    package = importlib.util.find_spec("apex")
    folders = [Path(folder) for folder in package.submodule_search_locations or ()] if package else []
    return ApexFacts(
        is_there=package is not None or "apex" in versions,
        is_nvidias=any((folder / "multi_tensor_apply").is_dir() for folder in folders),
        symbols=tuple(name for name in APEX_SYMBOLS if importlib.util.find_spec(name) is not None),
    )


def gather_machine(*, processes: int = 1) -> Machine:
    """This machine.

    Args:
        processes: of the run on it.
    """
    files, locked = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    shared, rdma = Path("/dev/shm"), Path("/sys/class/infiniband")
    return Machine(
        host=socket.gethostname(),
        devices=_devices(),
        driver=_driver(),
        driver_cuda=_driver_cuda(),
        gpus=_gpus(),
        processes=processes,
        shared_bytes=shutil.disk_usage(shared).total if shared.is_dir() else None,
        open_files=UNLIMITED if files == resource.RLIM_INFINITY else files,
        locked_bytes=UNLIMITED if locked == resource.RLIM_INFINITY else locked,
        has_rdma=rdma.is_dir() and any(rdma.iterdir()),
    )


def _devices() -> int:
    """NVIDIA's devices on the PCI bus that compute or draw, as the kernel lists them."""
    count = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with contextlib.suppress(OSError):
            kind = (device / "class").read_text().strip()
            count += (device / "vendor").read_text().strip() == "0x10de" and kind.startswith("0x03")
    return count


def _driver() -> str:
    try:
        match = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return ""
    return match.group(1) if match else ""


def _driver_cuda() -> str:
    try:
        version = ctypes.c_int(0)
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)):
            return ""
    except (OSError, AttributeError):
        return ""
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def _gpus() -> tuple[Gpu, ...]:
    try:
        import torch

        if not torch.cuda.is_available():
            return ()
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    except (ImportError, OSError, RuntimeError, AssertionError):
        return ()
    return tuple(Gpu(p.name, p.total_memory, 10 * p.major + p.minor) for p in found)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
