"""data.train: one place or several with weights; what makes no sense is told with its way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from comet_megatron.config.load import load_config, save_config
from comet_megatron.config.rules import check_config
from comet_megatron.config.schema import Config, DataSection, ModelSection, TrainSection
from comet_megatron.errors import ConfigError

MINIMAL = "model: {path: base}\ntrain: {output: run, steps: 20}\ndata:\n  train: "


def load(tmp_path: Path, train: str, *overrides: str) -> Config:
    path = tmp_path / "demo.yaml"
    path.write_text(MINIMAL + train + "\n")
    return load_config(path, overrides).config


@pytest.mark.parametrize(
    ("train", "sources"),
    [
        ("shards", (("shards", 1.0),)),
        ("007", (("007", 1.0),)),
        ("[[a, 3], [b/*.jsonl, 0.5]]", (("a", 3.0), ("b/*.jsonl", 0.5))),
        ("[a, [s3://bucket/b, 2]]", (("a", 1.0), ("s3://bucket/b", 2.0))),
        ("\n    - [a, 1]\n    - [b, 2]", (("a", 1.0), ("b", 2.0))),
    ],
)
def test_places_and_weights_are_read_and_written_back(train, sources, tmp_path):
    config = load(tmp_path, train)
    assert config.data.sources == sources
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml").config == config


def test_the_command_line_takes_them_too(tmp_path):
    assert load(tmp_path, "x", "data.train=[[a, 0.7], [b, 0.3]]").data.sources == (("a", 0.7), ("b", 0.3))


def test_environment_variables_are_put_in_inside_the_list(tmp_path, monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    config = load(tmp_path, '[["${oc.env:SCRATCH}/a", 1], ["${model.path}/b", 2]]')
    assert config.data.sources == (("/scratch/me/a", 1.0), ("base/b", 2.0))


@pytest.mark.parametrize("train", ["[[a, b]]", "[[a, 1, 2]]", "{a: 1}", "[{a: 1}]", "[[[a], 1]]"])
def test_what_is_no_list_of_places_is_refused_with_an_example(train, tmp_path):
    with pytest.raises(ConfigError, match=r"data.train=.* is not a path, or a list such as \[\[DATA/code, 0.7\]"):
        load(tmp_path, train)


GOOD = Config(ModelSection(path="base"), data=DataSection(train="a"), train=TrainSection(output="run", steps=20))


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        ((), "data.train=[] names no data"),
        (("a", ""), "data.train=['a', ''] must be the path of a folder"),
        (("a", "0.5"), "data.train has 0.5 where a path must be; a weight goes with its path"),
        ((("a", 0.0),), "the weight 0 of a must be a number above 0"),
        ((("a", float("inf")),), "the weight inf of a must be a number above 0"),
        ((("a", 1.0), ("b", 1.0), "./a"), "/a more than once"),
    ],
)
def test_a_list_that_makes_no_sense_is_one_problem_with_its_line(train, complaint):
    config = replace(GOOD, data=DataSection(train=train))
    (problem,) = check_config(config, where={"data.train": "my.yaml:7"})
    assert complaint in str(problem) and "my.yaml:7" in str(problem)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"workers": -1}, "data.workers=-1 must be auto, or 0 or more"),
        ({"workers": "many"}, "data.workers='many' must be auto, or 0 or more"),
        ({"pack_tokens": -1}, "data.pack_tokens=-1 must be 0 or more"),
        ({"sequence_length": 8}, "data.sequence_length=8 must be 32 or more"),
        ({"on_bad_sample": "drop"}, "data.on_bad_sample='drop' must be stop or skip"),
    ],
)
def test_other_settings_of_the_data_say_what_they_must_be(section, complaint):
    (problem,) = check_config(replace(GOOD, data=DataSection(train="a", **section)))
    assert complaint in str(problem)
