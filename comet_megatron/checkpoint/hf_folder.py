"""A Hugging Face model folder: its config, its tokenizer and its safetensors, checked before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from comet_megatron.config.schema import Architecture
from comet_megatron.errors import CheckpointError

KNOWN_FAMILIES = ("qwen3",)
_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)


def read_hf_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder.

    Raises:
        CheckpointError: the folder or file is missing, empty or not JSON.
    """
    need = "give a folder with config.json, *.safetensors and a tokenizer"
    if not folder.is_dir():
        raise CheckpointError(f"there is no model folder {folder}", way_out=need)
    if not any(folder.iterdir()):
        raise CheckpointError(f"model folder {folder} is empty", way_out=need)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{folder} has no readable config.json", way_out=need) from error
    except ValueError as error:
        raise CheckpointError(f"not JSON: {error}", where=str(path), way_out="copy the model again") from error
    if not isinstance(config, dict):
        raise CheckpointError("not a JSON object", where=str(path), way_out="copy the model again")
    return config


def architecture_of(config: Mapping[str, Any], *, where: str) -> Architecture:
    """The backbone's sizes from a Hugging Face config.

    Raises:
        CheckpointError: another architecture, a feature that is not supported, or a size is missing.
    """
    family = config.get("model_type")
    if family not in KNOWN_FAMILIES:
        raise CheckpointError(
            f"architecture {family!r} is not supported", where=where, way_out=f"known: {', '.join(KNOWN_FAMILIES)}"
        )
    if missing := [key for key in _SIZES if not isinstance(config.get(key), int) or config[key] < 1]:
        what = f"sizes are missing or no positive numbers: {', '.join(missing)}"
        raise CheckpointError(what, where=where, way_out="copy the model again")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise CheckpointError(f"rotary settings {rope!r} are not supported", where=where, way_out="use another model")
    kind = rope.get("rope_type", rope.get("type", "default"))
    unsupported = [
        f"{name} {value!r}"
        for name, value, fine in (
            ("rope type", kind, kind == "default"),
            ("attention_bias", config.get("attention_bias"), not config.get("attention_bias")),
            ("hidden_act", config.get("hidden_act", "silu"), config.get("hidden_act", "silu") == "silu"),
            ("use_sliding_window", config.get("use_sliding_window"), not config.get("use_sliding_window")),
        )
        if not fine
    ]
    if unsupported:
        raise CheckpointError(f"not supported: {', '.join(unsupported)}", where=where, way_out="use another model")
    heads = config["num_attention_heads"]
    return Architecture(
        family=family,
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        ffn_hidden_size=config["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=config["num_key_value_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        vocab_size=config["vocab_size"],
        norm_eps=float(config.get("rms_norm_eps") or 1e-6),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        init_std=float(config.get("initializer_range") or 0.02),
        max_positions=int(config.get("max_position_embeddings") or 32768),
    )


class HfTensors(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors by name, read when they are asked for. Close it after use.

    Raises:
        CheckpointError: no safetensors, an index that names a missing file or leaves the folder, a truncated file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open_files = ExitStack()
        self._file_of: dict[str, Any] = {}
        for path in _weight_files(folder):
            try:
                file = self._open_files.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self.close()
                raise CheckpointError(
                    f"truncated or damaged safetensors: {error}", where=str(path), way_out="copy the file again"
                ) from error
            self._file_of |= dict.fromkeys(file.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def close(self) -> None:
        """Close the files."""
        self._open_files.close()

    def __enter__(self) -> HfTensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder} has no *.safetensors", way_out="save the model with safe_serialization; pickles are not read"
            )
        return files
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"damaged index: {error!r}", where=str(index), way_out="copy it again") from error
    for name in names:
        if Path(name).name != name:
            raise CheckpointError(f"the index names a path outside its folder: {name!r}", where=str(index))
        if not (folder / name).exists():
            raise CheckpointError(
                f"the index names {name}, which is missing", where=str(index), way_out="copy it again"
            )
    return [folder / name for name in names]
