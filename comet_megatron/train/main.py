"""Fine-tune a CoMeT model.

One process:    python -m comet_megatron.train --config FILE [key=value ...]
Several:        torchrun --nproc-per-node N -m comet_megatron.train --config FILE [key=value ...]
Go on:          ... --resume

Every problem of the configuration is found and told before a device, a process group or data is touched.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.checkpoint.model_folder import (
    TOKENIZER,
    ModelDescription,
    differences,
    read_description,
    read_progress,
)
from comet_megatron.checkpoint.run_folder import check_is_new_run, newest_checkpoint
from comet_megatron.config.load import LoadedConfig, load_config, save_config
from comet_megatron.config.rules import check_config, check_layout, require
from comet_megatron.config.schema import Config
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.errors import CheckpointError, CometError, ConfigError, DataError, report_user_errors
from comet_megatron.parallel.process import ProcessRank


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="comet_megatron.train", description="Fine-tune a CoMeT model.")
    parser.add_argument("--config", required=True, type=Path, help="YAML file (examples/configs/)")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in train.output from its last checkpoint"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the file's")
    return parser.parse_args(arguments)


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = parse_arguments(arguments)
    loaded = load_config(given.config, given.overrides)
    process = ProcessRank.from_environment()
    start, description = check_before_start(loaded, process, resume=given.resume)
    train_data, eval_data = open_data(loaded.config, description, tokenizer=start / TOKENIZER)
    quiet_libraries()
    from comet_megatron.train.build import build_trainer  # loads torch and Megatron: after the checks

    trainer, summary = build_trainer(
        loaded.config, process, start, description, train_data, eval_data, resume=given.resume
    )
    if trainer.layout.is_main:
        save_config(loaded.config, Path(loaded.config.train.output) / "config.yaml")
    trainer.run(summary)
    return 0


def check_before_start(loaded: LoadedConfig, process: ProcessRank, *, resume: bool) -> tuple[Path, ModelDescription]:
    """The checkpoint to start from and its model.

    Raises:
        ConfigError: all problems of the configuration, the model, the layout and the output folder together.
    """
    config, where = loaded.config, loaded.where
    problems: list[CometError] = list(check_config(config, where=where))
    run = Path(config.train.output)
    start, description = Path(config.model.path), None
    try:
        description = read_description(start)
        problems += check_layout(
            config, description.architecture, description.memory, world_size=process.world_size, where=where
        )
    except CometError as error:
        problems.append(error)
    try:
        if resume:
            start = newest_checkpoint(run)
            check_same_run(start, config, description)
        else:
            check_is_new_run(run)
    except CometError as error:
        problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    require(problems)
    return start, description


def check_same_run(checkpoint: Path, config: Config, description: ModelDescription | None) -> None:
    """
    Raises:
        CheckpointError: the run to resume has a model of other sizes, other trainable parts, or is over.
    """
    found, progress = read_description(checkpoint), read_progress(checkpoint)
    if description is not None and (other := differences(found, description)):
        raise CheckpointError(
            f"{checkpoint} is of another model than {config.model.path}: {'; '.join(other[:5])}",
            way_out="resume with the model.path the run was started with",
        )
    if progress.trainable != config.train.trainable:
        raise CheckpointError(
            f"the run was started with train.trainable={progress.trainable}, not {config.train.trainable}",
            way_out="resume with the same, or start a new run from its exported model",
        )
    if progress.step >= config.train.steps:
        raise ConfigError(
            f"the run has done {progress.step} steps already and train.steps={config.train.steps}",
            way_out="raise train.steps, or export its last checkpoint with tools/convert_to_hf.py",
        )


def open_data(
    config: Config, description: ModelDescription, *, tokenizer: Path
) -> tuple[ShardDataset, ShardDataset | None]:
    """Training and held-out shards.

    Raises:
        DataError: missing or damaged shards, or shards made with another tokenizer than the model's.
    """
    opened = [ShardDataset(folder) if folder else None for folder in (config.data.train, config.data.eval)]
    for key, data in zip(("data.train", "data.eval"), opened, strict=True):
        if data is not None:
            check_fits(data, key, description)
    return opened[0], opened[1] if config.train.eval_every else None


def check_fits(data: ShardDataset, key: str, description: ModelDescription) -> None:
    """
    Raises:
        DataError: no samples, or ids that are not text ids of this model.
    """
    again = "prepare the data again with the model's tokenizer (tools/prepare_data.py)"
    if len(data) == 0:
        raise DataError(f"{key}={data.folder} holds no samples", way_out=again)
    if data.manifest.vocab_size > description.memory.first_new_id:
        raise DataError(
            f"{key}={data.folder} was made with a tokenizer of {data.manifest.vocab_size} ids, "
            f"the model's text has {description.memory.first_new_id}",
            way_out=again,
        )
