"""Measure what connects the processes of a run: clocks, all-reduce, and every link between two ranks, within a time.

All ranks call `measure_group` together. An operation that does not end in time ends the process with its name, for a
link that hangs cannot be asked again.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import combinations

import torch
import torch.distributed as dist

from comet_megatron.doctor.facts import GroupFacts, LinkFacts
from comet_megatron.parallel.process import ProcessRank

OPERATION_LIMIT_S = 20.0
ALL_PAIRS_UP_TO = 8  # ranks; of more, the neighbours in a ring
LARGE_BYTES = {"nccl": 256 << 20, "gloo": 16 << 20}
SMALL_BYTES = 64
LARGE_TIMES, SMALL_TIMES, CLOCK_TIMES = 4, 50, 10
HANG_EXIT_CODE = 1


class Watch:
    """Calls `on_hang` with the name of an operation that takes too long."""

    def __init__(self, limit_s: float, on_hang: Callable[[str], None]) -> None:
        self.limit_s, self.on_hang = limit_s, on_hang

    @contextmanager
    def limited(self, name: str) -> Iterator[None]:
        """Inside is one operation."""
        timer = threading.Timer(self.limit_s, self.on_hang, (f"{name}: no answer within {self.limit_s:.0f} s",))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def end_process(message: str) -> None:
    """Say what hangs, and end: nothing else frees a process from a collective."""
    print(f"wrong    {'links':<18} rank {os.environ.get('RANK', '0')}: {message}", file=sys.stderr, flush=True)
    os._exit(HANG_EXIT_CODE)


@contextmanager
def joined(device: torch.device) -> Iterator[str]:
    """The process group of torchrun's environment; its backend."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=2 * OPERATION_LIMIT_S + 20))
    try:
        yield backend
    finally:
        dist.destroy_process_group()


def measure_group(
    process: ProcessRank,
    device: torch.device,
    *,
    host: str,
    gpu_name: str,
    versions: str,
    seconds: float,
    watch: Watch,
) -> GroupFacts:
    """Everything about the processes together; the same on every rank.

    Args:
        device: of this rank.
        host, gpu_name, versions: of this rank; gpu_name is empty on CPU.
        seconds: after which no further link is begun.
    """
    end = time.monotonic() + seconds
    backend = dist.get_backend()
    large = LARGE_BYTES[backend]
    with watch.limited("the first collective of all ranks"):
        about: list[tuple[str, str, str]] = [("", "", "")] * process.world_size
        dist.all_gather_object(about, (host, gpu_name, versions))
    hosts, gpu_names, all_versions = (tuple(part) for part in zip(*about, strict=True))
    offsets, error_s = _measure_clocks(process.rank, hosts, device, watch)
    with watch.limited("all-reduce"):
        latency_s = _time_all_reduce(device, SMALL_BYTES, SMALL_TIMES)[0]
        seconds_each, is_right = _time_all_reduce(device, large, LARGE_TIMES)
    bus = 2 * (process.world_size - 1) / process.world_size * large / seconds_each
    links, pairs = [], plan_links(process.world_size)
    for first, second in pairs:
        with watch.limited(f"link {first} - {second}"):
            link = _measure_link(process.rank, first, second, hosts, device, large)
            told: list[tuple[bool, LinkFacts | None]] = [(time.monotonic() < end, link)]
            dist.broadcast_object_list(told, src=first)  # only the two know; the first tells all
        links.append(told[0][1])
        with watch.limited(f"all ranks after link {first} - {second}"):
            go_on = [time.monotonic() < end]
            dist.broadcast_object_list(go_on, src=0)
        if not go_on[0]:
            break
    return GroupFacts(
        backend=backend,
        hosts=hosts,
        gpu_names=gpu_names if any(gpu_names) else (),
        versions=all_versions,
        clock_offset_s=offsets,
        clock_error_s=error_s,
        all_reduce_bytes_per_s=bus if is_right else 0.0,
        all_reduce_latency_s=latency_s,
        links=tuple(link for link in links if link is not None),
        links_left_out=len(pairs) - len(links),
    )


def plan_links(world_size: int) -> list[tuple[int, int]]:
    """Pairs of ranks: all of a few, the neighbours in a ring of many."""
    if world_size <= ALL_PAIRS_UP_TO:
        return list(combinations(range(world_size), 2))
    return [(rank, (rank + 1) % world_size) for rank in range(world_size)]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time_all_reduce(device: torch.device, size: int, times: int) -> tuple[float, bool]:
    """Seconds of one all-reduce on the slowest rank, and whether the sums are right."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    tensor = torch.full((size // 4,), float(rank + 1), device=device)
    dist.all_reduce(tensor)  # also the first use of the links
    is_right = bool((tensor == world_size * (world_size + 1) / 2).all())
    tensor.zero_()  # sums of sums would overflow
    dist.barrier()
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(times):
        dist.all_reduce(tensor)
    _synchronise(device)
    result = torch.tensor([(time.perf_counter() - began) / times, float(not is_right)], device=device)
    dist.all_reduce(result, op=dist.ReduceOp.MAX)
    return float(result[0]), not bool(result[1])


def _measure_link(
    rank: int, first: int, second: int, hosts: Sequence[str], device: torch.device, size: int
) -> LinkFacts | None:
    """One link, both ways in turn; None on ranks that have no part in it. The others wait."""
    if rank not in (first, second):
        return None
    other, begins = second if rank == first else first, rank == first
    small, large = torch.zeros(SMALL_BYTES // 4, device=device), torch.zeros(size // 4, device=device)
    pattern = torch.arange(size // 4, device=device, dtype=torch.float32)
    _round_trip(pattern if begins else large, other, begins=begins)  # opens the link
    is_right = begins or bool(torch.equal(large, pattern))
    latency_s = _time_round_trips(small, other, SMALL_TIMES, device, begins=begins) / 2
    seconds_each = _time_round_trips(large, other, LARGE_TIMES, device, begins=begins) / 2
    verdict = torch.tensor([float(is_right)], device=device)
    if begins:
        dist.recv(verdict, other)
    else:
        dist.send(verdict, other)
    return LinkFacts(
        first=first,
        second=second,
        is_local=hosts[first] == hosts[second],
        bytes_per_s=size / seconds_each if bool(verdict[0]) else 0.0,
        latency_s=latency_s,
    )


def _round_trip(tensor: torch.Tensor, other: int, *, begins: bool) -> None:
    for sends in (begins, not begins):
        if sends:
            dist.send(tensor, other)
        else:
            dist.recv(tensor, other)


def _time_round_trips(tensor: torch.Tensor, other: int, times: int, device: torch.device, *, begins: bool) -> float:
    """Seconds of one round trip."""
    _round_trip(tensor, other, begins=begins)
    _synchronise(device)
    began = time.perf_counter()
    for _ in range(times):
        _round_trip(tensor, other, begins=begins)
    _synchronise(device)
    return (time.perf_counter() - began) / times


def _measure_clocks(
    rank: int, hosts: Sequence[str], device: torch.device, watch: Watch
) -> tuple[dict[str, float], float]:
    """Offset of each other machine's clock to rank 0's, and the largest uncertainty; the same on every rank.

    Rank 0 asks; the answer is taken to be of the middle between question and answer, from the quickest of several.
    """
    offsets, error_s = {}, 0.0
    for host in dict.fromkeys(hosts):
        asked = hosts.index(host)
        if asked == 0:
            continue
        with watch.limited(f"clock of rank {asked}"):
            if rank == 0:
                offsets[host], half_trip_s = min((_ask_clock(asked, device) for _ in range(CLOCK_TIMES)), key=_error)
                error_s = max(error_s, half_trip_s)
            elif rank == asked:
                for _ in range(CLOCK_TIMES):
                    _answer_clock(device)
    with watch.limited("clocks of all machines"):
        told = [(offsets, error_s)]
        dist.broadcast_object_list(told, src=0)
    return told[0]


def _ask_clock(asked: int, device: torch.device) -> tuple[float, float]:
    answer = torch.zeros(1, dtype=torch.float64, device=device)
    began = time.time()
    dist.send(answer, asked)
    dist.recv(answer, asked)
    theirs, ended = float(answer[0]), time.time()
    return theirs - (began + ended) / 2, (ended - began) / 2


def _answer_clock(device: torch.device) -> None:
    question = torch.zeros(1, dtype=torch.float64, device=device)
    dist.recv(question, 0)
    dist.send(question.fill_(time.time()), 0)


def _error(asked: tuple[float, float]) -> float:
    return asked[1]
