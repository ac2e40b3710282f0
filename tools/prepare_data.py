"""Turn text into shards of token ids: OUTPUT/train, and OUTPUT/eval with held-out documents.

    python tools/prepare_data.py --input python-stdlib --tokenizer tokenizers/python_stdlib_4k \\
        --sequence-length 2048 --output data/stdlib
    python tools/prepare_data.py --input corpus/ 'more/*.jsonl' --tokenizer my_model --sequence-length 131072 \\
        --output data/corpus

A document ends in the end-of-text token. One that is longer than the sequence length is cut into consecutive pieces of
that many tokens, the last one with what is left; documents are never joined. Pieces below --min-tokens are dropped.
Whether a document is held out is a hash of its name, so no piece of a held-out document is trained on.
The output folder must be new or empty, and appears only when it is complete.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence

from tqdm import tqdm

from comet_megatron.data.documents import Document, DocumentSource, find_documents
from comet_megatron.data.prepare import NO_LIMIT, PrepareReport, PrepareSettings, prepare_data
from comet_megatron.data.tokenizer import load_tokenizer
from comet_megatron.errors import report_user_errors
from comet_megatron.new_folder import check_is_new


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help='text files, folders, quoted patterns, .jsonl files with a "text" field, or the word python-stdlib',
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a folder that AutoTokenizer loads")
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--sequence-length", required=True, type=int, metavar="N", help="tokens of the longest sample")
    parser.add_argument("--min-tokens", type=int, default=32, metavar="N", help="drop shorter samples (32)")
    parser.add_argument(
        "--eval-fraction", type=float, default=0.05, metavar="F", help="of the documents to hold out; 0: none (0.05)"
    )
    parser.add_argument("--shard-mb", type=float, default=4, metavar="MB", help="MiB of a shard, about (4)")
    parser.add_argument("--max-documents", type=int, default=NO_LIMIT, metavar="N", help="stop after so many (all)")
    parser.add_argument("--max-tokens", type=int, default=NO_LIMIT, metavar="N", help="write at most so many (all)")
    return parser.parse_args(argv)


def with_progress(source: DocumentSource) -> Iterator[Document]:
    """Yield the documents; on a terminal, show how much of the input is read."""
    hidden = not sys.stderr.isatty()
    with tqdm(total=source.num_bytes, unit="B", unit_scale=True, desc="tokenising", disable=hidden) as bar:
        for document in source:
            yield document
            bar.update(source.bytes_read - bar.n)


def describe(report: PrepareReport, source: DocumentSource) -> str:
    """The report as lines of text."""
    lines = [
        f"documents  {report.num_documents}, of which {report.num_eval_documents} held out",
        f"dropped    {report.num_dropped_pieces} pieces too short, {report.num_dropped_tokens} tokens in all",
    ]
    if source.skipped:
        lines.append(f"skipped    {len(source.skipped)} files that are not UTF-8, the first is {source.skipped[0]}")
    for name, folder, manifest in (
        ("train", report.train_dir, report.train),
        ("eval", report.eval_dir, report.eval),
    ):
        if folder is None or manifest is None:
            lines.append(f"{name:<11}none: no document fell into the held-out part")
        else:
            lines.append(
                f"{name:<11}{manifest.num_samples} sequences, {manifest.num_tokens} tokens, "
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
    )
    settings.check()
    check_is_new(args.output)
    source = find_documents(args.input)
    tokenizer = load_tokenizer(args.tokenizer)
    report = prepare_data(with_progress(source), tokenizer=tokenizer, output_dir=args.output, settings=settings)
    print(describe(report, source))
    return 0


if __name__ == "__main__":
    sys.exit(main())
