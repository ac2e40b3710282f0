"""Tiny models for tests: sizes, weights from the oracle, a stage on this rank, whole gradients under their HF names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from comet_megatron.backend.device import select_device
from comet_megatron.checkpoint.hf_config import hf_config_of
from comet_megatron.checkpoint.hf_rules import Rule, Whole, plan_rules
from comet_megatron.checkpoint.model_folder import ModelDescription
from comet_megatron.config.schema import Architecture, MemorySizes, RopeScaling
from comet_megatron.hf.configuration_comet import CometConfig
from comet_megatron.hf.modeling_comet import CometForCausalLM
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.layout import Layout, build_layout
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.train.model import TrainableModel

TEXT_IDS = 200  # text ids of the tiny models; new ids follow


# What sets the families apart. The llama's base is so low that all three bands of its scaling occur in a head of 16.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3": {},
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "llama": {"qk_norm": False, "rope_theta": 500.0, "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 64)},
    "mistral": {"qk_norm": False},
}


def tiny_architecture(family: str = "qwen3", *, tie_embeddings: bool = False, num_layers: int = 3) -> Architecture:
    """Sizes that TP 1, 2 and 4 divide; a vocabulary that needs padding."""
    sizes = Architecture(
        family=family,
        num_layers=num_layers,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=4,
        head_dim=16,
        vocab_size=230,
        norm_eps=1e-6,
        rope_theta=10000.0,
        tie_embeddings=tie_embeddings,
        init_std=0.05,
        max_positions=512,
    )
    return replace(sizes, **FAMILIES[family])


def tiny_memory(*, global_slots: int = 6, stride: int = 4, budget: int = 12, chunk_size: int = 16) -> MemorySizes:
    """Memory of a tiny model; G or stride may be switched off (0, -1)."""
    return MemorySizes(
        chunk_size=chunk_size,
        stride=stride,
        budget=budget,
        memory_token_id=TEXT_IDS,
        beacon_id=TEXT_IDS + 1 + global_slots,
        global_beacon_ids=tuple(range(TEXT_IDS + 1, TEXT_IDS + 1 + global_slots)),
        first_new_id=TEXT_IDS,
    )


def tiny_sequences(lengths: Sequence[int], *, seed: int = 0) -> list[np.ndarray]:
    """Random text ids."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, TEXT_IDS, n).astype(np.int32) for n in lengths]


def build_oracle(architecture: Architecture, memory: MemorySizes, *, seed: int = 0) -> CometForCausalLM:
    """The oracle with random weights, norms included, so that a norm in the wrong place shows."""
    description = ModelDescription(architecture, memory, {"eos_token_id": 0})
    config = hf_config_of(description, tokenizer_eos=0, dtype="float32")
    torch.manual_seed(seed)
    oracle = CometForCausalLM(CometConfig(**{k: v for k, v in config.items() if k not in ("architectures", "dtype")}))
    with torch.no_grad():
        for name, param in oracle.named_parameters():
            if param.dim() == 1 and name.endswith("bias"):
                param.normal_(std=0.3)  # larger ones only add noise to the comparison
            elif param.dim() == 1:
                param.uniform_(0.5, 1.5)
            elif "_memory_net" in name:
                param.normal_(std=0.1)
    return oracle


def oracle_tensors(oracle: CometForCausalLM) -> dict[str, Tensor]:
    """Its weights by name, a tied head left out."""
    return {n: p.detach() for n, p in oracle.named_parameters()}


_current: list[tuple[tuple[int, int], Layout]] = []


def layout_of(process: ProcessRank, *, tp: int = 1, pp: int = 1) -> Layout:
    """A layout on the processes of this pool; the last one is kept for the next test."""
    if not (parallel_state.model_parallel_is_initialized() and _current and _current[0][0] == (tp, pp)):
        _current[:] = [((tp, pp), build_layout(process, select_device(process.local_rank), tp=tp, pp=pp, seed=1))]
    return _current[0][1]


@cache
def layout_alone() -> Layout:
    """The layout of a test in this one process."""
    torch.set_num_threads(1)
    return layout_of(ProcessRank(0, 1, 0, 1))


@torch.no_grad()
def load_hf_tensors(stage: CometStage, tensors: Mapping[str, Tensor]) -> None:
    """Set this rank's part of every parameter of a stage from whole Hugging Face tensors."""
    rules = {rule.megatron: rule for rule in plan_rules(stage.architecture, stage.memory_sizes)}
    names, group = stage.global_names(), stage.tp_group
    if stage.has_embedding and stage.has_head:
        assert set(names.values()) == rules.keys(), set(names.values()) ^ rules.keys()
    for name, param in stage.named_parameters():
        param.copy_(rules[names[name]].load(Whole(tensors), rank=group.rank(), size=group.size()))


def whole_tensors(stages: CometStage | Sequence[CometStage], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's tensors by name in the whole model -> whole tensors under Hugging Face names, on every rank.

    Args:
        stages: of this process.
        parts: of a tied embedding with a copy elsewhere, the two must be equal.
    """
    stage = stages if isinstance(stages, CometStage) else stages[0]
    rules: Sequence[Rule] = plan_rules(stage.architecture, stage.memory_sizes)
    group, pipeline = stage.tp_group, stage.pg_collection.pp
    whole: dict[str, Tensor] = {}
    for rule in rules:
        if rule.megatron in parts:
            part = parts[rule.megatron].contiguous()
            pieces = [torch.empty_like(part) for _ in range(group.size())]
            dist.all_gather(pieces, part, group=group)
            whole |= zip(rule.hf, rule.join(pieces), strict=True)
    if pipeline.size() > 1:
        of_stages: list[dict[str, Tensor]] = [{}] * pipeline.size()
        dist.all_gather_object(of_stages, whole, group=pipeline)
        for other in of_stages:
            for name, tensor in other.items():
                assert torch.equal(whole.setdefault(name, tensor), tensor), f"{name} differs between two stages"
    return whole


def weights(stages: CometStage | Sequence[CometStage]) -> dict[str, Tensor]:
    """Parameters of this process's stages by their name in the whole model."""
    return _by_global_name(stages, lambda param: param.detach())


def _by_global_name(
    stages: CometStage | Sequence[CometStage], value: Callable[[torch.nn.Parameter], Tensor]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for stage in [stages] if isinstance(stages, CometStage) else stages:
        names = stage.global_names()
        for name, param in stage.named_parameters():
            tensor = value(param)
            assert torch.equal(found.setdefault(names[name], tensor), tensor), f"{name} differs between two stages"
    return found


def gradients(stages: CometStage | Sequence[CometStage]) -> dict[str, Tensor]:
    """Gradients by parameter name in the whole model: Megatron's main gradient where DDP made one; zeros where there
    is none."""

    def gradient(param: torch.nn.Parameter) -> Tensor:
        grad = getattr(param, "main_grad", None)
        grad = param.grad if grad is None else grad
        return torch.zeros_like(param) if grad is None else grad.detach()

    return _by_global_name(stages, gradient)


def gather_zero1_gradients(model: TrainableModel) -> None:
    """After ZeRO-1's reduce-scatter each rank has its shard of the reduced gradients: give every rank all of them."""
    for part in model.parts.values():
        group = part.dp_cp_group
        for buffer in part.buffers:
            for bucket in buffer.buckets:
                shards = bucket.grad_data.view(group.size(), -1)
                parts = [torch.empty_like(shards[0]) for _ in range(group.size())]
                dist.all_gather(parts, shards[group.rank()].clone(), group=group)
                shards.copy_(torch.stack(parts))
