"""Show what a checkpoint holds and verify its checksums; exit code 2 if a file is damaged, with its name.

python tools/inspect_checkpoint.py RUN/checkpoints/step_0000100
python tools/inspect_checkpoint.py RUN              all checkpoints of a run, and which of them --resume takes
  --quick   sizes of all files, checksums of all but the weights: as --resume does before anything is loaded
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from comet_megatron.checkpoint.checksums import (
    CHECKSUMS,
    check_quickly,
    check_size,
    check_sums,
    files_of,
    is_large,
    read_checksums,
)
from comet_megatron.checkpoint.model_folder import (
    check_is_complete,
    read_description,
    read_progress,
    read_saved_with,
)
from comet_megatron.checkpoint.run_folder import all_checkpoints
from comet_megatron.config.schema import to_dict
from comet_megatron.errors import CheckpointError, CometError, report_user_errors


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkpoint, or a run")
    parser.add_argument("--quick", action="store_true", help="do not read the weights")
    return parser.parse_args(arguments)


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = parse_arguments(arguments)
    if not (of_run := all_checkpoints(given.folder)):
        show(given.folder)
        print(verify(given.folder, quick=given.quick), flush=True)
        return 0
    damaged = []
    for folder in of_run:
        try:
            print(f"{folder.name}  {verify(folder, quick=given.quick)}", flush=True)
        except CometError as error:
            print(f"{folder.name}  DAMAGED", flush=True)
            damaged.append(error)
    if damaged:
        listed = "\n".join(f"- {error.what}" for error in damaged)
        sound = [f for f in of_run if not any(str(f) in error.what for error in damaged)]
        way_out = f"--resume takes {sound[-1]}" if sound else "bring one back from a copy, or start anew with --fresh"
        raise CheckpointError(f"{len(damaged)} of {len(of_run)} checkpoints are damaged:\n{listed}", way_out=way_out)
    print(f"--resume takes {of_run[-1].name}")
    return 0


def show(folder: Path) -> None:
    """Step, model, layout, versions and files of one checkpoint.

    Raises:
        CheckpointError: it is no whole checkpoint, or what is said beside the weights is damaged.
    """
    check_is_complete(folder)
    check_quickly(folder)
    description = read_description(folder)
    if (folder / "progress.json").exists():
        progress = read_progress(folder)
        print(f"step       {progress.step}, of which {progress.skipped} skipped")
        print(
            f"data       fingerprint {progress.data_fingerprint}, seed {progress.data_seed}, "
            f"{progress.global_batch_size} sequences a step"
        )
        print(f"optimizer  trains {progress.trainable}{', ZeRO-1' if progress.zero1 else ''}")
    else:
        print("step       none: a starting checkpoint")
    print(f"model      {_listed(to_dict(description.architecture))}")
    print(
        f"memory     {_listed({**to_dict(description.memory), 'global_beacon_ids': description.memory.global_slots})}"
    )
    saved_with = read_saved_with(folder)
    print(f"layout     {_listed(saved_with.layout) if saved_with else 'not kept by the version that saved it'}")
    print(f"versions   {_listed(saved_with.versions) if saved_with else 'not kept by the version that saved it'}")
    print("files")
    for name in files_of(folder):
        print(f"  {(folder / name).stat().st_size:>15,}  {name}")


def verify(folder: Path, *, quick: bool) -> str:
    """What was verified, in words.

    Raises:
        CheckpointError: names the file that is damaged.
    """
    check_is_complete(folder)
    sums = read_checksums(folder)
    if sums is None:
        return "written to its end; saved before checkpoints had checksums, so nothing more can be said"
    for name, expected in sums.items():
        check_size(folder, name, expected)
    read = [name for name in sums if not (quick and is_large(name))]
    check_sums(folder, sums, read)
    total = sum(expected.bytes for expected in sums.values())
    uncovered = sorted(set(files_of(folder)) - set(sums))
    more = f"; not in {CHECKSUMS}: {', '.join(uncovered)}" if uncovered else ""
    return f"whole: {len(read)} of {len(sums)} files read, {total / 1e6:,.1f} MB in all{more}"


def _listed(values: dict[str, object]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


if __name__ == "__main__":
    sys.exit(main())
