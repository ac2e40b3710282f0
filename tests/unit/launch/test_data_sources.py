"""What DATA may be, beside texts: shards, their URL, a list of places with weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from comet_megatron.errors import DataError
from comet_megatron.launch.recipe import Recipe
from comet_megatron.launch.sources import find_data
from comet_megatron.testing.runs import write_data
from comet_megatron.testing.tiny import tiny_sequences


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """An output of prepare_data with held-out documents."""
    for part in ("train", "eval"):
        write_data(tmp_path / "data" / part, tiny_sequences((40, 50)))
    return tmp_path / "data"


def found(data: str):
    recipe = Recipe(16, 4, 4, 8, sequence_length=512, needs_gpu=False, data="")
    return find_data(data, Path(data), recipe)


@pytest.mark.parametrize("prefix", ["", "file://"], ids=["path", "URL"])
def test_shards_are_found_with_what_is_held_out(prefix, shards):
    whole = found(f"{prefix}{shards}")
    assert (whole.train, whole.eval) == (f"{prefix}{shards}/train", f"{prefix}{shards}/eval")
    only = found(f"{prefix}{shards}/train")
    assert (only.train, only.eval) == (f"{prefix}{shards}/train", None)


def test_a_list_is_looked_into_and_goes_to_the_train_command_as_it_is(shards):
    given = f"[[{shards}, 0.7], [file://{shards}/eval, 0.3]]"
    assert (found(given).train, found(given).folders) == (given, (f"{shards}/train",))


@pytest.mark.parametrize(
    ("given", "complaint"),
    [("[[/nowhere, 1]]", "does not exist"), ("[[", "is no list of places"), ("[[]]", "is no list of places")],
)
def test_a_list_with_a_mistake_is_refused_before_anything_is_prepared(given, complaint):
    with pytest.raises(DataError, match=complaint):
        found(given)


@pytest.mark.parametrize("prefix", ["", "file://"], ids=["path", "URL"])
def test_a_pattern_of_several_folders_is_one_place(prefix, shards, tmp_path):
    (tmp_path / "more").symlink_to(shards)
    place = f"{prefix}{tmp_path}/*"
    assert found(place).train == place and found(place).eval is None


def test_a_url_without_shards_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no manifest.json"):
        found(f"file://{tmp_path}")
