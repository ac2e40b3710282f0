"""Training and reading on one GPU: tokens/s, TFLOP/s, MFU, peak memory. A JSON line and a line of a table per run.

python benchmarks/gpu.py                     all runs; exits 1 if a figure misses its reach, 2 without a GPU
python benchmarks/gpu.py --only training     or prefill; --list prints the runs; --json FILE appends the lines there
python benchmarks/gpu.py --cpu-rehearsal     tiny sizes on the CPU: shows that the code runs, and is no figure

Random weights in the sizes of Qwen3-0.6B and 4B; the paper's memory: chunks of 2048 tokens, 512 global slots, a beacon
every 8 tokens, budget 2048. A training run is a whole step (forward, backward, reduction, clipping, AdamW) on one
sequence. FLOPs are planning/costs.py's: 2 m k n for a product, the causal half of attention, three times the forward
for a step, the head where a label is. MFU is these, without what recomputation does again, over the dense bf16 peak of
the GPU, for FP8 as well. Prefill is 1,048,576 tokens without the head, on a quarter of the 4B's layers (the keys and
values of all would not fit one card), against full attention on the same layers, the same kernels and in the same run.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from figures import Report

from comet_megatron.backend.capabilities import Capabilities, probe_capabilities
from comet_megatron.backend.environment import set_environment
from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.config.schema import Architecture, MemorySizes, ModelSection
from comet_megatron.errors import ConfigError
from comet_megatron.testing.resident import peak_resident_bytes

QWEN3_06B = Architecture("qwen3", 28, 1024, 3072, 16, 8, 128, 151936, 1e-6, 1e6, True, max_positions=40960)
QWEN3_4B = Architecture("qwen3", 36, 2560, 9728, 32, 8, 128, 151936, 1e-6, 1e6, True, max_positions=40960)
TINY = Architecture("qwen3", 4, 128, 256, 4, 2, 32, 1024, 1e-6, 1e6, True)
MODELS = {"0.6B": QWEN3_06B, "4B": QWEN3_4B, "tiny": TINY}
# Dense bf16 TFLOP/s by the makers' data sheets, by a part of the name that torch gives.
PEAKS = {"H200": 989.4, "H100 PCIe": 756.0, "H100": 989.4, "A100": 312.0, "B200": 2250.0, "L40S": 362.0}
READ_TOKENS, BLOCK_ROWS = 2**20, 16384


@dataclass(frozen=True)
class Training:
    """A run; `stages` of a pipeline are in this one process."""

    model: str
    tokens: int
    precision: str
    recompute: bool
    backend: str = "auto"
    stages: int = 1
    fuse: bool = False

    @property
    def name(self) -> str:
        """One word a setting."""
        words = [self.model, f"{self.tokens // 1024}k", self.precision, "recompute" if self.recompute else "keep"]
        words += [self.backend] if self.backend != "auto" else []
        words += [f"{self.stages} stages"] if self.stages > 1 else []
        return " ".join([*words, *(["fused gradients"] if self.fuse else [])])


K32, K128 = 32768, 131072
TRAINING = (
    *(Training("0.6B", K32, precision, recompute) for precision in ("bf16", "fp8") for recompute in (False, True)),
    Training("0.6B", K128, "bf16", True),
    Training("0.6B", K128, "fp8", True),
    Training("0.6B", K32, "bf16", True, stages=2),
    Training("0.6B", K32, "bf16", True, backend="torch"),
    *(Training("4B", K32, precision, recompute) for precision in ("bf16", "fp8") for recompute in (False, True)),
    Training("4B", K128, "bf16", True),
    Training("4B", K128, "bf16", True, fuse=True),
    Training("4B", K128, "bf16", True, backend="torch"),
    Training("4B", K128, "fp8", True),
)
REHEARSAL = (
    Training("tiny", 1024, "bf16", False),
    Training("tiny", 1024, "fp32", True, stages=2),
    Training("tiny", 1024, "fp8", True),  # refused on a CPU: that is shown as well
)


def memory_of(architecture: Architecture, *, tiny: bool) -> MemorySizes:
    """The paper's sizes, or small ones; the new ids are the last of the vocabulary."""
    chunk, slots, budget = (128, 16, 64) if tiny else (2048, 512, 2048)
    first = architecture.vocab_size - slots - 2
    return MemorySizes(chunk, 8, budget, first, first + slots + 1, tuple(range(first + 1, first + 1 + slots)), first)


class Bench:
    """Runs on this process's device and prints what they gave."""

    def __init__(self, machine: Capabilities, *, rehearsal: bool, json_path: Path | None, repetitions: int) -> None:
        self.machine, self.rehearsal, self.json_path = machine, rehearsal, json_path
        self.repetitions, self.report, self.rows = repetitions, Report(), {}
        self.device_name = machine.gpus[0].name if machine.gpus else "CPU"
        self.peak_tflops = next((v for k, v in PEAKS.items() if k in self.device_name), None)

    def say(self, kind: str, name: str, **values: object) -> None:
        """A JSON line, and the same for people."""
        line = {"kind": kind, "name": name, **values, "device": self.device_name, "rehearsal": self.rehearsal}
        line["versions"] = versions(self.machine)
        self.rows[name] = line
        print(json.dumps(line), flush=True)
        if self.json_path:
            with self.json_path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def synchronize(self) -> None:
        """Wait for the device."""
        import torch

        if self.machine.gpus:
            torch.cuda.synchronize()

    def time(self, run: Callable[[], object]) -> tuple[float, int]:
        """Best seconds of a few runs after one warm-up, and the peak bytes of all."""
        import torch

        run()
        gc.collect()
        if self.machine.gpus:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(self.repetitions):
            self.synchronize()
            started = time.perf_counter()
            run()
            self.synchronize()
            seconds.append(time.perf_counter() - started)
        if self.machine.gpus:
            return min(seconds), torch.cuda.max_memory_allocated()
        return min(seconds), peak_resident_bytes()


def versions(machine: Capabilities) -> dict[str, str]:
    """Of what computes."""
    import torch

    return {"torch": torch.__version__, "cuda": machine.cuda.version, "te": machine.te.version, "adamw": machine.adamw}


def run_training(bench: Bench, case: Training) -> None:
    """One training run; what cannot run is said and is no figure."""
    import torch

    from comet_megatron.parallel.alone import alone

    try:
        with alone() as layout:
            values = train(bench, case, layout)
    except ConfigError as error:
        bench.say("training", case.name, not_run=error.what)
        print(f"  {case.name:<44} not run: {error.what}", flush=True)
        return
    except torch.OutOfMemoryError as error:
        bench.say("training", case.name, not_run=f"does not fit: {str(error).splitlines()[0]}")
        print(f"  {case.name:<44} does not fit", flush=True)
        return
    finally:
        gc.collect()
        if bench.machine.gpus:
            torch.cuda.empty_cache()
    bench.say("training", case.name, **asdict(case), **values)
    mfu = f"{values['mfu']:.1%}" if values["mfu"] else "n/a"
    print(
        f"  {case.name:<44} {values['tokens_per_s']:>9,.0f} tokens/s {values['tflops']:>8.1f} TFLOP/s  MFU {mfu:>6}  "
        f"peak {values['peak_gib']:>6.1f} GiB  {values['seconds']:.2f} s a step",
        flush=True,
    )


def train(bench: Bench, case: Training, layout: object) -> dict[str, float | str | None]:
    """Build the model, time whole steps."""
    import torch

    from comet_megatron.backend.precision import plan_execution
    from comet_megatron.chunking import next_token_labels, plan_chunks
    from comet_megatron.config.schema import OptimizerSection
    from comet_megatron.model.build import build_stage
    from comet_megatron.parallel.executor import BackwardSettings
    from comet_megatron.planning.costs import training_flops
    from comet_megatron.train.model import build_trainable
    from comet_megatron.train.optimizer import build_optimizer
    from comet_megatron.train.step import train_step

    architecture = MODELS[case.model]
    memory = memory_of(architecture, tiny=case.model == "tiny")
    execution = plan_execution(ModelSection(precision=case.precision, backend=case.backend), bench.machine)
    if case.fuse and execution.backend != "te":
        raise ConfigError("fused gradients are for Transformer Engine's layers")
    layers, stages = architecture.num_layers, {}
    split = tuple(layers // case.stages for _ in range(case.stages))
    for number in range(case.stages):
        stages[number] = build_stage(
            architecture,
            memory,
            layout.groups,
            stage=number,
            layers_per_stage=split,
            precision=execution.precision,
            backend=execution.backend,
            fp8=execution.fp8,
        )
        draw_weights(stages[number])
    model = build_trainable(stages, layout, zero1=True)
    for stage in model.stages if case.fuse else ():
        stage.fuse_weight_gradients()
    optimizer = build_optimizer(model, OptimizerSection(lr=1e-6), precision=execution.precision, zero1=True)
    ids = random_text(memory, case.tokens)
    settings = BackwardSettings(recompute=case.recompute)
    results = []

    def step() -> None:
        results.append(train_step(model, optimizer, [ids], layout, settings=settings, step=len(results)))

    seconds, peak = bench.time(step)
    plans = plan_chunks(case.tokens, memory)
    labels = next_token_labels(ids)
    flops = training_flops(architecture, plans, [int((labels[p.text_start : p.text_end] >= 0).sum()) for p in plans])
    tflops = flops / seconds / 1e12
    return {
        "seconds": seconds,
        "tokens_per_s": case.tokens / seconds,
        "tflops": tflops,
        "mfu": tflops / bench.peak_tflops if bench.peak_tflops else None,
        "peak_gib": peak / 2**30,
        "loss": results[-1].loss,
        "ran_with": execution.told,
        "torch_memory": torch.cuda.memory_reserved() / 2**30 if bench.machine.gpus else None,
    }


def draw_weights(stage: object) -> None:
    """Small normal weights, norms of one."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for param in stage.parameters():
            param.normal_(std=0.02) if param.dim() > 1 else param.fill_(1.0)


def random_text(memory: MemorySizes, tokens: int) -> np.ndarray:
    """Text ids."""
    return np.random.default_rng(0).integers(0, memory.first_new_id, tokens).astype(np.int32)


def run_prefill(bench: Bench) -> None:
    """Ours, the authors' way and full attention on the same weights; ratios, and the limit of the first."""
    import torch
    from gpu_paths import read_with_full_attention, read_with_memory, read_with_slots_in_full

    from comet_megatron.backend.precision import plan_execution
    from comet_megatron.chunking import plan_chunks
    from comet_megatron.model.build import build_stage
    from comet_megatron.parallel.alone import alone
    from comet_megatron.planning.costs import full_attention_flops, prefill_flops

    name = "tiny" if bench.rehearsal else "4B"
    tokens, block = (4096, 1024) if bench.rehearsal else (READ_TOKENS, BLOCK_ROWS)
    whole = MODELS[name]
    architecture = replace(whole, num_layers=max(whole.num_layers // 4, 1))
    memory = memory_of(architecture, tiny=bench.rehearsal)
    ids, plans = random_text(memory, tokens), plan_chunks(tokens, memory, keep_last_memory=True)
    ours, full = prefill_flops(architecture, plans), full_attention_flops(architecture, tokens)
    found: dict[str, tuple[float, float]] = {}
    backends = ["torch"] if bench.rehearsal else ["torch", "te"]
    for backend in backends:
        with alone() as layout:
            try:
                execution = plan_execution(ModelSection(precision="bf16", backend=backend), bench.machine)
            except ConfigError as error:
                print(f"  prefill with {backend}: not run: {error.what}")
                continue
            stage = build_stage(architecture, memory, layout.groups, precision="bf16", backend=execution.backend)
            draw_weights(stage)
            held = torch.cuda.memory_allocated() if bench.machine.gpus else 0
            rates = measure_rates(bench, stage, plans[-1], block_rows=block, tokens=tokens)
            ways = {
                "memory": lambda stage=stage: read_with_memory(stage, ids),
                "slots in full": lambda stage=stage: read_with_slots_in_full(stage, ids),
                "full attention": lambda stage=stage: read_with_full_attention(stage, ids, block_rows=block),
            }
            for way, run in ways.items():
                seconds, peak = time_once(bench, run)
                found[f"{backend} {way}"] = seconds, peak - held
                values = {"tokens": tokens, "layers": architecture.num_layers, "seconds": seconds}
                values |= {"peak_gib_beside_weights": (peak - held) / 2**30, **rates}
                bench.say("prefill", f"{backend} {way}", **values)
                print(
                    f"  {backend + ' ' + way:<30} {seconds:>9.2f} s   {(peak - held) / 2**30:>7.2f} GiB beside weights"
                )
            del stage, ways
    compare_prefill(bench, found, ours, full)


def time_once(bench: Bench, run: Callable[[], object]) -> tuple[float, int]:
    """Seconds of one run (full attention takes minutes; what was measured before it has warmed up) and its peak."""
    import torch

    gc.collect()
    if bench.machine.gpus:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    bench.synchronize()
    started = time.perf_counter()
    run()
    bench.synchronize()
    seconds = time.perf_counter() - started
    if bench.machine.gpus:
        return seconds, torch.cuda.max_memory_allocated()
    return seconds, peak_resident_bytes()


def measure_rates(bench: Bench, stage: object, plan: object, *, block_rows: int, tokens: int) -> dict[str, float]:
    """TFLOP/s of the feed-forward's first product, and of attention in ours and in full attention's shapes."""
    import torch

    layer, device, dtype = stage.decoder.layers[0], stage.device, stage.config.params_dtype
    a = stage.architecture
    rows = torch.randn(plan.num_rows, 1, a.hidden_size, device=device, dtype=dtype)
    with torch.no_grad():
        product, _ = bench.time(lambda: layer.mlp.linear_fc1(rows))
        rates = {"gemm_tflops": 2 * plan.num_rows * a.hidden_size * 2 * a.ffn_hidden_size / product / 1e12}
        for name, queries, keys in (
            ("attention_tflops", plan.num_rows, plan.num_rows + plan.num_slots),
            ("full_attention_tflops", block_rows, tokens // 2 + block_rows),
        ):
            q = torch.randn(queries, 1, a.num_attention_heads, a.head_dim, device=device, dtype=dtype)
            k, v = (torch.randn(keys, 1, a.num_query_groups, a.head_dim, device=device, dtype=dtype) for _ in "kv")
            seconds, _ = bench.time(lambda q=q, k=k, v=v: layer.self_attention.core_attention(q, k, v))
            pairs = queries * (keys - queries / 2)
            rates[name] = 4 * a.num_attention_heads * a.head_dim * pairs / seconds / 1e12
    return rates


def compare_prefill(bench: Bench, found: dict, ours: object, full: object) -> None:
    """Against the fastest full attention that ran here, named."""
    full_ways = {way: times for way, times in found.items() if way.endswith("full attention")}
    our_ways = {way: times for way, times in found.items() if way.endswith("memory")}
    if not full_ways or not our_ways:
        return
    fastest = min(full_ways, key=lambda way: full_ways[way][0])
    best = min(our_ways, key=lambda way: our_ways[way][0])
    backend = best.split()[0]
    rates, full_rates = bench.rows[best], bench.rows[fastest]
    our_time = ours.products / rates["gemm_tflops"] + ours.attention / rates["attention_tflops"]
    full_time = full.products / full_rates["gemm_tflops"] + full.attention / full_rates["full_attention_tflops"]
    limit, ratio = full_time / our_time, full_ways[fastest][0] / our_ways[best][0]
    memory = our_ways[best][1] / max(full_ways[fastest][1], 1)
    slots = found[f"{backend} slots in full"][0] / our_ways[best][0]
    flops = full.total / ours.total
    print(f"  FLOP ratio {flops:.1f}; at the rates measured here it gives at most {limit:.1f} x; against: {fastest}")
    bench.say("prefill ratios", best, flop_ratio=flops, limit=limit, speed_up=ratio, memory_ratio=memory, slots=slots)
    if not bench.rehearsal:
        bench.report.figure(
            f"prefill, against {fastest}, of its limit", f"{ratio / limit:.0%}", ">= 85 %", ratio >= 0.85 * limit
        )
        bench.report.figure("prefill: peak memory of full attention's", f"{memory:.3f}", "<= 0.1", memory <= 0.1)
        bench.report.figure("prefill: faster than slots in full by", f"{slots:.2f} x", ">= 1.6", slots >= 1.6)


def judge_training(bench: Bench) -> None:
    """The figures that have a reach."""
    rows = {name: row for name, row in bench.rows.items() if row["kind"] == "training" and "mfu" in row}
    bf16, fp8 = (rows.get(f"4B 128k {precision} recompute") for precision in ("bf16", "fp8"))
    if bf16 and bf16["mfu"]:
        bench.report.figure("4B, 128k, bf16, recompute: MFU", f"{bf16['mfu']:.1%}", ">= 45 %", bf16["mfu"] >= 0.45)
    if bf16 and fp8:
        faster = fp8["tokens_per_s"] / bf16["tokens_per_s"]
        bench.report.figure("4B, 128k, recompute: FP8 over bf16", f"{faster:.2f} x", ">= 1.25", faster >= 1.25)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a figure misses its reach, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("training", "prefill"), help="one part")
    parser.add_argument("--runs", default="", help="training runs whose name holds these words")
    parser.add_argument("--list", action="store_true", help="print the names of the training runs")
    parser.add_argument("--json", type=Path, help="append the JSON lines to a file")
    parser.add_argument("--repetitions", type=int, default=3, help="timed steps of a run, after a warm-up")
    parser.add_argument("--report", action="store_true", help="print, and exit 0 whatever the figures")
    parser.add_argument("--cpu-rehearsal", action="store_true", help="tiny sizes on the CPU; no figures")
    given = parser.parse_args(arguments)
    cases = REHEARSAL if given.cpu_rehearsal else TRAINING
    if given.list:
        print("\n".join(case.name for case in cases))
        return 0
    quiet_libraries()
    set_environment()  # before the first CUDA call
    machine = probe_capabilities()
    if not machine.cuda.is_there and not given.cpu_rehearsal:
        print(f"no GPU: {machine.cuda.why_not}; --cpu-rehearsal shows that the code runs", file=sys.stderr)
        return 2
    bench = Bench(machine, rehearsal=given.cpu_rehearsal, json_path=given.json, repetitions=given.repetitions)
    print("REHEARSAL on the CPU: no figure" if given.cpu_rehearsal else f"{bench.device_name}; {versions(machine)}")
    if given.only != "prefill":
        for case in cases:
            if all(word in case.name for word in given.runs.split()):
                run_training(bench, case)
        judge_training(bench)
    if given.only != "training":
        run_prefill(bench)
    if given.cpu_rehearsal:
        print("REHEARSAL: it ran; nothing above is a figure")
        return 0
    return bench.report.close(only_print=given.report)


if __name__ == "__main__":
    sys.exit(main())
