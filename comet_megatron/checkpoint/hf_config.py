"""config.json: into the sizes of backbone and memory, and from them in each form of an export."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comet_megatron.checkpoint.families import (
    COMET_KEYS,
    DEFAULTS,
    FAMILIES,
    NOT_BUILT,
    OFFICIAL_ADAPTER_RANK,
    OFFICIAL_CLASS,
    OFFICIAL_FAMILY,
    Family,
    family_name,
    is_comet,
)
from comet_megatron.checkpoint.model_folder import ModelDescription
from comet_megatron.config.schema import Architecture, MemorySizes, RopeScaling
from comet_megatron.errors import CheckpointError

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_COPY_AGAIN = "copy the model again"
_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
FORMATS = ("comet", "official", "backbone")
# What may vary with the version of transformers that wrote a config; the plain keys below say it for all.
_VERSIONED_KEYS = ("rope_parameters", "rope_scaling", "rope_theta", "torch_dtype", "dtype", "transformers_version")
# Keys that our own config.json has beside a backbone's.
_OUR_KEYS = (*COMET_KEYS, "memory_adapter_rank", "backbone_model_type", "qk_norm", "qkv_bias", "rotary_scaling")


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
    if not path.is_file() and (folder / "model.json").exists():
        raise CheckpointError(
            f"{folder} is a checkpoint of this project, not a Hugging Face folder",
            way_out=f"export it: python tools/convert_to_hf.py --checkpoint {folder} --output DIR",
        )
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(f"{folder} has no readable config.json", way_out=need) from error
    except ValueError as error:
        raise CheckpointError(f"not JSON: {error}", where=str(path), way_out=_COPY_AGAIN) from error
    if not isinstance(config, dict):
        raise CheckpointError("not a JSON object", where=str(path), way_out=_COPY_AGAIN)
    return config


def architecture_of(config: Mapping[str, Any], *, where: str) -> Architecture:
    """The backbone's sizes from a Hugging Face config.

    Raises:
        CheckpointError: another architecture, a feature that is not supported, or a size is missing.
    """
    name = family_name(config)
    family = FAMILIES.get(str(name))
    if family is None:
        known = ", ".join([*FAMILIES, f"and CoMeT models of these (comet, {OFFICIAL_CLASS})"])
        raise CheckpointError(f"architecture {name!r} is not supported", where=where, way_out=f"known: {known}")
    own = config.get("model_type") == "comet"  # which says itself what its family would say of it
    window = _window_of(config, family)
    config = {**DEFAULTS, **family.defaults, **{k: v for k, v in config.items() if v is not None}}
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    wrong = [k for k in _SIZES if type(config.get(k)) is not int or config[k] < 1]
    if wrong:
        what = f"sizes are missing or no positive numbers: {', '.join(wrong)}"
        raise CheckpointError(what, where=where, way_out=_COPY_AGAIN)
    unsupported = [f"{key} {config[key]!r}" for key, fine in NOT_BUILT.items() if config.get(key, fine) != fine]
    if unsupported:
        raise CheckpointError(f"not supported: {', '.join(unsupported)}", where=where, way_out="use another model")
    theta, scaling = _rope_of(config, where=where)
    if not isinstance(config["tie_word_embeddings"], bool):
        what = f"tie_word_embeddings {config['tie_word_embeddings']!r} is neither true nor false"
        raise CheckpointError(what, where=where, way_out=_COPY_AGAIN)
    try:
        return Architecture(
            family=str(name),
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            ffn_hidden_size=config["intermediate_size"],
            num_attention_heads=config["num_attention_heads"],
            num_query_groups=config["num_key_value_heads"],
            head_dim=int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]),
            vocab_size=config["vocab_size"],
            norm_eps=float(config["rms_norm_eps"]),
            rope_theta=theta,
            tie_embeddings=bool(config["tie_word_embeddings"]),
            init_std=float(config["initializer_range"]),
            max_positions=min(int(config["max_position_embeddings"]), int(window or config["max_position_embeddings"])),
            qk_norm=bool(config.get("qk_norm", True)) if own else family.qk_norm,
            qkv_bias=bool(config.get("qkv_bias", False)) if own else family.qkv_bias,
            rope_scaling=scaling,
        )
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"a size is no number: {error}", where=where, way_out=_COPY_AGAIN) from error


def _window_of(config: Mapping[str, Any], family: Family) -> Any:
    """The sliding window, or None: it bounds the positions of a chunk, so that no chunk is ever cut by it.

    A key that is null switches it off; one that is absent has the family's default. Our own models have none.
    """
    if config.get("model_type") == "comet" or family.window == "never":
        return None
    if family.window == "use_sliding_window" and not config.get("use_sliding_window"):
        return None
    return config.get("sliding_window", family.defaults.get("sliding_window"))


def _rope_of(config: Mapping[str, Any], *, where: str) -> tuple[float, RopeScaling | None]:
    """Base and scaling of the rotary embedding, as transformers 4 or 5 or we write them."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters", "rotary_scaling"):
        given = config.get(key) or {}
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise CheckpointError(f"rotary settings {given!r} are not supported", where=where, way_out="another model")
        rope |= given
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    needed = {"default": (), "linear": ("factor",), "llama3": ("factor", *_LLAMA3_KEYS)}
    if kind not in needed:
        advice = f"known: {', '.join(needed)}; positions restart in each chunk, so a model of up to its original "
        advice += "length needs none: take the scaling out of config.json"
        raise CheckpointError(f"not supported: rope type {kind!r}", where=where, way_out=advice)
    theta = rope.get("rope_theta") or config["rope_theta"]
    try:
        if missing := [key for key in needed[kind] if not 0 < float(rope.get(key) or 0) < math.inf]:
            what = f"rope type {kind!r} needs {', '.join(missing)}"
            raise CheckpointError(what, where=where, way_out=_COPY_AGAIN)
        theta, values = float(theta), {key: float(rope[key]) for key in needed[kind]}
        if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
            what = f"low_freq_factor {values['low_freq_factor']:g} is not below high_freq_factor"
            raise CheckpointError(what, where=where, way_out=_COPY_AGAIN)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"a rotary setting is no number: {error}", where=where, way_out=_COPY_AGAIN) from error
    if kind == "default":
        return theta, None
    if "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = int(values["original_max_position_embeddings"])
    return theta, RopeScaling(kind, **values)  # type: ignore[arg-type]


def memory_of(config: Mapping[str, Any], *, where: str) -> MemorySizes:
    """The memories of a model that has them, from config.json; the authors' keys.

    Raises:
        CheckpointError: a key is missing or of another kind.
    """
    names, values = [*COMET_KEYS], {key: config.get(key) for key in COMET_KEYS}
    values["global_beacon_ids"] = values["global_beacon_ids"] or []
    missing = [k for k in ("chunk_size", "temp_beacon_stride") if values[k] is None]
    if values["temp_beacon_stride"] not in (None, -1):
        missing += [k for k in ("temp_beacon_id", "temp_mem_budget") if values[k] is None]
    if missing:
        what = f"a CoMeT model without {', '.join(missing)}"
        raise CheckpointError(what, where=where, way_out="copy config.json again")
    numbers = [values[k] for k in names if k != "global_beacon_ids" and values[k] is not None]
    if not isinstance(values["global_beacon_ids"], list) or not all(
        type(n) is int for n in [*numbers, *values["global_beacon_ids"]]
    ):
        raise CheckpointError(f"{', '.join(names)} must be whole numbers", where=where, way_out="copy it again")
    rank = config.get("memory_adapter_rank", OFFICIAL_ADAPTER_RANK)
    if type(rank) is not int:
        raise CheckpointError(f"memory_adapter_rank {rank!r} is no whole number", where=where, way_out="copy it again")
    ids = [values["placeholder_id"], values["temp_beacon_id"], *values["global_beacon_ids"]]
    used = [i for i in ids if i is not None and i >= 0]
    return MemorySizes(
        chunk_size=values["chunk_size"],
        stride=values["temp_beacon_stride"],
        budget=values["temp_mem_budget"] or 0,
        memory_token_id=-1 if ids[0] is None else ids[0],
        beacon_id=-1 if ids[1] is None else ids[1],
        global_beacon_ids=tuple(values["global_beacon_ids"]),
        first_new_id=min(used, default=int(config["vocab_size"])),
        adapter_rank=rank,
    )


def hf_config_of(
    description: ModelDescription, *, tokenizer_eos: int | None, dtype: str, form: str = "comet"
) -> dict[str, Any]:
    """config.json of an export, in keys that transformers 4 and 5 both read.

    Args:
        dtype: of the weights, as torch names it.
        form: comet | official | backbone.

    Raises:
        CheckpointError: the authors' class cannot hold this model.
    """
    return {"comet": _comet, "official": _official, "backbone": _backbone}[form](description, tokenizer_eos, dtype)


def _comet(description: ModelDescription, tokenizer_eos: int | None, dtype: str) -> dict[str, Any]:
    a, memory = description.architecture, description.memory
    return {
        "architectures": ["CometForCausalLM"],
        "model_type": "comet",
        "auto_map": {
            "AutoConfig": "configuration_comet.CometConfig",
            "AutoModelForCausalLM": "modeling_comet.CometForCausalLM",
        },
        "backbone_model_type": a.family,
        "qk_norm": a.qk_norm,
        "qkv_bias": a.qkv_bias,
        **_sizes(a),
        "rotary_scaling": _rope_scaling(a),
        **_ends(description, tokenizer_eos),
        "dtype": dtype,
        **_memory_keys(memory),
        "memory_adapter_rank": memory.adapter_rank,
    }


def _official(description: ModelDescription, tokenizer_eos: int | None, dtype: str) -> dict[str, Any]:
    a, memory = description.architecture, description.memory
    problems = []
    if a.family != OFFICIAL_FAMILY or not a.qk_norm or a.qkv_bias:
        problems.append(f"its backbone is {a.family}, theirs is {OFFICIAL_FAMILY}")
    if memory.adapter_rank != OFFICIAL_ADAPTER_RANK:
        problems.append(f"its memory adapters have rank {memory.adapter_rank}, theirs {OFFICIAL_ADAPTER_RANK}")
    if problems:
        raise CheckpointError(
            f"the authors' class {OFFICIAL_CLASS} cannot hold this model: {'; '.join(problems)}",
            way_out="use --format comet",
        )
    return {
        **_of_origin(description),
        "architectures": [OFFICIAL_CLASS],
        "model_type": OFFICIAL_FAMILY,
        **_sizes(a),
        "rope_scaling": _rope_scaling(a),
        "attention_bias": False,
        "use_sliding_window": False,
        **_ends(description, tokenizer_eos),
        "torch_dtype": dtype,
        **_memory_keys(memory),
    }


def _backbone(description: ModelDescription, tokenizer_eos: int | None, dtype: str) -> dict[str, Any]:
    a, origin = description.architecture, _of_origin(description)
    if is_comet(description.hf_config):  # where nothing says it, transformers takes the family's default
        origin["sliding_window"] = None
    return {
        **origin,
        "architectures": [FAMILIES[a.family].hf_class],
        "model_type": a.family,
        **_sizes(a),
        "vocab_size": backbone_vocabulary(description),
        "max_position_embeddings": origin.get("max_position_embeddings", a.max_positions),
        "rope_scaling": _rope_scaling(a),
        **_ends(description, tokenizer_eos),
        "torch_dtype": dtype,
    }


def backbone_vocabulary(description: ModelDescription) -> int:
    """Rows of the plain backbone: as many as the model had before it got a memory; else as many as it has."""
    origin = description.hf_config
    known = None if is_comet(origin) else origin.get("vocab_size")
    return description.architecture.vocab_size if known is None else int(known)


def _of_origin(description: ModelDescription) -> dict[str, Any]:
    """What the model's first config.json said beyond the keys that we write."""
    dropped = (*_VERSIONED_KEYS, *_OUR_KEYS, "auto_map")
    return {k: v for k, v in description.hf_config.items() if k not in dropped}


def _sizes(a: Architecture) -> dict[str, Any]:
    return {
        "vocab_size": a.vocab_size,
        "hidden_size": a.hidden_size,
        "intermediate_size": a.ffn_hidden_size,
        "num_hidden_layers": a.num_layers,
        "num_attention_heads": a.num_attention_heads,
        "num_key_value_heads": a.num_query_groups,
        "head_dim": a.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": a.max_positions,
        "initializer_range": a.init_std,
        "rms_norm_eps": a.norm_eps,
        "rope_theta": a.rope_theta,
        "tie_word_embeddings": a.tie_embeddings,
    }


def _rope_scaling(a: Architecture) -> dict[str, Any] | None:
    scaling = a.rope_scaling
    if scaling is None:
        return None
    keys = ("rope_type", "factor", *(_LLAMA3_KEYS if scaling.rope_type == "llama3" else ()))
    return {key: getattr(scaling, key) for key in keys}


def _ends(description: ModelDescription, tokenizer_eos: int | None) -> dict[str, Any]:
    origin = description.hf_config
    eos = origin.get("eos_token_id")
    eos = tokenizer_eos if eos is None else eos
    pad = origin.get("pad_token_id")
    return {
        "bos_token_id": origin.get("bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": (eos[0] if isinstance(eos, list) else eos) if pad is None else pad,
    }


def _memory_keys(memory: MemorySizes) -> dict[str, Any]:
    return {
        "chunk_size": memory.chunk_size,
        "placeholder_id": None if memory.memory_token_id < 0 else memory.memory_token_id,
        "temp_beacon_id": None if memory.beacon_id < 0 else memory.beacon_id,
        "temp_beacon_stride": memory.stride,
        "temp_mem_budget": memory.budget,
        "global_beacon_ids": list(memory.global_beacon_ids),
    }
