"""A stage and its optimizer as Megatron's sharded state, in the fully reshardable form."""

from __future__ import annotations

from typing import Any

from megatron.core.optimizer.optimizer import MegatronOptimizer

from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.layout import Layout


def sharded_state(
    stage: CometStage, optimizer: MegatronOptimizer | None, layout: Layout, *, is_loading: bool
) -> dict[str, Any]:
    """What a checkpoint holds of this rank. Communicates on DP where the optimizer is sharded."""
    metadata = {"distrib_optim_sharding_type": "fully_reshardable", "dp_cp_group": layout.groups.dp_cp}
    state: dict[str, Any] = {"model": stage.sharded_state_dict(metadata=metadata)}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state["model"], is_loading=is_loading, metadata=metadata)
    return state
