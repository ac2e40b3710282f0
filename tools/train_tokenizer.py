"""Train a SentencePiece BPE tokenizer and write it as a folder that transformers.AutoTokenizer loads.

python tools/train_tokenizer.py --input python-stdlib --vocab-size 4096 --output my_tokenizer
python tools/train_tokenizer.py --input corpus/ notes.txt 'more/*.jsonl' --vocab-size 32000 --output my_tokenizer
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence

from comet_megatron.data.documents import find_documents
from comet_megatron.data.tokenizer import encode, load_tokenizer, tokenizer_fingerprint, train_sentencepiece
from comet_megatron.errors import report_user_errors


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help='text files, folders, quoted patterns, .jsonl files with a "text" field, or the word python-stdlib',
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--vocab-size", type=int, default=4096, help="pieces, specials and 256 bytes included (4096)")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        help="share of characters that get a piece, the others become bytes (0.9995)",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads to train with (1)")
    return parser.parse_args(argv)


@report_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    source = find_documents(args.input)
    print(f"training on {len(source.files)} files, {source.num_bytes / 1e6:.1f} MB", flush=True)
    folder = train_sentencepiece(
        source,
        vocab_size=args.vocab_size,
        output_dir=args.output,
        character_coverage=args.character_coverage,
        num_threads=args.threads,
    )
    skipped = list(source.skipped)
    tokenizer = load_tokenizer(folder)
    sample = next(iter(source)).text[:100_000]
    print(f"tokenizer     {folder}: {len(tokenizer)} pieces, fingerprint {tokenizer_fingerprint(tokenizer)[:16]}")
    if sample:
        print(f"text          {len(sample) / len(encode(tokenizer, sample)):.2f} characters a token in the first file")
    if skipped:
        print(f"skipped       {len(skipped)} files that are not UTF-8, the first is {skipped[0]}")
    print(
        f"next: python tools/prepare_data.py --input {shlex.join(args.input)} --tokenizer {folder} "
        "--sequence-length 2048 --output data"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
