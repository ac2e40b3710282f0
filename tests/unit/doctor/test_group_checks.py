"""Doctor's judgement of processes together: mixed GPUs, clocks, sums, and the one link that is not like the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comet_megatron.doctor.facts import GroupFacts, LinkFacts
from comet_megatron.doctor.group_checks import check_group, link_table
from comet_megatron.doctor.lines import OK, WRONG, Line
from comet_megatron.doctor.links import plan_links

PAIRS = plan_links(4)
GROUP = GroupFacts(
    backend="nccl",
    hosts=("a", "a", "b", "b"),
    gpu_names=("NVIDIA H200",) * 4,
    versions=("torch 2.10.0",) * 4,
    clock_offset_s={"b": -0.004},
    clock_error_s=0.001,
    all_reduce_bytes_per_s=48e9,
    all_reduce_latency_s=40e-6,
    links=tuple(LinkFacts(i, j, i // 2 == j // 2, 200e9 if i // 2 == j // 2 else 48e9, 2e-5) for i, j in PAIRS),
)


def line_of(name: str, **changes: object) -> Line:
    return next(line for line in check_group(replace(GROUP, **changes)) if line.name == name)


def test_a_sound_group_is_ok_in_every_line():
    assert [line.state for line in check_group(GROUP)] == [OK] * 5
    assert "b is 4.0 ms behind a (within 1.0 ms)" in line_of("clocks").what
    assert line_of("all-reduce").what == "nccl, 4 processes on 2 machines: 48.00 GB/s bus bandwidth, 40 us"


def changed_link(number: int, **changes: object) -> tuple[LinkFacts, ...]:
    return (*GROUP.links[:number], replace(GROUP.links[number], **changes), *GROUP.links[number + 1 :])


@pytest.mark.parametrize(
    "name, changes, what",
    [
        ("GPU types", {"gpu_names": ("H200", "H200", "A100", "H200")}, "mixed: A100: rank 2; H200: rank 0, 1, 3"),
        ("same software", {"versions": ("torch 2.10", "torch 2.10", "torch 2.9", "torch 2.9")}, "torch 2.9: rank 2, 3"),
        ("clocks", {"clock_offset_s": {"b": 3.0}}, "b is 3,000.0 ms ahead of a"),
        ("all-reduce", {"all_reduce_bytes_per_s": 0.0}, "not what it should be"),
        ("links", {"links": changed_link(2, bytes_per_s=0.0)}, "what arrives is not what was sent: 0 - 3"),
        ("links", {"links": changed_link(2, bytes_per_s=10e9)}, "0 - 3 10.00 GB/s; 6 measured"),
    ],
)
def test_a_fault_between_processes_is_named_with_its_ranks(name, changes, what):
    line = line_of(name, **changes)
    assert line.state == WRONG and what in line.what and line.mend


def test_a_link_within_a_machine_is_not_compared_with_one_between_machines():
    assert line_of("links", links=changed_link(2, bytes_per_s=30e9)).state == OK  # 200 GB/s within
    assert line_of("links", backend="gloo", links=changed_link(2, bytes_per_s=10e9)).state == OK  # a CPU's scatter


def test_links_that_time_did_not_allow_are_told():
    assert line_of("links", links_left_out=3).what == "6 measured, 3 left out for want of time"


def test_the_table_has_a_line_for_each_link_and_marks_the_slow_one():
    table = link_table(replace(GROUP, links=changed_link(2, bytes_per_s=10e9)))
    assert len(table) == 7
    assert table[1].split() == ["0", "-", "1", "a", "200.00", "GB/s", "20", "us"]
    assert table[3].split() == ["0", "-", "3", "a", "-", "b", "10.00", "GB/s", "20", "us", "slow"]


@pytest.mark.parametrize("world_size, count", [(2, 1), (8, 28), (9, 9), (64, 64)])
def test_few_ranks_try_all_links_and_many_those_of_a_ring(world_size, count):
    pairs = plan_links(world_size)
    assert len(set(map(frozenset, pairs))) == len(pairs) == count
    assert {rank for pair in pairs for rank in pair} == set(range(world_size))
