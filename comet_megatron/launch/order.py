"""What every process does after the first one has prepared: an order that goes from it to the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Order:
    """The train command.

    Attributes:
        config: its configuration file.
        arguments: what follows it on the command line.
        folders: with the configuration, what every machine must see.
        needs_gpu: each machine must have a GPU for each of its processes.
    """

    config: str
    arguments: tuple[str, ...]
    folders: tuple[str, ...]
    needs_gpu: bool

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Order:
        """Of its fields, as JSON gives them back."""
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})
