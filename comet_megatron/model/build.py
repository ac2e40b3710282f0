"""Build the stages of a model on this rank, their weights not yet set."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.process_groups_config import ProcessGroupCollection

from comet_megatron.backend.precision import Fp8
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.model.architectures import build_transformer_config
from comet_megatron.model.specs import layer_spec
from comet_megatron.model.stage import CometStage


def build_stage(
    architecture: Architecture,
    memory: MemorySizes,
    groups: ProcessGroupCollection,
    *,
    stage: int = 0,
    layers_per_stage: Sequence[int] = (),
    sequence_parallel: bool = False,
    precision: str = "fp32",
    backend: str = "torch",
    fp8: Fp8 | None = None,
) -> CometStage:
    """A stage on this rank, its weights not yet set.

    Args:
        stage: its number in the pipeline.
        layers_per_stage: of all stages; empty: one stage holds all layers.
        backend, precision, fp8: as in backend.precision.Execution.
    """
    split = tuple(layers_per_stage) or (architecture.num_layers,)
    if sum(split) != architecture.num_layers:
        raise ValueError(f"{split} layers are not {architecture.num_layers}")
    config = build_transformer_config(
        architecture, tp=groups.tp.size(), sequence_parallel=sequence_parallel, precision=precision, fp8=fp8
    )
    first = sum(split[:stage])
    return CometStage(
        config,
        layer_spec(qk_norm=config.qk_layernorm, backend=backend),
        architecture,
        memory,
        layers=range(first, first + split[stage]),
        has_embedding=stage == 0,
        has_head=stage == len(split) - 1,
        pg_collection=groups,
    )
