"""The launcher's settings: CONFIG, MODEL, DATA, OUTPUT, TP, PP, each with the place its value comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from comet_megatron.errors import ConfigError

MAX_STAGES = 8  # the most that PP becomes by itself
# What the train command calls a setting: both ways of giving it mean the same here.
ARGUMENT_OF = {"MODEL": "model.path", "DATA": "data.train", "TP": "parallel.tp", "PP": "parallel.pp"}


@dataclass(frozen=True)
class Setting:
    """A value and where it comes from.

    Attributes:
        source: the environment, an argument, a file's name, or how the default was found.
        is_given: by the user for this launch; else it is a default.
    """

    value: str
    source: str
    is_given: bool


@dataclass(frozen=True)
class Given:
    """What the user typed.

    Attributes:
        settings: by name, those that were given.
        overrides: the other key=value arguments, for the train command.
    """

    settings: Mapping[str, Setting]
    overrides: tuple[str, ...]

    def get(self, name: str, default: str, source: str) -> Setting:
        """The setting of this name, or its default."""
        return self.settings.get(name, Setting(default, source, is_given=False))


def read_given(environment: Mapping[str, str], arguments: Sequence[str]) -> Given:
    """Settings from the environment, and from the arguments that mean the same; an argument wins."""
    settings = {}
    for name in ("CONFIG", "MODEL", "DATA", "OUTPUT", "TP", "PP"):
        if value := environment.get(name, "").strip():
            settings[name] = Setting(value, "environment", is_given=True)
    others = []
    names = {key: name for name, key in ARGUMENT_OF.items()}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and value.strip() and key.strip() in names:
            settings[names[key.strip()]] = Setting(value.strip(), f"argument {key.strip()}", is_given=True)
        else:
            others.append(argument)
    return Given(settings, tuple(others))


def path_of(setting: Setting, repository: Path) -> Path:
    """A path that the user gave starts where the user stands; a default starts from the repository."""
    return Path(os.path.abspath((Path.cwd() if setting.is_given else repository) / setting.value))


def shown(path: str | os.PathLike[str]) -> str:
    """A path as short as it can be typed from here."""
    absolute = Path(os.path.abspath(path))
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def size_of(setting: Setting, name: str) -> int:
    """TP or PP as a number.

    Raises:
        ConfigError: it is none, or below 1.
    """
    if setting.value.isascii() and setting.value.isdigit() and int(setting.value) > 0:
        return int(setting.value)
    what = f"{name}={setting.value} is not a whole number of 1 or more"
    raise ConfigError(what, where=setting.source, way_out=f"use {name}=1, 2, 4 or 8")


def choose_stages(processes: int, tp: int, layers: int | None) -> int:
    """What PP is by itself: the largest power of two up to 8 that divides what TP leaves, with a layer for each."""
    if tp < 1 or processes % tp:
        return 1
    most = min(MAX_STAGES, layers or MAX_STAGES)
    return max(stages for stages in (1, 2, 4, 8) if stages <= most and processes // tp % stages == 0)
