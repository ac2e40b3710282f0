"""Build a whole model on this rank, its weights not yet set."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection

from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.model.architectures import build_transformer_config
from comet_megatron.model.specs import local_layer_spec
from comet_megatron.model.stage import CometStage


def build_stage(
    architecture: Architecture,
    memory: MemorySizes,
    groups: ProcessGroupCollection,
    *,
    sequence_parallel: bool = False,
    precision: str = "fp32",
) -> CometStage:
    """A stage of all layers on this rank, its weights not yet set."""
    config = build_transformer_config(
        architecture, tp=groups.tp.size(), sequence_parallel=sequence_parallel, precision=precision
    )
    return CometStage(
        config,
        local_layer_spec(qk_norm=config.qk_layernorm),
        architecture,
        memory,
        layers=range(architecture.num_layers),
        has_embedding=True,
        has_head=True,
        pg_collection=groups,
    )
