"""What the settings become on a machine; what it lacks is an error before anything is built."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comet_megatron.backend.capabilities import Capabilities, Found, Gpu
from comet_megatron.backend.precision import Fp8, plan_execution, row_multiple, rows_to_add
from comet_megatron.config.schema import ModelSection
from comet_megatron.errors import ConfigError
from comet_megatron.model.architectures import build_transformer_config
from comet_megatron.testing.tiny import tiny_architecture

THERE, MISSING = Found(True, "1.0"), Found(False, why_not="not installed")
TOO_OLD = Found(False, why_not="compute capability 8.9 or higher required")


def machine(*capability: int, te: Found = THERE, **fp8: Found) -> Capabilities:
    """One with a GPU of this compute capability, or without one."""
    gpus = (Gpu("a GPU", capability, 1 << 30),) if capability else ()
    recipes = {"tensorwise": THERE, "blockwise": THERE, "mxfp8": TOO_OLD, **fp8}
    cuda = THERE if capability else Found(False, why_not="torch sees no GPU")
    return Capabilities(cuda, gpus, te, MISSING, MISSING, recipes)


CPU, HOPPER, BLACKWELL = machine(), machine(9, 0), machine(10, 0, mxfp8=THERE)
AMPERE = machine(8, 0, tensorwise=TOO_OLD, blockwise=TOO_OLD)


@pytest.mark.parametrize(
    ("model", "on", "backend", "recipe", "told"),
    [
        (ModelSection(), CPU, "torch", None, "auto is torch (fp32)"),
        (ModelSection(precision="bf16"), CPU, "torch", None, "auto is torch (no GPU)"),
        (ModelSection(), HOPPER, "torch", None, "auto is torch (fp32)"),
        (ModelSection(precision="bf16"), HOPPER, "te", None, "auto is te: Transformer Engine 1.0"),
        (
            ModelSection(precision="bf16"),
            replace(HOPPER, te=MISSING),
            "torch",
            None,
            "Transformer Engine not installed",
        ),
        (ModelSection(precision="bf16", backend="torch"), HOPPER, "torch", None, "backend  torch"),
        (ModelSection(precision="bf16", backend="te"), AMPERE, "te", None, "backend  te"),
        (ModelSection(precision="fp8"), HOPPER, "te", "tensorwise", "FP8 recipe auto is tensorwise, 1 layers at each"),
        (ModelSection(precision="fp8"), BLACKWELL, "te", "mxfp8", "auto is mxfp8"),
        (ModelSection(precision="fp8", fp8_recipe="blockwise"), HOPPER, "te", "blockwise", "FP8 recipe blockwise"),
    ],
)
def test_settings_become_what_the_machine_has(model, on, backend, recipe, told):
    found = plan_execution(model, on)
    assert found.backend == backend and found.precision == model.precision
    assert (found.fp8.recipe if found.fp8 else None) == recipe
    assert told in found.told


@pytest.mark.parametrize(
    ("model", "on", "what", "way_out"),
    [
        (ModelSection(precision="fp8"), CPU, "model.precision=fp8 needs a GPU: torch sees no GPU", "precision=bf16"),
        (ModelSection(precision="fp8"), replace(HOPPER, te=MISSING), "needs Transformer Engine: not installed", "bf16"),
        (ModelSection(precision="fp8"), AMPERE, "recipe tensorwise: a GPU cannot: compute capability 8.9", "bf16"),
        (ModelSection(precision="fp8", fp8_recipe="mxfp8"), HOPPER, "cannot", "tensorwise or blockwise, or model.prec"),
        (ModelSection(precision="bf16", backend="te"), CPU, "model.backend=te needs a GPU", "model.backend=torch"),
        (ModelSection(precision="bf16", backend="te"), replace(HOPPER, te=MISSING), "not installed", "backend=torch"),
    ],
)
def test_what_a_machine_cannot_do_is_refused_with_the_reason(model, on, what, way_out):
    with pytest.raises(ConfigError) as caught:
        plan_execution(model, on)
    assert what in caught.value.what and way_out in caught.value.way_out


@pytest.mark.parametrize("recipe", ["tensorwise", "mxfp8", "blockwise"])
def test_only_the_layers_between_the_ends_are_in_fp8(recipe):
    fp8 = Fp8(recipe, bf16_layers=2)
    config = build_transformer_config(
        tiny_architecture(num_layers=6), tp=1, sequence_parallel=False, precision="fp8", fp8=fp8
    )
    assert [row_multiple(config, layer) for layer in range(6)] == [1, 1, fp8.row_multiple, fp8.row_multiple, 1, 1]
    assert config.fp8 == ("hybrid" if recipe == "tensorwise" else "e4m3") and config.bf16


def test_without_fp8_rows_are_never_padded():
    config = build_transformer_config(tiny_architecture(), tp=1, sequence_parallel=False, precision="bf16")
    assert config.fp8 is None and row_multiple(config, 1) == 1


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("multiple", [1, 16, 32, 128])
def test_padded_rows_of_all_sequences_are_the_smallest_multiple(batch, multiple):
    for rows in range(1, 300):
        added = rows_to_add(rows, batch, multiple=multiple)
        fitting = [n for n in range(multiple + 1) if (rows + n) * batch % multiple == 0]
        assert added == fitting[0]


def test_the_papers_sizes_need_no_padding():
    rows, slots = 2048 + 2048 // 8 + 512, 512 + 2048
    assert all(rows_to_add(n, 1, multiple=128) == 0 for n in (rows, slots))
