"""What a checkpoint folder says of its model, beside the weights: sizes, the original Hugging Face config, progress.

FOLDER/
  model.json      architecture, memory sizes, the Hugging Face config it came from
  progress.json   of a training run: steps done, and what else the next step depends on
  config.yaml     of a training run: every setting, defaults too
  saved_with.json versions of the libraries, and the layout
  tokenizer/      loads with AutoTokenizer
  weights/        Megatron's sharded checkpoint: weights, and the optimizer's state after training
  checksums.json  size and CRC-32 of every file above
  complete        written last, the sum of checksums.json: without it the folder is not a checkpoint
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comet_megatron import __version__
from comet_megatron.config.schema import Architecture, MemorySizes, from_dict, to_dict
from comet_megatron.errors import CheckpointError

FORMAT_VERSION = 1  # of model.json and saved_with.json
PROGRESS_VERSION = 3  # 1 had no skipped steps, 2 no bad samples
SAVED_WITH = "saved_with.json"
CONFIG = "config.yaml"
COMPLETE = "complete"
WEIGHTS = "weights"
TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class ModelDescription:
    """The model of a checkpoint.

    Attributes:
        hf_config: config.json of the Hugging Face model that the backbone came from.
        text_tokenizer: fingerprint of the tokenizer that makes text ids, before CoMeT's tokens were added.
        generation_config: generation_config.json of that model: its way of sampling goes into exports.
    """

    architecture: Architecture
    memory: MemorySizes
    hf_config: dict[str, Any]
    text_tokenizer: str = ""
    generation_config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """How far a training run is.

    Attributes:
        step: optimizer steps done; with what follows it says which samples come next.
        data_fingerprint, data_seed, global_batch_size: of the samples' order.
        trainable, zero1: of the optimizer's state.
        skipped: steps of these that changed nothing; skipped_in_a_row: the last ones.
        recent_norms: of the gradients of the last steps that were not skipped, oldest first.
        bad_samples: sequences that were left out because a sample was damaged.
    """

    step: int
    data_fingerprint: str
    data_seed: int
    global_batch_size: int
    trainable: str
    zero1: bool
    skipped: int = 0
    skipped_in_a_row: int = 0
    recent_norms: tuple[float, ...] = ()
    bad_samples: int = 0


@dataclass(frozen=True)
class SavedWith:
    """What wrote a checkpoint; nothing depends on it.

    Attributes:
        versions: by library.
        layout: sizes of the parallel axes.
    """

    versions: dict[str, str]
    layout: dict[str, int]


def write_description(folder: Path, description: ModelDescription) -> None:
    """Write model.json."""
    content = {"format_version": FORMAT_VERSION, "comet_megatron": __version__, **to_dict(description)}
    (folder / "model.json").write_text(json.dumps(content, indent=2) + "\n")


def write_progress(folder: Path, progress: Progress) -> None:
    """Write progress.json."""
    content = {"format_version": PROGRESS_VERSION, **to_dict(progress)}
    (folder / "progress.json").write_text(json.dumps(content, indent=2) + "\n")


def write_saved_with(folder: Path, saved_with: SavedWith) -> None:
    """Write saved_with.json."""
    content = {"format_version": FORMAT_VERSION, **to_dict(saved_with)}
    (folder / SAVED_WITH).write_text(json.dumps(content, indent=2) + "\n")


def read_saved_with(folder: Path) -> SavedWith | None:
    """Read saved_with.json; None for a checkpoint that was written before it was kept."""
    path = folder / SAVED_WITH
    if not path.exists():
        return None
    content = _read_json(path, versions=(FORMAT_VERSION,))
    content.pop("format_version")
    try:
        return from_dict(SavedWith, content)
    except TypeError as error:
        raise CheckpointError(f"the versions are damaged: {error}", where=str(path)) from error


def check_is_complete(folder: Path) -> None:
    """
    Raises:
        CheckpointError: the folder is missing, empty, not a checkpoint, or was not written to the end.
    """
    convert = "make one with tools/convert_from_hf.py --hf MODEL --output DIR"
    if not folder.is_dir():
        raise CheckpointError(f"there is no checkpoint folder {folder}", way_out=convert)
    if not any(folder.iterdir()):
        raise CheckpointError(f"{folder} is empty, not a checkpoint", way_out=convert)
    if (folder / "config.json").exists() and not (folder / "model.json").exists():
        raise CheckpointError(
            f"{folder} is a Hugging Face folder, not a checkpoint of this project",
            way_out=f"convert it: python tools/convert_from_hf.py --hf {folder} --output DIR",
        )
    if not (folder / "model.json").exists():
        raise CheckpointError(f"{folder} holds no checkpoint: model.json is missing", way_out=convert)
    if not (folder / COMPLETE).exists():
        raise CheckpointError(
            f"checkpoint {folder} was not written to the end", way_out="use the one saved before it, or convert again"
        )


def read_description(folder: Path) -> ModelDescription:
    """Read model.json of a complete checkpoint.

    Raises:
        CheckpointError: see `check_is_complete`; or model.json is damaged or of another version.
    """
    check_is_complete(folder)
    content = _read_json(folder / "model.json", versions=(FORMAT_VERSION,))
    try:
        return ModelDescription(
            architecture=from_dict(Architecture, content["architecture"]),
            memory=from_dict(MemorySizes, content["memory"]),
            hf_config=content["hf_config"],
            text_tokenizer=content["text_tokenizer"],
            generation_config=content.get("generation_config", {}),  # checkpoints before it was kept have none
        )
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"the model description is damaged: {error}", where=str(folder / "model.json"), way_out="convert again"
        ) from error


def read_progress(folder: Path) -> Progress:
    """Read progress.json of a training run's checkpoint; what older versions did not have is 0."""
    path = folder / "progress.json"
    if not path.exists():
        raise CheckpointError(f"{folder} is a starting checkpoint, not one of a training run", way_out="omit --resume")
    content = _read_json(path, versions=range(1, PROGRESS_VERSION + 1))
    content.pop("format_version")
    try:
        return from_dict(Progress, content)
    except TypeError as error:
        raise CheckpointError(f"the progress is damaged: {error}", where=str(path)) from error


def _read_json(path: Path, *, versions: Sequence[int]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        version = content["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"cannot read it: {error!r}", where=str(path), way_out="use another checkpoint"
        ) from error
    if version not in versions:
        readable = f"version{'s' * (len(versions) > 1)} {' and '.join(map(str, versions))}"
        raise CheckpointError(
            f"format version {version}, but this program reads {readable}",
            where=str(path),
            way_out="use the version of comet_megatron that wrote it",
        )
    return content


def differences(found: ModelDescription, expected: ModelDescription) -> list[str]:
    """Sizes and tokenizer in which two models differ, each as `architecture.hidden_size 64, not 128`."""
    pairs = []
    for part in ("architecture", "memory"):
        ours, theirs = to_dict(getattr(found, part)), to_dict(getattr(expected, part))
        pairs += [f"{part}.{key} {ours[key]}, not {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if found.text_tokenizer != expected.text_tokenizer:
        pairs.append(f"tokenizer {found.text_tokenizer[:12]}, not {expected.text_tokenizer[:12]}")
    return pairs
