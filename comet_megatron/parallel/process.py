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
