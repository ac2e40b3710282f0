"""Fine-tune a CoMeT model.

One process:    python -m comet_megatron.train --config FILE [key=value ...]
Several:        torchrun --nproc-per-node N -m comet_megatron.train --config FILE [key=value ...]
Go on:          ... --resume        from the newest whole checkpoint
Go on or start: ... --resume auto   the same, or from step 0 where there is none yet: for jobs that are requeued
Start anew:     ... --fresh         what is in train.output is moved aside

Every problem of the configuration is found and told before a device, a process group or data is touched.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from comet_megatron.backend.capabilities import probe_capabilities
from comet_megatron.backend.environment import set_environment
from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.checkpoint.model_folder import read_description, read_progress
from comet_megatron.checkpoint.start import CheckpointStart, Start, open_start
from comet_megatron.config.load import LoadedConfig, load_config, save_config
from comet_megatron.config.rules import check_config, check_layout, check_start, require
from comet_megatron.config.schema import Config
from comet_megatron.errors import CometError, report_user_errors
from comet_megatron.parallel.hand_over import HandOver
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.train.continuation import (
    AUTO,
    LAST,
    NO,
    Continuation,
    plan_continuation,
    restarts_by_torchrun,
)
from comet_megatron.train.data import find_data, open_data
from comet_megatron.train.same_run import check_same_data, check_same_run


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="comet_megatron.train", description="Fine-tune a CoMeT model.", allow_abbrev=False
    )
    parser.add_argument("--config", required=True, type=Path, help="YAML file (examples/configs/)")
    parser.add_argument(
        "--resume",
        choices=(NO, LAST, AUTO),
        default=NO,
        metavar="auto",
        help="continue the run in train.output from its last whole checkpoint; auto: or start it, if it has none yet",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start from step 0; what is in train.output is moved aside, not deleted"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    return parser.parse_intermixed_args(resume_as_one(sys.argv[1:] if arguments is None else arguments))


def resume_as_one(arguments: Sequence[str]) -> list[str]:
    """`--resume` and `--resume auto` as --resume=WORD, so that argparse takes no override for its value."""
    joined: list[str] = []
    for word in arguments:
        if word == "--resume":
            joined.append(f"--resume={LAST}")
        elif word == AUTO and joined and joined[-1] == f"--resume={LAST}":
            joined[-1] = f"--resume={AUTO}"
        else:
            joined.append(word)
    return joined


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = parse_arguments(arguments)
    loaded = load_config(given.config, given.overrides)
    process = ProcessRank.from_environment()
    start, plan = check_before_start(loaded, process, resume=given.resume, fresh=given.fresh)
    if plan.newest is not None and given.resume == AUTO and _is_over(plan.newest, loaded.config, process):
        if process.rank == 0:  # fewer steps than before may be asked for, and then these are all
            save_config(loaded.config, Path(loaded.config.train.output) / "config.yaml")
        return 0
    sources = find_data(loaded.config)
    # Kept to the end: without torchrun's store the first process holds it, for the process group too.
    hand_over = HandOver("data") if sources.have_texts and process.world_size > 1 else None
    data = open_data(loaded.config, start, sources, process, hand_over)
    if plan.newest is not None:
        check_same_data(plan.newest, loaded.config, data.train)
    quiet_libraries()
    set_environment()  # before the first CUDA call
    import torch

    probe_capabilities()  # before Megatron, which expects an optional package to be whole
    from comet_megatron.train.build import build_trainer  # loads torch and Megatron: after the checks
    from comet_megatron.train.out_of_memory import explain_out_of_memory_of_building

    try:
        trainer, summary = build_trainer(loaded.config, process, start, data, plan=plan)
    except torch.OutOfMemoryError as error:
        raise explain_out_of_memory_of_building(error, loaded.config, start.description, process) from None
    if trainer.layout.is_main:
        save_config(loaded.config, Path(loaded.config.train.output) / "config.yaml")
    trainer.run(summary)
    return 0


def check_before_start(
    loaded: LoadedConfig, process: ProcessRank, *, resume: str, fresh: bool = False
) -> tuple[Start, Continuation]:
    """The model to start from, which is the run's own newest checkpoint where it goes on, and what it goes on from.

    Raises:
        ConfigError: all problems of the configuration, the model, the layout and the output folder together.
    """
    config, where = loaded.config, loaded.where
    problems: list[CometError] = list(check_config(config, where=where))
    run, start, plan = Path(config.train.output), None, None
    try:
        plan = plan_continuation(run, resume=resume, fresh=fresh, restarts=restarts_by_torchrun())
        if plan.newest is not None:
            start = CheckpointStart(plan.newest, read_description(plan.newest))
            problems += check_same_run(plan.newest, config, start.description, may_be_over=resume == AUTO)
    except CometError as error:
        problems.append(error)
    try:
        if start is not None or not check_start(config, where):  # else it may not even be named
            start = start or open_start(config)
            model = start.description
            problems += check_layout(
                config, model.architecture, model.memory, world_size=process.world_size, where=where
            )
    except CometError as error:
        problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    require(problems)
    assert start is not None and plan is not None
    return start, plan


def _is_over(checkpoint: Path, config: Config, process: ProcessRank) -> bool:
    """Whether the run has done all its steps; says so. A job that is requeued once too often is no mistake."""
    step = read_progress(checkpoint).step
    if step < config.train.steps:
        return False
    if process.rank == 0:
        print(f"nothing to do: the run has done {step} of {config.train.steps} steps; its checkpoint is {checkpoint}")
    return True
