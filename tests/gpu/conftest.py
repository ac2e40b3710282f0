"""Skips what this machine cannot run, saying why.

make test-gpu        on one GPU; aimed at less than 8 minutes
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from comet_megatron.backend.precision import Fp8
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.model.build import build_stage
from comet_megatron.testing.gpu import ARCHITECTURE, MACHINE, MEMORY, require_backend, require_recipe
from comet_megatron.testing.tiny import build_oracle, layout_alone, load_hf_tensors, oracle_tensors
from comet_megatron.train.model import TrainableModel, build_trainable

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """The marker, and a reason where there is no GPU."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    why_not = "the GPU is hidden (CUDA_VISIBLE_DEVICES is empty): run tests/gpu alone, make test-gpu"
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not MACHINE.cuda.is_there:
                item.add_marker(pytest.mark.skip(reason=why_not if hidden else MACHINE.cuda.why_not))


@pytest.fixture(scope="session")
def oracle_weights() -> dict[str, torch.Tensor]:
    """On the CPU, by their Hugging Face names."""
    return oracle_tensors(build_oracle(ARCHITECTURE, MEMORY))


@pytest.fixture
def build(oracle_weights) -> Callable[..., TrainableModel]:
    """`build(backend, precision, recipe=, split=, ends=)`: all stages in this process, with the oracle's weights."""

    def build(
        backend: str,
        precision: str,
        *,
        recipe: str = "",
        split: tuple[int, ...] = (),
        ends: int = 1,
        architecture: Architecture = ARCHITECTURE,
        memory: MemorySizes = MEMORY,
    ) -> TrainableModel:
        require_backend(backend)
        if recipe:
            require_recipe(recipe)
        layout, stages = layout_alone(), {}
        for number in range(max(len(split), 1)):
            stages[number] = build_stage(
                architecture,
                memory,
                layout.groups,
                stage=number,
                layers_per_stage=split,
                precision=precision,
                backend=backend,
                fp8=Fp8(recipe, ends) if recipe else None,
            )
            load_hf_tensors(stages[number], oracle_weights)
        return build_trainable(stages, layout, zero1=True)

    return build


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """fp32 products are fp32, not TF32; what a test leaves on the device is given back."""
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.cuda.empty_cache() if MACHINE.cuda.is_there else None
