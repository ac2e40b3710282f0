"""Doctor's measurements in real processes: figures of every link, and the name of an operation that hangs."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist

from comet_megatron.doctor import links
from comet_megatron.doctor.facts import GroupFacts
from comet_megatron.parallel.process import ProcessRank

HOSTS = ("a", "a", "b")


def measured(process: ProcessRank, seconds: float) -> GroupFacts:
    """The group as `torchrun tools/doctor.py` measures it, on made-up hosts."""
    links.LARGE_BYTES["gloo"] = 1 << 20
    return links.measure_group(
        process,
        torch.device("cpu"),
        host=HOSTS[process.rank],
        gpu_name="",
        versions=f"torch of rank {process.rank}",
        seconds=seconds,
        watch=links.Watch(60, links.end_process),
    )


def test_every_link_of_three_ranks_is_measured_and_all_ranks_know_all(pool):
    groups = pool(3).run(measured, 60.0)
    assert groups[0] == groups[1] == groups[2]
    group = groups[0]
    assert [(link.first, link.second, link.is_local) for link in group.links] == [
        (0, 1, True),
        (0, 2, False),
        (1, 2, False),
    ]
    assert all(link.bytes_per_s > 1e6 and 0 < link.latency_s < 1 for link in group.links)
    assert group.all_reduce_bytes_per_s > 1e6 and group.links_left_out == 0
    assert group.hosts == HOSTS and group.versions[2] == "torch of rank 2" and group.gpu_names == ()
    # Two "machines" on one clock.
    assert list(group.clock_offset_s) == ["b"]
    assert abs(group.clock_offset_s["b"]) <= group.clock_error_s + 1e-3


def test_links_are_left_out_when_time_is_over(pool):
    group = pool(3).run(measured, 1e-9)[1]
    assert (len(group.links), group.links_left_out) == (1, 2)


def late(process: ProcessRank) -> list[str]:
    """Rank 1 answers after the limit."""
    told: list[str] = []
    with links.Watch(0.2, told.append).limited("link 0 - 1"):
        if process.rank == 0:
            dist.recv(torch.zeros(1), 1)
        else:
            time.sleep(1.0)
            dist.send(torch.zeros(1), 0)
    return told


def test_an_operation_that_hangs_is_named(pool):
    assert pool(2).run(late)[0] == ["link 0 - 1: no answer within 0 s"]


def wrong_sum(process: ProcessRank) -> tuple[float, bool]:
    """Rank 1 adds something else than it should."""
    if process.rank == 1:
        get_rank, dist.get_rank = dist.get_rank, lambda: 7
    try:
        return links._time_all_reduce(torch.device("cpu"), 64, 1)
    finally:
        if process.rank == 1:
            dist.get_rank = get_rank


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrong_sum_is_noticed_by_all(pool, rank):
    assert pool(2).run(wrong_sum)[rank][1] is False
