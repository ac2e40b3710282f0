"""This process as torchrun describes it; imports no torch, so that checks can run before it is loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessRank:
    """Ranks from torchrun's environment variables, or the only process."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @classmethod
    def from_environment(cls) -> ProcessRank:
        def number(name: str, default: int) -> int:
            return int(os.environ.get(name, default))

        world_size = number("WORLD_SIZE", 1)
        return cls(number("RANK", 0), world_size, number("LOCAL_RANK", 0), number("LOCAL_WORLD_SIZE", world_size))


def store_generation() -> int:
    """How often the processes that share torchrun's store have been started again; 0 where each start has its own.

    torchrun keeps one store for all of them, unless TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1. Each agent counts for itself,
    so that the count is no common name where an agent has been replaced: runs on several machines set that variable.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) if shared else 0
