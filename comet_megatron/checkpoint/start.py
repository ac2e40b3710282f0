"""What a training run takes its weights from: a checkpoint of ours, or a Hugging Face folder read by each rank."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.checkpoint.model_folder import TOKENIZER, ModelDescription, read_description
from comet_megatron.config.rules import HF_PREFIX
from comet_megatron.config.schema import Config, to_dict
from comet_megatron.errors import CheckpointError

if TYPE_CHECKING:  # both load torch, which is not done before a configuration is checked
    from comet_megatron.checkpoint.hf_import import ImportPlan
    from comet_megatron.model.stage import CometStage
    from comet_megatron.parallel.layout import Layout


class Start(Protocol):
    """A model to start from.

    Attributes:
        path: where it lies.
        tokenizer: folder that AutoTokenizer loads, with CoMeT's tokens.
    """

    @property
    def path(self) -> Path: ...
    @property
    def description(self) -> ModelDescription: ...
    @property
    def tokenizer(self) -> Path: ...
    def load_weights(self, stage: CometStage, layout: Layout) -> None:
        """Fill this rank's stage. Every rank calls it."""


@dataclass(frozen=True)
class CheckpointStart:
    """A checkpoint of ours, saved on any layout."""

    path: Path
    description: ModelDescription

    @property
    def tokenizer(self) -> Path:
        return self.path / TOKENIZER

    def load_weights(self, stage: CometStage, layout: Layout) -> None:
        """See Start. Communicates on the world.

        Raises:
            CheckpointError: files are missing or damaged, or the weights have other sizes.
        """
        from comet_megatron.checkpoint.agreement import find_damage
        from comet_megatron.checkpoint.sharded import load_weights

        if problem := find_damage(self.path, layout):
            way_out = problem.way_out or "convert again, or copy the whole folder again"
            raise CheckpointError(problem.what, where=problem.where, way_out=way_out)
        load_weights(self.path, stage, layout)


@dataclass(frozen=True)
class HfStart:
    """A Hugging Face folder, of which each rank reads its part."""

    plan: ImportPlan

    @property
    def path(self) -> Path:
        return self.plan.source

    @property
    def description(self) -> ModelDescription:
        return self.plan.description

    @cached_property
    def _folder(self) -> tempfile.TemporaryDirectory:
        folder = tempfile.TemporaryDirectory(prefix="comet_tokenizer_")
        self.plan.save_tokenizer(Path(folder.name))
        return folder

    @property
    def tokenizer(self) -> Path:
        """Written when it is asked for; gone with this object."""
        return Path(self._folder.name)

    def load_weights(self, stage: CometStage, layout: Layout) -> None:
        """See Start. Communicates on no axis."""
        self.plan.load_weights(stage)


def open_start(config: Config) -> Start:
    """The model that a configuration starts from; no weight is read.

    Raises:
        CheckpointError, DataError, ConfigError: it is missing, damaged, or does not fit the section memory.
    """
    if not config.model.init_from:
        path = Path(config.model.path)
        return CheckpointStart(path, read_description(path))
    quiet_libraries()
    from comet_megatron.checkpoint.hf_import import AskedMemory, plan_import

    source = Path(config.model.init_from.removeprefix(HF_PREFIX))
    return HfStart(plan_import(source, AskedMemory(**to_dict(config.memory)), seed=config.train.seed))
