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
    ModelDescription,
    Progress,
    differences,
    read_description,
    read_progress,
)
from comet_megatron.checkpoint.run_folder import check_is_new_run, newest_checkpoint
from comet_megatron.checkpoint.start import CheckpointStart, Start, open_start
from comet_megatron.config.load import LoadedConfig, load_config, save_config
from comet_megatron.config.rules import HF_PREFIX, check_config, check_layout, check_start, require
from comet_megatron.config.schema import Config
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.tokenizer import load_tokenizer, tokenizer_fingerprint
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
    return parser.parse_intermixed_args(arguments)


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = parse_arguments(arguments)
    loaded = load_config(given.config, given.overrides)
    process = ProcessRank.from_environment()
    start = check_before_start(loaded, process, resume=given.resume)
    train_data, eval_data = open_data(loaded.config, start)
    if given.resume:
        check_same_data(read_progress(start.path), train_data)
    quiet_libraries()
    from comet_megatron.train.build import build_trainer  # loads torch and Megatron: after the checks

    trainer, summary = build_trainer(loaded.config, process, start, train_data, eval_data, resume=given.resume)
    if trainer.layout.is_main:
        save_config(loaded.config, Path(loaded.config.train.output) / "config.yaml")
    trainer.run(summary)
    return 0


def check_before_start(loaded: LoadedConfig, process: ProcessRank, *, resume: bool) -> Start:
    """The model to start from: with `resume` the run's own newest checkpoint.

    Raises:
        ConfigError: all problems of the configuration, the model, the layout and the output folder together.
    """
    config, where = loaded.config, loaded.where
    problems: list[CometError] = list(check_config(config, where=where))
    run, start = Path(config.train.output), None
    try:
        if resume:
            newest = newest_checkpoint(run)
            start = CheckpointStart(newest, read_description(newest))
            problems += check_same_run(newest, config, start.description)
        else:
            check_is_new_run(run)
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
    assert start is not None
    return start


def check_same_run(checkpoint: Path, config: Config, description: ModelDescription) -> list[CometError]:
    """What a resumed run would have otherwise than the run it continues."""
    progress, problems = read_progress(checkpoint), []
    origin = Path(config.model.path or config.model.init_from.removeprefix(HF_PREFIX))
    if origin.exists() and (other := differences(description, _description_of(config) or description)):
        what = f"{checkpoint} is of another model than {origin}: {'; '.join(other[:5])}"
        key = "model.init_from" if config.model.init_from else "model.path"
        problems.append(CheckpointError(what, way_out=f"resume with the {key} the run was started with"))
    if progress.step >= config.train.steps:
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


def check_same_data(progress: Progress, data: ShardDataset) -> None:
    """
    Raises:
        DataError: the run was started with other training data: samples would be skipped or repeated.
    """
    if data.manifest.fingerprint != progress.data_fingerprint:
        raise DataError(
            f"data.train={data.folder} is not the data the run was started with",
            way_out="resume with the same shards; for others, start a new run from its exported model",
        )


def open_data(config: Config, start: Start) -> tuple[ShardDataset, ShardDataset | None]:
    """Training and held-out shards.

    Raises:
        DataError: missing or damaged shards, or shards made with another tokenizer than the model's.
    """
    train = ShardDataset(config.data.train)
    check_fits(train, "data.train", start)
    if not (config.data.eval and config.train.eval_every):
        return train, None
    held_out = ShardDataset(config.data.eval)
    check_fits(held_out, "data.eval", start)
    return train, held_out


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
