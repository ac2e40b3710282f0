"""Data: prepare_data beside the bare tokenizer, the reader alone and as a share of a step, opening 10,000 shards.

python benchmarks/data.py             all figures; exits 1 if one misses its reach (about 3 minutes)
python benchmarks/data.py --quick     less text, one run of each
python benchmarks/data.py --report    only print

The text is this Python's standard library as JSONL, several times over; texts, and chats through a template. The bare
tokenizer is the same number of processes that call it, `tokenizer(text)["input_ids"]`, on texts that lie in their
memory, and do nothing else: no reading, parsing, checking, writing. Beside it stands, for comparison, the quickest
call there is, encode_batch_fast of the package tokenizers, which tells no offsets and which prepare_data uses too.
Both are timed from when the processes have begun, which takes seconds and is printed apart. Runs alternate; figures
are medians of the ratios of neighbouring runs. The reader reads every sample in random order, checksums included,
from the page cache.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from figures import Report, ratio, spread

from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.documents import python_stdlib_files, text_files
from comet_megatron.data.prepare import PrepareSettings, prepare_data
from comet_megatron.data.shard_writer import write_shards
from comet_megatron.data.shards import Sample
from comet_megatron.data.tokenizer import encode, load_tokenizer
from comet_megatron.launch.small_model import SmallModel, make_small_model

REPOSITORY = Path(__file__).resolve().parents[1]
TOKENIZER = REPOSITORY / "tokenizers" / "python_stdlib_4k"
DEMO = REPOSITORY / "examples" / "configs" / "demo.yaml"
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':\\n' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
REACH_PREPARE, REACH_READER, REACH_OPEN_S, REACH_SHARE = 0.9, 20e6, 2.0, 0.01
SEQUENCE_LENGTH = 8192
MANY_SHARDS = 10_000


def bare_tokenizer(texts: list[str], quickest: bool, barrier: Any, results: Any) -> None:
    """One process: tokens and seconds."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(TOKENIZER)

    def count(text: str) -> int:
        if quickest:
            return len(encode(tokenizer, text))
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    count(texts[0])
    barrier.wait()
    started = time.perf_counter()
    num_tokens = sum(map(count, texts))
    results.put((num_tokens, time.perf_counter() - started))


def bare_speed(texts: list[str], num_workers: int, *, quickest: bool = False) -> float:
    """Tokens/s of all processes together."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(num_workers), context.Queue()
    processes = [
        context.Process(target=bare_tokenizer, args=(texts[n::num_workers], quickest, barrier, results))
        for n in range(num_workers)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(tokens for tokens, _ in found) / max(seconds for _, seconds in found)


def prepare_speed(source: Path, output: Path, num_workers: int) -> tuple[float, float]:
    """Tokens/s from the first document on, and the seconds until then."""
    first: list[tuple[float, int]] = []
    last = [0]

    def on_progress(_: int, num_tokens: int) -> None:
        if not first:
            first.append((time.perf_counter(), num_tokens))
        last[0] = num_tokens

    started = time.perf_counter()
    prepare_data(
        text_files([source]),
        tokenizer=load_tokenizer(TOKENIZER),
        output_dir=output,
        settings=PrepareSettings(sequence_length=SEQUENCE_LENGTH, eval_fraction=0),
        chat_template=TEMPLATE,
        num_workers=num_workers,
        may_continue=True,
        on_progress=on_progress,
    )
    begun, tokens_before = first[0]
    return (last[0] - tokens_before) / (time.perf_counter() - begun), begun - started


def compare_prepare(
    report: Report, folder: Path, texts: list[str], *, kind: str, num_workers: int, repetitions: int
) -> None:
    """prepare_data on one kind of rows, the bare tokenizer on their texts."""
    source = folder / f"{kind}.jsonl"
    with open(source, "w", encoding="utf-8") as file:
        for text in texts:
            pair = [{"role": "user", "content": text[:1000]}, {"role": "assistant", "content": text[1000:] or "-"}]
            file.write(json.dumps({"text": text} if kind == "texts" else {"messages": pair}) + "\n")
    bare, quickest, prepared, begins = [], [], [], []
    for repetition in range(repetitions):
        bare.append(bare_speed(texts, num_workers))
        quickest.append(bare_speed(texts, num_workers, quickest=True))
        speed, begin = prepare_speed(source, folder / f"{kind}{repetition}", num_workers)
        prepared.append(speed)
        begins.append(begin)
    noise = f"noise {spread(prepared):.0%}" if repetitions > 1 else "one run"
    print(
        f"\n{kind}, {num_workers} processes: prepare_data {statistics.median(prepared):,.0f} tokens/s ({noise}), "
        f"bare tokenizer {statistics.median(bare):,.0f}, its quickest call {statistics.median(quickest):,.0f} "
        f"(prepare_data over that: {ratio(prepared, quickest):.0%}); {statistics.median(begins):.1f} s to begin"
    )
    share = ratio(prepared, bare)
    wanted = f">= {REACH_PREPARE:.0%}"
    report.figure(f"{kind}: prepare_data over the bare tokenizer", f"{share:.0%}", wanted, share >= REACH_PREPARE)


def measure_reader(report: Report, shards: Path, *, name: str) -> None:
    """Every sample once, in random order."""
    dataset = ShardDataset(shards)
    order = np.random.default_rng(0).permutation(len(dataset))
    speeds = []
    for _ in range(3):
        started = time.perf_counter()
        for number in order:
            _ = dataset[number]
            _ = dataset.loss_mask(number)
        speeds.append(dataset.num_tokens / (time.perf_counter() - started))
    speed = statistics.median(speeds)
    report.figure(
        f"reader, {name} of {dataset.num_tokens // len(dataset):,} tokens, one process",
        f"{speed / 1e6:.0f} M/s",
        f">= {REACH_READER / 1e6:.0f} M/s",
        speed >= REACH_READER,
    )


def measure_opening(report: Report, folder: Path) -> None:
    """Seconds to open very many shards."""
    samples = (Sample(np.arange(20) + n % 100) for n in range(MANY_SHARDS))
    write_shards(samples, output_dir=folder, tokenizer_fingerprint="", vocab_size=1000, shard_bytes=1, settings={})
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        ShardDataset(folder)
        seconds.append(time.perf_counter() - started)
    value = statistics.median(seconds)
    report.figure(f"opening {MANY_SHARDS:,} shards", f"{value:.2f} s", f"< {REACH_OPEN_S:.0f} s", value < REACH_OPEN_S)


def measure_share_of_a_step(report: Report, folder: Path, *, steps: int) -> None:
    """The train command on the demo's model and data: how long a step waits for its batch, read when it is needed."""
    prepare_data(
        python_stdlib_files(),
        tokenizer=load_tokenizer(TOKENIZER),
        output_dir=folder / "demo",
        settings=PrepareSettings(sequence_length=2048, eval_fraction=0, max_tokens=200_000),
    )
    make_small_model(SmallModel(str(TOKENIZER)), folder / "model")
    command = [sys.executable, "-m", "comet_megatron.train", "--config", str(DEMO), f"train.steps={steps}"]
    command += [f"model.init_from=hf:{folder / 'model'}", "memory.chunk_size=256", "memory.global_slots=16"]
    command += ["memory.stride=8", "memory.budget=64", "parallel.pp=1", f"data.train={folder / 'demo'}"]
    command += ["data.eval=", "train.eval_every=0", "train.save_every=0", "optimizer.warmup_steps=1", "data.workers=0"]
    command += [f"train.output={folder / 'run'}", "profile.timeline=false"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    records = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    records = [r for r in records if r["step"] > 1]  # the first one also warms up
    share = statistics.median(r["reading_seconds"] / r["seconds"] for r in records)
    figure = f"{share:.3%}"
    report.figure(
        "waiting for the batch, share of a step of the demo", figure, f"< {REACH_SHARE:.0%}", share < REACH_SHARE
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 1 if a figure misses its reach."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="print, and exit 0 whatever the figures")
    parser.add_argument("--quick", action="store_true", help="less text, one run of each")
    given = parser.parse_args(arguments)
    report = Report()
    num_workers = len(os.sched_getaffinity(0))
    texts = [document.text for document in python_stdlib_files()] * (1 if given.quick else 3)
    texts = [text for text in texts if text]
    with tempfile.TemporaryDirectory(prefix="comet_") as name:
        folder = Path(name)
        repetitions = 1 if given.quick else 3
        for kind in ("texts", "chats"):
            compare_prepare(report, folder, texts, kind=kind, num_workers=num_workers, repetitions=repetitions)
        print()
        measure_reader(report, folder / "texts0" / "train", name="texts")
        measure_reader(report, folder / "chats0" / "train", name="chats")
        measure_opening(report, folder / "many")
        measure_share_of_a_step(report, folder, steps=6 if given.quick else 20)
    return report.close(only_print=given.report)


if __name__ == "__main__":
    sys.exit(main())
