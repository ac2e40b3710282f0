"""The planned bytes of a rank are within 15 % of the peak of a real training run, in processes that do nothing else.

Weights of 84 MB in fp32, so that libraries are not all. The base is taken after a tiny model has trained in the same
process: interpreter, libraries and the kernels' own buffers are not planned.
"""

from __future__ import annotations

import gc
from dataclasses import replace

import numpy as np
import pytest
import torch

from comet_megatron.backend.device import keep_large_tensors_apart
from comet_megatron.config.schema import (
    Config,
    MemorySizes,
    ModelSection,
    OptimizerSection,
    ParallelSection,
    TrainSection,
)
from comet_megatron.model.build import build_stage
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.planning.balance import resolve_layers_per_stage
from comet_megatron.planning.memory import kept_piece_bytes
from comet_megatron.planning.report import plan_pipeline
from comet_megatron.testing.distributed import ProcessPool
from comet_megatron.testing.resident import forget_peak, peak_resident_bytes, resident_bytes
from comet_megatron.testing.tiny import layout_of, tiny_architecture, tiny_memory
from comet_megatron.train.model import build_trainable
from comet_megatron.train.optimizer import build_optimizer
from comet_megatron.train.step import train_step

MODEL = replace(
    tiny_architecture(num_layers=4),
    hidden_size=512,
    ffn_hidden_size=1536,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=64,
    vocab_size=8192,
)
MEMORY = MemorySizes(
    chunk_size=512,
    stride=8,
    budget=512,
    memory_token_id=8062,
    beacon_id=8191,
    global_beacon_ids=tuple(range(8063, 8191)),
    first_new_id=8062,
)
TOKENS, STEPS, WITHIN = 2049, 2, 0.15
CASES = {
    "plain": Config(),
    "recompute": Config(train=TrainSection(recompute="full")),
    "PP 2": Config(parallel=ParallelSection(pp=2)),
    "PP 2, recompute": Config(parallel=ParallelSection(pp=2), train=TrainSection(recompute="full")),
    "ZeRO-1, DP 2": Config(),
    "bf16": Config(model=ModelSection(precision="bf16")),
    "bf16, recompute": Config(model=ModelSection(precision="bf16"), train=TrainSection(recompute="full")),
}


def train(layout, architecture, memory, config, *, tokens):
    """Two steps of one sequence."""
    recompute = config.train.recompute == "full"
    split = resolve_layers_per_stage(
        "auto", architecture, memory, num_stages=layout.pp, tokens=tokens, recompute=recompute
    )
    precision = config.model.precision
    stage = build_stage(
        architecture, memory, layout.groups, stage=layout.pp_rank, layers_per_stage=split, precision=precision
    )
    with torch.no_grad():
        for param in stage.parameters():
            param.normal_(std=0.02) if param.dim() > 1 else param.fill_(1.0)
    model = build_trainable({layout.pp_rank: stage}, layout, zero1=True)
    optimizer = build_optimizer(model, OptimizerSection(), precision=precision, zero1=True)
    optimizer.reload_model_params()
    sequence = np.random.default_rng(layout.dp_rank).integers(0, memory.first_new_id, tokens).astype(np.int32)
    settings = BackwardSettings(recompute=recompute, slice_tokens=config.train.loss_slice_tokens)
    for step in range(1, STEPS + 1):
        train_step(model, optimizer, [sequence], layout, settings=settings, step=step)


def measure_peak(process, config):
    """Peak of this rank above its base, bytes."""
    layout = layout_of(process, pp=config.parallel.pp)
    keep_large_tensors_apart(kept_piece_bytes(MODEL, MEMORY))
    train(layout, tiny_architecture(num_layers=4), tiny_memory(), config, tokens=100)
    gc.collect()
    base = resident_bytes()
    forget_peak()
    train(layout, MODEL, MEMORY, config, tokens=TOKENS)
    return peak_resident_bytes() - base


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", CASES)
def test_a_rank_takes_what_is_planned(case):
    config, dp = CASES[case], 2 if "DP 2" in case else 1
    report = plan_pipeline(config, MODEL, MEMORY, [TOKENS], longest=TOKENS, dp=dp)
    pool = ProcessPool(config.parallel.pp * dp)
    try:
        peaks = pool.run(measure_peak, config, timeout_s=800)
    finally:
        pool.close()
    for rank, peak in enumerate(peaks):
        planned = report.stages[rank // dp].bytes
        items = ", ".join(f"{name} {count / 1e6:.0f}" for name, count in vars(planned).items())
        print(
            f"\n{case}, rank {rank}: planned {planned.total / 1e6:.0f} MB, measured {peak / 1e6:.0f} "
            f"({peak / planned.total - 1:+.1%}): {items}"
        )
        assert peak == pytest.approx(planned.total, rel=WITHIN)
