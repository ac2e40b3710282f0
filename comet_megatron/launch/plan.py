"""Plan a launch: read the settings, print them, find every problem, before anything is written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comet_megatron.checkpoint.run_folder import check_is_new_run, newest_checkpoint
from comet_megatron.config.load import LoadedConfig, load_config
from comet_megatron.config.rules import check_config, check_layout, check_stride_divides
from comet_megatron.data.documents import PYTHON_STDLIB
from comet_megatron.data.storage import is_url
from comet_megatron.errors import CometError, ConfigError, OutputError
from comet_megatron.launch.prepare import data_folder, is_made, origin_of_data, origin_of_start, start_folder
from comet_megatron.launch.recipe import Recipe, RecipeFile, read_recipe
from comet_megatron.launch.requirements import advise, check_gpus, describe_need
from comet_megatron.launch.settings import (
    MAX_STAGES,
    Given,
    Setting,
    choose_stages,
    path_of,
    read_given,
    shown,
    size_of,
)
from comet_megatron.launch.sources import (
    DataSource,
    ModelSource,
    find_data,
    find_model,
    is_list,
    plan_small_model,
)
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.planning.memory import count_parameters
from comet_megatron.train.continuation import AUTO, LAST, plan_continuation

RECIPES = Path("examples") / "configs"
PAPER, TINY = RECIPES / "comet_128k.yaml", RECIPES / "tiny_128k.yaml"


@dataclass(frozen=True)
class Plan:
    """A launch without problems.

    Attributes:
        loaded: the configuration as the train command will have it, but for what the preparation decides.
        overrides: the user's arguments for the train command.
    """

    file: RecipeFile
    model: ModelSource
    data: DataSource
    output: Path
    tp: int
    pp: int
    loaded: LoadedConfig
    overrides: tuple[str, ...]
    resume: str


def make_plan(
    process: ProcessRank, arguments: Sequence[str], *, resume: str, repository: Path, only_check: bool = False
) -> Plan:
    """Plan the launch that the environment and the arguments ask for. The first process only.

    Args:
        arguments: the user's key=value.
        resume: NO, LAST or AUTO of train/continuation.py.
        only_check: with problems, print the settings to stderr too.

    Raises:
        CometError: every problem, in one message.
    """
    planner = _Planner(process, read_given(os.environ, arguments), repository, resume=resume)
    plan = planner.plan()
    to = sys.stderr if plan is None and only_check else sys.stdout
    for name, value, source in planner.settings:
        print(f"{name:<10} {value:<38} ({source})", file=to, flush=True)
    if plan is not None:
        return plan
    if len(planner.problems) == 1:
        raise planner.problems[0]
    raise ConfigError.collect(planner.problems)


def override(key: str, path: str | Path) -> str:
    """An argument of the train command that gives a path or URL, whatever characters are in it."""
    text = str(path).replace("${", "\\${")
    return f"{key}={json.dumps(text, ensure_ascii=False)}"


class _Planner:
    """Goes through the settings once; gathers them for printing, and every problem.

    Attributes:
        settings: name, value and where it comes from.
    """

    def __init__(self, process: ProcessRank, given: Given, repository: Path, *, resume: str) -> None:
        self.process, self.given, self.repository, self.resume = process, given, repository, resume
        self.settings: list[tuple[str, str, str]] = []
        self.problems: list[CometError] = []

    def plan(self) -> Plan | None:
        """The plan; None if there are problems."""
        config = self.given.get("CONFIG", str(PAPER), "default")
        path = path_of(config, self.repository)
        self._tell("CONFIG", shown(path), config.source)
        file = self._attempt(read_recipe, path, shipped=self.repository / RECIPES)
        if file is None:  # of the rest only TP and PP can be judged
            for name in ("TP", "PP"):
                self._size(self.given.get(name, "1", "default"), name)
            return None
        model, data, output = self._model(file), self._data(file), self._output(file)
        tp, pp = self._layout(model)
        if file.recipe.needs_gpu:
            self._check_gpus(file.recipe, model, max(tp, 1), max(pp, 1))
        loaded = self._attempt(load_config, file.path, self._arguments(file, model, data, output, tp, pp))
        if loaded is not None:
            self._check_run(output, Path(loaded.config.train.output))
            self._check_training(loaded, file, model, has_layout=tp > 0 and pp > 0)
        if model is not None and model.kind != "checkpoint":
            self._attempt(is_made, start_folder(output), origin_of_start(model, file.recipe))
        if data is not None and data.texts is not None:
            self._attempt(is_made, data_folder(output), origin_of_data(data, file.recipe))
        if self.problems:
            return None
        return Plan(file, model, data, output, tp, pp, loaded, self.given.overrides, self.resume)

    def _tell(self, name: str, value: str, source: str) -> None:
        self.settings.append((name, value, source))

    def _attempt(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """What the function returns; None and a problem more if it raises."""
        try:
            return function(*arguments, **named)
        except CometError as error:
            self.problems.append(error)
            return None

    def _size(self, setting: Setting, name: str) -> int:
        """TP or PP as a number; 0 and a problem if it is none."""
        return self._attempt(size_of, setting, name) or 0

    def _model(self, file: RecipeFile) -> ModelSource | None:
        """MODEL, or the small model that the recipe has made."""
        recipe = file.recipe
        setting = self.given.get("MODEL", recipe.model, file.path.name)
        if recipe.small_model is not None and not setting.is_given:
            small = recipe.small_model
            self._tell("MODEL", f"random, {small.layers} layers of {small.hidden_size}, made here", setting.source)
            tokenizer = path_of(Setting(small.tokenizer, file.path.name, is_given=False), self.repository)
            return self._attempt(plan_small_model, small, tokenizer, recipe)
        path = path_of(setting, self.repository)
        self._tell("MODEL", shown(path), setting.source)
        return self._attempt(find_model, path, recipe)

    def _data(self, file: RecipeFile) -> DataSource | None:
        setting = self.given.get("DATA", file.recipe.data, file.path.name)
        path = path_of(setting, self.repository)
        is_path = setting.value != PYTHON_STDLIB and not is_list(setting.value) and not is_url(setting.value)
        self._tell("DATA", shown(path) if is_path else setting.value, setting.source)
        return self._attempt(find_data, setting.value, path, file.recipe)

    def _output(self, file: RecipeFile) -> Path:
        setting = self.given.get("OUTPUT", f"runs/{file.path.stem}", "default")
        path = path_of(setting, self.repository)
        self._tell("OUTPUT", shown(path), setting.source)
        return path

    def _layout(self, model: ModelSource | None) -> tuple[int, int]:
        """TP and PP; 0 for one that is no number, or if they do not fit the processes."""
        processes = self.process.world_size
        tp_setting = self.given.get("TP", "1", "default")
        self._tell("TP", tp_setting.value, tp_setting.source)
        tp = self._size(tp_setting, "TP")
        stages = choose_stages(processes, tp, model.architecture.num_layers if model else None)
        how = f"default: the largest power of two up to {MAX_STAGES} that divides {processes} processes / TP"
        pp_setting = self.given.get("PP", str(stages), how)
        self._tell("PP", pp_setting.value, pp_setting.source)
        pp = self._size(pp_setting, "PP")
        if tp and pp and processes % (tp * pp):
            there = "is 1" if processes == 1 else f"are {processes}"
            what = f"TP={tp} with PP={pp} needs a multiple of {tp * pp} processes, and there {there}"
            advice = "start so many (NPROC=..., or torchrun --nproc-per-node), or change TP or PP"
            self.problems.append(ConfigError(what, way_out=advice))
            return 0, 0
        return tp, pp

    def _check_gpus(self, recipe: Recipe, model: ModelSource | None, tp: int, pp: int) -> None:
        parameters = recipe.parameters
        if model is not None:
            a = model.architecture
            parameters = count_parameters(a, model.memory, a.num_layers).all
        need = describe_need(parameters, tp=tp, pp=pp, processes=self.process.world_size)
        self._tell("needs", need, "an estimate")
        chunks = -(-recipe.sequence_length // max(recipe.chunk_size, 1))
        tiny = shown(self.repository / TINY)
        self.problems += check_gpus(self.process, advice=advise(parameters, chunks=chunks, tiny=tiny))

    def _arguments(
        self, file: RecipeFile, model: ModelSource | None, data: DataSource | None, output: Path, tp: int, pp: int
    ) -> list[str]:
        """What the train command will be given, as far as it is known before anything is prepared."""
        listed = data is not None and data.train is not None and is_list(data.train)
        is_checkpoint = model is not None and model.kind == "checkpoint"
        return [
            override("model.path", model.path if is_checkpoint else start_folder(output)),
            f"data.train={data.train}" if listed else override("data.train", data_folder(output)),
            override("data.eval", data_folder(output)),
            override("train.output", output / "train"),
            *([f"parallel.tp={tp}", f"parallel.pp={pp}"] if tp and pp else []),
            *self.given.overrides,
        ]

    def _check_run(self, output: Path, run: Path) -> None:
        """OUTPUT can be written, and holds a run exactly if one is resumed."""
        existing = next(folder for folder in (output, *output.parents) if folder.exists())
        if not existing.is_dir():
            what = f"OUTPUT={shown(output)} cannot be a folder: {shown(existing)} is a file"
            self.problems.append(OutputError(what, way_out="give OUTPUT a new folder"))
        elif not os.access(existing, os.W_OK):
            what = f"OUTPUT={shown(output)} cannot be written: no permission in {shown(existing)}"
            self.problems.append(OutputError(what, way_out="give OUTPUT a folder that you may write to"))
        elif self.resume == LAST:
            self._attempt(newest_checkpoint, run)
        elif self.resume == AUTO:
            self._attempt(plan_continuation, run, resume=AUTO, fresh=False, restarts=0)
        else:
            try:
                check_is_new_run(run)
            except OutputError as error:
                advice = "add --resume to go on with the run that is there, or give OUTPUT another folder"
                self.problems.append(OutputError(error.what, way_out=advice))

    def _check_training(
        self, loaded: LoadedConfig, file: RecipeFile, model: ModelSource | None, *, has_layout: bool
    ) -> None:
        """What the train command would refuse of the configuration, the sizes and the layout."""
        problems = check_config(loaded.config, where=loaded.where)
        self.problems += problems
        if problems or model is None:
            return
        config = loaded.config
        if model.kind != "checkpoint":  # there is no such folder yet: the sizes come from here
            config = replace(config, model=replace(config.model, path=f"{file.path.name}, section recipe"))
            if model.kind != "comet":
                self.problems += check_stride_divides(model.memory, where=config.model.path)
        if has_layout:
            self.problems += check_layout(
                config, model.architecture, model.memory, world_size=self.process.world_size, where=loaded.where
            )
