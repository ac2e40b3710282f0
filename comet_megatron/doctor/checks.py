"""Judge facts: each check is a pure function from facts to one line."""

from __future__ import annotations

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from comet_megatron.doctor.facts import APEX_SYMBOLS, UNLIMITED, Machine, Software
from comet_megatron.doctor.lines import MISSING, OK, WRONG, Line

MIB, GIB = 1 << 20, 1 << 30
PYTHON_FROM = (3, 11)
TORCH, MEGATRON, TE, PSUTIL = "torch", "megatron-core", "transformer-engine", "psutil"
OWN_LINES = (TORCH, MEGATRON, TE, PSUTIL)
# In the image of the Dockerfile all parts for GPUs are there, and fit each other.
IMAGE = "docker build -t comet-megatron .   # the image has it"
SHARED_BYTES, OPEN_FILES, OPEN_FILES_WITH_GPUS = GIB, 1024, 16384


def check_software(software: Software) -> list[Line]:
    """Every line about what is installed."""
    return [
        check_python(software),
        check_torch(software),
        check_megatron(software),
        check_psutil(software),
        check_others(software),
        check_cuda(software),
        check_nccl(software),
        check_te(software),
        check_apex(software),
        check_flash(software),
    ]


def check_machine(machine: Machine, software: Software) -> list[Line]:
    """Every line about one machine."""
    return [
        check_driver(machine, software),
        check_gpus(machine, software),
        check_processes(machine),
        check_shared_memory(machine),
        check_open_files(machine),
        check_locked_memory(machine),
    ]


# --- what is installed -----------------------------------------------------------------------------------------------


def check_python(software: Software) -> Line:
    version = ".".join(map(str, software.python))
    if software.python[:2] < PYTHON_FROM:
        return Line(WRONG, "Python", f"{version}; 3.11 or newer is needed", "python3.11 -m venv .venv", is_needed=True)
    return Line(OK, "Python", version)


def check_torch(software: Software) -> Line:
    line = _package(TORCH, software, pip=_pip(TORCH, software), is_needed=True)
    if line.state != OK:
        return line
    if software.torch.error:
        what = f"{line.what} cannot be imported: {software.torch.error}"
        return Line(WRONG, TORCH, what, f"pip install --force-reinstall {_pip(TORCH, software)}", is_needed=True)
    built = f"for CUDA {software.torch.cuda}" if software.torch.cuda else "for CPU"
    return Line(OK, TORCH, f"{line.what}, built {built}")


def check_cuda(software: Software) -> Line:
    if software.torch.cuda:
        return Line(OK, "CUDA", software.torch.cuda)
    return Line(MISSING, "CUDA", "this torch is built for CPU", IMAGE)


def check_nccl(software: Software) -> Line:
    if software.torch.nccl:
        return Line(OK, "NCCL", software.torch.nccl)
    return Line(MISSING, "NCCL", "not in this torch; processes talk by gloo", IMAGE)


def check_megatron(software: Software) -> Line:
    return _package(MEGATRON, software, pip=_pip(MEGATRON, software), is_needed=True)


def check_te(software: Software) -> Line:
    """Transformer Engine: its version, and whether it is built for the torch and the CUDA that are here."""
    name, te = "Transformer Engine", software.te
    line = _package(TE, software, pip=_pip(TE, software), name=name)
    if line.state == MISSING:
        return Line(MISSING, name, "not installed; model.backend=torch runs without it, FP8 does not", IMAGE)
    if line.state == WRONG:
        return line
    rebuild = f"pip install --no-build-isolation --force-reinstall --no-deps '{_pip(TE, software)}'"
    major = software.torch.cuda.split(".")[0]
    other = [core for core in te.core_cuda if core != major]
    if other:
        here = f"torch is for CUDA {software.torch.cuda}" if major else "torch is built for CPU"
        return Line(WRONG, name, f"{line.what} is for CUDA {', '.join(other)}, and {here}", rebuild)
    if "undefined symbol" in te.error:
        return Line(WRONG, name, f"{line.what} was built for another torch: {te.error}", rebuild)
    if "libcuda.so" in te.error:  # where an image is built there is no driver
        return Line(OK, name, f"{line.what}; not loaded, as there is no driver")
    if te.error:
        return Line(WRONG, name, f"{line.what} cannot be imported: {te.error}", rebuild)
    return Line(OK, name, line.what)


def check_apex(software: Software) -> Line:
    """apex by its compiled modules: an import proves nothing, nor does the name."""
    apex = software.apex
    if apex.is_there and not apex.is_nvidias:
        what = "the package called apex here is not NVIDIA's but the unrelated one of the public index"
        return Line(WRONG, "apex", what, "pip uninstall -y apex")
    if not apex.is_there and not apex.symbols:
        return Line(MISSING, "apex", "not installed; torch's or Transformer Engine's fused AdamW is used", IMAGE)
    lacking = [f"{symbol} ({use})" for symbol, use in APEX_SYMBOLS.items() if symbol not in apex.symbols]
    if lacking:
        return Line(MISSING, "apex", f"installed without its compiled {' and '.join(lacking)}", IMAGE)
    return Line(OK, "apex", f"compiled: {', '.join(apex.symbols)}")


def check_flash(software: Software) -> Line:
    package = software.versions.get("flash-attn", "")
    found = ["in torch's attention"] * software.torch.has_flash + [f"flash-attn {package}"] * bool(package)
    if found:
        return Line(OK, "flash attention", ", ".join(found))
    return Line(MISSING, "flash attention", "not in this torch", IMAGE)


def check_psutil(software: Software) -> Line:
    line = _package(PSUTIL, software, pip=_pip(PSUTIL, software), is_needed=True)
    if line.state == MISSING:
        what = "not installed: the first checkpoint would wait for ever"
        return Line(MISSING, PSUTIL, what, line.mend, is_needed=True)
    return line


def check_others(software: Software) -> Line:
    """The project's other requirements, in one line."""
    others = [Requirement(text) for text in software.requirements]
    others = [r for r in others if canonicalize_name(r.name) not in OWN_LINES]
    lines = {r.name: _package(canonicalize_name(r.name), software, pip=str(r)) for r in others}
    bad = {name: line for name, line in lines.items() if line.state != OK}
    if not bad:
        return Line(OK, "other packages", f"all {len(others)} of setup.py are in their ranges")
    what = "; ".join(f"{name} {line.what}" for name, line in bad.items())
    asked = " ".join(f"'{r}'" for r in others if r.name in bad)
    state = WRONG if any(line.state == WRONG for line in bad.values()) else MISSING
    return Line(state, "other packages", what, f"pip install {asked}", is_needed=True)


# --- the machine -----------------------------------------------------------------------------------------------------


def check_driver(machine: Machine, software: Software) -> Line:
    if not machine.driver:
        if not machine.devices and not machine.gpus:
            return Line(MISSING, "driver", "none, and no NVIDIA GPU is built in")
        return Line(
            MISSING, "driver", f"none, for {machine.devices} GPUs", "apt-get install cuda-drivers   # on the host"
        )
    what = f"{machine.driver}, for CUDA up to {machine.driver_cuda or 'unknown'}"
    built, known = _major(software.torch.cuda), _major(machine.driver_cuda)
    if built and known and built > known:
        mend = f"apt-get install cuda-drivers   # on the host: one that knows CUDA {built}"
        return Line(WRONG, "driver", f"{what}; torch is built for CUDA {software.torch.cuda}", mend)
    return Line(OK, "driver", what)


def check_gpus(machine: Machine, software: Software) -> Line:
    """The GPUs of one machine: all alike, or the slowest and smallest sets the pace and the size for all."""
    if not machine.gpus:
        if not machine.devices:
            return Line(MISSING, "GPUs", "none: everything runs on CPU")
        what = f"{machine.devices} are built in, and torch sees none"
        if not software.torch.cuda:
            return Line(WRONG, "GPUs", f"{what}, as it is built for CPU", IMAGE)
        return Line(WRONG, "GPUs", what, "docker run --gpus all ...   # outside of Docker: unset CUDA_VISIBLE_DEVICES")
    kinds = [(gpu.name, round(gpu.memory_bytes / GIB)) for gpu in machine.gpus]
    what = ", ".join(f"{kinds.count(kind)} x {kind[0]}, {kind[1]} GiB" for kind in sorted(set(kinds)))
    if len(set(kinds)) > 1:
        most = max(sorted(set(kinds)), key=kinds.count)
        visible = ",".join(str(index) for index, kind in enumerate(kinds) if kind == most)
        mend = f"export CUDA_VISIBLE_DEVICES={visible}   # one kind only"
        return Line(WRONG, "GPUs", f"of different kinds: {what}", mend)
    capability = machine.gpus[0].capability
    fp8 = "" if capability >= 89 else "; no FP8"
    return Line(OK, "GPUs", f"{what}, compute capability {capability / 10:.1f}{fp8}")


def check_processes(machine: Machine) -> Line:
    """A process for each GPU at most."""
    count = f"{machine.processes} on this machine"
    if machine.gpus and machine.processes > len(machine.gpus):
        mend = f"torchrun --nproc-per-node {len(machine.gpus)} ..."
        return Line(WRONG, "processes", f"{count}, which has {len(machine.gpus)} GPUs", mend)
    return Line(OK, "processes", count)


def check_shared_memory(machine: Machine) -> Line:
    """NCCL's links within a machine, and the data workers, go through /dev/shm."""
    if machine.shared_bytes is None:
        return Line(WRONG, "shared memory", "there is no /dev/shm", "mount -t tmpfs -o size=16g tmpfs /dev/shm")
    what = f"{_size(machine.shared_bytes)} in /dev/shm"
    if machine.shared_bytes < SHARED_BYTES:
        mend = "docker run --shm-size 16g ...   # or mount -o remount,size=16g /dev/shm"
        return Line(WRONG, "shared memory", f"{what}; {_size(SHARED_BYTES)} or more is needed", mend)
    return Line(OK, "shared memory", what)


def check_open_files(machine: Machine) -> Line:
    needed = OPEN_FILES_WITH_GPUS if machine.gpus else OPEN_FILES
    if machine.open_files == UNLIMITED:
        return Line(OK, "open files", "unlimited")
    if machine.open_files < needed:
        return Line(WRONG, "open files", f"{machine.open_files:,}; {needed:,} are needed", f"ulimit -n {4 * needed}")
    return Line(OK, "open files", f"{machine.open_files:,} a process")


def check_locked_memory(machine: Machine) -> Line:
    if machine.locked_bytes == UNLIMITED:
        return Line(OK, "locked memory", "unlimited")
    what = _size(machine.locked_bytes)
    if machine.has_rdma:
        mend = "ulimit -l unlimited   # or docker run --ulimit memlock=-1 ..."
        return Line(WRONG, "locked memory", f"{what}; the RDMA devices here need it unlimited", mend)
    return Line(OK, "locked memory", f"{what}; no RDMA device needs more")


# --- words -----------------------------------------------------------------------------------------------------------


def _package(package: str, software: Software, *, pip: str, name: str = "", is_needed: bool = False) -> Line:
    """A package against the range that the project states for it; without one, any version is right."""
    name = name or package
    version = software.versions.get(package)
    mend = f"pip install '{pip}'"
    if version is None:
        return Line(MISSING, name, "not installed", mend, is_needed=is_needed)
    requirement = _requirement(package, software)
    if requirement is not None and not requirement.specifier.contains(version, prereleases=True):
        return Line(WRONG, name, f"{version} is not {requirement.specifier}", mend, is_needed=is_needed)
    return Line(OK, name, version)


def _requirement(package: str, software: Software) -> Requirement | None:
    stated = map(Requirement, (*software.requirements, *software.gpu_requirements))
    return next((r for r in stated if canonicalize_name(r.name) == package), None)


def _pip(package: str, software: Software) -> str:
    requirement = _requirement(package, software)
    return str(requirement) if requirement is not None else package


def _major(version: str) -> int:
    """13 of "13.0"; 0 of nothing."""
    first = version.split(".")[0]
    return int(first) if first.isdigit() else 0


def _size(count: int) -> str:
    return f"{count / GIB:,.0f} GiB" if count >= GIB else f"{count / MIB:,.0f} MiB"
