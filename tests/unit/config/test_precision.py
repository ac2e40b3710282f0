"""Precision, backend and FP8 recipe: what does not go together is refused with what would work."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comet_megatron.config.precision import FP8_MULTIPLES, fp8_size_problems
from comet_megatron.config.rules import check_config, check_layout
from comet_megatron.config.schema import Config, DataSection, ModelSection, ParallelSection, TrainSection
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory


def config(*, tp: int = 1, train: dict | None = None, **model) -> Config:
    return Config(
        model=ModelSection(path="start", **model),
        data=DataSection(train="shards"),
        train=TrainSection(output="run", steps=20, **(train or {})),
        parallel=ParallelSection(tp=tp),
    )


GOOD = {
    "defaults": {},
    "bf16 on any backend": {"precision": "bf16"},
    "te in bf16": {"precision": "bf16", "backend": "te"},
    "fp8": {"precision": "fp8"},
    "fp8 with a recipe": {"precision": "fp8", "backend": "te", "fp8_recipe": "mxfp8", "fp8_bf16_layers": 0},
}


@pytest.mark.parametrize("name", GOOD)
def test_what_goes_together_is_accepted(name):
    assert check_config(config(**GOOD[name])) == []


BAD = {
    "unknown precision": ({"precision": "fp16"}, "model.precision='fp16' must be fp32 or bf16 or fp8"),
    "unknown backend": ({"backend": "apex"}, "must be te or torch or auto"),
    "unknown recipe": ({"precision": "fp8", "fp8_recipe": "fast"}, "auto or tensorwise or blockwise or mxfp8"),
    "fp8 on torch": ({"precision": "fp8", "backend": "torch"}, "use model.backend=te or auto, or model.precision=bf16"),
    "te in fp32": ({"backend": "te"}, "no attention kernel for model.precision=fp32"),
    "a recipe without fp8": ({"precision": "bf16", "fp8_recipe": "tensorwise"}, "changes nothing"),
    "delayed scaling": ({"precision": "fp8", "fp8_recipe": "delayed"}, "not right in a loop over chunks"),
    "fp8 on cpu": ({"precision": "fp8", "train": {"device": "cpu"}}, "model.precision=fp8 needs a GPU"),
    "te on cpu": ({"precision": "bf16", "backend": "te", "train": {"device": "cpu"}}, "model.backend=te needs a GPU"),
    "fusion on torch": ({"backend": "torch", "train": {"fuse_weight_gradients": True}}, "Transformer Engine's layers"),
    "unknown device": ({"train": {"device": "gpu"}}, "train.device='gpu' must be auto or cuda or cpu"),
    "negative bf16 layers": ({"precision": "fp8", "fp8_bf16_layers": -1}, "must be 0 or more"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_go_together_is_refused(name):
    settings, wanted = BAD[name]
    (problem,) = check_config(config(**settings), where={"model.precision": "my.yaml:3"})
    assert wanted in str(problem)


def test_fp8_leaves_some_layer_in_fp8():
    fits = replace(tiny_architecture(num_layers=5), hidden_size=128, ffn_hidden_size=128)
    (problem,) = check_layout(config(precision="fp8", fp8_bf16_layers=3), fits, tiny_memory(), world_size=8)[:1]
    assert "use 2 or fewer" in str(problem)
    assert fp8_size_problems(config(precision="fp8", fp8_bf16_layers=2), fits) == []


@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8", "blockwise", "auto"])
def test_widths_are_multiples_of_what_the_recipe_takes_on_each_rank(recipe):
    multiple = FP8_MULTIPLES.get(recipe, 32)
    fits = replace(tiny_architecture(), hidden_size=multiple, ffn_hidden_size=2 * multiple, head_dim=multiple)
    for tp in (1, 2):
        assert fp8_size_problems(config(precision="fp8", fp8_recipe=recipe, tp=tp), fits) == []
    ((what, _),) = fp8_size_problems(config(precision="fp8", fp8_recipe=recipe, tp=4), fits)
    assert f"feed-forward {multiple // 2} on each of parallel.tp=4 ranks" in what
    assert not fp8_size_problems(config(precision="bf16", tp=4), fits)
