"""Make a small Qwen3 model with random weights, so that the demo starts from a Hugging Face folder without a download.

python examples/make_small_model.py --tokenizer tokenizers/python_stdlib_4k --output runs/demo/qwen3_small
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from comet_megatron.errors import report_user_errors
from comet_megatron.launch.small_model import SmallModel, make_small_model


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder that AutoTokenizer loads")
    parser.add_argument("--output", required=True, type=Path, help="new folder")
    parser.add_argument("--hidden-size", type=int, default=192, help="default %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default %(default)s")
    parser.add_argument("--heads", type=int, default=4, help="half as many K/V heads (default %(default)s)")
    parser.add_argument("--untied", action="store_true", help="a head of its own, not the embedding")
    parser.add_argument("--seed", type=int, default=1234, help="default %(default)s")
    given = parser.parse_args(arguments)
    small = SmallModel(
        tokenizer=given.tokenizer,
        hidden_size=given.hidden_size,
        layers=given.layers,
        heads=given.heads,
        tied=not given.untied,
        seed=given.seed,
    )
    weights = make_small_model(small, given.output)
    print(f"model {given.output}: {weights / 1e6:.1f} M weights, random")
    return 0


if __name__ == "__main__":
    sys.exit(main())
