"""Read a configuration: YAML with dotted overrides onto the frozen dataclasses of schema.py.

Unusual here:
- All problems are found before the first is reported, each with the line of the YAML file it comes from.
- A value is read by the type of its field, not by YAML's guess: `path: 007` stays "007", `eval: no` stays "no",
  `lr: 5e-5` is a number, `steps: 1e3` is 1000, and `tp: true` or `zero1: 1` are refused.
- OmegaConf's interpolation works (`${oc.env:SCRATCH}/run`, `${data.train}`); `\\${` stands for a literal `${`.
- Overrides win over the file; of two overrides of one key the last wins.
- A section `recipe` is the launcher's and is passed over.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from comet_megatron.config.schema import REQUIRED, Config, to_dict
from comet_megatron.errors import ConfigError

COMMAND_LINE = "command line"
WANTED = {"data.train": "a path, or a list such as [[DATA/code, 0.7], [DATA/chats, 0.3]]"}  # beyond what types say
INSTEAD_OF = {"model.path": "model.init_from"}  # a required key that need not be given where the other is
LAUNCHER_SECTION = "recipe"  # launch/recipe.py reads it: what is prepared before training
_TRUE, _FALSE = {"true", "yes", "on"}, {"false", "no", "off"}
_NULL, _STRING, _LIST = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "str", "seq"))


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration, and where each value that was given comes from."""

    config: Config
    where: Mapping[str, str]  # "optimizer.lr" -> "demo.yaml:12" or "command line"; defaults are absent


@dataclass(frozen=True)
class _Given:
    """One value as the user wrote it."""

    node: yaml.Node
    place: str


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> LoadedConfig:
    """The configuration in the YAML file `path`, changed by `overrides` such as `train.steps=10`.

    Raises ConfigError with every problem of the file and the overrides. Ranges and combinations: see rules.py.
    """
    path = Path(path)
    hints = field_types()
    problems: list[ConfigError] = []
    collector = _Collector(hints, problems)
    root = _read_yaml(path, problems)
    if root is not None:
        collector.add_mapping(root, file=path.name)
    for override in overrides:
        collector.add_override(override)
    given = collector.given

    values: dict[str, Any] = {}
    interpolated: dict[str, Any] = {}
    for key, one in given.items():
        try:
            if _has_interpolation(one.node):
                interpolated[key] = _plain(one.node)
            elif not _is_required_marker(one.node):
                values[key] = _convert(one.node, hints[key])
        except ValueError as error:
            what = f"{key}={_shown(one.node)} is not {WANTED.get(key, error)}"
            problems.append(ConfigError(what, where=one.place))
    for key, other in INSTEAD_OF.items():
        if other in given and (key not in given or _is_required_marker(given[key].node)):
            values[key] = ""
    _resolve(interpolated, values, hints, given, problems)
    if root is not None:
        problems += _missing(path, hints, given)
    if problems:
        raise ConfigError.collect(problems)

    # Built here and not by OmegaConf.to_object: its versions differ on frozen classes and on tuples.
    nested = _nested(values)
    config = Config(**{name: kind(**nested.get(name, {})) for name, kind in get_type_hints(Config).items()})
    return LoadedConfig(config=config, where={key: one.place for key, one in given.items()})


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write `config` as YAML that load_config reads back as an equal one; a reader never sees half a file."""
    path = Path(path)
    data = {section: {k: _escaped(v) for k, v in values.items()} for section, values in to_dict(config).items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            yaml.safe_dump(data, file, sort_keys=False, allow_unicode=True, width=120)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(
            f"cannot write the configuration: {error.strerror or error}", where=str(path), way_out="check the folder"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def field_types(kind: type = Config, prefix: str = "") -> dict[str, Any]:
    """Dotted name -> type of every field: {"train.steps": int, ...}, in the order of the schema."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            types |= field_types(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            types[prefix + name] = hint
    return types


# --- reading ---------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path, problems: list[ConfigError]) -> yaml.MappingNode | None:
    """The file's nodes (they know their lines), or None and a problem."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), Loader=yaml.SafeLoader)
    except FileNotFoundError:
        near = [p.name for p in sorted(path.parent.glob("*.y*ml"))]
        close = difflib.get_close_matches(path.name, near, n=1)
        advice = f"did you mean {path.parent / close[0]}?" if close else "check the path"
        problems.append(ConfigError("the configuration file does not exist", where=str(path), way_out=advice))
    except IsADirectoryError:
        problems.append(ConfigError("a folder, not a YAML file", where=str(path), way_out="name the file in it"))
    except OSError as error:
        problems.append(ConfigError(f"cannot read the configuration: {error.strerror or error}", where=str(path)))
    except UnicodeDecodeError:
        problems.append(ConfigError("this is not a text file in UTF-8", where=str(path)))
    except RecursionError:
        problems.append(ConfigError("not valid YAML: nested too deeply", where=str(path)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        what = getattr(error, "problem", None) or getattr(error, "context", None) or getattr(error, "reason", None)
        place = f"{path.name}:{mark.line + 1}" if mark else str(path)
        advice = "look at the indentation, colons and quotes of this line and the one before"
        problems.append(ConfigError(f"not valid YAML: {what or error}", where=place, way_out=advice))
    else:
        if isinstance(root, yaml.MappingNode) and root.value:
            return root
        empty = root is None or not root.value or root.tag == _NULL
        what = "the configuration file is empty" if empty else "the configuration is not a mapping"
        advice = "it needs sections with values, such as\n  train:\n    steps: 100"
        problems.append(ConfigError(what, where=str(path), way_out=advice))
    return None


class _Collector:
    """Gathers the values given for known keys; unknown and doubled keys become problems."""

    def __init__(self, hints: Mapping[str, Any], problems: list[ConfigError]) -> None:
        self.hints, self.problems = hints, problems
        self.given: dict[str, _Given] = {}

    def add_mapping(self, node: yaml.MappingNode, *, file: str, prefix: str = "") -> None:
        """Every value under `node`; `file` is the YAML file's name, or COMMAND_LINE, which has no line numbers."""
        first_place: dict[str, str] = {}
        for key_node, value in node.value:
            if not prefix and key_node.value == LAUNCHER_SECTION and file != COMMAND_LINE:
                continue
            place = file if file == COMMAND_LINE else f"{file}:{key_node.start_mark.line + 1}"
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(f"{_shown(key_node)} is not a key", place, "keys are words")
                continue
            key = prefix + key_node.value
            if key in first_place:
                self._refuse(f"{key} is given twice", f"{first_place[key]} and {place}", "keep one of the two")
                continue
            first_place[key] = place
            if "." in key_node.value:  # `optimizer.lr: 1` at the top is not a path in YAML
                section, _, name = key.rpartition(".")
                nest = f"in YAML write {name} inside the section {section}; dots are for the command line"
                self._refuse(f"unknown key {key}", place, nest if key in self.hints else _did_you_mean(key, self.hints))
            else:
                self._add(key, value, file=file, place=place)

    def add_override(self, override: str) -> None:
        """One `section.key=value` of the command line."""
        key, equals, text = override.partition("=")
        key, text = key.strip(), text.strip()
        if not equals or not key:
            advice = "write an override as section.key=value, for example train.steps=10"
            self._refuse(f"{override!r} is not an override", COMMAND_LINE, advice)
            return
        try:
            node = yaml.compose(text, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError):
            node = None
        if node is None:  # nothing, or text such as "{" or "@x"
            node = yaml.ScalarNode(_STRING, text)
        elif isinstance(node, yaml.ScalarNode) and node.style is None:
            node.value = text  # the shell has done the quoting: keep " #" and all else
        self._add(key, node, file=COMMAND_LINE, place=COMMAND_LINE)

    def _add(self, key: str, node: yaml.Node, *, file: str, place: str) -> None:
        names = _names_in(f"{key}.", self.hints)
        if key in self.hints:
            self.given[key] = _Given(node, place)
        elif not names:
            self._refuse(f"unknown key {key}", place, _did_you_mean(key, self.hints))
        elif isinstance(node, yaml.MappingNode):
            self.add_mapping(node, file=file, prefix=f"{key}.")
        elif node.tag != _NULL or file == COMMAND_LINE:  # in a file, all lines of a section may be commented out
            self._refuse(f"{key}={_shown(node)}, but {key} is a section", place, f"it has: {', '.join(names)}")

    def _refuse(self, what: str, place: str, way_out: str) -> None:
        self.problems.append(ConfigError(what, where=place, way_out=way_out))


# --- values ----------------------------------------------------------------------------------------------------------


def _convert(node: yaml.Node, hint: Any) -> Any:
    """The value of `node` for a field of type `hint`; ValueError says what was expected."""
    if get_origin(hint) is tuple and get_args(hint)[1:] == (...,):
        if not _is_list(node):
            raise ValueError("a list of whole numbers such as [8, 8, 6]")
        return tuple(_convert(item, get_args(hint)[0]) for item in node.value)
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        expected = f"a list of {len(kinds)} numbers such as [{', '.join(['0.9'] * len(kinds))}]"
        if not _is_list(node) or len(node.value) != len(kinds):
            raise ValueError(expected)
        try:
            return tuple(_convert(item, kind) for item, kind in zip(node.value, kinds, strict=True))
        except ValueError:
            raise ValueError(expected) from None
    if get_origin(hint) is Union:
        for kind in sorted(get_args(hint), key=lambda kind: kind is str):  # text takes anything: try it last
            try:
                return _convert(node, kind)
            except ValueError:
                pass
        listed = any(get_origin(kind) is tuple for kind in get_args(hint))
        raise ValueError("a list of whole numbers or a word" if listed else "a whole number or a word")
    expected = {str: 'text (write "" for none)', int: "a whole number", float: "a number", bool: "true or false"}[hint]
    if not isinstance(node, yaml.ScalarNode) or node.tag == _NULL:
        raise ValueError(expected)
    read: dict[Any, Callable[[str], Any]] = {str: str, int: _integer, float: float, bool: _boolean}
    try:
        return read[hint](node.value)
    except ValueError:
        raise ValueError(expected) from None


def _is_list(node: yaml.Node) -> bool:
    """A plain one: a tag that would build something else is refused."""
    return isinstance(node, yaml.SequenceNode) and node.tag == _LIST


def _integer(text: str) -> int:
    """An int; 1e3 and 10.0 count, 1.5 does not."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():  # inf and nan too
            raise
        return int(number)


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE | _FALSE:
        raise ValueError(text)
    return text.lower() in _TRUE


def _resolve(
    interpolated: Mapping[str, Any],
    values: dict[str, Any],
    hints: Mapping[str, Any],
    given: Mapping[str, _Given],
    problems: list[ConfigError],
) -> None:
    """Add the interpolated values to `values`: OmegaConf finds what they refer to, then the field's type counts."""
    if not interpolated:
        return

    def refuse(key: str, error: Exception) -> None:
        reason = str(error).splitlines()[0].removeprefix("KeyError raised while resolving interpolation: ")
        what = f"{key}={interpolated[key]!r} refers to nothing: {reason}"
        problems.append(ConfigError(what, where=given[key].place, way_out="to write a literal ${ use \\${"))

    readable = {}
    for key, text in interpolated.items():
        try:
            OmegaConf.create({"text": text})  # one text that cannot be parsed would spoil the whole tree
            readable[key] = text
        except (OmegaConfBaseException, RecursionError) as error:
            refuse(key, error)
    defaults = {section: {k: _escaped(v) for k, v in own.items()} for section, own in to_dict(Config()).items()}
    plain = {key: _escaped(value) for key, value in values.items()} | readable
    tree = OmegaConf.merge(defaults, _nested(plain))
    for key in readable:
        place = given[key].place
        try:
            found = OmegaConf.select(tree, key, throw_on_missing=True)
        except (OmegaConfBaseException, RecursionError) as error:
            refuse(key, error)
            continue
        try:
            if OmegaConf.is_config(found):
                found = OmegaConf.to_container(found, resolve=True)
            node = yaml.compose(yaml.safe_dump(found), Loader=yaml.SafeLoader)
            values[key] = found if hints[key] is str and isinstance(found, str) else _convert(node, hints[key])
        except (ValueError, OmegaConfBaseException) as error:
            what = f"{key}={interpolated[key]!r} is {found!r}, not {WANTED.get(key, error)}"
            problems.append(ConfigError(what, where=place))
        except yaml.YAMLError:  # a resolver gave something that is no YAML value
            problems.append(ConfigError(f"{key}={interpolated[key]!r} is {found!r}, not a plain value", where=place))


def _escaped(value: Any) -> Any:
    """`value` so that OmegaConf and load_config read a literal `${` in it as just that; tuples as lists."""
    if isinstance(value, str):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", value)
    return [_escaped(item) for item in value] if isinstance(value, tuple | list) else value


def _has_interpolation(node: yaml.Node) -> bool:
    if isinstance(node, yaml.SequenceNode):
        return any(_has_interpolation(item) for item in node.value)
    return isinstance(node, yaml.ScalarNode) and "${" in node.value


def _plain(node: yaml.Node) -> Any:
    """Texts and lists of them, as they were written."""
    return [_plain(item) for item in node.value] if isinstance(node, yaml.SequenceNode) else node.value


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return nested


# --- messages --------------------------------------------------------------------------------------------------------


def _missing(path: Path, hints: Mapping[str, Any], given: Mapping[str, _Given]) -> list[ConfigError]:
    """A problem for each required field without a value."""
    problems = []
    for key in hints:
        if INSTEAD_OF.get(key) in given:
            continue
        is_required, one = _default(key) == REQUIRED, given.get(key)
        if (one is None and is_required) or (one is not None and _is_required_marker(one.node)):
            place = one.place if one else path.name
            advice = f"give it in {path.name}, or as {key}=... on the command line"
            problems.append(ConfigError(f"{key} has no value", where=place, way_out=advice))
    return problems


def _default(key: str) -> Any:
    section, _, name = key.rpartition(".")
    owner = get_type_hints(Config)[section]
    return next(f.default for f in fields(owner) if f.name == name)


def _is_required_marker(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.value == REQUIRED


def _did_you_mean(key: str, hints: Mapping[str, Any]) -> str:
    """The way out of an unknown key: the same name in another section, a similar one, or all there are."""
    section, _, name = key.rpartition(".")
    elsewhere = [other for other in hints if other.rpartition(".")[2] == name]
    sections = list(dict.fromkeys(other.split(".")[0] for other in hints))
    siblings = _names_in(f"{section}.", hints) if section else sections
    close = [f"{section}.{n}" if section else n for n in difflib.get_close_matches(name, siblings, n=2)]
    if section not in sections:
        close = close or difflib.get_close_matches(key.lstrip("-+"), [*hints, *sections], n=2)
    close = elsewhere or close
    if close:
        return f"did you mean {' or '.join(close)}?"
    if section and siblings:
        return f"{section} has: {', '.join(siblings)}"
    return f"the sections are: {', '.join(sections)}"


def _names_in(prefix: str, hints: Mapping[str, Any]) -> list[str]:
    return [name.removeprefix(prefix) for name in hints if name.startswith(prefix)]


def _shown(node: yaml.Node) -> str:
    """What the user wrote, short."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _NULL:
            return node.value or "nothing"
        text = node.value if len(node.value) <= 60 else f"{node.value[:57]}..."
        return repr(text) if node.tag == _STRING else text
    if isinstance(node, yaml.SequenceNode):
        if all(isinstance(item, yaml.ScalarNode) for item in node.value) and len(node.value) <= 4:
            return f"[{', '.join(_shown(item) for item in node.value)}]"
        return f"a list of {len(node.value)}"
    return "a mapping"
