"""What tests/gpu share: a model large enough for the kernels of a GPU, text that can be learnt, reasons to skip."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from comet_megatron.backend.capabilities import probe_capabilities
from comet_megatron.backend.environment import set_environment

set_environment()  # before the first CUDA call
MACHINE = probe_capabilities()  # before Megatron is imported, which expects an optional package to be whole

from megatron.core.optimizer.optimizer import MegatronOptimizer  # noqa: E402

from comet_megatron.config.schema import OptimizerSection  # noqa: E402
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory  # noqa: E402
from comet_megatron.train.model import TrainableModel  # noqa: E402
from comet_megatron.train.optimizer import build_optimizer  # noqa: E402

ARCHITECTURE = replace(
    tiny_architecture(num_layers=4), hidden_size=256, ffn_hidden_size=512, head_dim=64, max_positions=4096
)
MEMORY = tiny_memory(chunk_size=128, global_slots=16, stride=8, budget=32)
LENGTHS = (700, 256, 393, 70)  # 6, 2, 4 and 1 chunks; ragged


def require_backend(backend: str) -> None:
    """Skip the test if the backend is te and cannot be used."""
    if backend == "te" and not MACHINE.te.is_there:
        pytest.skip(f"Transformer Engine: {MACHINE.te.why_not}")


def require_recipe(recipe: str) -> None:
    """Skip the test if this GPU, or what is installed, has not this FP8 recipe."""
    require_backend("te")
    if not MACHINE.fp8[recipe].is_there:
        pytest.skip(f"FP8 {recipe}: {MACHINE.fp8[recipe].why_not}")


def optimizer_of(model: TrainableModel, precision: str, *, lr: float) -> MegatronOptimizer:
    """AdamW at a constant rate."""
    section = OptimizerSection(lr=lr, min_lr=lr, warmup_steps=0)
    optimizer = build_optimizer(model, section, precision=precision, zero1=True)
    for group in optimizer.param_groups:
        group["lr"] = group.get("max_lr", lr)
    return optimizer


def text(length: int, *, seed: int) -> np.ndarray:
    """Text ids that can be learnt: each is the one before plus a few, or one of a few."""
    generator = np.random.default_rng(seed)
    steps = generator.integers(0, 3, length)
    return (np.cumsum(steps) % 200).astype(np.int32)


def batch(*, seed: int = 0) -> list[np.ndarray]:
    """Sequences of all lengths."""
    return [text(length, seed=seed + i) for i, length in enumerate(LENGTHS)]
