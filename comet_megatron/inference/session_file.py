"""The file of a session: tensors in safetensors, the rest as JSON in its header; never pickle.

It appears complete or not at all, holds a checksum of all of itself, and says of which model it is.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from comet_megatron.errors import CheckpointError, OutputError

HEADER_KEY = "comet_session"
VERSION = 1
SAMPLES_OF_A_PARAMETER = 1024
MODEL_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "qk_norm",
    "qkv_bias",
    "rms_norm_eps",
    "rope_theta",
    "rotary_scaling",
    "chunk_size",
    "placeholder_id",
    "temp_beacon_id",
    "temp_beacon_stride",
    "temp_mem_budget",
    "global_beacon_ids",
    "memory_adapter_rank",
)


def describe_model(model: Any) -> dict[str, Any]:
    """What tells a model from others: sizes, dtype, and a checksum of a sample of every parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLES_OF_A_PARAMETER)].contiguous().cpu()
        digest.update(name.encode() + sample.view(torch.uint8).numpy().tobytes())
    sizes = {name: getattr(model.config, name, None) for name in MODEL_SIZES}
    return {**sizes, "dtype": str(model.dtype), "weights_sha256": digest.hexdigest()}


def refuse_other_model(path: str | Path, header: Mapping[str, Any], model: Any) -> None:
    """Refuse a session that `model` did not write.

    Raises:
        CheckpointError: says what differs.
    """
    was, now = header.get("model"), describe_model(model)
    was = was if isinstance(was, dict) else {}
    different = [
        f"{name} {was.get(name)}, here {now[name]}" for name in (*MODEL_SIZES, "dtype") if was.get(name) != now[name]
    ]
    if not different and was.get("weights_sha256") != now["weights_sha256"]:
        different = ["the sizes agree, the weights do not"]
    if different:
        raise CheckpointError(
            f"the session is of another model: {'; '.join(different)}",
            where=str(path),
            way_out="load it with the model (and the dtype) that wrote it, or begin a new session",
        )


def check_session_path(path: str | Path) -> Path:
    """The absolute path of a file that may be written: a new one, or an older session.

    Raises:
        OutputError: its folder is missing or may not be written, or it is there and is no session.
    """
    target = Path(path).resolve()
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise OutputError(
            "the session's folder is missing or may not be written",
            where=str(target.parent),
            way_out="make it first, or choose another one",
        )
    if target.exists():
        try:
            _read_header(target)
        except CheckpointError as error:
            raise OutputError(
                "the output exists and is no session file, so it is not replaced",
                where=str(path),
                way_out="give the name of a new file",
            ) from error
    return target


def write_session_file(path: str | Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write under a temporary name, rename at the end.

    Raises:
        OutputError: as check_session_path, or the disk is full.
    """
    target = check_session_path(path)
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {**header, "version": VERSION}
    content["sha256"] = _checksum(content, stored)
    temporary = target.parent / f".{target.name}.partial-{os.getpid()}"
    try:
        save_file(stored, temporary, metadata={HEADER_KEY: json.dumps(content)})
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise OutputError(f"the session cannot be written: {error}", where=str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_session_file(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors, on the CPU.

    Raises:
        CheckpointError: the file is missing, no session, of another version, or damaged.
    """
    header = read_session_header(path)
    with safe_open(str(path), "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (no mapping)
    if _checksum({k: v for k, v in header.items() if k != "sha256"}, tensors) != header.get("sha256"):
        raise CheckpointError(
            "the session file is damaged: its checksum does not agree", where=str(path), way_out="begin a new session"
        )
    return header, tensors


def read_session_header(path: str | Path) -> dict[str, Any]:
    """What a session file says of itself; its checksum is not looked at.

    Raises:
        CheckpointError: the file is missing, no session, or of another version.
    """
    header = _read_header(Path(path))
    if header.get("version") != VERSION:
        raise CheckpointError(
            f"the session file has version {header.get('version')!r}, this code reads {VERSION}",
            where=str(path),
            way_out="begin a new session, or use the code that wrote it",
        )
    return header


def _read_header(path: Path) -> dict[str, Any]:
    if path.is_dir():
        raise CheckpointError(
            "this is a folder, no session file", where=str(path), way_out="give a file that --save-session wrote"
        )
    if not path.is_file():
        raise CheckpointError("the session file does not exist", where=str(path))
    try:
        with safe_open(str(path), "pt") as file:
            header = json.loads((file.metadata() or {})[HEADER_KEY])
        if not isinstance(header, dict):
            raise ValueError("the header is no object")
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            "the file is damaged, or no session", where=str(path), way_out="give a file that --save-session wrote"
        ) from error
    return header


def _checksum(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
