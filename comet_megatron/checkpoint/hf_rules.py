"""Hugging Face names and Megatron names: a table per model family, and a rule object for each way tensors differ.

A rule turns whole Hugging Face tensors into one whole Megatron tensor and back, and knows how Megatron cuts that tensor
over tensor-parallel ranks. CoMeT's own parameters bear the authors' names on the Hugging Face side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from comet_megatron.config.schema import Architecture, MemorySizes


@dataclass(frozen=True)
class Rule:
    """The same tensor under two names.

    Attributes:
        megatron: parameter name in a CometStage, layers numbered in the whole model.
        hf: names on the Hugging Face side.
        partition_axis: axis that tensor parallelism cuts; None: replicated.
    """

    megatron: str
    hf: tuple[str, ...]
    partition_axis: int | None = None

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """Whole Hugging Face tensors, in the order of `hf` -> the whole Megatron tensor."""
        return tensors[0]

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `to_megatron`."""
        return (tensor,)

    def partition(self, whole: Tensor, *, rank: int, size: int) -> Tensor:
        """A tensor-parallel rank's part of the whole Megatron tensor."""
        return whole if self.partition_axis is None else whole.chunk(size, self.partition_axis)[rank]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `partition`."""
        return parts[0] if self.partition_axis is None else torch.cat(tuple(parts), self.partition_axis)


@dataclass(frozen=True)
class FusedQkv(Rule):
    """q, k, v projections <-> linear_qkv: per query group its queries, its key, its value."""

    num_groups: int = 1
    head_dim: int = 1

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        tail = tensors[0].shape[1:]
        return torch.cat([t.reshape(self.num_groups, -1, *tail) for t in tensors], 1).reshape(-1, *tail)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        tail = tensor.shape[1:]
        grouped = tensor.reshape(self.num_groups, -1, *tail)
        queries = grouped.shape[1] - 2 * self.head_dim
        return tuple(t.reshape(-1, *tail) for t in grouped.split([queries, self.head_dim, self.head_dim], 1))


@dataclass(frozen=True)
class GatedMlp(Rule):
    """gate and up projections <-> linear_fc1, in which each rank holds its part of both."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(tensors))

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(2)

    def partition(self, whole: Tensor, *, rank: int, size: int) -> Tensor:
        return torch.cat([half.chunk(size)[rank] for half in whole.chunk(2)])

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([part.chunk(2)[half] for half in range(2) for part in parts])


@dataclass(frozen=True)
class Vocabulary(Rule):
    """A matrix with a row per token id; Megatron's may have padding rows at the end."""

    vocab_size: int = 0

    def partition(self, whole: Tensor, *, rank: int, size: int) -> Tensor:
        """Missing padding rows are zeros."""
        from comet_megatron.model.architectures import padded_vocabulary

        missing = padded_vocabulary(self.vocab_size, tp=size) - len(whole)
        padded = torch.cat([whole, whole.new_zeros(missing, *whole.shape[1:])]) if missing > 0 else whole
        return padded.chunk(size)[rank]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(parts))[: self.vocab_size]


# Backbone parameters of a layer that differ in their names only: Hugging Face, Megatron, partition axis.
_QWEN3_LAYER = (
    ("input_layernorm.weight", "input_layernorm.weight", None),
    ("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", None),
    ("self_attn.q_norm.weight", "self_attention.q_layernorm.weight", None),
    ("self_attn.k_norm.weight", "self_attention.k_layernorm.weight", None),
    ("self_attn.o_proj.weight", "self_attention.linear_proj.weight", 1),
    ("mlp.down_proj.weight", "mlp.linear_fc2.weight", 1),
)
_GLOBAL_NET = ("norm.weight", "g_proj.weight", "o_proj.down_proj.weight", "o_proj.up_proj.weight")
_TEMPORARY_NET = ("0.weight", "1.down_proj.weight", "1.up_proj.weight")
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def plan_rules(architecture: Architecture, memory: MemorySizes | None) -> list[Rule]:
    """Every parameter of the model, once.

    Args:
        memory: None for the plain backbone, whose layers have no `inner_layer.` in their names and no memory nets.
    """
    vocabulary = {"partition_axis": 0, "vocab_size": architecture.vocab_size}
    rules: list[Rule] = [Vocabulary("embedding.word_embeddings.weight", (EMBEDDING,), **vocabulary)]
    for layer in range(architecture.num_layers):
        rules += _layer_rules(layer, architecture, memory)
    rules.append(Rule("decoder.final_layernorm.weight", ("model.norm.weight",)))
    if not architecture.tie_embeddings:
        rules.append(Vocabulary("output_layer.weight", (HEAD,), **vocabulary))
    return rules


def _layer_rules(layer: int, architecture: Architecture, memory: MemorySizes | None) -> Iterator[Rule]:
    outer, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    theirs = outer if memory is None else f"{outer}inner_layer."
    for hf, megatron, axis in _QWEN3_LAYER:
        yield Rule(ours + megatron, (theirs + hf,), axis)
    yield FusedQkv(
        f"{ours}self_attention.linear_qkv.weight",
        tuple(f"{theirs}self_attn.{x}_proj.weight" for x in "qkv"),
        0,
        num_groups=architecture.num_query_groups,
        head_dim=architecture.head_dim,
    )
    gate_up = tuple(f"{theirs}mlp.{name}_proj.weight" for name in ("gate", "up"))
    yield GatedMlp(f"{ours}mlp.linear_fc1.weight", gate_up, 0)
    if memory is not None and memory.global_slots:
        for name in _GLOBAL_NET:
            yield Rule(f"{ours}global_memory_net.{name}", (f"{outer}global_memory_net.{name}",))
    if memory is not None and memory.stride > 0:
        for name in _TEMPORARY_NET:
            yield Rule(f"{ours}temp_memory_net.{name}", (f"{outer}temp_memory_net.{name}",))


def to_megatron(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole Hugging Face tensors -> whole Megatron tensors."""
    return {rule.megatron: rule.to_megatron([tensors[name] for name in rule.hf]) for rule in rules}


def to_hf(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole Megatron tensors -> whole Hugging Face tensors."""
    return {
        name: part for rule in rules for name, part in zip(rule.hf, rule.to_hf(tensors[rule.megatron]), strict=True)
    }
