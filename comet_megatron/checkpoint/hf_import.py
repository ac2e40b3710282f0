"""Import a Hugging Face model: new tokens, their embedding rows and memory nets are added; a checkpoint is written."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comet_megatron.checkpoint.hf_folder import HfTensors, architecture_of, read_hf_config
from comet_megatron.checkpoint.hf_rules import EMBEDDING, HEAD, plan_rules, to_megatron
from comet_megatron.checkpoint.model_folder import ModelDescription
from comet_megatron.checkpoint.sharded import save_checkpoint
from comet_megatron.config.rules import check_architecture, check_memory_sizes, check_stride_divides, require
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from comet_megatron.errors import CheckpointError, ConfigError
from comet_megatron.model.build import build_stage
from comet_megatron.parallel.layout import Layout
from tokenizers import AddedToken

# Distance of a new row from the mean of the old ones, in their standard deviations: near enough to the mean that a
# softmax over tied rows hardly notices, far enough apart that beacons start as different tokens.
NEW_ROW_SPREAD = 0.01
VOCABULARY_MULTIPLE = 256


@dataclass(frozen=True)
class AskedMemory:
    """Memory sizes a user asks for; the token ids follow from the tokenizer.

    Attributes:
        global_slots: 0: no global memory.
        stride: text tokens per beacon; -1: no temporary memory.
    """

    chunk_size: int
    global_slots: int
    stride: int
    budget: int
    adapter_rank: int = 8


def import_hf(source: Path, output: Path, asked: AskedMemory, layout: Layout, *, seed: int = 1234) -> ModelDescription:
    """Write the starting checkpoint of a fine-tuning run. One process.

    Args:
        source: folder with config.json, safetensors and a tokenizer.
        output: new folder.
        seed: of new rows and memory nets.

    Raises:
        CheckpointError, DataError, ConfigError: the model, its tokenizer or the sizes asked for; nothing is written.
    """
    hf_config = read_hf_config(source)
    backbone = architecture_of(hf_config, where=str(source / "config.json"))
    require(check_architecture(backbone, where=str(source / "config.json")))
    if asked.global_slots < 0:
        raise ConfigError(f"--global-slots {asked.global_slots} must be 0 or more; 0: no global memory")
    with HfTensors(source) as tensors:
        check_tensors(tensors, backbone)
    tokenizer = load_tokenizer(source)
    text_tokenizer = tokenizer_fingerprint(tokenizer)
    memory = add_tokens(tokenizer, asked, where=str(source))
    rows = max(backbone.vocab_size, len(tokenizer))
    architecture = replace(backbone, vocab_size=-(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
    require(
        check_memory_sizes(memory, architecture, where="the sizes asked for")
        + check_stride_divides(memory, where="the sizes asked for")
    )
    with HfTensors(source) as tensors:
        precision = "bf16" if tensors[EMBEDDING].dtype == torch.bfloat16 else "fp32"
        torch.manual_seed(seed)
        stage = build_stage(architecture, memory, layout.groups, precision=precision)
        fill_from_backbone(stage, tensors, backbone)
    description = ModelDescription(architecture, memory, hf_config, text_tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        save_checkpoint(output, stage, layout, description=description, tokenizer=Path(folder))
    return description


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer that loads with AutoTokenizer on transformers 4 and 5.

    5 names its general class TokenizersBackend, which 4 does not know; both know its old name.
    """
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n")


def add_tokens(tokenizer: Any, asked: AskedMemory, *, where: str) -> MemorySizes:
    """Add CoMeT's tokens to a tokenizer: the memory token, a beacon per global slot, the beacon, in this order.

    Raises:
        CheckpointError: the tokenizer has such tokens already.
    """
    names = ["<|memory|>", *(f"<beacon_{i}>" for i in range(asked.global_slots)), "<beacon>"]
    vocabulary = tokenizer.get_vocab()
    if present := [name for name in names if name in vocabulary]:
        raise CheckpointError(
            f"the tokenizer has CoMeT's tokens already: {', '.join(present[:3])}",
            where=where,
            way_out="convert the original model, without memory",
        )
    first = max(len(tokenizer), 1 + max(vocabulary.values()))
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    ids = tokenizer.convert_tokens_to_ids(names)
    assert ids == list(range(first, first + len(names))), (first, ids[:3])
    return MemorySizes(
        chunk_size=asked.chunk_size,
        stride=asked.stride,
        budget=asked.budget,
        memory_token_id=ids[0],
        beacon_id=ids[-1],
        global_beacon_ids=tuple(ids[1:-1]),
        first_new_id=first,
        adapter_rank=asked.adapter_rank,
    )


def check_tensors(tensors: HfTensors, backbone: Architecture) -> None:
    """
    Raises:
        CheckpointError: tensors are missing, unexpected, or of another shape than the config says.
    """
    hidden, groups, head = backbone.hidden_size, backbone.num_query_groups, backbone.head_dim
    heads = backbone.num_attention_heads
    shapes = {
        "embed_tokens": (backbone.vocab_size, hidden),
        "lm_head": (backbone.vocab_size, hidden),
        "q_proj": (heads * head, hidden),
        "k_proj": (groups * head, hidden),
        "v_proj": (groups * head, hidden),
        "o_proj": (hidden, heads * head),
        "gate_proj": (backbone.ffn_hidden_size, hidden),
        "up_proj": (backbone.ffn_hidden_size, hidden),
        "down_proj": (hidden, backbone.ffn_hidden_size),
        "q_norm": (head,),
        "k_norm": (head,),
    }
    expected = [name for rule in plan_rules(backbone, None) for name in rule.hf]
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    known = {*expected, HEAD}  # some tied models hold their head as well
    problems += [f"{name} is unknown" for name in tensors if name not in known]
    for name in expected:
        want = shapes.get(name.split(".")[-2], (hidden,))
        if name in tensors and tensors.shape(name) != want:
            problems.append(f"{name} has shape {tensors.shape(name)}, not {want}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise CheckpointError(
            f"weights do not fit config.json: {'; '.join(problems[:5])}{more}",
            where=str(tensors.folder),
            way_out="copy the model again",
        )


@torch.no_grad()
def fill_from_backbone(stage: torch.nn.Module, tensors: HfTensors, backbone: Architecture) -> None:
    """Copy the backbone's weights and make the rows of new ids; the memory nets keep their initial values."""
    params = dict(stage.named_parameters())
    for rule in plan_rules(backbone, None):
        whole = to_megatron([rule], {name: tensors[name] for name in rule.hf})[rule.megatron]
        param = params[rule.megatron]
        if rule.hf[0] in (EMBEDDING, HEAD):
            whole = with_new_rows(whole, rows=len(param), first_new_id=stage.memory_sizes.first_new_id)
        param.copy_(whole)


def with_new_rows(matrix: Tensor, *, rows: int, first_new_id: int) -> Tensor:
    """A matrix of `rows` rows, in which every row from `first_new_id` on is drawn around the mean of those before.

    Rows that the old matrix had there were never trained.
    """
    old = matrix[:first_new_id].float()
    noise = torch.randn(rows - len(old), old.shape[1], device=old.device)
    new = old.mean(0) + NEW_ROW_SPREAD * old.std(0) * noise
    return torch.cat([matrix[:first_new_id], new.to(matrix.dtype)])
