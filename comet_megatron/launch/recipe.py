"""A recipe: a training configuration with a section `recipe`, which says what to prepare before training."""

from __future__ import annotations

import difflib
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from comet_megatron.config.load import LAUNCHER_SECTION as SECTION
from comet_megatron.config.load import load_config
from comet_megatron.errors import ConfigError
from comet_megatron.launch.small_model import SmallModel

_NAMES_OF_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Recipe:
    """The section `recipe`. Relative paths in it start from the repository.

    Attributes:
        chunk_size, global_slots, stride, budget: the memory that a Hugging Face model gets.
        sequence_length: tokens of the longest sequence that texts are cut into.
        needs_gpu: refuse to start without a GPU for each process.
        model: MODEL where the user gives none; hub_model: its name where it can be downloaded.
        parameters: of that model, for the estimate of its memory while it is missing.
        small_model: instead of `model`: one with random weights, made on the spot.
        data: DATA where the user gives none.
        max_sequences: prepare at most the tokens of so many full sequences; 0: all.
    """

    chunk_size: int
    global_slots: int
    stride: int
    budget: int
    sequence_length: int
    needs_gpu: bool
    data: str
    model: str = ""
    hub_model: str = ""
    parameters: float = 0.0
    small_model: SmallModel | None = None
    max_sequences: int = 0

    def small_model_at(self, tokenizer: Path) -> SmallModel:
        """The small model with its tokenizer as a path that holds from everywhere."""
        assert self.small_model is not None
        return replace(self.small_model, tokenizer=str(tokenizer))


@dataclass(frozen=True)
class RecipeFile:
    """A recipe and the file it was read from, which is the train command's configuration as well."""

    path: Path
    recipe: Recipe


def read_recipe(path: Path, *, shipped: Path) -> RecipeFile:
    """Read a recipe.

    Args:
        shipped: folder of the project's own recipes, to name them when there is no such file.

    Raises:
        ConfigError: not readable, no YAML, no section `recipe`, or every unknown, missing or unfitting key in it. The
            rest of the file is the train command's and is not looked at.
    """
    if not path.exists():
        names = [f.name for f in sorted(shipped.glob("*.yaml")) if f"\n{SECTION}:" in f.read_text(encoding="utf-8")]
        advice = f"in {shipped} there are: {', '.join(names)}"
        raise ConfigError("the recipe CONFIG does not exist", where=str(path), way_out=advice)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError):
        root = None
    if not isinstance(root, yaml.MappingNode):
        load_config(path)  # says what is wrong with the file
        raise ConfigError("the recipe cannot be read", where=str(path))
    for key, node in root.value:
        if key.value == SECTION:
            return RecipeFile(path, _read_section(node, file=path.name))
    raise ConfigError(
        f"the configuration has no section {SECTION}, which says what to prepare",
        where=str(path),
        way_out=f"begin with a copy of a recipe from {shipped}; for the train command alone: "
        "python -m comet_megatron.train --config",
    )


# --- the section -----------------------------------------------------------------------------------------------------


def _read_section(node: yaml.Node, *, file: str) -> Recipe:
    problems: list[ConfigError] = []
    lines: dict[str, str] = {}
    values = _values_of(node, Recipe, f"{SECTION}.", file, lines, problems)
    if isinstance(small := values.get("small_model"), dict):
        values["small_model"] = SmallModel(**small) if not problems else None
    if not problems:
        recipe = Recipe(**values)
        problems = _check(recipe, lines, place=f"{file}:{node.start_mark.line + 1}")
    if problems:
        raise ConfigError.collect(problems)
    return recipe


def _values_of(
    node: yaml.Node, kind: type, prefix: str, file: str, lines: dict[str, str], problems: list[ConfigError]
) -> dict[str, Any]:
    """The values given for the fields of `kind`; `lines` and `problems` grow."""
    place = f"{file}:{node.start_mark.line + 1}"
    if not isinstance(node, yaml.MappingNode):
        problems.append(ConfigError(f"{prefix[:-1]} is a section with keys and values", where=place))
        return {}
    known, values = {f.name: f for f in fields(kind)}, {}
    hints = get_type_hints(kind)
    for key, value in node.value:
        name, at = str(key.value), f"{file}:{key.start_mark.line + 1}"
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            advice = f"did you mean {prefix}{close[0]}?" if close else f"there are: {', '.join(known)}"
            problems.append(ConfigError(f"unknown key {prefix}{name}", where=at, way_out=advice))
        elif name in values:
            problems.append(ConfigError(f"{prefix}{name} is given twice", where=f"{lines[prefix + name]} and {at}"))
        else:
            lines[prefix + name] = at
            if name == "small_model":
                values[name] = _values_of(value, SmallModel, f"{prefix}{name}.", file, lines, problems)
            else:
                values[name] = _value(value, hints[name], prefix + name, at, problems)
    missing = [name for name, f in known.items() if f.default is MISSING and name not in values]
    if missing:
        problems.append(ConfigError(f"{prefix[:-1]} lacks {', '.join(missing)}", where=place))
    return values


def _value(node: yaml.Node, kind: type, name: str, place: str, problems: list[ConfigError]) -> Any:
    """The value of a field; text stays as it is written."""
    if isinstance(node, yaml.ScalarNode):
        try:
            if kind is str and node.tag != "tag:yaml.org,2002:null":
                return node.value
            if kind is bool and node.value.lower() in ("true", "false"):
                return node.value.lower() == "true"
            if kind in (int, float):
                return kind(node.value)
        except ValueError:
            pass
    shown = node.value if isinstance(node, yaml.ScalarNode) else "a list or section"
    problems.append(ConfigError(f"{name}={shown} is not {_NAMES_OF_TYPES[kind]}", where=place))
    return None


def _check(recipe: Recipe, lines: dict[str, str], *, place: str) -> list[ConfigError]:
    """What the values must obey beyond their types; the memory sizes are checked with the model."""
    problems = []

    def refuse(name: str, must: str) -> None:
        where = lines.get(f"{SECTION}.{name}", place)
        problems.append(ConfigError(f"{SECTION}.{name}={getattr(recipe, name)} must be {must}", where=where))

    if recipe.global_slots < 0:
        refuse("global_slots", "0 or more; 0: no global memory")
    if recipe.sequence_length < 32:
        refuse("sequence_length", "32 or more")
    if not recipe.data.strip():
        refuse("data", "a path, or the word python-stdlib")
    if recipe.max_sequences < 0:
        refuse("max_sequences", "1 or more; 0: all")
    if bool(recipe.model) == (recipe.small_model is not None):
        what = f"{SECTION} has {'both' if recipe.model else 'neither'} model and small_model"
        problems.append(ConfigError(what, where=place, way_out="give one of the two"))
    if recipe.small_model is not None:
        try:
            recipe.small_model.check(where=lines[f"{SECTION}.small_model"])
        except ConfigError as error:
            problems.append(error)
    return problems
