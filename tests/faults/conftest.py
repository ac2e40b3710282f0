"""A tiny model with data for all tests of faults, and the command as torchrun starts it."""

from __future__ import annotations

from pathlib import Path

import pytest

from comet_megatron.testing.runs import write_data, write_start
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory, tiny_sequences


@pytest.fixture(scope="session")
def start(tmp_path_factory, pool) -> Path:
    """A folder with start/ and data/."""
    folder = tmp_path_factory.mktemp("faults")
    write_data(folder / "data", tiny_sequences((80, 75, 130, 140, 9, 16, 137, 144, 50, 33)))
    pool(1).run(write_start, folder / "start", tiny_architecture(num_layers=2), tiny_memory())
    return folder
