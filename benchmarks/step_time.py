"""Forward and backward of one sequence: this model, the authors' way, plain full attention. Figures beside their reach.

python benchmarks/step_time.py             all figures; exits 1 if one misses its reach (about 12 minutes)
python benchmarks/step_time.py --quick     fewer repetitions
python benchmarks/step_time.py --report    only print

Same weights, same tokens, same attention kernel, fp32, 2 threads. (a) train_sequence at TP 1; (b) memory slots computed
in full at every layer and the head on every row, in one graph, as the authors do; (c) plain full attention without
memory. Times are medians of alternating runs in this process; ratios are medians of the ratios of neighbouring runs.
Peak memory is the high-water mark of the resident set of a fresh process, above what it held before the run (Linux).
FLOPs are counted from the shapes of the matrix products really made: 2 * m * n * k forward, twice that backward;
attention counts the causal half where the kernel skips the other. (b) is first held against the authors' golden data.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from figures import Report, ratio, spread
from reference_paths import loss_with_full_attention, loss_with_slots_in_full
from safetensors.torch import load_file

from comet_megatron.backend.device import keep_large_tensors_apart
from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.checkpoint.hf_rules import plan_rules, to_megatron
from comet_megatron.chunking import next_token_labels, plan_chunks
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.model.build import build_stage
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.alone import alone
from comet_megatron.parallel.executor import BackwardSettings
from comet_megatron.planning.memory import kept_piece_bytes
from comet_megatron.testing.resident import forget_peak, peak_resident_bytes, resident_bytes
from comet_megatron.train.sequence import train_sequence

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "caseA"
THREADS = 2
TOKENS, SHORT, LONG = 4096, 8192, 32768
GLOBAL_SLOTS = 128
ARCHITECTURE = Architecture(
    family="qwen3",
    num_layers=6,
    hidden_size=512,
    ffn_hidden_size=1536,
    num_attention_heads=8,
    num_query_groups=4,
    head_dim=64,
    vocab_size=8192,
    norm_eps=1e-6,
    rope_theta=1e6,
    tie_embeddings=False,
)
MEMORY = MemorySizes(
    chunk_size=512,
    stride=8,
    budget=512,
    memory_token_id=8192 - 130,
    beacon_id=8192 - 1,
    global_beacon_ids=tuple(range(8192 - 129, 8192 - 1)),
    first_new_id=8192 - 130,
)


def small_random_weights(stage: CometStage) -> None:
    """Normal weights, norms of one."""
    torch.manual_seed(0)
    with torch.no_grad():
        for param in stage.parameters():
            param.normal_(std=0.02) if param.dim() > 1 else param.fill_(1.0)


def make_sequence(tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Random text ids and their labels."""
    ids = np.random.default_rng(0).integers(0, MEMORY.first_new_id, tokens)
    return ids, next_token_labels(ids)


def build_paths(stage: CometStage) -> dict[str, Callable[[np.ndarray, np.ndarray], float]]:
    """Each runs forward and backward and gives the loss."""

    def ours(ids: np.ndarray, labels: np.ndarray, *, recompute: bool = False) -> float:
        count = len(ids) - 1
        settings = BackwardSettings(recompute=recompute)
        result = train_sequence(stage, ids[None], labels[None], scale=1 / count, settings=settings)
        return float(result.losses.sum()) / count

    def graph(loss_of: Callable[..., torch.Tensor]) -> Callable[[np.ndarray, np.ndarray], float]:
        def run(ids: np.ndarray, labels: np.ndarray) -> float:
            loss = loss_of(stage, ids, labels)
            loss.backward()
            return float(loss.detach())

        return run

    return {
        "a": ours,
        "b": graph(loss_with_slots_in_full),
        "c": graph(loss_with_full_attention),
        "a recompute": lambda ids, labels: ours(ids, labels, recompute=True),
    }


def count_flops(path: str, tokens: int) -> float:
    """FLOPs of forward and backward, matrix products only."""
    a, plans = ARCHITECTURE, plan_chunks(tokens, MEMORY, keep_last_memory=path == "b")
    hidden, heads_width, groups_width = (
        a.hidden_size,
        a.num_attention_heads * a.head_dim,
        a.num_query_groups * a.head_dim,
    )
    per_row = 2 * (hidden * (2 * heads_width + 2 * groups_width) + 3 * hidden * a.ffn_hidden_size)
    per_slot = 2 * hidden * 2 * groups_width
    per_pair = 4 * heads_width
    head = 2 * hidden * a.vocab_size
    if path == "c":
        return 3 * (a.num_layers * (tokens * per_row + per_pair * tokens**2 / 2) + (tokens - 1) * head)
    layer = logits = 0.0
    for plan in plans:
        rows, slots = plan.num_rows, plan.num_slots
        if path == "b":
            layer += (rows + slots) * per_row + per_pair * (rows + slots) ** 2 / 2
            logits += (rows + slots) * head
        else:
            layer += rows * per_row + slots * per_slot + per_pair * rows * (slots + rows / 2)
            logits += (plan.num_text - (plan is plans[-1])) * head
    return 3 * (a.num_layers * layer + logits)


def check_against_golden() -> str:
    """Path (b) equals the authors' loss and gradients.

    Raises:
        SystemExit: it does not.
    """
    golden = json.loads((GOLDEN / "golden.json").read_text())
    c = golden["config"]
    architecture = Architecture(
        family="qwen3",
        num_layers=c["num_hidden_layers"],
        hidden_size=c["hidden_size"],
        ffn_hidden_size=c["intermediate_size"],
        num_attention_heads=c["num_attention_heads"],
        num_query_groups=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        vocab_size=c["vocab_size"],
        norm_eps=golden["hf_config"]["rms_norm_eps"],
        rope_theta=c["rope_theta"],
        tie_embeddings=False,
    )
    memory = MemorySizes(
        chunk_size=c["chunk_size"],
        stride=c["temp_beacon_stride"],
        budget=c["temp_mem_budget"],
        memory_token_id=c["placeholder_id"],
        beacon_id=c["temp_beacon_id"],
        global_beacon_ids=tuple(c["global_beacon_ids"]),
        first_new_id=c["placeholder_id"],
    )
    with alone() as layout:
        stage = build_stage(architecture, memory, layout.groups)
        rules = plan_rules(architecture, memory)
        weights = to_megatron(rules, load_file(GOLDEN / "weights.safetensors"))
        params = dict(stage.named_parameters())
        vocabulary = architecture.vocab_size
        with torch.no_grad():
            for name, param in params.items():
                param[: len(weights[name])].copy_(weights[name])
        ids = np.array(golden["train"]["ragged"]["text_ids"])
        loss = loss_with_slots_in_full(stage, ids, next_token_labels(ids))
        loss.backward()
    wanted = load_file(GOLDEN / "grads.safetensors")
    worst = 0.0
    for rule in rules:
        grad = params[rule.megatron].grad
        grad = grad[:vocabulary] if rule.megatron.endswith(("word_embeddings.weight", "output_layer.weight")) else grad
        for name, part in zip(rule.hf, rule.to_hf(grad), strict=True):
            want = wanted[f"ragged/{name}"]
            worst = max(worst, ((part - want).abs().max() / want.abs().max()).item())
    off = abs(loss.item() - golden["train"]["ragged"]["loss"])
    if off > 1e-5 or worst > 1e-5:
        raise SystemExit(f"path (b) is not the authors': loss off by {off:.1e}, gradients by {worst:.1e}")
    return f"(b) equals the authors' golden data: loss within {off:.0e}, gradients within {worst:.0e} of their largest"


def time_alternating(
    stage: CometStage, runs: dict[str, Callable[[], float]], repetitions: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of each run, one after the other, `repetitions` times after one warm-up; and the losses."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    losses = {}
    for repetition in range(repetitions + 1):
        for name, run in runs.items():
            stage.zero_grad(set_to_none=True)
            gc.collect()
            started = time.perf_counter()
            losses[name] = run()
            if repetition:
                seconds[name].append(time.perf_counter() - started)
    return seconds, losses


def measure_peak(path: str, tokens: int) -> int:
    """Peak bytes of a run above what the process held before, in this process: call it in a fresh one."""
    with alone() as layout:
        torch.set_num_threads(THREADS)
        stage = build_stage(ARCHITECTURE, MEMORY, layout.groups)
        small_random_weights(stage)
        run = build_paths(stage)[path]
        for param in stage.parameters():
            param.grad = torch.zeros_like(param)
        run(*make_sequence(MEMORY.chunk_size // 8))  # kernels and their buffers
        gc.collect()
        before = resident_bytes()
        forget_peak()
        run(*make_sequence(tokens))
        return peak_resident_bytes() - before


def peak_in_fresh_process(path: str, tokens: int) -> int:
    """`measure_peak` in a process of its own."""
    command = [sys.executable, __file__, "--peak", path, str(tokens)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def checkpoint_bytes(tokens: int) -> int:
    """What recomputation keeps of a sequence: new temporary entries and new global states of every layer, fp32."""
    written = [p for p in plan_chunks(tokens, MEMORY) if p.writes_memory]
    slots = sum(p.num_beacons + p.num_global_beacons for p in written)
    return slots * ARCHITECTURE.hidden_size * 4 * ARCHITECTURE.num_layers


def compare_paths(stage: CometStage, report: Report, *, repetitions: int) -> None:
    """(a), (b) and (c) at 4,096 tokens."""
    paths, sequence = build_paths(stage), make_sequence(TOKENS)
    runs = {name: (lambda run=paths[name]: run(*sequence)) for name in "abc"}
    seconds, losses = time_alternating(stage, runs, repetitions)
    peaks = {name: peak_in_fresh_process(name, TOKENS) for name in "abc"}
    print(f"\n{TOKENS:,} tokens, forward and backward, medians of {repetitions} alternating runs on {THREADS} threads:")
    print("  path                          seconds  noise   TFLOP  GFLOP/s   peak MB  loss")
    titles = {"a": "(a) this model, TP 1", "b": "(b) slots in full, full head", "c": "(c) plain full attention"}
    rates = {}
    for name, title in titles.items():
        middle, flops = statistics.median(seconds[name]), count_flops(name, TOKENS)
        rates[name] = flops / middle
        print(
            f"  {title:<30}{middle:>7.2f}  {spread(seconds[name]):>4.0%}  {flops / 1e12:>6.2f}  "
            f"{rates[name] / 1e9:>7.0f}  {peaks[name] / 1e6:>8.0f}  {losses[name]:.4f}"
        )
    if abs(losses["a"] - losses["b"]) > 1e-5:
        raise SystemExit("(a) and (b) do not compute the same loss")
    faster = ratio(seconds["b"], seconds["a"])
    report.figure("(a) is faster than (b) by", f"{faster:.2f} x", ">= 1.5", faster >= 1.5)
    than_c = ratio(seconds["c"], seconds["a"])
    report.figure("(a) is faster than (c) by", f"{than_c:.2f} x", "> 1", than_c > 1)
    memory = peaks["a"] / peaks["b"]
    report.figure("peak memory of (a) over that of (b)", f"{memory:.2f}", "<= 0.7", memory <= 0.7)
    fair = rates["b"] / rates["a"]
    report.figure("FLOP/s of (b) over those of (a): (b) is no straw man", f"{fair:.2f}", ">= 0.9", fair >= 0.9)


def compare_lengths(stage: CometStage, report: Report, *, repetitions: int) -> None:
    """(a) with recomputation at 8,192 and 32,768 tokens."""
    run = build_paths(stage)["a recompute"]
    sequences = {n: make_sequence(n) for n in (SHORT, LONG)}
    runs = {str(n): (lambda n=n: run(*sequences[n])) for n in (SHORT, LONG)}
    seconds, _ = time_alternating(stage, runs, repetitions)
    short, long = ([s / n for s in seconds[str(n)]] for n in (SHORT, LONG))
    peaks = {n: peak_in_fresh_process("a recompute", n) for n in (SHORT, LONG)}
    print(f"\n(a) with recomputation, medians of {repetitions} alternating runs:")
    for n, times in ((SHORT, short), (LONG, long)):
        print(f"  {n:>6,} tokens: {statistics.median(times) * 1e6:>6.0f} us/token, peak {peaks[n] / 1e6:>5.0f} MB")
    change = ratio(long, short) - 1
    report.figure(f"time per token at {LONG:,} against {SHORT:,}", f"{change:+.1%}", "+-8 %", abs(change) <= 0.08)
    grown, predicted = peaks[LONG] - peaks[SHORT], checkpoint_bytes(LONG) - checkpoint_bytes(SHORT)
    print(f"  memory grows by {grown / 1e6:.0f} MB; the checkpoints of the added chunks are {predicted / 1e6:.0f} MB")
    share = grown / predicted
    report.figure("growth of peak memory over the checkpoints' bytes", f"{share:.2f}", "<= 1.15", share <= 1.15)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a figure misses its reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="print, and exit 0 whatever the figures")
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    quiet_libraries()
    keep_large_tensors_apart(kept_piece_bytes(ARCHITECTURE, MEMORY))
    if given.peak:
        print(measure_peak(given.peak[0], int(given.peak[1])))
        return 0
    print(check_against_golden())
    report = Report()
    with alone() as layout:
        torch.set_num_threads(THREADS)
        stage = build_stage(ARCHITECTURE, MEMORY, layout.groups)
        small_random_weights(stage)
        compare_paths(stage, report, repetitions=3 if given.quick else 7)
        compare_lengths(stage, report, repetitions=1 if given.quick else 3)
    return report.close(only_print=given.report)


if __name__ == "__main__":
    sys.exit(main())
