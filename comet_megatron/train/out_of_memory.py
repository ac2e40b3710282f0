"""A GPU whose memory is full: what was planned, what was measured, and the first setting to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from comet_megatron.chunking import plan_chunks
from comet_megatron.config.schema import Config
from comet_megatron.errors import TrainingError
from comet_megatron.planning.memory import (
    BYTES,
    Parameters,
    StateBytes,
    checkpoint_bytes,
    count_parameters,
    state_bytes,
)

if TYPE_CHECKING:
    from comet_megatron.checkpoint.model_folder import ModelDescription
    from comet_megatron.parallel.process import ProcessRank
    from comet_megatron.train.trainer import Trainer

GIB = 2**30


class OutOfMemory(TrainingError):
    """Of one rank; the others do not know."""

    kind = "out of memory"
    said_by_all = True


def explain_out_of_memory(error: torch.OutOfMemoryError, trainer: Trainer) -> OutOfMemory:
    """The error in the terms of the run. Builds nothing on the device."""
    config, layout, stage = trainer.config, trainer.layout, trainer.stage
    params = list(stage.parameters())
    counts = Parameters(sum(p.numel() for p in params), sum(p.numel() for p in params if p.requires_grad))
    precision = config.model.precision
    state = state_bytes(counts, precision=precision, dp=layout.dp, zero1=config.parallel.zero1)
    kept = sum(
        checkpoint_bytes(
            stage.architecture,
            plan,
            stage.num_layers,
            is_first=stage.has_embedding,
            dtype_bytes=BYTES[precision],
            sequence_shards=stage.shards.size,
        )
        for plan in plan_chunks(trainer.data.train.longest, stage.memory_sizes)
    )
    has = peak = 0
    if layout.device.kind == "cuda":
        has = torch.cuda.get_device_properties(layout.device.torch_device).total_memory
        peak = torch.cuda.max_memory_allocated()
    what = describe_out_of_memory(state, kept, peak=peak, has=has, recompute=config.train.recompute)
    asked = next(iter(str(error).splitlines()), "")
    knob = first_knob(config, state=state, has=has, dp=layout.dp)
    return OutOfMemory(f"{what}\n  torch: {asked}", where=layout.name_of(layout.rank), way_out=knob)


def explain_out_of_memory_of_building(
    error: torch.OutOfMemoryError, config: Config, description: ModelDescription, process: ProcessRank
) -> OutOfMemory:
    """The same before there is a trainer: the weights and what belongs to them do not fit."""
    parallel, precision = config.parallel, config.model.precision
    dp = max(process.world_size // (parallel.tp * parallel.pp), 1)
    layers = -(-description.architecture.num_layers // parallel.pp)
    counts = count_parameters(
        description.architecture,
        description.memory,
        layers,
        tp=parallel.tp,
        is_last=parallel.pp == 1,
        trainable=config.train.trainable,
    )
    state = state_bytes(counts, precision=precision, dp=dp, zero1=parallel.zero1)
    is_on_gpu = torch.cuda.is_available()
    has = torch.cuda.get_device_properties(process.local_rank).total_memory if is_on_gpu else 0
    peak = torch.cuda.max_memory_allocated() if is_on_gpu else 0
    what = describe_out_of_memory(state, 0, peak=peak, has=has, recompute="full")
    asked = next(iter(str(error).splitlines()), "")
    # It does not fit, whatever the estimate says.
    knob = first_knob(config, state=state, has=max(min(has, state.total), 1), dp=dp)
    return OutOfMemory(f"{what}\n  torch: {asked}", where=f"rank {process.rank}, building the model", way_out=knob)


def describe_out_of_memory(state: StateBytes, kept: int, *, peak: int, has: int, recompute: str) -> str:
    """What was planned and what was measured, in lines.

    Args:
        state: of the stage on this rank.
        kept: bytes that recomputation keeps of the longest sequence.
        peak: most bytes that were allocated.
        has: bytes of the device.
    """
    chunks = (
        f"{kept / GIB:.1f} of chunks to be computed again" if recompute == "full" else "the activations of all chunks"
    )
    return (
        f"the GPU's memory is full: {peak / GIB:.1f} of {has / GIB:.1f} GiB were in use at most\n"
        f"  planned, in GiB: weights {state.weights / GIB:.1f}, gradients {state.gradients / GIB:.1f}, "
        f"optimizer {state.optimizer / GIB:.1f}, {chunks};\n"
        f"  beside these, the activations of the chunk in work and a slice of logits"
    )


def first_knob(config: Config, *, state: StateBytes, has: int, dp: int) -> str:
    """The one setting to change first: of what helps, what costs least."""
    train, parallel = config.train, config.parallel
    if 0 < 0.7 * has < state.total:
        if dp > 1 and not parallel.zero1:
            return "set parallel.zero1=true: data-parallel ranks share the optimizer's state"
        more = f"set parallel.pp={2 * parallel.pp} (on more GPUs, a layer each at least)"
        if train.trainable != "memory":
            more += ", or start anew with train.trainable=memory"
        return f"weights, gradients and optimizer fill the GPU: {more}"
    if train.recompute == "none":
        return "set train.recompute=full: a chunk's activations are computed again in its backward"
    if train.loss_slice_tokens > 256:
        return f"set train.loss_slice_tokens={train.loss_slice_tokens // 4}: fewer rows of logits at once"
    if train.bptt_chunks == "all":
        return "set train.bptt_chunks=64, for example: what chunks before that window wrote is not kept"
    return f"set parallel.pp={2 * parallel.pp} (on more GPUs)"
