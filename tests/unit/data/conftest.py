"""Fixtures of the data tests: the shipped tokenizer, a few documents, folders made of them, the tools."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from comet_megatron.data.shard_writer import write_shards
from comet_megatron.data.shards import Sample
from comet_megatron.data.tokenizer import load_tokenizer

settings.register_profile("repeatable", derandomize=True)  # the same examples each time
settings.load_profile("repeatable")

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def tokenizer_dir() -> Path:
    return REPOSITORY / "tokenizers" / "python_stdlib_4k"


@pytest.fixture(scope="session")
def tokenizer(tokenizer_dir: Path) -> Any:
    return load_tokenizer(tokenizer_dir)


@pytest.fixture
def samples() -> list[Sample]:
    """Forty ragged samples of 1 to 300 tokens."""
    random = np.random.default_rng(0)
    return [Sample(random.integers(0, 1000, size=n), {"document": f"d{n}"}) for n in random.integers(1, 300, size=40)]


@pytest.fixture
def shard_dir(tmp_path: Path, samples: list[Sample]) -> Path:
    """A folder with these samples in several shards."""
    write_shards(
        samples,
        output_dir=tmp_path / "shards",
        tokenizer_fingerprint="f" * 64,
        vocab_size=1000,
        shard_bytes=4000,
        settings={"sequence_length": 300},
    )
    return tmp_path / "shards"


@pytest.fixture
def corpus_dir(tmp_path: Path) -> Path:
    """Thirty small text files, one of them too short for a sample and one empty."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(28):
        lines = [f"def function_{number}_{i}(x):\n    return x + {i}\n" for i in range(number + 2)]
        (folder / f"file{number:02d}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "short.txt").write_text("x = 1\n", encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    return folder


def _tool_main(name: str) -> Callable[[Sequence[str]], int]:
    spec = importlib.util.spec_from_file_location(f"tool_{name}", REPOSITORY / "tools" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="session")
def prepare_data_tool() -> Callable[[Sequence[str]], int]:
    return _tool_main("prepare_data")


@pytest.fixture(scope="session")
def train_tokenizer_tool() -> Callable[[Sequence[str]], int]:
    return _tool_main("train_tokenizer")
