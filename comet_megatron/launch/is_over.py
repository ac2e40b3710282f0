"""Whether a run has done all its steps: `python -m comet_megatron.launch.is_over RUN`, for jobs that are queued again.

Exit code: 0 all steps are done and in a checkpoint; 1 not yet; 2 there is no run, or it cannot be read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from comet_megatron.checkpoint.model_folder import read_progress
from comet_megatron.checkpoint.run_folder import find_checkpoints
from comet_megatron.errors import CheckpointError, ConfigError, report_user_errors

DONE, NOT_DONE = 0, 1


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1:
        raise ConfigError("is_over takes the folder of one run", way_out="name OUTPUT/train")
    run = Path(words[0])
    done, steps = steps_done(run), steps_asked(run)
    print(f"{run}: {done} of {steps} steps are done")
    return DONE if done >= steps else NOT_DONE


def steps_done(run: Path) -> int:
    """Of the newest sound checkpoint; 0 without one."""
    sound = find_checkpoints(run).sound
    return read_progress(sound[0]).step if sound else 0


def steps_asked(run: Path) -> int:
    """Of the configuration that the run was last started with.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = run / "config.yaml"
    if not path.exists():
        raise CheckpointError(f"{run} holds no run: there is no config.yaml", way_out="name OUTPUT/train")
    try:
        return int(yaml.safe_load(path.read_text())["train"]["steps"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
