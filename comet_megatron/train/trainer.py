"""The training loop: batches in, steps, evaluations and checkpoints out; callbacks are told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from comet_megatron.backend.device import peak_memory_bytes
from comet_megatron.checkpoint.model_folder import ModelDescription, Progress
from comet_megatron.checkpoint.run_folder import checkpoint_folder
from comet_megatron.checkpoint.sharded import save_checkpoint
from comet_megatron.config.schema import Config
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.sampler import plan_batch
from comet_megatron.errors import DataError
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.activity import Activity
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.parallel.hang_watch import HangWatch
from comet_megatron.parallel.layout import Layout
from comet_megatron.train.model import TrainableModel
from comet_megatron.train.optimizer import backbone_learning_rate
from comet_megatron.train.profile import write_profile
from comet_megatron.train.records import Callback, RunEnd, RunStart, StepRecord
from comet_megatron.train.step import evaluate, train_step


@dataclass
class Trainer:
    """Everything a run needs, built; `run` does the rest.

    Attributes:
        tokenizer: folder that checkpoints carry along.
        progress: where the run is; 0 steps for a new one.
        callbacks: empty but on the main process.
        watch: ends the run when another process holds it up; None where there is no other.
    """

    config: Config
    layout: Layout
    model: TrainableModel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    description: ModelDescription
    tokenizer: Path
    train_data: ShardDataset
    eval_data: ShardDataset | None
    progress: Progress
    callbacks: Sequence[Callback]
    watch: HangWatch | None = None

    @property
    def activity(self) -> Activity:
        """What this process does."""
        return self.model.executor.activity

    @property
    def stage(self) -> CometStage:
        """This process's part of the model."""
        return self.model.stages[0]

    @property
    def settings(self) -> BackwardSettings:
        """How sequences are trained on."""
        train = self.config.train
        return BackwardSettings(
            bptt_chunks=train.bptt_chunks,
            recompute=train.recompute == "full",
            slice_tokens=train.loss_slice_tokens,
            slack=self.config.parallel.slack,
        )

    def run(self, summary: Sequence[str] = ()) -> Path:
        """Train to the last step; the last checkpoint's folder. Every rank calls it.

        Raises:
            TrainingError: a loss or gradient is not finite.
            DataError: a shard is damaged.
        """
        folder = Path(self.config.train.output)
        with self.watch.watching() if self.watch else nullcontext():
            return self._run(folder, summary)

    def _run(self, folder: Path, summary: Sequence[str]) -> Path:
        train = self.config.train
        try:
            self._tell("on_start", RunStart(folder, train.steps, self.progress.step, tuple(summary)))
            if self.progress.step == 0 and train.eval_every:
                self._evaluate(0)
            saved = checkpoint_folder(folder, self.progress.step)
            for step in range(self.progress.step + 1, train.steps + 1):
                self._step(step)
                if train.eval_every and (step % train.eval_every == 0 or step == train.steps):
                    self._evaluate(step)
                if step == train.steps or (train.save_every and step % train.save_every == 0):
                    saved = self._save(step)
            self._tell("on_end", RunEnd(folder, saved))
            return saved
        finally:
            self._tell("close")

    def _tell(self, event: str, *arguments: object) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*arguments)

    def _step(self, step: int) -> None:
        started = time.perf_counter()
        numbers = plan_batch(
            step - 1,
            global_batch_size=self.config.train.global_batch_size,
            dp_rank=self.layout.dp_rank,
            dp_size=self.layout.dp,
            num_samples=len(self.train_data),
            seed=self.config.data.seed,
        )
        with self.activity.phase("reading the batch"):
            sequences = self._read(numbers)
        self.schedule.step(increment=1)
        records = self.config.profile.timeline and step == self.config.profile.timeline_step
        since = None
        if records:
            with self.activity.phase("starting the stages' clocks together"):
                dist.barrier(group=self.layout.groups.pp)
            since = self.activity.mark()
        result = train_step(self.model, self.optimizer, sequences, self.layout, settings=self.settings, step=step)
        self.progress = replace(self.progress, step=step)
        record = StepRecord(
            step=step,
            result=result,
            learning_rate=backbone_learning_rate(self.optimizer),
            seconds=time.perf_counter() - started,
            peak_memory_bytes=self._peak_memory(),
        )
        self._tell("on_step", record)
        if since is not None:
            with self.activity.phase("drawing the profile", limited=False):
                path = write_profile(self.activity, self.layout, Path(self.config.train.output), step=step, since=since)
            if path is not None:
                self._tell("on_profile", step, path)

    def _read(self, numbers: Sequence[int]) -> list[np.ndarray]:
        """This rank's samples. A sample that one rank cannot read stops all ranks with the same message."""
        found, problem = [], None
        try:
            found = [self.train_data[n] for n in numbers]
        except DataError as error:
            problem = error
        problems: list[DataError | None] = [None] * self.layout.world_size
        failed = torch.tensor(int(problem is not None), device=self.layout.device.torch_device)
        dist.all_reduce(failed, op=dist.ReduceOp.MAX)
        if int(failed):
            dist.all_gather_object(problems, problem)
            raise next(p for p in problems if p is not None)
        return found

    def _evaluate(self, step: int) -> None:
        count = min(self.config.train.eval_sequences, len(self.eval_data))
        sequences = [self.eval_data[n] for n in range(self.layout.dp_rank, count, self.layout.dp)]
        result = evaluate(self.model.executor, sequences, self.layout, settings=self.settings)
        self._tell("on_evaluation", step, result)

    def _save(self, step: int) -> Path:
        folder = checkpoint_folder(Path(self.config.train.output), step)
        with self.activity.phase("saving a checkpoint", limited=False):
            save_checkpoint(
                folder,
                self.stage,
                self.layout,
                description=self.description,
                tokenizer=self.tokenizer,
                optimizer=self.optimizer,
                progress=self.progress,
            )
        self._tell("on_checkpoint", step, folder)
        return folder

    def _peak_memory(self) -> int:
        with self.activity.phase("comparing peak memory"):
            return self._most_of_all_ranks()

    def _most_of_all_ranks(self) -> int:
        most = torch.tensor(peak_memory_bytes(self.layout.device), device=self.layout.device.torch_device)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        return int(most)
