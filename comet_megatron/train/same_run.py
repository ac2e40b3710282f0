"""What a resumed run must have in common with the run it continues; what differs is named."""

from __future__ import annotations

from pathlib import Path

from comet_megatron.checkpoint.model_folder import (
    CONFIG,
    TOKENIZER,
    ModelDescription,
    differences,
    read_progress,
)
from comet_megatron.checkpoint.start import CheckpointStart, Start, open_start
from comet_megatron.config.load import load_config
from comet_megatron.config.rules import HF_PREFIX
from comet_megatron.config.schema import Config, to_dict
from comet_megatron.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from comet_megatron.data.training_data import TrainingData
from comet_megatron.errors import CheckpointError, CometError, ConfigError, DataError

_SETTINGS = ("chunks", "max_stride", "pack_tokens", "sequence_length")  # of the section data, for what a step reads


def check_same_run(
    checkpoint: Path, config: Config, description: ModelDescription, *, may_be_over: bool = False
) -> list[CometError]:
    """What a resumed run would have otherwise than the run it continues."""
    progress = read_progress(checkpoint)
    problems: list[CometError] = [*_check_model(checkpoint, config, description)]
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


def _check_model(checkpoint: Path, config: Config, description: ModelDescription) -> list[CometError]:
    """Sizes and tokenizer of the model that the config names; where it is gone, the sizes that the config asks for."""
    origin = Path(config.model.path or config.model.init_from.removeprefix(HF_PREFIX))
    key = "model.init_from" if config.model.init_from else "model.path"
    way_out = f"resume with the {key} the run was started with"
    asked = [
        f"memory.{name} {getattr(description.memory, name)}, not {size}"
        for name, size in to_dict(config.memory).items()
        if config.model.init_from and size != "auto" and size != getattr(description.memory, name)
    ]
    if asked:
        what = f"{checkpoint} has a memory of other sizes than the section memory asks for: {'; '.join(asked)}"
        return [CheckpointError(what, way_out="resume with the sizes the run was started with")]
    if (start := _start_of(config) if origin.exists() else None) is None:
        return []
    other = differences(description, start.description)
    if not other and isinstance(start, CheckpointStart) and not _same_tokenizer(checkpoint, start.path):
        other = [f"the tokenizer in {checkpoint / TOKENIZER}, not the one in {start.tokenizer}"]
    if not other:
        return []
    return [CheckpointError(f"{checkpoint} is of another model than {origin}: {'; '.join(other[:5])}", way_out=way_out)]


def _start_of(config: Config) -> Start | None:
    """The model that the run was started from, if it is still whole."""
    try:
        return open_start(config)
    except CometError:
        return None


def _same_tokenizer(checkpoint: Path, origin: Path) -> bool:
    """Whether two checkpoints make the same ids; loaded only where their files differ."""
    ours, theirs = checkpoint / TOKENIZER, origin / TOKENIZER
    if not theirs.is_dir() or _files(ours) == _files(theirs):
        return True
    try:
        return tokenizer_fingerprint(load_tokenizer(ours)) == tokenizer_fingerprint(load_tokenizer(theirs))
    except CometError:  # one of them is none any more
        return False


def _files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_same_data(checkpoint: Path, config: Config, data: TrainingData) -> None:
    """
    Raises:
        DataError: the run was started with other training data: samples would be skipped or repeated.
    """
    expected = read_progress(checkpoint).data_fingerprint
    if data.fingerprint == expected:
        return
    was = _config_of(checkpoint)
    pairs = [(name, getattr(was.data, name), getattr(config.data, name)) for name in _SETTINGS] if was else []
    other = [f"data.{name}={now}, was {before}" for name, before, now in pairs if before != now]
    if not other:
        other = [f"its fingerprint is {data.fingerprint[:12]}, was {expected[:12]}"]
        if was and was.data.train != config.data.train:
            other.append(f"data.train was {was.data.train}")
    raise DataError(
        f"data.train={data.describe()} is not the data the run was started with, or is mixed, packed "
        "or cut in another way: " + "; ".join(other),
        way_out="resume with the same data and settings; for others, start a new run from its exported model",
    )


def _config_of(checkpoint: Path) -> Config | None:
    """What the run was told; None for a checkpoint that was written before it was kept, or by another version."""
    try:
        return load_config(checkpoint / CONFIG).config
    except CometError:
        return None
