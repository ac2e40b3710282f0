"""Published sizes of models by name, with the paper's memory: plans without a checkpoint. Pure, no torch.

From the config.json of each model on the Hugging Face hub (checked against the builders of torchtune and torchtitan,
and for Llama against the model cards in oumi's recipes). Rows of the embedding are those after CoMeT's tokens were
added.
"""

from __future__ import annotations

from dataclasses import replace

from comet_megatron.config.schema import Architecture, MemorySizes, RopeScaling
from comet_megatron.errors import ConfigError

# Of the script that the paper's authors train with.
CHUNK_SIZE, GLOBAL_SLOTS, STRIDE, BUDGET = 2048, 512, 8, 2048
_VOCABULARY_MULTIPLE = 256  # to which an import grows a vocabulary
_QWEN3_TOKENS, _LLAMA3_TOKENS = 151669, 128256  # that the tokenizers know


def _qwen3(layers: int, hidden: int, ffn: int, heads: int, *, tied: bool) -> Architecture:
    return Architecture(
        family="qwen3",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=8,
        head_dim=128,
        vocab_size=151936,
        norm_eps=1e-6,
        rope_theta=1e6,
        tie_embeddings=tied,
        max_positions=40960,
    )


def _llama31(layers: int, hidden: int, ffn: int, heads: int) -> Architecture:
    return Architecture(
        family="llama",
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=8,
        head_dim=128,
        vocab_size=128256,
        norm_eps=1e-5,
        rope_theta=500000.0,
        tie_embeddings=False,
        max_positions=131072,
        qk_norm=False,
        rope_scaling=RopeScaling("llama3", 8.0),
    )


BACKBONES = {
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32, tied=False),
    "qwen3-14b": _qwen3(40, 5120, 17408, 40, tied=False),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64, tied=False),
    "llama-3.1-8b": _llama31(32, 4096, 14336, 32),
    "llama-3.1-70b": _llama31(80, 8192, 28672, 64),
}


def paper_memory(first_new_id: int) -> MemorySizes:
    """The paper's memory for a model whose text ids are below `first_new_id`."""
    global_beacons = tuple(range(first_new_id + 1, first_new_id + 1 + GLOBAL_SLOTS))
    return MemorySizes(
        chunk_size=CHUNK_SIZE,
        stride=STRIDE,
        budget=BUDGET,
        memory_token_id=first_new_id,
        beacon_id=global_beacons[-1] + 1,
        global_beacon_ids=global_beacons,
        first_new_id=first_new_id,
    )


def named_shape(name: str) -> tuple[Architecture, MemorySizes]:
    """
    Raises:
        ConfigError: it is not in the table.
    """
    backbone = BACKBONES.get(name.lower())
    if backbone is None:
        raise ConfigError(f"model {name!r} has no published sizes here", way_out=f"use one of {', '.join(BACKBONES)}")
    memory = paper_memory(_QWEN3_TOKENS if backbone.family == "qwen3" else _LLAMA3_TOKENS)
    needed = memory.beacon_id + 1
    rows = max(backbone.vocab_size, -(-needed // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE)
    return replace(backbone, vocab_size=rows), memory
