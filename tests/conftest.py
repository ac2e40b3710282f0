"""Fixtures of all tests: process pools, one per world size, kept for the whole run.

All tests but tests/gpu run on CPU, wherever they run: a GPU is hidden from them. So tests/gpu is run alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
GPU_TESTS = Path(__file__).parent / "gpu"

from comet_megatron.testing.distributed import ProcessPool  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported."""
    asked = [Path(argument.split("::")[0]).absolute() for argument in config.args]
    if not (asked and all(path == GPU_TESTS or GPU_TESTS in path.parents for path in asked)):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], ProcessPool]]:
    """`pool(n)`: n gloo processes, started at the first use."""
    pools: dict[int, ProcessPool] = {}

    def get(world_size: int) -> ProcessPool:
        return pools.setdefault(world_size, ProcessPool(world_size))

    yield get
    for started in pools.values():
        started.close()
