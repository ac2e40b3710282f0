"""Reading and writing long texts: 1,048,576 tokens, prefill against the authors' way, decoding. Figures and reach.

python benchmarks/inference.py             all figures; exits 1 if one misses its reach (about 5 minutes)
python benchmarks/inference.py --quick     262,144 tokens, fewer repetitions (about 2 minutes)
python benchmarks/inference.py --report    only print

CometForCausalLM with random weights, fp32, in fresh processes: the long text on 1 thread (on two, its windows differed
by what the second core was given), the rest on 2, which sleep while they wait. Figures are of CPU seconds of the
process, all threads: where other programs want the same cores, wall times of one and the same run lie 25 to 75 % apart,
CPU seconds 5 to 15 %. Wall time is printed beside them. Ratios are medians of the ratios of neighbouring runs; "spread"
is (largest - smallest) / median.

Long prefill: a tiny model, CometSession.feed in pieces. Windows of 65,536 tokens, each by the median of its pieces; the
first window fills the memory and the kernels' buffers. Peak memory is the high-water mark of the resident set since
the model was built, the libraries' share in it (Linux). Tensors from 1 MiB on have mappings of their own: without,
holes in malloc's heap make the peak differ from process to process (461 to 574 MB, not 413 to 423) and once grow by
5 %, but page faults cost this tiny model some 40 % of time, in every window alike.

Prefill: the sizes of step_time.py. (a) CometSession.feed, the head on the last token only; in the last layer no query,
projection or MLP for text that nobody reads. (b) The same modules and the same rows, but memory slots computed in full,
as the authors do: in every layer a slot is a row with a query, an output projection and an MLP, causal over slots and
rows, and what comes out is thrown away. Nothing else of theirs is counted: (b) keeps no keys and values, has the head
on the last row only, lays beacons as (a) does (theirs drop the last of a chunk) and leaves out the beacons at the end
of the text, which nobody reads. (a) and (b) must give the same logits. (c) The backbone alone, full attention over the
whole text in one go, the head on the last row only.

Decoding: sessions of the tiny model with a chunk of 512 and a budget of 256 slots, so that the memory is full after
2,048 tokens; they write in turn, a stride of tokens at a time, at the same places of their chunks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from figures import Report, ratio, spread
from torch import Tensor

from comet_megatron.backend.device import keep_large_tensors_apart
from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.hf.configuration_comet import CometConfig
from comet_megatron.hf.modeling_comet import CometForCausalLM, LayerMemory, Row, build_rotary, plan_rows
from comet_megatron.inference.session import CometSession
from comet_megatron.testing.resident import forget_peak, peak_resident_bytes, resident_bytes

THREADS = {"long": 1, "prefill": 2, "decoding": 2}
TOKENS, QUICK_TOKENS, WINDOW, PIECE = 1_048_576, 262_144, 65_536, 8192
SHORT, LONG = 8192, 16_384
FED = (2048, 16_384, 65_536)
LIMIT = 1e-4  # between the logits of (a) and (b)
STRIDE = 8
MID_SIZE = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "chunk_size": 512,
    "temp_mem_budget": 512,
}
TINY = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 1024,
    "chunk_size": 2048,
    "temp_mem_budget": 512,
}
TINY_DECODING = {**TINY, "chunk_size": 512, "temp_mem_budget": 256}

Times = dict[str, list[float]]  # of alternating runs, by name
Clocks = tuple[float, float]  # CPU and wall seconds


def build_model(sizes: dict[str, Any], *, global_slots: int) -> CometForCausalLM:
    """A model with random weights, large enough for the memory to matter; its last ids write memory."""
    torch.manual_seed(0)
    first = sizes["vocab_size"] - global_slots - 2
    config = CometConfig(
        **sizes,
        placeholder_id=first,
        temp_beacon_id=first + 1,
        temp_beacon_stride=STRIDE,
        global_beacon_ids=range(first + 2, sizes["vocab_size"]),
        initializer_range=0.05,
    )
    return CometForCausalLM(config).eval()


def make_text(model: CometForCausalLM, tokens: int, *, seed: int = 0) -> Tensor:
    """Random text ids."""
    return torch.randint(model.config.placeholder_id, (tokens,), generator=torch.Generator().manual_seed(seed))


def clocks() -> Clocks:
    return time.process_time(), time.perf_counter()


def since(started: Clocks) -> Clocks:
    now = clocks()
    return now[0] - started[0], now[1] - started[1]


# --- in a process of its own ------------------------------------------------------------------------------------------


def measure_long_prefill(*, tokens: int) -> dict[str, Any]:
    """Seconds of every piece; resident and peak bytes after the first window and at the end; bytes of the session."""
    keep_large_tensors_apart(0)
    model = build_model(TINY, global_slots=64)
    session = CometSession(model)
    before = resident_bytes()
    forget_peak()
    cpu, wall, held = [], [], []
    for number in range(tokens // PIECE):
        ids = make_text(model, PIECE, seed=number)
        started = clocks()
        session.feed(ids)
        for kept, taken in zip((cpu, wall), since(started), strict=True):
            kept.append(taken)
        if session.tokens_fed in (WINDOW, tokens):
            held.append((resident_bytes(), peak_resident_bytes(), session.state_bytes))
    return {"cpu": cpu, "wall": wall, "held": held, "before": before}


def measure_prefill(*, repetitions: int) -> dict[str, Any]:
    """Seconds of (a), (b) and (c) at two lengths, and how far the logits of (a) and (b) are apart.

    Raises:
        SystemExit: (a) and (b) do not compute the same, or the memory makes no difference that would show it.
    """
    model = build_model(MID_SIZE, global_slots=128)
    text = make_text(model, 10 * MID_SIZE["chunk_size"] + 77)  # the queue is full and drops slots; warms up
    wanted = prefill(model, text)
    off = (prefill_with_slots_in_full(model, text) - wanted).abs().max().item()
    forgetful = (prefill(model, text[-77:]) - wanted).abs().max().item()
    if not off <= LIMIT <= forgetful / 100:
        raise SystemExit(f"logits of (a) and (b) are {off:.1e} apart, without the memory {forgetful:.1e}")
    ways = {"a": prefill, "b": prefill_with_slots_in_full, "c": prefill_with_full_attention}
    runs = {(way, tokens): ways[way] for tokens in (SHORT, LONG) for way in ways}
    cpu: Times = {f"{way} {tokens}": [] for way, tokens in runs}
    wall: Times = {name: [] for name in cpu}
    for repetition in range(repetitions):
        logits = {}
        for (way, tokens), run in runs.items():
            text = make_text(model, tokens, seed=repetition)
            started = clocks()
            logits[way, tokens] = run(model, text)
            for kept, taken in zip((cpu, wall), since(started), strict=True):
                kept[f"{way} {tokens}"].append(taken)
        for tokens in (SHORT, LONG):
            off = max(off, (logits["a", tokens] - logits["b", tokens]).abs().max().item())
        if not off <= LIMIT:
            raise SystemExit(f"logits of (a) and (b) are {off:.1e} apart")
    return {"cpu": cpu, "wall": wall, "off": off, "forgetful": forgetful}


def measure_decoding(*, rounds: int) -> dict[str, Any]:
    """Seconds per token of every round, a stride of tokens a session, by the tokens that were fed."""
    model = build_model(TINY_DECODING, global_slots=64)
    sessions = {str(fed): CometSession(model) for fed in FED}
    for fed, session in sessions.items():
        session.feed(make_text(model, int(fed) + TINY_DECODING["chunk_size"] // 4))
        session.generate(2 * STRIDE)  # warms up
    cpu: Times = {fed: [] for fed in sessions}
    wall: Times = {fed: [] for fed in sessions}
    for number in range(rounds):
        for fed, session in list(sessions.items())[:: 1 if number % 2 else -1]:
            started = clocks()
            session.generate(STRIDE)
            for kept, taken in zip((cpu, wall), since(started), strict=True):
                kept[fed].append(taken / STRIDE)
    return {"cpu": cpu, "wall": wall, "state": [s.state_bytes for s in sessions.values()]}


@torch.no_grad()
def prefill(model: CometForCausalLM, text_S: Tensor) -> Tensor:
    """(a): logits [V] after the text."""
    session = CometSession(model)
    session.feed(text_S[:-1])
    return session.feed(text_S[-1:], return_logits=True)[0]


@torch.no_grad()
def prefill_with_slots_in_full(model: CometForCausalLM, text_S: Tensor) -> Tensor:
    """(b): logits [V] after the text."""
    config, layers = model.config, model.model.layers
    memory = [LayerMemory() for _ in layers]
    chunks = text_S.split(config.chunk_size)
    for number, chunk_S in enumerate(chunks):
        closes = number < len(chunks) - 1
        rows = plan_rows(
            text_before=0,
            text_new=len(chunk_S),
            stride=config.temp_beacon_stride,
            global_slots=len(config.global_beacon_ids),
            closes=closes,
        )
        kinds_C = torch.tensor(rows)
        is_beacon_C, is_global_C = kinds_C == Row.BEACON, kinds_C == Row.GLOBAL_BEACON
        ids_C = torch.full((len(rows),), config.temp_beacon_id)
        ids_C[kinds_C == Row.TEXT] = chunk_S
        if closes:
            ids_C[is_global_C] = torch.tensor(config.global_beacon_ids)
        x_BCD = model.model.embed_tokens(ids_C[None])
        slots_BMD = layers[0].read_memory(memory[0])
        slots = 0 if slots_BMD is None else slots_BMD.shape[1]
        rotary = build_rotary(0, slots + len(rows), config, x_BCD.device)
        for place, layer in enumerate(layers):
            slots_BMD = layer.read_memory(memory[place])
            whole = x_BCD if slots_BMD is None else torch.cat([slots_BMD, x_BCD], dim=1)
            x_BCD = layer.inner_layer(whole, None, rotary, None)[0][:, slots:]
            if closes:
                memory[place] = layer.write_memory(memory[place], x_BCD[:, is_beacon_C], x_BCD[:, is_global_C])
    return model.lm_head(model.model.norm(x_BCD[0, -1]))


@torch.no_grad()
def prefill_with_full_attention(model: CometForCausalLM, text_S: Tensor) -> Tensor:
    """(c): logits [V] after the text, of the backbone alone."""
    x_BCD = model.model.embed_tokens(text_S[None])
    rotary = build_rotary(0, len(text_S), model.config, x_BCD.device)
    for layer in model.model.layers:
        x_BCD, _ = layer.inner_layer(x_BCD, None, rotary, None)
    return model.lm_head(model.model.norm(x_BCD[0, -1]))


MEASURED: dict[str, Callable[..., dict[str, Any]]] = {
    "long": measure_long_prefill,
    "prefill": measure_prefill,
    "decoding": measure_decoding,
}


def in_fresh_process(part: str, **options: int) -> dict[str, Any]:
    """What a part of the benchmark measured in a process of its own.

    Raises:
        SystemExit: it failed, and has said why.
    """
    command = [sys.executable, __file__, "--measure", part, json.dumps(options)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS[part]), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


# --- figures ----------------------------------------------------------------------------------------------------------


def report_long_prefill(report: Report, *, tokens: int) -> None:
    """A text of many tokens: does the last window take the time and the memory of the first?"""
    started = time.perf_counter()
    found = in_fresh_process("long", tokens=tokens)
    pieces = WINDOW // PIECE
    print(f"\nprefill of {tokens:,} tokens, tiny model, {time.perf_counter() - started:.0f} s; by {WINDOW:,} tokens:")
    changes = {}
    for clock in ("cpu", "wall"):
        times = found[clock]
        windows = [statistics.median(times[i : i + pieces]) / PIECE * 1e6 for i in range(0, len(times), pieces)]
        changes[clock] = windows[-1] / windows[1]
        within = statistics.median(spread(times[i : i + pieces]) for i in range(pieces, len(times), pieces))
        print(f"  {clock:<4} us/token: {' '.join(f'{w:.0f}' for w in windows)}")
        print(
            f"       spread of the windows from the second on {spread(windows[1:]):.0%}, inside a window {within:.0%}"
        )
    (first_now, first_peak, first_state), (now, peak, state) = found["held"]
    grown = peak / first_peak - 1
    print(
        f"  resident before {found['before'] / 1e6:.1f} MB; at {WINDOW:,} tokens {first_now / 1e6:.1f}, "
        f"peak {first_peak / 1e6:.1f}; at the end {now / 1e6:.1f}, peak {peak / 1e6:.1f}; "
        f"session {first_state / 1e6:.2f} and {state / 1e6:.2f} MB"
    )
    last = changes["cpu"]
    print(f"  last window over the second: {last:.3f} in CPU seconds, {changes['wall']:.3f} in wall time")
    report.figure(f"time per token, last {WINDOW:,} over the second", f"{last:.3f}", "<= 1.10", last <= 1.10)
    report.figure(f"growth of peak memory from {WINDOW:,} to {tokens:,}", f"{grown:+.1%}", "< 5 %", grown < 0.05)


def report_prefill(report: Report, *, repetitions: int) -> None:
    """(a), (b) and (c) at two lengths."""
    found = in_fresh_process("prefill", repetitions=repetitions)
    cpu, wall = found["cpu"], found["wall"]
    print(f"\nprefill, mid-size model, medians of {repetitions} alternating runs on {THREADS['prefill']} threads:")
    print(f"  last logits of (a) and (b) within {found['off']:.0e}; without the memory {found['forgetful']:.0e} off")
    titles = {"a": "(a) this model", "b": "(b) slots in full", "c": "(c) full attention"}
    print("  way                    tokens   CPU s  spread  wall s  spread")
    for name in cpu:
        way, tokens = name.split()
        columns = (f"{statistics.median(t[name]):>8.2f}  {spread(t[name]):>6.0%}" for t in (cpu, wall))
        print(f"  {titles[way]:<20}{int(tokens):>9,}{''.join(columns)}")
    for tokens in (SHORT, LONG):
        than_b, than_c = (ratio(cpu[f"{way} {tokens}"], cpu[f"a {tokens}"]) for way in "bc")
        by_wall = (ratio(wall[f"{way} {tokens}"], wall[f"a {tokens}"]) for way in "bc")
        print("  {:,}: wall (b)/(a) {:.2f}, (c)/(a) {:.2f}; CPU (c)/(a) {:.2f}".format(tokens, *by_wall, than_c))
        report.figure(f"{tokens:,} tokens: (a) is faster than (b) by", f"{than_b:.2f} x", ">= 1.4", than_b >= 1.4)
    grown, by_wall = (ratio(t[f"a {LONG}"], t[f"a {SHORT}"]) for t in (cpu, wall))
    print(f"  (a) at {LONG:,} over {SHORT:,}: wall {by_wall:.2f}")
    report.figure(f"(a) at {LONG:,} over {SHORT:,} tokens", f"{grown:.2f}", "<= 2.2", grown <= 2.2)


def report_decoding(report: Report, *, rounds: int) -> None:
    """Time per token after more and more tokens."""
    found = in_fresh_process("decoding", rounds=rounds)
    cpu, wall = found["cpu"], found["wall"]
    print(f"\ndecoding, tiny model, medians of {rounds} alternating runs of {STRIDE} tokens:")
    for fed, state in zip(cpu, found["state"], strict=True):
        cpu_us, wall_us = (statistics.median(t[fed]) * 1e6 for t in (cpu, wall))
        print(
            f"  after {int(fed):>6,} tokens: {cpu_us:>5.0f} us/token CPU (spread {spread(cpu[fed]):.0%}), "
            f"{wall_us:>5.0f} wall (spread {spread(wall[fed]):.0%}); session {state / 1e6:.2f} MB"
        )
    short, long = str(FED[0]), str(FED[-1])
    grown, by_wall = ratio(cpu[long], cpu[short]), ratio(wall[long], wall[short])
    print(f"  after {FED[-1]:,} over after {FED[0]:,}: wall {by_wall:.3f}")
    report.figure(
        f"time per written token, after {FED[-1]:,} over after {FED[0]:,}", f"{grown:.3f}", "<= 1.10", grown <= 1.10
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a figure misses its reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="print, and exit 0 whatever the figures")
    parser.add_argument("--quick", action="store_true", help="fewer tokens and repetitions")
    parser.add_argument("--only", choices=tuple(MEASURED), help="a part of the figures")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    quiet_libraries()
    if given.measure:
        part, options = given.measure
        torch.set_num_threads(THREADS[part])
        print(json.dumps(MEASURED[part](**json.loads(options))))
        return 0
    report, started = Report(), time.perf_counter()
    if given.only in (None, "long"):
        report_long_prefill(report, tokens=QUICK_TOKENS if given.quick else TOKENS)
    if given.only in (None, "prefill"):
        report_prefill(report, repetitions=1 if given.quick else 3)
    if given.only in (None, "decoding"):
        report_decoding(report, rounds=8 if given.quick else 24)
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    return report.close(only_print=given.report)


if __name__ == "__main__":
    sys.exit(main())
