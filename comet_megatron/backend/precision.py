"""Which modules compute a run, and in what precision: decided from the settings and what the machine has.

FP8 in a loop over chunks, as it is done here:

- Scales belong to a call (tensorwise, blockwise, mxfp8): a module is called once for each chunk of a pass.
- Each layer enters its own FP8 context (Megatron's get_fp8_context with the layer's number in the whole model: the
  first and last layers stay in bf16), also where it is computed again.
- A chunk's first forward without a graph and the second one with it are the two halves of Transformer Engine's
  checkpoint. They lie far apart in a schedule, so they are marked one by one, with the context that its checkpoint
  enters: the first half then also makes the transposed FP8 weights that the backward will need.
- FP8 weights are kept during a pass over a batch, and made anew in the first call of the next (Executor tells the
  stage). Weights change only between passes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from comet_megatron.backend.capabilities import Capabilities
from comet_megatron.config.precision import FP8_MULTIPLES
from comet_megatron.config.schema import Config, ModelSection
from comet_megatron.errors import ConfigError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

AMPERE = (8, 0)
BLACKWELL = (10, 0)


class Visit(Enum):
    """Which time a chunk goes through a layer in a pass."""

    ONLY = "with the graph that its backward needs, or without a backward"
    FIRST = "without a graph; it comes again"
    AGAIN = "with a graph, after FIRST"


@dataclass(frozen=True)
class Fp8:
    """How products are computed in FP8.

    Attributes:
        recipe: tensorwise, blockwise or mxfp8.
        bf16_layers: at each end of the model.
    """

    recipe: str
    bf16_layers: int = 1

    @property
    def row_multiple(self) -> int:
        """Numbers of rows that an FP8 product takes."""
        return FP8_MULTIPLES[self.recipe]

    @property
    def number_format(self) -> str:
        """Megatron's name: gradients need more range than one scale for a whole tensor gives them."""
        return "hybrid" if self.recipe == "tensorwise" else "e4m3"


@dataclass(frozen=True)
class Execution:
    """What computes a run.

    Attributes:
        backend: te or torch.
        precision: fp32, bf16 or fp8.
        fp8: where precision is fp8.
        told: for the user.
    """

    backend: str = "torch"
    precision: str = "fp32"
    fp8: Fp8 | None = None
    told: str = ""


def plan_execution(model: ModelSection, machine: Capabilities) -> Execution:
    """What the settings become on this machine. Pure.

    Args:
        model: without problems of its own (config/rules.py).

    Raises:
        ConfigError: the machine lacks what is asked for; nothing is built then.
    """
    if model.precision == "fp8":
        return _plan_fp8(model, machine)
    if model.backend == "te":
        _require_te(machine, "model.backend=te", "use model.backend=torch")
        return Execution("te", model.precision, told=f"backend  te: Transformer Engine {machine.te.version}")
    if model.backend == "torch":
        return Execution("torch", model.precision, told="backend  torch")
    if model.precision == "bf16" and machine.cuda.is_there and machine.te.is_there:
        return Execution("te", "bf16", told=f"backend  auto is te: Transformer Engine {machine.te.version}")
    if model.precision == "fp32":
        why = "fp32"
    else:
        why = f"Transformer Engine {machine.te.why_not}" if machine.cuda.is_there else "no GPU"
    return Execution("torch", model.precision, told=f"backend  auto is torch ({why})")


def check_machine(config: Config, execution: Execution, machine: Capabilities) -> None:
    """What else a run needs of a machine.

    Raises:
        ConfigError: gradients are to be fused without Transformer Engine's layers, or Megatron-Core would take an
            optimizer whose compiled part is missing; or a GPU is too old for bf16.
    """
    if config.train.fuse_weight_gradients and execution.backend != "te":
        what = "train.fuse_weight_gradients=true is for Transformer Engine's layers, and model.backend became torch"
        raise ConfigError(what, way_out="use train.fuse_weight_gradients=false")
    if config.model.precision != "fp32" and (old := [gpu for gpu in machine.gpus if gpu.capability < AMPERE]):
        what = f"model.precision={config.model.precision}: {old[0].name} has no attention kernel for bf16"
        raise ConfigError(what, way_out="use a GPU of compute capability 8.0 or newer, or model.precision=fp32")
    if machine.apex_would_fail:
        what = f"Megatron-Core would take apex's AdamW, which cannot be built: {machine.apex_optimizer.why_not}"
        raise ConfigError(what, way_out="pip uninstall apex, or build NVIDIA's with --cpp_ext --cuda_ext")


def _plan_fp8(model: ModelSection, machine: Capabilities) -> Execution:
    other = "use model.precision=bf16"
    _require_te(machine, "model.precision=fp8", other)
    recipe = model.fp8_recipe
    if recipe == "auto":
        prefers_mx = min(gpu.capability for gpu in machine.gpus) >= BLACKWELL
        recipe = "mxfp8" if prefers_mx and machine.fp8["mxfp8"].is_there else "tensorwise"
    if not machine.fp8[recipe].is_there:
        able = [name for name, found in machine.fp8.items() if found.is_there]
        advice = f"use model.fp8_recipe={' or '.join(able)}, or model.precision=bf16" if able else other
        what = f"model.precision=fp8 with recipe {recipe}: {machine.gpus[0].name} cannot: {machine.fp8[recipe].why_not}"
        raise ConfigError(what, way_out=advice)
    was = "auto is " if model.fp8_recipe == "auto" else ""
    ends = f", {model.fp8_bf16_layers} layers at each end in bf16" if model.fp8_bf16_layers else ""
    told = f"backend  te: Transformer Engine {machine.te.version}; FP8 recipe {was}{recipe}{ends}"
    return Execution("te", "fp8", Fp8(recipe, model.fp8_bf16_layers), told)


def _require_te(machine: Capabilities, asked: str, other: str) -> None:
    if not machine.cuda.is_there:
        raise ConfigError(f"{asked} needs a GPU: {machine.cuda.why_not}", way_out=other)
    if not machine.te.is_there:
        what = f"{asked} needs Transformer Engine: {machine.te.why_not}"
        raise ConfigError(what, way_out=f"install transformer-engine[pytorch] for this torch, or {other}")


def row_multiple(config: TransformerConfig, layer: int) -> int:
    """What the number of rows that enter a layer's products must be a multiple of.

    Args:
        layer: 0-based number in the whole model.
    """
    if not config.fp8:
        return 1
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    return 1 if is_first_last_bf16_layer(config, layer) else FP8_MULTIPLES[config.fp8_recipe]


def rows_to_add(rows: int, batch: int, *, multiple: int) -> int:
    """Rows at the end after which (rows x batch) is a multiple."""
    return -rows % (multiple // math.gcd(multiple, batch))


@contextmanager
def fp8_layer(config: TransformerConfig, layer: int, visit: Visit) -> Iterator[None]:
    """Compute a layer inside; in FP8 if the config says so and the layer is not one of those that stay in bf16.

    Args:
        layer: 0-based number in the whole model.
    """
    if not config.fp8:
        yield
        return
    from megatron.core.fp8_utils import get_fp8_context
    from transformer_engine.pytorch.distributed import activation_recompute_forward

    with get_fp8_context(config, layer):
        # Inside, for it asks whether FP8 is on.
        again = visit is Visit.AGAIN
        marked = activation_recompute_forward(activation_recompute=True, recompute_phase=again)
        with nullcontext() if visit is Visit.ONLY else marked:
            yield
