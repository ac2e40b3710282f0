"""The model families that are known: what config.json leaves unsaid in each, and how their attention differs.

A family is a row of this table. Its tensors are those of hf_rules.py's tables; which of them it has follows from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """A kind of model on the Hugging Face side.

    Attributes:
        hf_class: that transformers loads it with.
        qk_norm: queries and keys are normed, per head.
        qkv_bias: the query, key and value projections have biases.
        defaults: of keys that config.json may leave out (those of the family's config class in transformers).
        window: when the sliding window is on: never | use_sliding_window (that key says so) | given (it has a value).
    """

    hf_class: str
    qk_norm: bool = False
    qkv_bias: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    window: str = "never"


FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True, defaults={"head_dim": 128}, window="use_sliding_window"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, window="use_sliding_window"),
    "llama": Family("LlamaForCausalLM", defaults={"max_position_embeddings": 2048}),
    "mistral": Family(
        "MistralForCausalLM",
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        window="given",
    ),
}
# What every family leaves unsaid alike.
DEFAULTS: Mapping[str, Any] = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}
# Keys that must have this value, or be absent: what they switch on is not built.
NOT_BUILT: Mapping[str, Any] = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}

# The authors' class, and the keys of CoMeT in config.json: theirs, which are ours too.
OFFICIAL_CLASS = "MemQwen3ForCausalLM"
OFFICIAL_FAMILY = "qwen3"
OFFICIAL_ADAPTER_RANK = 8  # fixed in their code
COMET_KEYS = (
    "chunk_size",
    "placeholder_id",
    "temp_beacon_id",
    "temp_beacon_stride",
    "temp_mem_budget",
    "global_beacon_ids",
)


def is_comet(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of a model with memory: an export of ours, or a checkpoint of the authors."""
    is_named = config.get("model_type") == "comet" or OFFICIAL_CLASS in _classes(config)
    return is_named or {"temp_beacon_stride", "temp_mem_budget", "global_beacon_ids"} <= set(config)


def family_name(config: Mapping[str, Any]) -> str | None:
    """The backbone's model_type."""
    if config.get("model_type") == "comet":
        return config.get("backbone_model_type", OFFICIAL_FAMILY)
    return OFFICIAL_FAMILY if OFFICIAL_CLASS in _classes(config) else config.get("model_type")


def _classes(config: Mapping[str, Any]) -> list[Any]:
    named = config.get("architectures")
    return named if isinstance(named, list) else []
