"""AdamW and learning-rate schedule of a model, with the memory nets at their own rate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.optimizer import (
    USING_PYTORCH_OPTIMIZER,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from comet_megatron.backend.torch_adam import step_device
from comet_megatron.config.schema import OptimizerSection
from comet_megatron.train.model import TrainableModel

MEMORY_NETS = "*_memory_net.*"
MEMORY_MARK = 2.0  # lr_mult of the memory nets' groups: Megatron only compares it
_FROM_CONFIG = ("max_lr", "min_lr", "betas", "eps", "weight_decay", "fused")


def build_optimizer(
    model: TrainableModel, settings: OptimizerSection, *, precision: str, zero1: bool
) -> MegatronOptimizer:
    """AdamW over the trainable parameters; fp32 master weights but in fp32; its state sharded over DP with `zero1`.

    Megatron matches parameter groups after a load by their multipliers alone, so the memory nets' groups are marked by
    an lr_mult of their own, whatever their rate: a run may be resumed with another rate.

    Megatron takes Transformer Engine's fused AdamW, else apex's, else torch's (backend.capabilities); torch's is fused
    on a GPU.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=precision != "fp32",
        params_dtype=model.stages[0].config.params_dtype,
        use_distributed_optimizer=zero1,
    )
    overrides = get_standard_config_overrides(config)  # no decay on vectors
    overrides[ParamKey(name=MEMORY_NETS)] = {
        "max_lr": settings.lr * settings.memory_lr_mult,
        "min_lr": settings.min_lr * settings.memory_lr_mult,
        "lr_mult": MEMORY_MARK,
    }
    optimizer = get_megatron_optimizer(config, list(model.parts.values()), overrides, use_gloo_process_groups=False)
    if USING_PYTORCH_OPTIMIZER and model.stages[0].device.type == "cuda":
        for group in optimizer.param_groups:
            group["fused"] = True
    return optimizer


def build_schedule(
    optimizer: MegatronOptimizer, settings: OptimizerSection, *, steps: int, steps_done: int
) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine decay; min_lr right after `decay_steps`. Step k (from 1) uses the rate at k."""
    decay_steps = steps if settings.decay_steps == "auto" else int(settings.decay_steps)
    warmup_steps = min(settings.warmup_steps, decay_steps)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps + 1,  # so that the last step still trains where min_lr is 0
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    schedule.step(increment=steps_done)
    return schedule


def backbone_learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate of all but the memory nets; of these where nothing else is trained."""
    groups = optimizer.param_groups
    return next((group["lr"] for group in groups if group["lr_mult"] != MEMORY_MARK), groups[0]["lr"])


@contextmanager
def keep_settings(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Let a load inside bring back the optimizer's state, but not the settings that the config states anew."""
    kept = {_group_key(g): {k: g[k] for k in _FROM_CONFIG if k in g} for g in optimizer.param_groups}
    yield
    for group in optimizer.param_groups:
        group.update(kept[_group_key(group)])
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        _place_steps(part.optimizer)


def _place_steps(optimizer: torch.optim.Optimizer) -> None:
    """Put torch's count of steps where its AdamW wants it now: what was saved may not have been fused."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param, {})
            if torch.is_tensor(step := state.get("step")):
                state["step"] = step.to(step_device(group, param))


def _group_key(group: dict) -> tuple[float, float]:
    return group["lr_mult"], group["wd_mult"]
