"""Tiny models for tests: sizes, a stage on this rank, whole gradients under Hugging Face names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from comet_megatron.checkpoint.hf_rules import Rule, plan_rules, to_hf, to_megatron
from comet_megatron.model.stage import CometStage


@torch.no_grad()
def load_hf_tensors(stage: CometStage, tensors: Mapping[str, Tensor]) -> None:
    """Set this rank's part of every parameter from whole Hugging Face tensors."""
    rules = plan_rules(stage.architecture, stage.memory_sizes)
    whole = to_megatron(rules, tensors)
    params = dict(stage.named_parameters())
    assert params.keys() == whole.keys(), params.keys() ^ whole.keys()
    group = stage.tp_group
    for rule in rules:
        part = rule.partition(whole[rule.megatron], rank=group.rank(), size=group.size())
        params[rule.megatron].copy_(part)


def whole_tensors(stage: CometStage, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This rank's tensors by parameter name -> whole tensors under Hugging Face names, on every rank."""
    rules: Sequence[Rule] = plan_rules(stage.architecture, stage.memory_sizes)
    group = stage.tp_group
    whole = {}
    for rule in rules:
        part = parts[rule.megatron].contiguous()
        pieces = [torch.empty_like(part) for _ in range(group.size())]
        dist.all_gather(pieces, part, group=group)
        whole[rule.megatron] = rule.join(pieces)
    return to_hf(rules, whole)


def gradients(stage: CometStage) -> dict[str, Tensor]:
    """Gradients by parameter name: Megatron's main gradient where DDP made one; zeros where there is none."""
    found = {}
    for name, param in stage.named_parameters():
        grad = getattr(param, "main_grad", None)
        grad = param.grad if grad is None else grad
        found[name] = torch.zeros_like(param) if grad is None else grad.detach()
    return found
