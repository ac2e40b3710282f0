"""Saving and restarting: what training waits for a checkpoint, what is hidden, and how long a restart takes.

python benchmarks/state.py             all figures; exits 1 if one misses its reach (about 4 minutes)
python benchmarks/state.py --quick     fewer repetitions
python benchmarks/state.py --report    only print

One process on CPU, fp32, ZeRO-1 as in training; 82 M weights, so 1.3 GB with the optimizer's state. The bare copy is a
clone of as many bytes in as many tensors, into fresh memory, and nothing else. Training waits for the start of a save,
in which the state is copied, and for its end, in which small files are written; between them a thread writes the files,
brings them to the disk and sums them up. The restart is the command itself in a new process, its parts timed where they
are called; the checkpoint is in the page cache.

The wait and the load are in CPU seconds, which other programs disturb less than wall time. Planning a save takes
Megatron and Python some time whatever the size: it is measured on a thin model of as many tensors, printed, and taken
off the wait. The rest makes 1.75 copies on one rank: the optimizer's three quarters are gathered, as from several
ranks, and all is cloned. The reach is 3, as both times scatter under load. What is hidden of a save depends on the
disk: with one that takes a second for 1.3 GB it is less than half. Everything alternates; ratios are medians of those
of neighbouring runs.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from figures import Report, ratio, spread

from comet_megatron.backend.device import keep_large_tensors_apart, set_cpu_threads
from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.checkpoint.model_folder import ModelDescription, Progress
from comet_megatron.checkpoint.run_folder import checkpoint_folder
from comet_megatron.checkpoint.saving import Contents, Saving
from comet_megatron.config.load import load_config
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.data.shard_writer import write_shards
from comet_megatron.data.shards import Sample
from comet_megatron.model.build import build_stage
from comet_megatron.parallel.alone import alone
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.parallel.layout import Layout
from comet_megatron.planning.memory import kept_piece_bytes
from comet_megatron.train.model import TrainableModel, build_trainable
from comet_megatron.train.optimizer import build_optimizer
from comet_megatron.train.step import train_step

REACH_COPIES, REACH_HIDDEN, REACH_SLOWER, REACH_LOAD = 3.0, 0.3, 2.0, 0.3
TOKENS, TEXT_IDS = 128, 16000
TOKENIZER = Path(__file__).resolve().parents[1] / "tokenizers" / "python_stdlib_4k"
ARCHITECTURE = Architecture(
    family="qwen3",
    num_layers=8,
    hidden_size=768,
    ffn_hidden_size=2304,
    num_attention_heads=12,
    num_query_groups=6,
    head_dim=64,
    vocab_size=16384,
    norm_eps=1e-6,
    rope_theta=1e6,
    tie_embeddings=False,
)
MEMORY = MemorySizes(
    chunk_size=64,
    stride=8,
    budget=64,
    memory_token_id=TEXT_IDS,
    beacon_id=TEXT_IDS + 1,
    global_beacon_ids=tuple(range(TEXT_IDS + 2, TEXT_IDS + 18)),
    first_new_id=TEXT_IDS,
)


@dataclass
class Run:
    """A model in training and its folder."""

    model: TrainableModel
    optimizer: Any
    layout: Layout
    folder: Path
    contents: Contents
    steps: int = 0

    def step(self) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        self.steps += 1
        ids = np.random.default_rng(self.steps).integers(0, TEXT_IDS, TOKENS).astype(np.int32)
        train_step(self.model, self.optimizer, [ids], self.layout, settings=BackwardSettings(), step=self.steps)
        return time.perf_counter() - started

    def start_save(self) -> Saving:
        stage = self.model.stages[0]
        return Saving.start(self.folder / "saved", stage, self.optimizer, self.layout, contents=self.contents)

    def forget_save(self) -> None:
        """So that the next one has the same to do."""
        shutil.rmtree(self.folder / "saved")


def build_run(folder: Path, layout: Layout, architecture: Architecture = ARCHITECTURE) -> Run:
    """With random weights, data for a few steps, and a config; trained for one step, so that all state is there."""
    stage = build_stage(architecture, MEMORY, layout.groups)
    torch.manual_seed(0)
    with torch.no_grad():
        for param in stage.parameters():
            param.normal_(std=0.02) if param.dim() > 1 else param.fill_(1.0)
    samples = (Sample(np.random.default_rng(n).integers(0, TEXT_IDS, TOKENS).astype(np.int32)) for n in range(8))
    folder.mkdir(exist_ok=True)
    options = {"tokenizer_fingerprint": "none", "vocab_size": TEXT_IDS, "shard_bytes": 1 << 20, "settings": {}}
    manifest = write_shards(samples, output_dir=folder / "data", **options)
    values = {
        "model": {"path": str(folder / "gone")},
        "data": {"train": str(folder / "data")},
        "optimizer": {"warmup_steps": 1},
        "train": {"output": str(folder / "run"), "steps": 9, "global_batch_size": 1},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(values))
    config = load_config(folder / "c.yaml").config
    description = ModelDescription(architecture, MEMORY, {"model_type": "qwen3", "eos_token_id": 0}, "none")
    progress = Progress(1, manifest.fingerprint, config.data.seed, 1, config.train.trainable, config.parallel.zero1)
    model = build_trainable(stage, layout, zero1=True)
    optimizer = build_optimizer(model, config.optimizer, precision="fp32", zero1=True)
    run = Run(model, optimizer, layout, folder, Contents(description, TOKENIZER, progress, config))
    run.step()
    return run


def copy_state(run: Run) -> tuple[float, float]:
    """Seconds and CPU seconds of a bare copy: every weight, its fp32 master and two moments."""
    started, cpu = time.perf_counter(), time.process_time()
    copies = [param.detach().clone() for param in run.model.stages[0].parameters() for _ in range(4)]
    seconds = time.perf_counter() - started, time.process_time() - cpu
    del copies
    return seconds


def plan_save(thin: Run) -> float:
    """CPU seconds of a wait in which next to nothing is copied."""
    started = time.process_time()
    saving = thin.start_save()
    seconds = time.process_time() - started
    saving.finish()
    thin.forget_save()
    return seconds


def measure_saves(report: Report, run: Run, thin: Run, *, repetitions: int) -> None:
    """Asynchronous and synchronous saves, the bare copy, and steps with and without a save beside them."""
    copies, copies_cpu, starts, waited, waited_cpu, hidden, synchronous, undisturbed, beside, plans = (
        [] for _ in range(10)
    )
    for _ in range(repetitions):
        plans.append(plan_save(thin))
        copy, cpu = copy_state(run)
        copies.append(copy)
        copies_cpu.append(cpu)
        undisturbed.append(statistics.median(run.step() for _ in range(5)))
        cpu = time.process_time()
        saving = run.start_save()
        waited_cpu.append(time.process_time() - cpu)
        starts.append(saving.blocking_s)
        steps = []
        while not saving.is_written():
            steps.append(run.step())
        cpu = time.process_time()
        saving.finish()
        waited_cpu[-1] += time.process_time() - cpu
        beside.append(statistics.median(steps[:-1] or steps))  # the last one was alone for a part of its time
        waited.append(saving.blocking_s)
        hidden.append(saving.writing_s)
        run.forget_save()
        started = time.perf_counter()
        run.start_save().finish()
        synchronous.append(time.perf_counter() - started)
        run.forget_save()
    size = 16 * sum(param.numel() for param in run.model.stages[0].parameters())
    middle = {name: statistics.median(values) for name, values in locals().items() if isinstance(values, list)}
    print(
        f"\n{size / 1e9:.2f} GB: training waits {middle['waited']:.2f} s for an asynchronous save "
        f"({middle['starts']:.2f} at its start), {middle['hidden']:.2f} s are written beside {len(steps)} steps; "
        f"a synchronous save takes {middle['synchronous']:.2f} s (noise {spread(synchronous):.0%}); "
        f"bare copy {middle['copies']:.2f} s (noise {spread(copies):.0%})"
    )
    print(f"a step takes {middle['undisturbed']:.2f} s, while a save is written {middle['beside']:.2f} s")
    print(
        f"CPU seconds: {middle['waited_cpu']:.2f} of the wait, {middle['plans']:.2f} of planning, "
        f"{middle['copies_cpu']:.2f} of the bare copy"
    )
    value = ratio([waited - plan for waited, plan in zip(waited_cpu, plans, strict=True)], copies_cpu)
    met = value <= REACH_COPIES
    report.figure(
        "wait for a save without its planning / a bare copy, CPU seconds", f"{value:.2f}", f"<= {REACH_COPIES:.0f}", met
    )
    value = 1 - ratio(waited, synchronous)
    met = value >= REACH_HIDDEN
    report.figure("share of a synchronous save that is hidden", f"{value:.0%}", f">= {REACH_HIDDEN:.0%}", met)
    value = ratio(beside, undisturbed)
    met = value <= REACH_SLOWER
    report.figure("a step while a save is written / without", f"{value:.2f}", f"<= {REACH_SLOWER:.0f}", met)


PARTS = ("imports", "data", "checksums", "load", "step")
_TIMED = {  # where the command calls them
    "data": ("comet_megatron.train.main", "open_data"),
    "checksums": ("comet_megatron.train.build", "choose_checkpoint"),
    "load": ("comet_megatron.train.build", "load_training_state"),
    "step": ("comet_megatron.train.trainer", "train_step"),
}


def restart_here(config: str, started: float) -> None:
    """In a process of its own: the command with its parts timed, up to the end of its first step."""
    seconds: dict[str, float] = {}

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            begun, cpu = time.perf_counter(), time.process_time()
            result = function(*given, **named)
            seconds[part], seconds[f"{part} cpu"] = time.perf_counter() - begun, time.process_time() - cpu
            if part == "step":
                print(json.dumps({**seconds, "all": time.time() - started}), file=sys.stderr, flush=True)
                os._exit(0)
            return result

        return call

    quiet_libraries()
    modules = {name: importlib.import_module(name) for name, _ in _TIMED.values()}
    seconds["imports"] = time.time() - started
    for part, (module, name) in _TIMED.items():
        setattr(modules[module], name, timed(getattr(modules[module], name), part))
    sys.exit(modules["comet_megatron.train.main"].main(["--config", config, "--resume"]))


def restart(folder: Path) -> dict[str, float]:
    """Seconds of a restart's parts, and of all of it."""
    command = [sys.executable, __file__, "--restart", str(folder / "c.yaml"), "--started", str(time.time())]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stderr, result.stderr
    return json.loads(result.stderr.splitlines()[-1])


def measure_restart(report: Report, run: Run, *, repetitions: int) -> None:
    """From the command's start to the end of its first step."""
    target = checkpoint_folder(run.folder / "run", 1)
    run.start_save().finish()
    target.parent.mkdir(parents=True)
    (run.folder / "saved").rename(target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    found = [restart(run.folder) for _ in range(repetitions)]
    parts = {part: statistics.median(one[part] for one in found) for part in (*PARTS, "all")}
    parts["the rest"] = parts["all"] - sum(parts[part] for part in PARTS)
    shown = ", ".join(f"{part} {parts[part]:.2f}" for part in (*PARTS, "the rest"))
    print(f"\na restart takes {parts['all']:.1f} s to the end of its first step: {shown}")
    cpu = statistics.median(one["checksums cpu"] + one["load cpu"] for one in found)
    speed = size / cpu / 1e9
    report.figure("checksums and load, a CPU second", f"{speed:.2f} GB", f">= {REACH_LOAD} GB", speed >= REACH_LOAD)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a figure misses its reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="print, and exit 0 whatever the figures")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--restart", help=argparse.SUPPRESS)
    parser.add_argument("--started", type=float, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.restart:
        restart_here(given.restart, given.started)
    quiet_libraries()
    report, repetitions = Report(), 2 if given.quick else 5
    with alone() as layout, tempfile.TemporaryDirectory(prefix="comet_") as name:
        keep_large_tensors_apart(kept_piece_bytes(ARCHITECTURE, MEMORY))  # as training does
        threads = set_cpu_threads("auto", processes_on_this_machine=1)
        run = build_run(Path(name), layout)
        weights = sum(param.numel() for param in run.model.stages[0].parameters())
        print(f"{weights / 1e6:.0f} M weights, {threads} threads; load of the machine {os.getloadavg()[0]:.0f}")
        thin = build_run(
            Path(name) / "thin", layout, replace(ARCHITECTURE, hidden_size=48, ffn_hidden_size=96, head_dim=4)
        )
        measure_saves(report, run, thin, repetitions=repetitions)
        measure_restart(report, run, repetitions=repetitions)
    return report.close(only_print=given.report)


if __name__ == "__main__":
    sys.exit(main())
