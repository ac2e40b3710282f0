"""Judge what was measured of the processes together, and show the links as a table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from comet_megatron.doctor.facts import GroupFacts, LinkFacts
from comet_megatron.doctor.lines import OK, WRONG, Line

CLOCK_LIMIT_S = 0.5  # logs, checkpoints' times and certificates of machines further apart contradict each other
# A link below this share of the median of its kind is wrong: on a CPU that others use too, figures scatter.
SLOW = {"nccl": 0.5, "gloo": 0.1}
LINKS_TO_COMPARE = 3
TRACE = "NCCL_DEBUG=INFO torchrun ... tools/doctor.py"


def check_group(group: GroupFacts) -> list[Line]:
    """Every line about the processes together."""
    return [
        *([check_gpu_types(group)] if group.gpu_names else []),
        check_versions(group),
        check_clocks(group),
        check_all_reduce(group),
        check_links(group),
    ]


def check_gpu_types(group: GroupFacts) -> Line:
    """The slowest kind sets the pace for all, and the smallest the size."""
    kinds = sorted(set(group.gpu_names))
    if len(kinds) == 1:
        return Line(OK, "GPU types", f"{len(group.gpu_names)} x {kinds[0]}")
    what = "; ".join(f"{kind}: rank {_ranks(group.gpu_names, kind)}" for kind in kinds)
    return Line(WRONG, "GPU types", f"mixed: {what}", "torchrun ...   # on machines of one kind")


def check_versions(group: GroupFacts) -> Line:
    """All ranks run the same software: torch and Megatron talk to each other, not to another version."""
    kinds = sorted(set(group.versions))
    if len(kinds) == 1:
        return Line(OK, "same software", f"on {_processes(group)}: {kinds[0]}")
    what = "; ".join(f"{kind}: rank {_ranks(group.versions, kind)}" for kind in kinds)
    return Line(WRONG, "same software", what, "docker pull ...   # the same image on every machine")


def check_clocks(group: GroupFacts) -> Line:
    if not group.clock_offset_s:
        return Line(OK, "clocks", "all processes are on one machine")
    furthest = max(group.clock_offset_s, key=lambda host: abs(group.clock_offset_s[host]))
    offset_s = group.clock_offset_s[furthest]
    what = f"{furthest} is {abs(offset_s) * 1e3:,.1f} ms {'ahead of' if offset_s > 0 else 'behind'} {group.hosts[0]}"
    what += f" (within {group.clock_error_s * 1e3:,.1f} ms)"
    if abs(offset_s) - group.clock_error_s > CLOCK_LIMIT_S:
        return Line(WRONG, "clocks", what, f"ssh {furthest} chronyc makestep   # or timedatectl set-ntp true")
    return Line(OK, "clocks", what)


def check_all_reduce(group: GroupFacts) -> Line:
    if not group.all_reduce_bytes_per_s:
        return Line(WRONG, "all-reduce", "a sum over all ranks is not what it should be", TRACE)
    rate = f"{_rate(group.all_reduce_bytes_per_s)} bus bandwidth, {_latency(group.all_reduce_latency_s)}"
    return Line(OK, "all-reduce", f"{group.backend}, {_processes(group)}: {rate}")


def check_links(group: GroupFacts) -> Line:
    """Those that deliver something else, and those far slower than their like."""
    counted = f"{len(group.links)} measured"
    counted += f", {group.links_left_out} left out for want of time" if group.links_left_out else ""
    broken = [_name(link) for link in group.links if not link.bytes_per_s]
    if broken:
        return Line(WRONG, "links", f"what arrives is not what was sent: {', '.join(broken)}", TRACE)
    slow = slow_links(group)
    if slow:
        what = ", ".join(f"{_name(link)} {_rate(link.bytes_per_s)}" for link in slow)
        return Line(WRONG, "links", f"far slower than the others of their kind: {what}; {counted}", TRACE)
    return Line(OK, "links", counted)


def slow_links(group: GroupFacts) -> list[LinkFacts]:
    """Links below a share of the median of their kind: within a machine, or between two."""
    found = []
    for is_local in (True, False):
        alike = [link for link in group.links if link.is_local == is_local]
        if len(alike) >= LINKS_TO_COMPARE:
            limit = SLOW[group.backend] * median(link.bytes_per_s for link in alike)
            found += [link for link in alike if link.bytes_per_s < limit]
    return found


def link_table(group: GroupFacts) -> list[str]:
    """A line for each link, columns aligned."""
    slow = slow_links(group)
    rows = [("link", "within", "one way", "latency", "")]
    for link in group.links:
        remark = "wrong data" if not link.bytes_per_s else "slow" if link in slow else ""
        within = group.hosts[link.first]
        within = within if link.is_local else f"{within} - {group.hosts[link.second]}"
        ends = f"{link.first} - {link.second}"
        rows.append((ends, within, _rate(link.bytes_per_s), _latency(link.latency_s), remark))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _name(link: LinkFacts) -> str:
    return f"{link.first} - {link.second}"


def _processes(group: GroupFacts) -> str:
    machines = len(set(group.hosts))
    return f"{len(group.hosts)} processes on {machines} machine{'s' * (machines > 1)}"


def _ranks(values: Sequence[str], value: str) -> str:
    """`0, 1` or, of many, `0, 1, 2, ...`."""
    ranks = [str(rank) for rank, other in enumerate(values) if other == value]
    return ", ".join(ranks[:8]) + (", ..." if len(ranks) > 8 else "")


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:,.2f} GB/s"


def _latency(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"
