"""The training loop: batches in, steps, evaluations and checkpoints out; callbacks are told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from comet_megatron.backend.device import peak_memory_bytes
from comet_megatron.checkpoint.model_folder import ModelDescription, Progress
from comet_megatron.checkpoint.run_folder import checkpoint_folder
from comet_megatron.checkpoint.saving import Contents
from comet_megatron.config.schema import Config
from comet_megatron.data.read_ahead import BatchReader, ReadSequence, read_sequence
from comet_megatron.data.sampler import plan_positions
from comet_megatron.data.training_data import TrainingSequence, sequence_of
from comet_megatron.errors import CometError, DamagedSample, DataError, PeerError, TrainingError
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.activity import Activity
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.parallel.hang_watch import HangWatch
from comet_megatron.parallel.layout import Layout
from comet_megatron.train.data import RunData
from comet_megatron.train.model import TrainableModel
from comet_megatron.train.nonfinite import NotFinite, UnusableStep
from comet_megatron.train.optimizer import backbone_learning_rate
from comet_megatron.train.out_of_memory import explain_out_of_memory
from comet_megatron.train.profile import write_profile
from comet_megatron.train.records import BadSamples, Callback, RunEnd, RunStart, SkipRecord, StepRecord
from comet_megatron.train.saver import Saver
from comet_megatron.train.spike import largest_usual_norm, remember_norm
from comet_megatron.train.step import BatchResult, evaluate, train_step
from comet_megatron.train.stop_request import StopRequest


@dataclass
class Trainer:
    """Everything a run needs, built; `run` does the rest.

    Attributes:
        tokenizer: folder that checkpoints carry along.
        progress: where the run is; 0 steps for a new one.
        data: what is trained on and evaluated.
        callbacks: empty but on the main process.
        watch: ends the run when another process holds it up; None where there is no other.
        stop_request: a signal's.
    """

    config: Config
    layout: Layout
    model: TrainableModel
    optimizer: MegatronOptimizer
    schedule: OptimizerParamScheduler
    description: ModelDescription
    tokenizer: Path
    data: RunData
    progress: Progress
    callbacks: Sequence[Callback]
    watch: HangWatch | None = None
    stop_request: StopRequest = field(default_factory=StopRequest)

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
        """Train to the last step, or to the border at which a signal asks to stop; the last checkpoint's folder.

        Every rank calls it.

        Raises:
            TrainingError: a loss or gradient is not finite, too many steps were skipped, or a GPU's memory is full.
            DataError: a shard is damaged.
            OutputError: a checkpoint cannot be written, and training must not go on without it.
        """
        folder = Path(self.config.train.output)
        with self.watch.watching() if self.watch else nullcontext(), self.stop_request.listening():
            try:
                return self._run(folder, summary)
            except torch.OutOfMemoryError as error:
                raise explain_out_of_memory(error, self) from None

    def _run(self, folder: Path, summary: Sequence[str]) -> Path:
        train = self.config.train
        saver = Saver(folder, self.stage, self.optimizer, self.layout, train, self._tell)
        reader = BatchReader(self.data.train, self._positions, num_workers=self.data.workers)
        try:
            start = RunStart(folder, train.steps, self.progress.step, tuple(summary), self.data.bad_rows)
            self._tell("on_start", start)
            if self.progress.step == 0 and train.eval_every:
                self._evaluate(0)
            try:
                asked_to_stop = self._train(saver, reader)
            except CometError as error:
                if not isinstance(error, PeerError):  # else all ranks are here, and the last save can be finished
                    self._finish(saver)
                raise
            end = RunEnd(folder, saver.saved or checkpoint_folder(folder, self.progress.step))
            if asked_to_stop:
                self._tell("on_stop", self.progress.step, end)
            else:
                self._tell("on_end", end)
            return end.checkpoint
        finally:
            reader.close()
            self._tell("close")

    def _positions(self, step: int) -> Sequence[int] | None:
        """What this rank trains on in a step, counted from 0; None behind the last one."""
        train, layout = self.config.train, self.layout
        if step >= train.steps:
            return None
        return plan_positions(
            step, global_batch_size=train.global_batch_size, dp_rank=layout.dp_rank, dp_size=layout.dp
        )

    def _train(self, saver: Saver, reader: BatchReader) -> bool:
        """Steps, evaluations and checkpoints; whether it ended because it was asked to."""
        train = self.config.train
        for step in range(self.progress.step + 1, train.steps + 1):
            border = self._step(step, saver, reader)
            is_last = step == train.steps
            must_stop = border.stop_requested and not is_last
            if saver.has_begun and border.all_have_written:
                self._finish(saver)
            if train.eval_every and (step % train.eval_every == 0 or is_last) and not must_stop:
                self._evaluate(step)
            if is_last or must_stop or (train.save_every and step % train.save_every == 0):
                self._save(saver, step, must=is_last or must_stop)
            if must_stop:
                return True
        return False

    def _tell(self, event: str, *arguments: object) -> None:
        for callback in self.callbacks:
            getattr(callback, event)(*arguments)

    def _step(self, step: int, saver: Saver, reader: BatchReader) -> _Border:
        started = time.perf_counter()
        with self.activity.phase("reading the batch"):
            batch = reader.read(step - 1)
            reading_s = time.perf_counter() - started
            sequences, errors = self._usable(batch, f"step {step}")
        if errors:
            self._leave_out(errors, step)
        self.schedule.step(increment=1)
        records = self.config.profile.timeline and step == self.config.profile.timeline_step
        since = None
        if records:
            with self.activity.phase("starting the stages' clocks together"):
                dist.barrier(group=self.layout.groups.pp)
            since = self.activity.mark()
        result = self._update(sequences, step)
        border = self._agree(saver)
        if result is not None:
            record = StepRecord(
                step=step,
                result=result,
                learning_rate=backbone_learning_rate(self.optimizer),
                seconds=time.perf_counter() - started,
                peak_memory_bytes=border.peak_memory_bytes,
                reading_s=reading_s,
            )
            self._tell("on_step", record)
        if since is not None:
            with self.activity.phase("drawing the profile", limited=False):
                path = write_profile(self.activity, self.layout, Path(self.config.train.output), step=step, since=since)
            if path is not None:
                self._tell("on_profile", step, path)
        return border

    def _update(self, sequences: Sequence[TrainingSequence], step: int) -> BatchResult | None:
        """One step of the optimizer; None if it was skipped: only the place in the data has moved then.

        Raises:
            UnusableStep: it may not be skipped.
        """
        progress, train = self.progress, self.config.train
        limit = largest_usual_norm(progress.recent_norms, deviations=train.spike_guard)
        try:
            result = train_step(
                self.model,
                self.optimizer,
                sequences,
                self.layout,
                settings=self.settings,
                step=step,
                largest_norm=limit,
            )
        except UnusableStep as error:
            self._skip(error, step)
            return None
        norms = remember_norm(progress.recent_norms, result.grad_norm)
        self.progress = replace(progress, step=step, skipped_in_a_row=0, recent_norms=norms)
        return result

    def _skip(self, error: UnusableStep, step: int) -> None:
        progress, train = self.progress, self.config.train
        if isinstance(error, NotFinite) and train.on_nonfinite == "stop":
            raise error
        in_a_row = progress.skipped_in_a_row + 1
        if in_a_row >= train.max_skips:
            what = f"{in_a_row} steps in a row were skipped (train.max_skips); the last: {error.what}"
            raise TrainingError(what, way_out=error.way_out) from error
        self.schedule.step(increment=-1)
        self.activity.clear()  # the error has left a phase open
        self.progress = replace(progress, step=step, skipped=progress.skipped + 1, skipped_in_a_row=in_a_row)
        self._tell("on_skip", SkipRecord(step, error.what, in_a_row, self.progress.skipped))

    def _usable(self, batch: Sequence[ReadSequence], where: str) -> tuple[list[TrainingSequence], list[DataError]]:
        """The documents of this rank's batch, and the errors of those of all ranks that are left out.

        What one rank cannot read, no rank uses. Communicates on the world.

        Args:
            where: the step or evaluation, for messages.

        Raises:
            DataError: on all ranks: data.on_bad_sample=stop, or what is wrong is no damage and may be gone at the next
                try, or no document is left.
        """
        bad = {at: error for read in batch for at, error in read.errors.items()}
        if self._any_rank(bool(bad)):
            own = (bad, {read.position: len(read.documents) for read in batch})
            found: list[tuple[dict[tuple[int, int], DataError], dict[int, int]]] = [own] * self.layout.world_size
            dist.all_gather_object(found, own)
            bad = {at: error for errors, _ in found for at, error in errors.items()}
            counts = {position: count for _, of_rank in found for position, count in of_rank.items()}
            self._check_may_skip([bad[at] for at in sorted(bad)], where, num_documents=sum(counts.values()))
        numbered = [((read.position, n), d) for read in batch for n, d in enumerate(read.documents)]
        usable = [d for at, d in numbered if at not in bad and isinstance(d, TrainingSequence)]
        return usable, [bad[at] for at in sorted(bad)]

    def _any_rank(self, value: bool) -> bool:
        """Whether it is so on one of the ranks. Communicates on the world, if there is one."""
        if self.layout.world_size == 1:
            return value
        found = torch.tensor(int(value), device=self.layout.device.torch_device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return bool(found)

    def _check_may_skip(self, errors: Sequence[DataError], where: str, *, num_documents: int) -> None:
        """Raises: see _usable."""
        if failing := [error for error in errors if not isinstance(error, DamagedSample)]:
            raise failing[0]
        if self.config.data.on_bad_sample == "stop":
            advice = "to leave damaged samples out and list them in the log: data.on_bad_sample=skip"
            way_out = "\n  ".join(filter(None, (errors[0].way_out, advice)))
            raise DataError(errors[0].what, where=errors[0].where, way_out=way_out)
        if len(errors) == num_documents:
            what = f"no sample of {where} can be used; the first: {errors[0].what}"
            raise DataError(what, where=errors[0].where, way_out=errors[0].way_out)

    def _leave_out(self, errors: Sequence[DataError], step: int) -> None:
        """Count and tell what a step is computed without."""
        in_all = self.progress.bad_samples + len(errors)
        self.progress = replace(self.progress, bad_samples=in_all)
        self._tell("on_bad_samples", BadSamples(step, tuple(f"{e.what} ({e.where})" for e in errors), in_all))

    def _evaluate(self, step: int) -> None:
        held_out = self.data.held_out
        count = min(self.config.train.eval_sequences, len(held_out))
        with self.activity.phase("reading held-out sequences"):
            numbers = range(self.layout.dp_rank, count, self.layout.dp)
            batch = [read_sequence(n, [partial(sequence_of, held_out, n)]) for n in numbers]
            sequences, errors = self._usable(batch, "the evaluation")
        for error in errors:
            self._tell("on_warning", f"left out of the evaluation: {error.what} ({error.where})")
        result = evaluate(self.model.executor, sequences, self.layout, settings=self.settings)
        self._tell("on_evaluation", step, result)

    def _save(self, saver: Saver, step: int, *, must: bool) -> None:
        contents = Contents(self.description, self.tokenizer, self.progress, self.config)
        with self.activity.phase("saving a checkpoint", limited=False):
            saver.save(step, contents, must=must)

    def _finish(self, saver: Saver) -> None:
        with self.activity.phase("finishing a checkpoint", limited=False):
            saver.finish()

    def _agree(self, saver: Saver) -> _Border:
        """What the ranks have to know of each other after a step. Communicates on the world."""
        own = [peak_memory_bytes(self.layout.device), int(self.stop_request.was_made), int(saver.is_writing)]
        most = torch.tensor(own, device=self.layout.device.torch_device)
        with self.activity.phase("agreeing on what comes after the step"):
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
        peak, stop, writing = most.tolist()
        return _Border(peak, stop_requested=bool(stop), all_have_written=not writing)


@dataclass(frozen=True)
class _Border:
    """Between two steps, the same on every rank.

    Attributes:
        peak_memory_bytes: the most that any rank has held so far.
        stop_requested: of any rank.
        all_have_written: no thread is writing a checkpoint.
    """

    peak_memory_bytes: int
    stop_requested: bool
    all_have_written: bool
