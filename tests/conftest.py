"""Fixtures of all tests: process pools, one per world size, kept for the whole run; one-process layouts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # these tests run on CPU, wherever they run

from comet_megatron.testing.distributed import ProcessPool  # noqa: E402


@pytest.fixture(scope="session")
def pool() -> Iterator[Callable[[int], ProcessPool]]:
    """`pool(n)`: n gloo processes, started at the first use."""
    pools: dict[int, ProcessPool] = {}

    def get(world_size: int) -> ProcessPool:
        return pools.setdefault(world_size, ProcessPool(world_size))

    yield get
    for started in pools.values():
        started.close()
