"""Turn texts and chats into shards of token ids: OUTPUT/train, and OUTPUT/eval with held-out documents.

    python tools/prepare_data.py --input python-stdlib --tokenizer tokenizers/python_stdlib_4k \\
        --sequence-length 2048 --output data/stdlib
    python tools/prepare_data.py --input corpus/ 'more/*.jsonl.gz' --tokenizer my_model --sequence-length 131072 \\
        --output data/corpus
    python tools/prepare_data.py --input chats.jsonl --tokenizer my_chat_model --sequence-length 131072 \\
        --output data/chats --on-bad-sample skip

A line of JSONL has "messages" (a list, or a JSON string of one), "prompt" and "response", or "text". Chats are written
by the tokenizer's chat template, and only what the assistant says carries loss. A text ends in the end-of-text token.
Documents are never joined. One that is longer than the sequence length is cut into consecutive pieces (texts) or loses
its beginning (chats), or as --long says. Pieces below --min-tokens are dropped. Whether a document is held out is a
hash of its name, so no piece of a held-out document is trained on.
The output folder must be new or empty, and appears only when it is complete, with report.json and lengths.png. An
interrupted call continues where it was when it is given again; a finished one is not done again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from comet_megatron.data.documents import DocumentSource, find_documents
from comet_megatron.data.journal import partial_folder
from comet_megatron.data.prepare import NO_LIMIT, ON_BAD_SAMPLE, PrepareReport, PrepareSettings, prepare_data
from comet_megatron.data.tokenise import LONG_CHOICES
from comet_megatron.data.tokenizer import load_text_tokenizer
from comet_megatron.data.workers import auto_workers
from comet_megatron.errors import ConfigError, report_user_errors

INTERRUPTED_EXIT_CODE = 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="text files, folders, quoted patterns, .jsonl files (also .gz and .zst), or the word python-stdlib",
    )
    parser.add_argument(
        "--tokenizer",
        required=True,
        metavar="DIR",
        help="a folder that AutoTokenizer loads, or a tokenizer.model of tools/train_tokenizer.py",
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--sequence-length", required=True, type=int, metavar="N", help="tokens of the longest sample")
    parser.add_argument("--min-tokens", type=int, default=32, metavar="N", help="drop shorter samples (32)")
    parser.add_argument(
        "--eval-fraction", type=float, default=0.05, metavar="F", help="of the documents to hold out; 0: none (0.05)"
    )
    parser.add_argument("--shard-mb", type=float, default=4, metavar="MB", help="MiB of a shard, about (4)")
    parser.add_argument("--max-documents", type=int, default=NO_LIMIT, metavar="N", help="stop after so many (all)")
    parser.add_argument("--max-tokens", type=int, default=NO_LIMIT, metavar="N", help="write at most so many (all)")
    parser.add_argument(
        "--long",
        choices=LONG_CHOICES,
        default="auto",
        help="what to do with longer documents; auto: split texts, truncate-left chats (auto)",
    )
    parser.add_argument(
        "--on-bad-sample",
        choices=ON_BAD_SAMPLE,
        default="stop",
        help="stop at a bad row, or skip it and list it in report.json (stop)",
    )
    parser.add_argument("--chat-template", metavar="FILE", help="Jinja template instead of the tokenizer's own")
    parser.add_argument(
        "--workers", default="auto", metavar="N", help="processes; the result does not depend on it (auto: the cores)"
    )
    return parser.parse_args(argv)


def number_of_workers(given: str, source: DocumentSource) -> int:
    """
    Raises:
        ConfigError: it is not "auto" and not a number above 0.
    """
    if given == "auto":
        return auto_workers(source.num_bytes)
    if not given.isdecimal() or int(given) < 1:
        raise ConfigError(f"--workers={given} is not a number of processes", way_out="use 1 or more, or auto")
    return int(given)


def read_template(path: str | None) -> str:
    """
    Raises:
        ConfigError: the file cannot be read, or is empty.
    """
    if path is None:
        return ""
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template={path} cannot be read: {error}") from error
    if not template.strip():
        raise ConfigError(f"--chat-template={path} is empty")
    return template


@contextmanager
def progress_bar(source: DocumentSource) -> Iterator[Callable[[int, int], None]]:
    """On a terminal, show how much of the input is read, and documents and tokens a second."""
    started = time.monotonic()
    hidden = not sys.stderr.isatty()
    with tqdm(total=source.num_bytes, unit="B", unit_scale=True, desc="tokenising", disable=hidden) as bar:

        def show(num_documents: int, num_tokens: int) -> None:
            if hidden:
                return
            seconds = max(time.monotonic() - started, 1e-9)
            speed = f"{num_documents / seconds:,.0f} documents/s, {num_tokens / seconds:,.0f} tokens/s"
            bar.set_postfix_str(speed, refresh=False)
            bar.update(source.bytes_read - bar.n)

        yield show


def describe(report: PrepareReport) -> str:
    """The report as lines of text."""
    counts = report.counts
    chats = f", {counts.num_chats} of them chats" if counts.num_chats else ""
    lines = [
        f"documents  {report.num_documents}, of which {report.num_eval_documents} held out{chats}",
        f"dropped    {report.num_dropped_pieces} pieces too short, {report.num_dropped_tokens} tokens in all",
    ]
    if counts.num_unlabelled:
        lost = f"{counts.num_unlabelled} pieces in which nothing carries loss, {counts.num_unlabelled_tokens} tokens"
        lines.append(f"{'':<11}{lost} in all")
    if counts.num_split:
        lines.append(f"split      {counts.num_split} documents longer than a sequence")
    if counts.num_truncated:
        lost = f"{counts.num_truncated_tokens} tokens cut off"
        lines.append(f"truncated  {counts.num_truncated} documents longer than a sequence, {lost}")
    if report.skipped_files:
        first = report.skipped_files[0]
        lines.append(f"skipped    {len(report.skipped_files)} files that are not UTF-8, the first is {first}")
    if report.skipped:
        first_sample = f"{report.skipped[0].where}: {report.skipped[0].what}"
        lines.append(f"skipped    {len(report.skipped)} bad documents, all in report.json; the first is {first_sample}")
    for name, folder, manifest in (
        ("train", report.train_dir, report.train),
        ("eval", report.eval_dir, report.eval),
    ):
        if folder is None or manifest is None:
            lines.append(f"{name:<11}none: no document fell into the held-out part")
        else:
            share = f" ({manifest.num_labels / manifest.num_tokens:.1%} carry loss)" if counts.num_chats else ""
            lines.append(
                f"{name:<11}{manifest.num_samples} sequences, {manifest.num_tokens} tokens{share}, "
                f"{len(manifest.shards)} shards in {folder}"
            )
    overrides = f"data.train={shlex.quote(str(report.train_dir))}"
    if report.eval_dir is not None:
        overrides += f" data.eval={shlex.quote(str(report.eval_dir))}"
    lines.append(f"next: train with {overrides}")
    return "\n".join(lines)


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    settings = PrepareSettings(
        sequence_length=args.sequence_length,
        min_tokens=args.min_tokens,
        eval_fraction=args.eval_fraction,
        shard_bytes=int(args.shard_mb * 2**20),
        max_documents=args.max_documents,
        max_tokens=args.max_tokens,
        long=args.long,
        on_bad_sample=args.on_bad_sample,
    )
    settings.check()
    source = find_documents(args.input)
    num_workers = number_of_workers(args.workers, source)
    chat_template = read_template(args.chat_template)
    tokenizer = load_text_tokenizer(args.tokenizer)
    if num_workers > 1:
        print(f"tokenising {source.num_bytes / 1e6:.1f} MB in {num_workers} processes", flush=True)
    if partial_folder(Path(args.output)).exists():
        print(f"continuing what lies in {partial_folder(Path(args.output))}", flush=True)
    try:
        with progress_bar(source) as show:
            report = prepare_data(
                source,
                tokenizer=tokenizer,
                output_dir=args.output,
                settings=settings,
                chat_template=chat_template,
                num_workers=num_workers,
                may_continue=True,
                on_progress=show,
            )
    except KeyboardInterrupt:
        print("interrupted; the same command continues", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    if report.was_done:
        print(f"{args.output} is finished already, with the same input and settings; nothing was done")
    print(describe(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
