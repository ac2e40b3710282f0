"""The example configurations load and have no problem of their own."""

from pathlib import Path

import pytest

from comet_megatron.config.load import load_config
from comet_megatron.config.rules import check_config

CONFIGS = sorted((Path(__file__).parents[3] / "examples" / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_an_example_needs_only_its_folders(path):
    folders = ("model.path=m", "data.train=d", "data.eval=e", "train.output=o")
    assert check_config(load_config(path, folders).config) == []
