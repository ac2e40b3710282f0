"""Megatron's DDP, AdamW and learning-rate schedule for a stage, with the memory nets at their own rate."""

from __future__ import annotations

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from comet_megatron.config.schema import OptimizerSection
from comet_megatron.model.stage import CometStage

MEMORY_NETS = "*_memory_net.*"


def wrap_in_ddp(stage: CometStage, *, zero1: bool) -> DistributedDataParallel:
    """Megatron's DDP with fp32 gradients, summed (not averaged) over data-parallel ranks.

    Gradients are reduced once a step, when `finalize_model_grads` asks for it: Megatron's hooks count calls per
    parameter, and the number of calls differs with the number of chunks.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=zero1, overlap_grad_reduce=False
    )
    return DistributedDataParallel(stage.config, config, stage, pg_collection=stage.pg_collection)


def build_optimizer(
    model: DistributedDataParallel, settings: OptimizerSection, *, precision: str, zero1: bool
) -> MegatronOptimizer:
    """AdamW over the trainable parameters; fp32 master weights under bf16; its state sharded over DP with `zero1`.

    Megatron matches parameter groups after a load by their multipliers alone, so the memory nets' group carries its
    own lr_mult beside its own learning rates.
    """
    stage: CometStage = model.module
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=precision == "bf16",
        params_dtype=stage.config.params_dtype,
        use_distributed_optimizer=zero1,
    )
    overrides = get_standard_config_overrides(config)  # no decay on vectors
    mult = settings.memory_lr_mult
    if mult != 1.0:
        overrides[ParamKey(name=MEMORY_NETS)] = {
            "max_lr": settings.lr * mult,
            "min_lr": settings.min_lr * mult,
            "lr_mult": mult,
        }
    return get_megatron_optimizer(config, [model], overrides, use_gloo_process_groups=False)


def build_schedule(
    optimizer: MegatronOptimizer, settings: OptimizerSection, *, steps: int, steps_done: int
) -> OptimizerParamScheduler:
    """Linear warm-up, then cosine decay to min_lr at `decay_steps`. Step k of a run (from 1) uses the rate at k."""
    decay_steps = steps if settings.decay_steps == "auto" else int(settings.decay_steps)
    warmup_steps = min(settings.warmup_steps, decay_steps)
    schedule = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=max(decay_steps, warmup_steps + 1),
        lr_decay_style="cosine",
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    schedule.step(increment=steps_done)
    return schedule


def backbone_learning_rate(optimizer: MegatronOptimizer) -> float:
    """The rate without the memory nets' multiplier."""
    return max(group["lr"] / group["lr_mult"] for group in optimizer.param_groups)
