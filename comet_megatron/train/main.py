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
from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.checkpoint.model_folder import (
    ModelDescription,
    Progress,
    differences,
    read_description,
    read_progress,
)
from comet_megatron.checkpoint.start import CheckpointStart, Start, open_start
from comet_megatron.config.load import LoadedConfig, load_config, save_config
from comet_megatron.config.rules import HF_PREFIX, check_config, check_layout, check_start, require
from comet_megatron.config.schema import Config
from comet_megatron.data.cuts import CutPlan, parse_ways, sentence_end_ids
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from comet_megatron.data.training_data import TrainingData
from comet_megatron.errors import CheckpointError, CometError, ConfigError, DataError, report_user_errors
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.train.continuation import (
    AUTO,
    LAST,
    NO,
    Continuation,
    plan_continuation,
    restarts_by_torchrun,
)


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
    return parser.parse_intermixed_args(_resume_as_one(sys.argv[1:] if arguments is None else arguments))


def _resume_as_one(arguments: Sequence[str]) -> list[str]:
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
        return 0
    train_data, eval_data = open_data(loaded.config, start)
    if plan.newest is not None:
        check_same_data(read_progress(plan.newest), train_data)
    quiet_libraries()
    import torch

    probe_capabilities()  # before Megatron, which expects an optional package to be whole
    from comet_megatron.train.build import build_trainer  # loads torch and Megatron: after the checks
    from comet_megatron.train.out_of_memory import explain_out_of_memory_of_building

    try:
        trainer, summary = build_trainer(loaded.config, process, start, train_data, eval_data, plan=plan)
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


def check_same_run(
    checkpoint: Path, config: Config, description: ModelDescription, *, may_be_over: bool = False
) -> list[CometError]:
    """What a resumed run would have otherwise than the run it continues."""
    progress, problems = read_progress(checkpoint), []
    origin = Path(config.model.path or config.model.init_from.removeprefix(HF_PREFIX))
    if origin.exists() and (other := differences(description, _description_of(config) or description)):
        what = f"{checkpoint} is of another model than {origin}: {'; '.join(other[:5])}"
        key = "model.init_from" if config.model.init_from else "model.path"
        problems.append(CheckpointError(what, way_out=f"resume with the {key} the run was started with"))
    if progress.step >= config.train.steps and not may_be_over:
        what = f"the run has done {progress.step} steps already and train.steps={config.train.steps}"
        way_out = "raise train.steps, or export its last checkpoint with tools/convert_to_hf.py"
        problems.append(ConfigError(what, way_out=way_out))
    for key, was, now in (
        ("train.trainable", progress.trainable, config.train.trainable),
        ("parallel.zero1", progress.zero1, config.parallel.zero1),
        ("train.global_batch_size", progress.global_batch_size, config.train.global_batch_size),
        ("data.seed", progress.data_seed, config.data.seed),
    ):
        if was != now:
            what = f"the run was started with {key}={was}, not {now}"
            way_out = "resume with the same; for another, start a new run from its exported model"
            problems.append(ConfigError(what, way_out=way_out))
    return problems


def _description_of(config: Config) -> ModelDescription | None:
    """The model that the run was started from, if it is still whole."""
    try:
        return open_start(config).description
    except CometError:
        return None


def check_same_data(progress: Progress, data: TrainingData) -> None:
    """
    Raises:
        DataError: the run was started with other training data: samples would be skipped or repeated.
    """
    if data.fingerprint != progress.data_fingerprint:
        raise DataError(
            f"data.train={data.describe()} is not the data the run was started with, or is cut in another way",
            way_out="resume with the same shards and data.chunks; for others, start a new run from its exported model",
        )


def open_data(config: Config, start: Start) -> tuple[TrainingData, ShardDataset | None]:
    """Training and held-out shards.

    Raises:
        DataError: missing or damaged shards, or shards made with another tokenizer than the model's.
        ConfigError: data.chunks names no way of cutting.
    """
    cuts = plan_cuts(config, start)
    shards = ShardDataset(config.data.train)
    check_fits(shards, "data.train", start)
    train = TrainingData([shards], seed=config.data.seed, cuts=cuts)
    if not (config.data.eval and config.train.eval_every):
        return train, None
    held_out = ShardDataset(config.data.eval)
    check_fits(held_out, "data.eval", start)
    return train, held_out


def plan_cuts(config: Config, start: Start) -> CutPlan:
    """How the run's sequences are cut into chunks.

    Raises:
        ConfigError: data.chunks names no way of cutting.
    """
    ways, memory = parse_ways(config.data.chunks), start.description.memory
    ends = sentence_end_ids(load_tokenizer(start.tokenizer)) if "sentence" in ways else frozenset()
    return CutPlan(ways, memory.chunk_size, memory.stride, config.data.seed, config.data.max_stride, ends)


def check_fits(data: ShardDataset, key: str, start: Start) -> None:
    """
    Raises:
        DataError: no samples, or ids that another tokenizer than the model's made.
    """
    again = "prepare the data again with the model's tokenizer (tools/prepare_data.py)"
    if len(data) == 0:
        raise DataError(f"{key}={data.folder} holds no samples", way_out=again)
    made_with, description = data.manifest.tokenizer_fingerprint, start.description
    # The checkpoint's own tokenizer has CoMeT's tokens too; it makes the same text ids.
    if made_with != description.text_tokenizer and made_with != tokenizer_fingerprint(load_tokenizer(start.tokenizer)):
        raise DataError(
            f"{key}={data.folder} was made with another tokenizer of {data.manifest.vocab_size} ids, "
            f"the model's text has {description.memory.first_new_id}",
            way_out=again,
        )
