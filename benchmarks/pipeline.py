"""Two pipeline stages on two cores: speed, the simulation against what was measured, memory at 131,072 tokens.

python benchmarks/pipeline.py             all figures; exits 1 if one misses its reach (about 25 minutes)
python benchmarks/pipeline.py --quick     one run of each (about 15 minutes)
python benchmarks/pipeline.py --report    only print

Two real processes with one thread each, gloo; the model of step_time.py with 8 layers, fp32, no recomputation, split by
cost; T chunks a sequence, M sequences. The runs of one M alternate: one process alone; both processes with a whole
model each, which shows what two cores are worth together; the pipeline; the pipeline with the op lists of ordinary
1F1B, sequences as microbatches, by the same executor. Times are medians, ratios are medians of the ratios of
neighbouring runs. Memory is the high-water mark of each process's resident set above what it held before, in fresh
processes.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from figures import Report, ratio, spread
from step_time import ARCHITECTURE, MEMORY, small_random_weights
from torch import Tensor

from comet_megatron.backend.device import keep_large_tensors_apart
from comet_megatron.chunking import next_token_labels
from comet_megatron.config.schema import (
    Architecture,
    Config,
    DataSection,
    MemorySizes,
    ModelSection,
    ParallelSection,
    TrainSection,
)
from comet_megatron.model.build import build_stage
from comet_megatron.parallel.executor import BackwardSettings, Executor, plan_training
from comet_megatron.parallel.p2p import Expected, Message, Transport
from comet_megatron.parallel.process import ProcessRank
from comet_megatron.parallel.schedule import Op, Workload, plan_whole_sequences
from comet_megatron.parallel.simulator import Span, Timeline, replay
from comet_megatron.planning.balance import chunk_costs, resolve_layers_per_stage, stage_costs
from comet_megatron.planning.memory import kept_piece_bytes
from comet_megatron.planning.report import plan_pipeline
from comet_megatron.testing.distributed import ProcessPool
from comet_megatron.testing.resident import forget_peak, peak_resident_bytes, resident_bytes
from comet_megatron.testing.tiny import layout_of

STAGES, CHUNKS, LAYERS = 2, 16, 8
MODEL = replace(ARCHITECTURE, num_layers=LAYERS)
REACH = {1: 1.7, 4: 1.8}  # of the speed-up, by M, where two cores are worth two
SHORT, LONG = 32_768, 131_072
TINY = Architecture(
    family="qwen3",
    num_layers=8,
    hidden_size=256,
    ffn_hidden_size=512,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=64,
    vocab_size=1024,
    norm_eps=1e-6,
    rope_theta=1e6,
    tie_embeddings=False,
)
TINY_MEMORY = MemorySizes(
    chunk_size=1024,
    stride=8,
    budget=512,
    memory_token_id=800,
    beacon_id=929,
    global_beacon_ids=tuple(range(801, 929)),
    first_new_id=800,
)
TIMEOUT_S = 1800
REPETITIONS = {1: 3, 4: 2}  # by M


Timed = tuple[float, float, tuple[Span, ...]]  # of one process: seconds, loss of its stages, its ops


class WholeSequences:
    """A transport that hands a sequence on when all of its chunks are done, as pipelines do that know no chunks."""

    def __init__(self, inner: Transport, chunks: int) -> None:
        self.inner, self.last = inner, chunks - 1
        self.held: list[tuple[Message, Tensor]] = []

    def start(self, expected: Sequence[Expected], *, max_in_flight: int) -> None:
        self.inner.start(expected, max_in_flight=2 * CHUNKS)

    def send(self, message: Message, tensor: Tensor) -> None:
        self.held.append((message, tensor))
        if message.chunk == (0 if message.is_gradient else self.last):
            for one in self.held:
                self.inner.send(*one)
            self.held.clear()

    def receive(self, message: Message) -> Tensor:
        return self.inner.receive(message)

    def finish(self) -> None:
        self.inner.finish()


# --- on every process -------------------------------------------------------------------------------------------------


@cache
def executors(process: ProcessRank) -> dict[str, Executor]:
    """The whole model, and this process's stage under the two schedules."""
    keep_large_tensors_apart(kept_piece_bytes(MODEL, MEMORY))
    layout = layout_of(process, pp=STAGES)
    whole = build_stage(MODEL, MEMORY, layout.groups)
    stage = build_stage(MODEL, MEMORY, layout.groups, stage=layout.pp_rank, layers_per_stage=split())
    small_random_weights(whole)
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for name, param in stage.named_parameters():
            param.copy_(weights[stage.global_names()[name]])
    for param in (*whole.parameters(), *stage.parameters()):
        param.grad = torch.zeros_like(param)
    transport = layout.build_transport()
    diagonal = Executor({layout.pp_rank: stage}, num_stages=STAGES, transport=transport)
    ordinary = Executor({layout.pp_rank: stage}, num_stages=STAGES, transport=WholeSequences(transport, CHUNKS))
    ordinary.planner = lambda work, number, slack: plan_whole_sequences(work)[number]
    return {"whole": Executor({0: whole}), "diagonal": diagonal, "1F1B": ordinary}


def run(process: ProcessRank, name: str, sequences: list[np.ndarray], ranks: Sequence[int]) -> Timed | None:
    """Forward and backward of a batch on the processes of `ranks`, begun together."""
    executor = executors(process)[name]
    for stage in executor.stages.values():
        stage.zero_grad(set_to_none=False)
    gc.collect()
    dist.barrier()
    if process.rank not in ranks:
        return None
    batch = [executor.microbatch(ids[None], next_token_labels(ids)[None]) for ids in sequences]
    scale = 1 / sum(len(ids) - 1 for ids in sequences)
    started = time.perf_counter()
    results = executor.train(batch, scale=scale, settings=BackwardSettings())
    seconds = time.perf_counter() - started
    loss = sum(float(r.losses.sum()) for r in results) * scale
    return seconds, loss, tuple(executor.activity.spans())


def measure_peak(process: ProcessRank, tokens: int, layers_per_stage: tuple[int, ...]) -> int:
    """Peak bytes of a step with recomputation above what this process held before: call it in a fresh one."""
    keep_large_tensors_apart(kept_piece_bytes(TINY, TINY_MEMORY))
    layout = layout_of(process, pp=STAGES)
    stage = build_stage(TINY, TINY_MEMORY, layout.groups, stage=layout.pp_rank, layers_per_stage=layers_per_stage)
    small_random_weights(stage)
    for param in stage.parameters():
        param.grad = torch.zeros_like(param)
    executor = Executor({layout.pp_rank: stage}, num_stages=STAGES, transport=layout.build_transport())

    def step(length: int) -> None:
        ids = np.random.default_rng(0).integers(0, TINY_MEMORY.first_new_id, length)
        batch = [executor.microbatch(ids[None], next_token_labels(ids)[None])]
        executor.train(batch, scale=1 / length, settings=BackwardSettings(recompute=True))

    step(3 * TINY_MEMORY.chunk_size)  # kernels and their buffers
    gc.collect()
    before = resident_bytes()
    forget_peak()
    step(tokens)
    return peak_resident_bytes() - before


# --- figures ----------------------------------------------------------------------------------------------------------


def split() -> tuple[int, ...]:
    """Layers of each stage, by cost."""
    return resolve_layers_per_stage("auto", MODEL, MEMORY, num_stages=STAGES, tokens=CHUNKS * MEMORY.chunk_size)


def compare_speed(
    pool: ProcessPool, report: Report, *, sequences: int, repetitions: int, ceiling: float | None = None
) -> float:
    """One process, the pipeline, 1F1B of whole sequences; what two cores are worth.

    Args:
        ceiling: what two cores are worth, if it was measured before; else two whole models at once are timed too.
    """
    generator = np.random.default_rng(0)
    length = CHUNKS * MEMORY.chunk_size
    batch = [generator.integers(0, MEMORY.first_new_id, length) for _ in range(sequences)]
    runs = {
        "alone": ("whole", (0,)),
        "both": ("whole", (0, 1)),
        "pipeline": ("diagonal", (0, 1)),
        "1F1B": ("1F1B", (0, 1)),
    }
    if ceiling is not None:
        del runs["both"]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    bubbles: dict[str, list[float]] = {"pipeline": [], "1F1B": []}
    off: list[float] = []
    advantages: list[float] = []  # over 1F1B, simulated
    first = 0 if ceiling is None else 1
    for repetition in range(first, repetitions + 1):
        losses = {}
        for name, (executor, ranks) in runs.items():
            given = batch if repetition else batch[:1]  # round 0 warms up
            results = [r for r in pool.run(run, executor, given, ranks, timeout_s=TIMEOUT_S) if r]
            losses[name] = max(loss for _, loss, _ in results)
            if repetition:
                seconds[name].append(max(taken for taken, _, _ in results))
                if name in bubbles:
                    timeline = Timeline(tuple(spans for _, _, spans in results))
                    bubbles[name].append(timeline.bubble)
                if name == "pipeline":
                    diagonal, whole = (simulate(timeline, sequences, whole_sequences=w) for w in (False, True))
                    off.append(timeline.makespan / diagonal.makespan - 1)
                    advantages.append(whole.makespan / diagonal.makespan)
        if max(losses.values()) - min(losses.values()) > 1e-5:
            raise SystemExit(f"the runs do not compute the same loss: {losses}")
    print(f"\nT = {CHUNKS} chunks, M = {sequences}: medians of {repetitions} alternating runs, one thread a process")
    titles = {
        "alone": "one process, whole model",
        "both": "two processes, a whole model each, at once",
        "pipeline": f"pipeline, {' + '.join(map(str, split()))} layers",
        "1F1B": "the same, 1F1B of whole sequences",
    }
    for name, title in ((n, t) for n, t in titles.items() if n in runs):
        waits = f", bubble {statistics.median(bubbles[name]):.1%}" if name in bubbles else ""
        noise = f"noise {spread(seconds[name]):.0%}" if repetitions > 1 else "one run"
        print(f"  {title:<44}{statistics.median(seconds[name]):>8.2f} s  {noise}{waits}")
    ceiling = ceiling or 2 / ratio(seconds["both"], seconds["alone"])
    faster, count = ratio(seconds["alone"], seconds["pipeline"]), CHUNKS * sequences
    ideal = STAGES * count / (count + STAGES - 1)
    reach = REACH[sequences] if ceiling >= 2 else 0.9 * ideal * ceiling / 2
    costs = stage_costs(split(), chunk_costs(MODEL, MEMORY, tokens=length))
    print(
        f"  two cores are worth {ceiling:.2f} of one; ideal {ideal:.2f}, and with this split, if time were FLOPs, "
        f"{ideal * sum(costs) / (STAGES * max(costs)):.2f}"
    )
    report.figure(
        f"M = {sequences}: the pipeline is faster than one process by",
        f"{faster:.2f} x",
        f">= {reach:.2f}",
        faster >= reach,
    )
    difference = statistics.median(off)
    report.figure(
        f"M = {sequences}: measured makespan against the simulated one",
        f"{difference:+.1%}",
        "+-10 %",
        abs(difference) <= 0.1,
    )
    against, wanted = ratio(seconds["1F1B"], seconds["pipeline"]), 0.9 * statistics.median(advantages)
    report.figure(
        f"M = {sequences}: faster than 1F1B of whole sequences by",
        f"{against:.2f} x",
        f">= {wanted:.2f}",
        against >= wanted,
    )
    return ceiling


def simulate(measured: Timeline, sequences: int, *, whole_sequences: bool) -> Timeline:
    """The op lists of either schedule, with the times that the ops really took."""
    took: dict[Op, float] = {span.op: span.duration for process in measured.spans for span in process}
    work = Workload(STAGES, (CHUNKS,) * sequences, whole_messages=whole_sequences)
    if whole_sequences:
        lists = plan_whole_sequences(work)
    else:
        lists = [plan_training(work, stage, BackwardSettings().slack) for stage in range(STAGES)]
    return replay(lists, work, cost=took.__getitem__)


def compare_memory(report: Report) -> None:
    """Peak memory of each process at two lengths, against the plan's checkpoints."""
    config = Config(
        model=ModelSection(path="-"),
        parallel=ParallelSection(pp=STAGES),
        data=DataSection(train="-"),
        train=TrainSection(output="-", steps=1, recompute="full"),
    )
    plans = {n: plan_pipeline(config, TINY, TINY_MEMORY, [n], longest=n) for n in (SHORT, LONG)}
    peaks = {}
    for tokens in (SHORT, LONG):
        pool = ProcessPool(STAGES)
        peaks[tokens] = pool.run(measure_peak, tokens, plans[tokens].layers_per_stage, timeout_s=TIMEOUT_S)
        pool.close()
    print(f"\ntiny model (hidden {TINY.hidden_size}, {TINY.num_layers} layers), PP {STAGES}, recomputation:")
    for stage in range(STAGES):
        kept = [plans[n].stages[stage].checkpoint_bytes for n in (SHORT, LONG)]
        grown, predicted = peaks[LONG][stage] - peaks[SHORT][stage], kept[1] - kept[0]
        print(
            f"  stage {stage}: peak {peaks[SHORT][stage] / 1e6:.0f} MB at {SHORT:,} tokens, "
            f"{peaks[LONG][stage] / 1e6:.0f} MB at {LONG:,}: grows by {grown / 1e6:.0f} MB, "
            f"planned {predicted / 1e6:.0f} MB"
        )
        share = grown / predicted
        report.figure(
            f"stage {stage}: growth of peak memory over the plan's", f"{share:.2f}", "+-15 %", abs(share - 1) <= 0.15
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a figure misses its reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="print, and exit 0 whatever the figures")
    parser.add_argument("--quick", action="store_true", help="one run of each")
    parser.add_argument("--only", choices=("speed", "memory"), help="a part of the figures")
    given = parser.parse_args(arguments)
    sys.path.insert(0, str(Path(__file__).parent))  # the processes find what this file imports
    report = Report()
    if given.only != "memory":
        pool = ProcessPool(STAGES)
        ceiling = None
        for sequences, repetitions in REPETITIONS.items():
            repetitions = 1 if given.quick else repetitions
            ceiling = compare_speed(pool, report, sequences=sequences, repetitions=repetitions, ceiling=ceiling)
        pool.close()
    if given.only != "speed":
        compare_memory(report)
    return report.close(only_print=given.report)


if __name__ == "__main__":
    sys.exit(main())
