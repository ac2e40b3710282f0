"""A checkpoint on its way to the disk: copied at once, written by a thread, made whole when all ranks have written.

`start` returns when the state is copied, and training may change it. A thread of each rank writes its files and sums
them up. `finish`, called by every rank, adds what is said beside the weights, the checksums and the marker, and renames
the folder. A failure of one rank is known to all; what was written is deleted then, and no other folder was touched.

Unusual: Megatron's own way of saving (dist_checkpointing.save) leaves the other ranks waiting when the main one cannot
write, in common.pt and in .metadata. So its parts are called one by one here, each followed by an agreement.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.metadata import Metadata

from comet_megatron import __version__
from comet_megatron.checkpoint.agreement import failing_together
from comet_megatron.checkpoint.checksums import FileSum, sum_file, write_checksums
from comet_megatron.checkpoint.model_folder import (
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    ModelDescription,
    Progress,
    SavedWith,
    write_description,
    write_progress,
    write_saved_with,
)
from comet_megatron.checkpoint.state import sharded_state
from comet_megatron.config.load import save_config as save_settings
from comet_megatron.config.schema import Config
from comet_megatron.model.stage import CometStage
from comet_megatron.new_folder import copy_files, make_folder
from comet_megatron.parallel.layout import Layout

_BACKEND, _VERSION = "torch_dist", 1  # Megatron's default form


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds beside the weights.

    Attributes:
        tokenizer: folder that is copied into the checkpoint.
        progress, config: of a training run.
    """

    description: ModelDescription
    tokenizer: Path
    progress: Progress | None = None
    config: Config | None = None


class Saving:
    """One checkpoint that is being written. Every rank has one, and calls the same methods.

    Attributes:
        folder: where the checkpoint will be.
        blocking_s: how long this rank's training waited for it so far.
        writing_s: how long the thread took; known after `finish`.
    """

    def __init__(self, folder: Path, contents: Contents, layout: Layout) -> None:
        self.folder, self.contents, self.layout = folder, contents, layout
        self.temporary = folder.with_name(unfinished_name(folder.name))
        self.blocking_s = self.writing_s = 0.0
        self._plan: _Plan
        self._thread: threading.Thread
        self._problem: Exception | None = None
        self._sums: dict[str, FileSum] = {}

    @classmethod
    def start(
        cls,
        folder: Path,
        stage: CometStage,
        optimizer: MegatronOptimizer | None,
        layout: Layout,
        *,
        contents: Contents,
    ) -> Saving:
        """Copy the state of stage and optimizer and start to write it. Communicates on the world.

        Raises:
            OutputError: on all ranks: the folder cannot be made or written by one of them.
        """
        started = time.perf_counter()
        saving = cls(folder, contents, layout)
        try:
            saving._prepare(sharded_state(stage, optimizer, layout, is_loading=False))
        except BaseException:
            saving._clean_up()
            raise
        saving.blocking_s = time.perf_counter() - started
        return saving

    def _prepare(self, state: dict[str, Any]) -> None:
        with failing_together(self.folder):
            if self.layout.is_main:
                shutil.rmtree(self.temporary, ignore_errors=True)
                make_folder(self.temporary / WEIGHTS)
        with failing_together(self.folder):  # each rank writes here, or says now that it cannot
            probe = self.temporary / WEIGHTS / f".probe_{self.layout.rank}"
            probe.touch()
            probe.unlink()
        weights = str(self.temporary / WEIGHTS)
        sharded, common = save_preprocess(state)
        with failing_together(self.folder):
            if self.layout.is_main:
                TorchCommonSaveStrategy("torch", 1).save_common(common, weights)
        strategy = _OpenStrategy()
        request = strategy.async_save(sharded, weights)
        assert strategy.plan is not None
        self._plan = strategy.plan
        arguments = list(request.async_fn_args)
        if request.preload_fn is not None:
            arguments[1] = request.preload_fn()  # host memory, or a copy of it
            torch.cuda.synchronize()
        self._thread = threading.Thread(target=self._write, args=(request, arguments), name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self, request: AsyncRequest, arguments: list[Any]) -> None:
        """In the thread: no communication."""
        started = time.perf_counter()
        try:
            if request.async_fn is not None:
                request.async_fn(*arguments, **request.async_fn_kwargs)
            own = (self.temporary / WEIGHTS).glob(f"__{self.layout.rank}_*.distcp")
            self._sums = {path.relative_to(self.temporary).as_posix(): sum_file(path) for path in own}
        except Exception as error:
            self._problem = error
        self.writing_s = time.perf_counter() - started

    def is_written(self) -> bool:
        """Whether this rank's files are written, or cannot be: then `finish` waits for no thread."""
        return not self._thread.is_alive()

    def finish(self) -> None:
        """Wait for this rank's files, and make the checkpoint whole. Communicates on the world.

        Raises:
            OutputError: on all ranks: one of them could not write; the folder is not there.
        """
        started = time.perf_counter()
        try:
            self._finish()
        except BaseException:
            self._clean_up()
            raise
        self.blocking_s += time.perf_counter() - started

    def _finish(self) -> None:
        results: Any = None
        with failing_together(self.folder):
            self._thread.join()
            if self._problem is not None:
                raise self._problem
            results = self._plan.writer.retrieve_write_results()
            if not isinstance(results, list):  # an exception, and where it came from
                raise results[0].__cause__ or results[0]
        of_ranks: list[Any] | None = [None] * self.layout.world_size if self.layout.is_main else None
        dist.gather_object((results, self._sums), of_ranks)
        with failing_together(self.folder):
            if of_ranks is not None:
                self._complete(
                    [found for found, _ in of_ranks], {k: v for _, sums in of_ranks for k, v in sums.items()}
                )

    def _complete(self, results: list[Any], sums: dict[str, FileSum]) -> None:
        """On the main rank: everything but the weights; the rename comes last."""
        contents, folder = self.contents, self.temporary
        assert self._plan.metadata is not None
        self._plan.writer.finish(self._plan.metadata, results)
        save_config(CheckpointingConfig(_BACKEND, _VERSION), str(folder / WEIGHTS))
        write_description(folder, contents.description)
        write_saved_with(folder, saved_with(self.layout))
        if contents.progress is not None:
            write_progress(folder, contents.progress)
        if contents.config is not None:
            save_settings(contents.config, folder / CONFIG)
        copy_files(contents.tokenizer, folder / TOKENIZER)
        write_checksums(folder, sums)
        move_aside(self.folder)
        os.replace(folder, self.folder)
        _sync_folder(self.folder.parent)

    def _clean_up(self) -> None:
        if self.layout.is_main:
            shutil.rmtree(self.temporary, ignore_errors=True)


@dataclass(frozen=True)
class _Plan:
    writer: FileSystemWriterAsync
    metadata: Metadata | None  # on the main rank


class _OpenStrategy(TorchDistSaveShardedStrategy):
    """Megatron's planning; what it would do after the writing is done by Saving."""

    def __init__(self) -> None:
        super().__init__(_BACKEND, _VERSION)
        self.plan: _Plan | None = None

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, save_state_dict_ret: Any) -> AsyncRequest:
        self.plan = _Plan(writer, save_state_dict_ret[1])
        return super()._get_save_and_finalize_callbacks(writer, save_state_dict_ret)


def unfinished_name(name: str) -> str:
    """Of the folder in which a checkpoint is written."""
    return f".{name}.unfinished"


def saved_with(layout: Layout) -> SavedWith:
    """Of this process."""
    libraries = ("torch", "megatron-core", "transformers", "numpy")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    sizes = {"processes": layout.world_size, "tp": layout.tp, "pp": layout.pp, "dp": layout.dp}
    return SavedWith({"comet_megatron": __version__, **versions}, sizes)


def move_aside(folder: Path) -> None:
    """Give a folder that is there another name: a damaged checkpoint, whose step was trained again."""
    number = 0
    while folder.exists():
        number += 1
        aside = folder.with_name(f"replaced_{folder.name}_{number}")
        if not aside.exists():
            folder.rename(aside)


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
