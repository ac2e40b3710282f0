"""Export a checkpoint as a Hugging Face folder that stands alone: config, weights, tokenizer and the modeling code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

import comet_megatron.hf
from comet_megatron.checkpoint.hf_rules import plan_rules, to_hf
from comet_megatron.checkpoint.model_folder import TOKENIZER, ModelDescription, read_description
from comet_megatron.checkpoint.sharded import load_weights, stored_precision
from comet_megatron.data.tokenizer import load_tokenizer
from comet_megatron.errors import CheckpointError
from comet_megatron.model.architectures import DTYPES
from comet_megatron.model.build import build_stage
from comet_megatron.new_folder import new_folder
from comet_megatron.parallel.layout import Layout

CODE_FILES = ("configuration_comet.py", "modeling_comet.py")
MAX_FILE_SIZE = "5GB"


def export_hf(checkpoint: Path, output: Path, layout: Layout, *, dtype: str = "auto") -> ModelDescription:
    """Write a folder for `AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)`. One process.

    Args:
        checkpoint: folder of a starting checkpoint or of a training run's, saved on any layout.
        dtype: fp32 | bf16 | auto (as stored).

    Raises:
        CheckpointError, DataError: the checkpoint is damaged, its tokenizer does not load, or `output` is not empty.
    """
    description = read_description(checkpoint)
    tokenizer_folder = checkpoint / TOKENIZER
    tokenizer = load_tokenizer(tokenizer_folder)
    if len(tokenizer) > description.architecture.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {description.architecture.vocab_size}",
            where=str(checkpoint),
        )
    with new_folder(output) as folder:
        stored = stored_precision(checkpoint)
        stage = build_stage(description.architecture, description.memory, layout.groups, precision=stored)
        load_weights(checkpoint, stage, layout)
        rules = plan_rules(description.architecture, description.memory)
        params = {name: p.detach()[: _rows(name, p, description)] for name, p in stage.named_parameters()}
        tensors = to_hf(rules, params)
        target = DTYPES[stored if dtype == "auto" else dtype]
        weights = {name: t.to(target, copy=True).contiguous() for name, t in tensors.items()}
        save_torch_state_dict(weights, folder, max_shard_size=MAX_FILE_SIZE, metadata={"format": "pt"})
        config = hf_config_of(description, tokenizer_eos=tokenizer.eos_token_id, dtype=target)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        generation = {"eos_token_id": config["eos_token_id"], "pad_token_id": config["pad_token_id"]}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        code = Path(comet_megatron.hf.__file__).parent
        for name in CODE_FILES:
            shutil.copyfile(code / name, folder / name)
        for file in tokenizer_folder.iterdir():
            shutil.copyfile(file, folder / file.name)
    return description


def _rows(name: str, param: torch.Tensor, description: ModelDescription) -> int:
    """Rows of a parameter without Megatron's vocabulary padding."""
    in_vocabulary = name in ("embedding.word_embeddings.weight", "output_layer.weight")
    return description.architecture.vocab_size if in_vocabulary else len(param)


def hf_config_of(description: ModelDescription, *, tokenizer_eos: int | None, dtype: torch.dtype) -> dict[str, object]:
    """config.json of the export: the backbone's own keys, then CoMeT's."""
    architecture, memory, origin = description.architecture, description.memory, description.hf_config
    eos = origin.get("eos_token_id")
    eos = tokenizer_eos if eos is None else eos
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = origin.get("pad_token_id")
    return {
        "architectures": ["CometForCausalLM"],
        "model_type": "comet",
        "auto_map": {
            "AutoConfig": "configuration_comet.CometConfig",
            "AutoModelForCausalLM": "modeling_comet.CometForCausalLM",
        },
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": architecture.max_positions,
        "initializer_range": architecture.init_std,
        "rms_norm_eps": architecture.norm_eps,
        "rope_theta": architecture.rope_theta,
        "tie_word_embeddings": architecture.tie_embeddings,
        "bos_token_id": origin.get("bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": first_eos if pad is None else pad,
        "chunk_size": memory.chunk_size,
        "placeholder_id": memory.memory_token_id,
        "temp_beacon_id": memory.beacon_id,
        "temp_beacon_stride": memory.stride,
        "temp_mem_budget": memory.budget,
        "global_beacon_ids": list(memory.global_beacon_ids),
        "memory_adapter_rank": memory.adapter_rank,
    }
