"""Examine this machine alone, or all machines of a run together: gather, judge, and put the lines in order."""

from __future__ import annotations

from contextlib import ExitStack

from comet_megatron.doctor.checks import MEGATRON, TE, TORCH, check_machine, check_software
from comet_megatron.doctor.facts import Machine, Software
from comet_megatron.doctor.gather import gather_machine, gather_software
from comet_megatron.doctor.lines import WRONG, Line, merge_hosts
from comet_megatron.errors import DeviceError
from comet_megatron.parallel.process import ProcessRank

SAME_EVERYWHERE = (TORCH, MEGATRON, TE)


def examine_alone(*, with_machine: bool) -> list[Line]:
    """What is installed and, unless left out, this machine."""
    software = gather_software()
    return [*check_software(software), *(check_machine(gather_machine(), software) if with_machine else [])]


def examine_together(process: ProcessRank, *, with_machine: bool, seconds: float) -> tuple[list[Line], list[str]]:
    """All processes of torchrun: the lines, the same on every rank, and the table of links.

    The first process of each machine looks at it. Communicates on the world; ends the process if an operation hangs.
    """
    import torch
    import torch.distributed as dist

    from comet_megatron.backend.environment import set_environment
    from comet_megatron.doctor.group_checks import check_group, link_table
    from comet_megatron.doctor.links import OPERATION_LIMIT_S, Watch, end_process, joined, measure_group

    set_environment()
    software = gather_software() if process.local_rank == 0 else Software(python=(0, 0, 0))
    machine = gather_machine(processes=process.local_world_size)
    wants_gpu = with_machine and torch.cuda.is_available()
    if wants_gpu and process.local_world_size > torch.cuda.device_count():
        return _refuse(process, machine, software), []
    device = torch.device("cuda", process.local_rank) if wants_gpu else torch.device("cpu")
    if wants_gpu:
        torch.cuda.set_device(device)
    watch = Watch(OPERATION_LIMIT_S, end_process)
    own: list[Line] | None = None
    if process.local_rank == 0:
        own = [*check_software(software), *(check_machine(machine, software) if with_machine else [])]
    with ExitStack() as stack:
        try:
            stack.enter_context(joined(device))
        except (RuntimeError, ValueError) as error:  # what is wrong with this machine may be the cause
            return [*(own or []), _no_group(error)], []
        with watch.limited("the lines of all machines"):
            told: list[tuple[int, str, list[Line] | None]] = [(0, "", None)] * process.world_size
            dist.all_gather_object(told, (process.rank, machine.host, own))
        # Two agents on one machine, as in a rehearsal: each counts as a machine.
        hosts = [host for _, host, lines in told if lines is not None]
        by_host = {
            host if hosts.count(host) == 1 else f"{host}, rank {rank}": lines
            for rank, host, lines in told
            if lines is not None
        }
        group = measure_group(
            process,
            device,
            host=machine.host,
            gpu_name=machine.gpus[process.local_rank].name if wants_gpu else "",
            versions=_versions(),
            seconds=seconds,
            watch=watch,
        )
    return [*merge_hosts(by_host), *check_group(group)], link_table(group)


def _no_group(error: Exception) -> Line:
    what = f"the processes do not find each other: {str(error).strip().splitlines()[0]}"
    return Line(WRONG, "process group", what, mend="start all of them, and let port MASTER_PORT of MASTER_ADDR through")


def _refuse(process: ProcessRank, machine: Machine, software: Software) -> list[Line]:
    """More processes than GPUs: no group can be built, so only this machine is judged, which its first process tells.

    Raises:
        DeviceError: on another machine than that of rank 0, whose first process is the only one that exits with 1.
    """
    lines = [*check_software(software), *check_machine(machine, software)] if process.local_rank == 0 else []
    if process.local_rank == 0 and process.rank != 0:
        raise DeviceError("; ".join(f"{line.name}: {line.what}" for line in lines if line.state == WRONG))
    return lines


def _versions() -> str:
    """Of this process, without importing more than is there."""
    import importlib.metadata

    found = []
    for name in SAME_EVERYWHERE:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
