"""Build a run: device, layout, model, optimizer, callbacks; load weights or the state to resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from comet_megatron.backend.device import keep_large_tensors_apart, select_device, set_cpu_threads
from comet_megatron.checkpoint.model_folder import TOKENIZER, Progress, read_progress
from comet_megatron.checkpoint.sharded import load_training_state
from comet_megatron.checkpoint.start import Start
from comet_megatron.config.schema import Config
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.model.build import build_stage
from comet_megatron.new_folder import copy_files, make_folder
from comet_megatron.parallel.hang_watch import HangWatch
from comet_megatron.parallel.layout import Layout, build_layout
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.planning.balance import chunk_costs, describe_split, resolve_layers_per_stage
from comet_megatron.planning.memory import kept_piece_bytes
from comet_megatron.train.callbacks.curve import Curve
from comet_megatron.train.callbacks.progress import Progress as ProgressDisplay
from comet_megatron.train.callbacks.progress import start_logging
from comet_megatron.train.callbacks.tensorboard import TensorBoard
from comet_megatron.train.model import TrainableModel, build_trainable
from comet_megatron.train.optimizer import build_optimizer, build_schedule, keep_settings
from comet_megatron.train.records import Callback
from comet_megatron.train.trainer import Trainer


def build_trainer(
    config: Config,
    process: ProcessRank,
    start: Start,
    train_data: ShardDataset,
    eval_data: ShardDataset | None,
    *,
    resume: bool,
) -> tuple[Trainer, list[str]]:
    """A trainer ready to run and a summary for the user. Communicates on the world.

    Args:
        start: model to load; with `resume` a checkpoint of the run itself.
    """
    description = start.description
    if process.rank == 0:
        make_folder(Path(config.train.output))  # before minutes are spent on loading
    device = select_device(process.local_rank)
    threads = None
    if device.kind == "cpu":
        keep_large_tensors_apart(kept_piece_bytes(description.architecture, description.memory))
        threads = set_cpu_threads(config.train.cpu_threads, processes_on_this_machine=process.local_world_size)
    parallel = config.parallel
    layout = build_layout(
        process, device, tp=parallel.tp, pp=parallel.pp, seed=config.train.seed, timeout_s=parallel.timeout_s
    )
    layers_per_stage = resolve_layers_per_stage(
        parallel.layers_per_stage,
        description.architecture,
        description.memory,
        num_stages=parallel.pp,
        tokens=int(train_data.lengths.max()),
        recompute=config.train.recompute == "full",
    )
    stage = build_stage(
        description.architecture,
        description.memory,
        layout.groups,
        stage=layout.pp_rank,
        layers_per_stage=layers_per_stage,
        sequence_parallel=config.parallel.sequence_parallel,
        precision=config.model.precision,
    )
    if not resume:
        start.load_weights(stage, layout)
    if config.train.trainable == "memory":
        stage.freeze_backbone()
    model = build_trainable({layout.pp_rank: stage}, layout, zero1=config.parallel.zero1)
    optimizer = build_optimizer(model, config.optimizer, precision=config.model.precision, zero1=config.parallel.zero1)
    progress = Progress(
        step=0,
        data_fingerprint=train_data.manifest.fingerprint,
        data_seed=config.data.seed,
        global_batch_size=config.train.global_batch_size,
        trainable=config.train.trainable,
        zero1=config.parallel.zero1,
    )
    if resume:
        with keep_settings(optimizer):
            load_training_state(start.path, stage, optimizer, layout)
        progress = read_progress(start.path)
    schedule = build_schedule(optimizer, config.optimizer, steps=config.train.steps, steps_done=progress.step)
    trainer = Trainer(
        config=config,
        layout=layout,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        description=description,
        tokenizer=keep_tokenizer(start, Path(config.train.output), layout),
        train_data=train_data,
        eval_data=eval_data,
        progress=progress,
        callbacks=_build_callbacks(config) if layout.is_main else (),
        watch=_build_watch(model, layout, timeout_s=parallel.timeout_s),
    )
    return trainer, summarize(trainer, start.path, layers_per_stage, threads=threads)


def keep_tokenizer(start: Start, run: Path, layout: Layout) -> Path:
    """The run's own copy of the tokenizer: what it started from may be gone before the run has ended."""
    folder = run / TOKENIZER
    if layout.is_main:
        copy_files(start.tokenizer, folder)
    return folder


def _build_watch(model: TrainableModel, layout: Layout, *, timeout_s: float) -> HangWatch | None:
    if layout.world_size == 1:
        return None
    return HangWatch(
        model.executor.activity,
        rank=layout.rank,
        world_size=layout.world_size,
        timeout_s=timeout_s,
        name_of=layout.name_of,
        store=dist.distributed_c10d._get_default_store(),
    )


def _build_callbacks(config: Config) -> list[Callback]:
    folder = Path(config.train.output)
    callbacks: list[Callback] = [Curve(folder)]
    if config.logging.tensorboard:
        callbacks.append(TensorBoard(folder / "tensorboard"))
    callbacks.append(ProgressDisplay(start_logging(folder), log_every=config.logging.log_every))
    return callbacks


def summarize(trainer: Trainer, start: Path, layers_per_stage: Sequence[int], *, threads: int | None) -> list[str]:
    """What runs, in a few lines."""
    config, layout, stage = trainer.config, trainer.layout, trainer.stage
    architecture, memory, data = stage.architecture, stage.memory_sizes, trainer.train_data
    weights = sum(p.numel() for p in stage.parameters())
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    parallel = f"TP {layout.tp}{' with sequence parallelism' if config.parallel.sequence_parallel else ''}, "
    parallel += f"PP {layout.pp}, DP {layout.dp}"
    parallel += ", ZeRO-1" if config.parallel.zero1 else ""
    on = layout.device.kind if threads is None else f"{layout.device.kind}, {threads} thread{'s' * (threads > 1)} each"
    temporary = f"a beacon every {memory.stride} tokens, budget {memory.budget}" if memory.stride > 0 else "no beacons"
    lines = [
        f"model    {start}: {architecture.family}, {architecture.num_layers} layers, "
        f"hidden {architecture.hidden_size}, vocabulary {architecture.vocab_size}; "
        f"{weights / 1e6:.1f} M weights on this rank, {trained / 1e6:.1f} M trained",
        f"memory   chunks of {memory.chunk_size} tokens, {memory.global_slots} global slots, {temporary}",
        f"layout   {layout.world_size} process{'es' * (layout.world_size > 1)} on {on}: {parallel}; "
        f"{config.model.precision}",
        f"data     {data.folder}: {len(data):,} sequences, {data.num_tokens:,} tokens; "
        f"{config.train.global_batch_size} sequences a step, {config.train.steps} steps",
    ]
    if layout.pp > 1:
        costs = chunk_costs(
            architecture,
            memory,
            tokens=int(data.lengths.max()),
            recompute=config.train.recompute == "full",
        )
        split = describe_split(layers_per_stage, costs, setting=config.parallel.layers_per_stage)
        lines.insert(3, f"{split}; slack {config.parallel.slack}")
    if trainer.progress.step:
        lines.append(f"resume   after step {trainer.progress.step}")
    return lines
