"""Make a starting checkpoint from a Hugging Face model: adds CoMeT's tokens, their rows and the memory nets.

python tools/convert_from_hf.py --hf MODEL --output DIR
python tools/convert_from_hf.py --hf MODEL --output DIR --chunk-size 2048 --global-slots 512 --stride 8 --budget 2048
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.errors import report_user_errors
from comet_megatron.new_folder import check_is_new


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, type=Path, help="folder: config.json, *.safetensors, tokenizer")
    parser.add_argument("--output", required=True, type=Path, help="new folder for the checkpoint")
    parser.add_argument("--chunk-size", type=int, default=2048, help="text tokens a chunk (default %(default)s)")
    parser.add_argument("--global-slots", type=int, default=512, help="0: no global memory (default %(default)s)")
    parser.add_argument(
        "--stride", type=int, default=8, help="text tokens per beacon; -1: no temporary memory (default %(default)s)"
    )
    parser.add_argument("--budget", type=int, default=2048, help="temporary slots kept (default %(default)s)")
    parser.add_argument("--adapter-rank", type=int, default=8, help="of the memory nets (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1234, help="of new rows and memory nets (default %(default)s)")
    return parser.parse_args(arguments)


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = parse_arguments(arguments)
    check_is_new(given.output)
    quiet_libraries()
    from comet_megatron.checkpoint.hf_import import AskedMemory, import_hf
    from comet_megatron.parallel.alone import alone

    asked = AskedMemory(given.chunk_size, given.global_slots, given.stride, given.budget, given.adapter_rank)
    with alone() as layout:
        description = import_hf(given.hf, given.output, asked, layout, seed=given.seed)
    model, memory = description.architecture, description.memory
    temporary = f"a beacon every {memory.stride} tokens, budget {memory.budget}" if memory.stride > 0 else "none"
    print(
        f"checkpoint {given.output}: {model.family}, {model.num_layers} layers, hidden {model.hidden_size}\n"
        f"  chunks of {memory.chunk_size} tokens; global memory: {memory.global_slots} slots; "
        f"temporary memory: {temporary}\n"
        f"  {len(memory.new_ids)} new tokens from id {memory.first_new_id}; vocabulary {model.vocab_size}\n"
        f"next: put model.path: {given.output} into a config (examples/configs/) and train:\n"
        f"  torchrun --nproc-per-node 2 -m comet_megatron.train --config FILE"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
