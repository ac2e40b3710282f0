"""Small Hugging Face folders for tests: every family with random weights, and tokenizers made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from comet_megatron.checkpoint.families import COMET_KEYS, OFFICIAL_CLASS
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

SIZES = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "eos_token_id": 299,
}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# What sets the families apart; of the llama, so low a base that all three bands of its scaling occur.
FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {},
    "llama": {"rope_parameters": {**LLAMA3_SCALING, "rope_theta": 500.0}},
    "mistral": {"sliding_window": None},
}
TEXT_TOKENS = 300


def save_tokenizer(folder: Path, *, added: dict[int, str] | None = None, words: int = TEXT_TOKENS) -> None:
    """A tokenizer of the words `t0` ... `t299`, the last of which ends a text, and of added special tokens by id."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(words)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for number in sorted(added or {}):
        tokenizer.add_tokens([AddedToken((added or {})[number], special=True, normalized=False)])
        assert tokenizer.token_to_id((added or {})[number]) == number
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0", eos_token="t299")
    fast.save_pretrained(folder)


def save_family(
    folder: Path, family: str, *, tie: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any
) -> nn.Module:
    """A model of a family with random weights, norms and biases included, and the tokenizer above."""
    torch.manual_seed(seed)
    settings = {**SIZES, **FAMILY_SETTINGS[family], "tie_word_embeddings": tie, **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings)).eval().to(dtype)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("bias"):
                param.normal_()
            elif param.dim() == 1:
                param.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def save_official(folder: Path, golden: dict[str, Any], weights: dict[str, Tensor]) -> None:
    """A checkpoint of CoMeT's authors: a golden case's weights, its config.json and a tokenizer that has its tokens."""
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**golden["hf_config"], "architectures": [OFFICIAL_CLASS]}
    assert set(COMET_KEYS) <= set(config)
    (folder / "config.json").write_text(json.dumps(config))
    beacons = {number: f"<beacon_{i}>" for i, number in enumerate(config["global_beacon_ids"])}
    pad = {config["pad_token_id"]: "<|pad|>"}
    tokens = {config["placeholder_id"]: "<|memory|>", config["temp_beacon_id"]: "<beacon>"}
    save_tokenizer(folder, added={**pad, **tokens, **beacons})


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
