"""Build a run: device, layout, model, optimizer, callbacks; load weights or the state to resume."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from comet_megatron.backend.capabilities import probe_capabilities
from comet_megatron.backend.device import Device, keep_large_tensors_apart, select_device, set_cpu_threads
from comet_megatron.backend.environment import describe_environment
from comet_megatron.backend.precision import check_machine, plan_execution
from comet_megatron.checkpoint.model_folder import TOKENIZER, Progress, read_progress
from comet_megatron.checkpoint.sharded import load_training_state
from comet_megatron.checkpoint.start import CheckpointStart, Start
from comet_megatron.config.schema import Config
from comet_megatron.data.training_data import TrainingData
from comet_megatron.model.build import build_stage
from comet_megatron.new_folder import copy_files, make_folder
from comet_megatron.parallel.hang_watch import HangWatch
from comet_megatron.parallel.layout import Layout, build_layout
from comet_megatron.parallel.process import ProcessRank, store_generation
from comet_megatron.planning.balance import chunk_costs, describe_split, resolve_layers_per_stage
from comet_megatron.planning.cutting import Cutting
from comet_megatron.planning.memory import kept_piece_bytes
from comet_megatron.train.callbacks.curve import Curve
from comet_megatron.train.callbacks.progress import Progress as ProgressDisplay
from comet_megatron.train.callbacks.progress import start_logging
from comet_megatron.train.callbacks.tensorboard import TensorBoard
from comet_megatron.train.continuation import Continuation, choose_checkpoint, prepare_run_folder
from comet_megatron.train.data import RunData
from comet_megatron.train.model import TrainableModel, build_trainable
from comet_megatron.train.optimizer import build_optimizer, build_schedule, keep_settings
from comet_megatron.train.records import Callback
from comet_megatron.train.room import check_room
from comet_megatron.train.trainer import Trainer


def build_trainer(
    config: Config,
    process: ProcessRank,
    start: Start,
    data: RunData,
    *,
    plan: Continuation,
) -> tuple[Trainer, list[str]]:
    """A trainer ready to run and a summary for the user. Communicates on the world.

    Args:
        start: model to load; where the run goes on, one of its own checkpoints.
        plan: what it goes on from.

    Raises:
        CheckpointError: all checkpoints that it could go on from are damaged.
    """
    run = Path(config.train.output)
    description = start.description
    machine = probe_capabilities()
    device = select_device(process.local_rank, wanted=config.train.device)
    execution = plan_execution(config.model, machine)
    check_machine(config, execution, machine)
    if process.rank == 0:
        make_folder(run)  # before minutes are spent on loading
    threads = None
    if device.kind == "cpu":
        keep_large_tensors_apart(kept_piece_bytes(description.architecture, description.memory))
        threads = set_cpu_threads(config.train.cpu_threads, processes_on_this_machine=process.local_world_size)
    parallel = config.parallel
    if (generation := store_generation()) and not dist.is_initialized():
        join_restarted_world(process, device, generation=generation, timeout_s=parallel.timeout_s)
    layout = build_layout(
        process, device, tp=parallel.tp, pp=parallel.pp, seed=config.train.seed, timeout_s=parallel.timeout_s
    )
    room = check_room(config, description, layout, process, longest=data.train.longest)
    told: list[str] = []
    if plan.newest is not None:
        checkpoint, told = choose_checkpoint(run, plan, layout)
        start = CheckpointStart(checkpoint, description)
    told += [*room, *prepare_run_folder(run, plan, layout), *(plan.told if plan.newest is None else ())]
    layers_per_stage = resolve_layers_per_stage(
        parallel.layers_per_stage,
        description.architecture,
        description.memory,
        num_stages=parallel.pp,
        tokens=data.train.longest,
        recompute=config.train.recompute == "full",
        cutting=Cutting.of(config.data),
    )
    stage = build_stage(
        description.architecture,
        description.memory,
        layout.groups,
        stage=layout.pp_rank,
        layers_per_stage=layers_per_stage,
        sequence_parallel=config.parallel.sequence_parallel,
        precision=execution.precision,
        backend=execution.backend,
        fp8=execution.fp8,
    )
    if plan.newest is None:
        start.load_weights(stage, layout)
    if config.train.trainable == "memory":
        stage.freeze_backbone()
    model = build_trainable({layout.pp_rank: stage}, layout, zero1=config.parallel.zero1)
    if config.train.fuse_weight_gradients:
        stage.fuse_weight_gradients()
    optimizer = build_optimizer(model, config.optimizer, precision=config.model.precision, zero1=config.parallel.zero1)
    progress = Progress(
        step=0,
        data_fingerprint=data.train.fingerprint,
        data_seed=config.data.seed,
        global_batch_size=config.train.global_batch_size,
        trainable=config.train.trainable,
        zero1=config.parallel.zero1,
    )
    if plan.newest is not None:
        with keep_settings(optimizer):
            load_training_state(start.path, stage, optimizer, layout)
        progress = read_progress(start.path)
    schedule = build_schedule(
        optimizer, config.optimizer, steps=config.train.steps, steps_done=progress.step - progress.skipped
    )
    trainer = Trainer(
        config=config,
        layout=layout,
        model=model,
        optimizer=optimizer,
        schedule=schedule,
        description=description,
        tokenizer=keep_tokenizer(start, run, layout),
        data=data,
        progress=progress,
        callbacks=_build_callbacks(config) if layout.is_main else (),
        watch=_build_watch(model, layout, timeout_s=parallel.timeout_s),
    )
    backend = f"{execution.told}; {machine.adamw}"
    return trainer, [*told, *summarize(trainer, start.path, layers_per_stage, threads=threads, backend=backend)]


def join_restarted_world(process: ProcessRank, device: Device, *, generation: int, timeout_s: float) -> None:
    """Start torch.distributed after torchrun has started the processes again, with names of its own in the store.

    torchrun keeps one store for all restarts, in which the addresses of the processes that are gone still stand; who
    reads them before the new ones are written cannot connect, and fails again.
    """
    timeout = timedelta(seconds=2 * timeout_s + 60)  # as build_layout does
    store, rank, world_size = next(dist.rendezvous("env://", process.rank, process.world_size, timeout=timeout))
    store.set_timeout(timeout)
    own = dist.PrefixStore(f"restart_{generation}", store)
    dist.init_process_group(device.collectives, store=own, rank=rank, world_size=world_size, timeout=timeout)


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


def summarize(
    trainer: Trainer, start: Path, layers_per_stage: Sequence[int], *, threads: int | None, backend: str
) -> list[str]:
    """What runs, in a few lines."""
    config, layout, stage = trainer.config, trainer.layout, trainer.stage
    architecture, memory, data = stage.architecture, stage.memory_sizes, trainer.data.train
    weights = sum(p.numel() for p in stage.parameters())
    trained = sum(p.numel() for p in stage.parameters() if p.requires_grad)
    parallel = f"TP {layout.tp}{' with sequence parallelism' if config.parallel.sequence_parallel else ''}, "
    parallel += f"PP {layout.pp}, DP {layout.dp}"
    parallel += ", ZeRO-1" if config.parallel.zero1 else ""
    on = layout.device.kind if threads is None else f"{layout.device.kind}, {threads} thread{'s' * (threads > 1)} each"
    temporary = f"a beacon every {memory.stride} tokens, budget {memory.budget}" if memory.stride > 0 else "no beacons"
    workers = trainer.data.workers
    ahead = f"; read ahead by {workers} process{'es' * (workers > 1)} a rank" if workers else ""
    lines = [
        f"model    {start}: {architecture.family}, {architecture.num_layers} layers, "
        f"hidden {architecture.hidden_size}, vocabulary {architecture.vocab_size}; "
        f"{weights / 1e6:.1f} M weights on this rank, {trained / 1e6:.1f} M trained",
        f"memory   chunks of {memory.chunk_size} tokens, {memory.global_slots} global slots, {temporary}",
        f"layout   {layout.world_size} process{'es' * (layout.world_size > 1)} on {on}: {parallel}; "
        f"{config.model.precision}",
        backend,
        f"data     {data.describe()}: {_describe_size(data)}; "
        f"{config.train.global_batch_size} sequences a step, {config.train.steps} steps{ahead}",
    ]
    if layout.pp > 1:
        costs = chunk_costs(
            architecture,
            memory,
            tokens=data.longest,
            recompute=config.train.recompute == "full",
            cutting=Cutting.of(config.data),
        )
        split = describe_split(layers_per_stage, costs, setting=config.parallel.layers_per_stage)
        lines.insert(4, f"{split}; slack {config.parallel.slack}")
    if environment := describe_environment(on_gpu=layout.device.kind == "cuda"):
        lines.append(f"environ  {environment}")
    if trainer.progress.step:
        lines.append(f"resume   after step {trainer.progress.step}")
    return lines


def _describe_size(data: TrainingData) -> str:
    if not data.pack_tokens:
        return f"{len(data):,} sequences, {data.num_tokens:,} tokens"
    packed = f"{data.num_documents:,} documents in {len(data):,} sequences of at most {data.pack_tokens:,} tokens"
    return f"{packed}, {data.num_tokens:,} tokens"
