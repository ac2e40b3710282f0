"""Hugging Face names and Megatron names: tables of parameters, and a rule object for each way tensors differ.

A rule turns Hugging Face tensors into one Megatron tensor and back, whole ones or one tensor-parallel rank's parts
alike, and knows which part of each a rank holds. CoMeT's own parameters bear the authors' names on the Hugging Face
side.

Shapes: H hidden, Q heads x head size, K groups x head size, E head size, F ffn, V vocabulary, R adapter rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from comet_megatron.config.schema import Architecture, MemorySizes

Shape = tuple[int, ...]


class Slices(Protocol):
    """Tensors by name, of which parts can be read."""

    def part(self, name: str, axis: int | None, begin: int, end: int) -> Tensor:
        """Positions begin to end of an axis; None: the whole tensor."""


class Whole(dict[str, Tensor]):
    """Tensors in memory as Slices."""

    def part(self, name: str, axis: int | None, begin: int, end: int) -> Tensor:
        """See Slices."""
        return self[name] if axis is None else self[name].narrow(axis, begin, end - begin)


@dataclass(frozen=True)
class Rule:
    """The same tensor under two names.

    Attributes:
        megatron: parameter name in a CometStage, layers numbered in the whole model.
        hf: names on the Hugging Face side.
        shapes: of the Hugging Face tensors.
        partition_axis: axis that tensor parallelism cuts, of each Hugging Face tensor; None: replicated.
    """

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]
    partition_axis: int | None = None

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        """Hugging Face tensors, in the order of `hf` -> the Megatron tensor."""
        return tensors[0]

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The inverse of `to_megatron`."""
        return (tensor,)

    def load(self, tensors: Slices, *, rank: int, size: int) -> Tensor:
        """A tensor-parallel rank's part of the Megatron tensor; nothing else is read."""
        axis, parts = self.partition_axis, []
        for name, shape in zip(self.hf, self.shapes, strict=True):
            length = 0 if axis is None else shape[axis] // size
            parts.append(tensors.part(name, axis, rank * length, (rank + 1) * length))
        return self.to_megatron(parts)

    def join(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The Megatron tensor's parts of all tensor-parallel ranks -> whole Hugging Face tensors."""
        if self.partition_axis is None:
            return self.to_hf(parts[0])
        return tuple(torch.cat(of_ranks, self.partition_axis) for of_ranks in zip(*map(self.to_hf, parts), strict=True))


@dataclass(frozen=True)
class FusedQkv(Rule):
    """q, k, v projections or their biases <-> linear_qkv: per query group its queries, its key, its value."""

    head_dim: int = 1

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        tail, groups = tensors[0].shape[1:], len(tensors[1]) // self.head_dim
        return torch.cat([t.reshape(groups, -1, *tail) for t in tensors], 1).reshape(-1, *tail)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        tail, (queries, keys, _) = tensor.shape[1:], (shape[0] for shape in self.shapes)
        per_group = [queries // (keys // self.head_dim), self.head_dim, self.head_dim]
        grouped = tensor.reshape(-1, sum(per_group), *tail)
        return tuple(t.reshape(-1, *tail) for t in grouped.split(per_group, 1))


@dataclass(frozen=True)
class GatedMlp(Rule):
    """gate and up projections <-> linear_fc1, in which each rank holds its part of both."""

    def to_megatron(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat(tuple(tensors))

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.chunk(2)


@dataclass(frozen=True)
class Vocabulary(Rule):
    """A matrix with a row per token id; Megatron's has rows of zeros at the end, for every rank to have as many."""

    def load(self, tensors: Slices, *, rank: int, size: int) -> Tensor:
        rows = self.rows_of(rank, size)
        known = tensors.part(self.hf[0], 0, min(rows.start, self.num_rows), min(rows.stop, self.num_rows))
        return torch.cat([known, known.new_zeros(len(rows) - len(known), *known.shape[1:])])

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor[: self.num_rows],)

    def join(self, parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return self.to_hf(torch.cat(tuple(parts)))

    @property
    def num_rows(self) -> int:
        """Rows without padding."""
        return self.shapes[0][0]

    def rows_of(self, rank: int, size: int) -> range:
        """Rows that a tensor-parallel rank holds, padding included."""
        from comet_megatron.model.architectures import padded_vocabulary

        length = padded_vocabulary(self.num_rows, tp=size) // size
        return range(rank * length, (rank + 1) * length)


# Parameters of a layer that differ in their names only: Hugging Face, Megatron, shape, partition axis.
_LAYER = (
    ("input_layernorm.weight", "input_layernorm.weight", "H", None),
    ("post_attention_layernorm.weight", "pre_mlp_layernorm.weight", "H", None),
    ("self_attn.o_proj.weight", "self_attention.linear_proj.weight", "HQ", 1),
    ("mlp.down_proj.weight", "mlp.linear_fc2.weight", "HF", 1),
)
_QK_NORM = (
    ("self_attn.q_norm.weight", "self_attention.q_layernorm.weight", "E", None),
    ("self_attn.k_norm.weight", "self_attention.k_layernorm.weight", "E", None),
)
# Of the memory nets: name, shape; the same on both sides.
_GLOBAL_NET = (
    ("norm.weight", "H"),
    ("g_proj.weight", "1D"),
    ("o_proj.down_proj.weight", "RH"),
    ("o_proj.up_proj.weight", "HR"),
)
_TEMPORARY_NET = (("0.weight", "H"), ("1.down_proj.weight", "RH"), ("1.up_proj.weight", "HR"))
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def plan_rules(architecture: Architecture, memory: MemorySizes | None) -> list[Rule]:
    """Every parameter of the model, once.

    Args:
        memory: None for the plain backbone, whose layers have no `inner_layer.` in their names and no memory nets.
    """
    sizes = _sizes(architecture, memory)
    rules: list[Rule] = [Vocabulary("embedding.word_embeddings.weight", (EMBEDDING,), (_shape("VH", sizes),), 0)]
    for layer in range(architecture.num_layers):
        rules += _layer_rules(layer, architecture, memory, sizes)
    rules.append(Rule("decoder.final_layernorm.weight", ("model.norm.weight",), (_shape("H", sizes),)))
    if not architecture.tie_embeddings:
        rules.append(Vocabulary("output_layer.weight", (HEAD,), (_shape("VH", sizes),), 0))
    return rules


def _sizes(architecture: Architecture, memory: MemorySizes | None) -> dict[str, int]:
    hidden, head = architecture.hidden_size, architecture.head_dim
    return {
        "H": hidden,
        "Q": architecture.num_attention_heads * head,
        "K": architecture.num_query_groups * head,
        "E": head,
        "F": architecture.ffn_hidden_size,
        "V": architecture.vocab_size,
        "R": 0 if memory is None else memory.adapter_rank,
        "D": 2 * hidden,
        "1": 1,
    }


def _shape(letters: str, sizes: Mapping[str, int]) -> Shape:
    return tuple(sizes[letter] for letter in letters)


def _layer_rules(
    layer: int, architecture: Architecture, memory: MemorySizes | None, sizes: Mapping[str, int]
) -> Iterator[Rule]:
    outer, ours = f"model.layers.{layer}.", f"decoder.layers.{layer}."
    theirs = outer if memory is None else f"{outer}inner_layer."
    for hf, megatron, letters, axis in (*_LAYER, *(_QK_NORM if architecture.qk_norm else ())):
        yield Rule(ours + megatron, (theirs + hf,), (_shape(letters, sizes),), axis)
    for kind, tail in (("weight", "H"), ("bias", ""))[: 2 if architecture.qkv_bias else 1]:
        yield FusedQkv(
            f"{ours}self_attention.linear_qkv.{kind}",
            tuple(f"{theirs}self_attn.{x}_proj.{kind}" for x in "qkv"),
            tuple(_shape(rows + tail, sizes) for rows in "QKK"),
            0,
            head_dim=architecture.head_dim,
        )
    gate_up = tuple(f"{theirs}mlp.{name}_proj.weight" for name in ("gate", "up"))
    yield GatedMlp(f"{ours}mlp.linear_fc1.weight", gate_up, (_shape("FH", sizes),) * 2, 0)
    nets = []
    if memory is not None and memory.global_slots:
        nets.append(("global_memory_net", _GLOBAL_NET))
    if memory is not None and memory.stride > 0:
        nets.append(("temp_memory_net", _TEMPORARY_NET))
    for net, parameters in nets:
        for name, letters in parameters:
            yield Rule(f"{ours}{net}.{name}", (f"{outer}{net}.{name}",), (_shape(letters, sizes),))


def is_memory_net(name: str) -> bool:
    """Whether a parameter, under either name, is of a memory net."""
    return "_memory_net." in name


def to_megatron(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole Hugging Face tensors -> whole Megatron tensors."""
    return {rule.megatron: rule.to_megatron([tensors[name] for name in rule.hf]) for rule in rules}


def to_hf(rules: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole Megatron tensors -> whole Hugging Face tensors."""
    return {
        name: part for rule in rules for name, part in zip(rule.hf, rule.to_hf(tensors[rule.megatron]), strict=True)
    }
