"""Look for what is missing or wrong: in the installation, on this machine and, under torchrun, between the processes.

  python tools/doctor.py                                   this machine
  torchrun --nproc-per-node N tools/doctor.py              with clocks, all-reduce and every link between two ranks
  python tools/doctor.py --strict --no-gpu                 in an image, while it is built
  python tools/doctor.py --freeze FILE                     write what torch, Transformer Engine and apex are
  python tools/doctor.py --unchanged FILE                  compare with that

Exit code: 0 nothing is wrong, and nothing that CPU runs need is missing; 1 otherwise, or with --strict if anything at
all is missing; 2 a mistake on the command line. Nothing is changed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.doctor.examine import examine_alone, examine_together
from comet_megatron.doctor.frozen import compare_frozen, describe_frozen, freeze, read_frozen
from comet_megatron.doctor.lines import exit_code, show, summarize
from comet_megatron.errors import ConfigError, report_user_errors
from comet_megatron.parallel.process import ProcessRank


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strict", action="store_true", help="what is missing counts as wrong")
    parser.add_argument(
        "--no-gpu", action="store_true", help="only what is installed: no driver, GPUs, limits of the machine"
    )
    parser.add_argument(
        "--seconds", type=float, default=60, metavar="S", help="time for the links, under torchrun (default: 60)"
    )
    frozen = parser.add_mutually_exclusive_group()
    frozen.add_argument("--freeze", type=Path, metavar="FILE", help="write the versions that no install may change")
    frozen.add_argument("--unchanged", type=Path, metavar="FILE", help="compare with what --freeze wrote")
    return parser.parse_args(arguments)


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = parse_arguments(arguments)
    if not given.seconds > 0:
        raise ConfigError(f"--seconds {given.seconds:g} must be more than 0")
    if given.freeze is not None:
        for name, what in freeze(given.freeze).items():
            print(f"{name:<27} {what}")
        return 0
    if given.unchanged is not None:
        lines = compare_frozen(read_frozen(given.unchanged), describe_frozen())
        print(show(lines))
        return exit_code(lines, strict=given.strict)
    quiet_libraries()
    process = ProcessRank.from_environment()
    if process.world_size == 1 or "MASTER_ADDR" not in os.environ:  # a scheduler may set ranks and start one program
        lines, table = examine_alone(with_machine=not given.no_gpu), []
    else:
        lines, table = examine_together(process, with_machine=not given.no_gpu, seconds=given.seconds)
    if process.rank == 0:
        print(
            "\n".join([show(lines), "", *table, *([""] if table else []), summarize(lines, strict=given.strict)]),
            flush=True,
        )
    return exit_code(lines, strict=given.strict) if process.rank == 0 else 0  # torchrun reports each that fails


if __name__ == "__main__":
    sys.exit(main())
