"""Make a starting checkpoint from a Hugging Face model: Qwen3, Qwen2.5, Llama 3 or Mistral, which get CoMeT's tokens,
their rows and memory nets; or a CoMeT model, of the authors or exported from here, which has them.

python tools/convert_from_hf.py --hf MODEL --output DIR
python tools/convert_from_hf.py --hf MODEL --output DIR --chunk-size 2048 --global-slots 512 --stride 8 --budget 2048
torchrun --nproc-per-node 4 tools/convert_from_hf.py --hf MODEL --output DIR     (each process holds a quarter)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.errors import report_user_errors
from comet_megatron.new_folder import check_is_new


def size(text: str) -> int | str:
    """A whole number, or the word auto."""
    return text if text == "auto" else int(text)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", required=True, type=Path, help="folder: config.json, *.safetensors, tokenizer")
    parser.add_argument("--output", required=True, type=Path, help="new folder for the checkpoint")
    sizes = parser.add_argument_group("memory", "of a model without one; a CoMeT model has its own in config.json")
    for option, text in (
        ("--chunk-size", "text tokens a chunk (default 2048)"),
        ("--global-slots", "0: no global memory (default 512)"),
        ("--stride", "text tokens per beacon; -1: no temporary memory (default 8)"),
        ("--budget", "temporary slots kept (default 2048)"),
        ("--adapter-rank", "of the memory nets (default 8)"),
    ):
        sizes.add_argument(option, type=size, default="auto", help=text)
    parser.add_argument("--seed", type=int, default=1234, help="of new rows and memory nets (default %(default)s)")
    return parser.parse_args(arguments)


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    given = parse_arguments(arguments)
    check_is_new(given.output)
    quiet_libraries()
    from comet_megatron.checkpoint.hf_import import AskedMemory, import_hf
    from comet_megatron.parallel.alone import as_pipeline

    asked = AskedMemory(given.chunk_size, given.global_slots, given.stride, given.budget, given.adapter_rank)
    with as_pipeline() as layout:
        description = import_hf(given.hf, given.output, asked, layout, seed=given.seed)
        if not layout.is_main:
            return 0
    model, memory = description.architecture, description.memory
    temporary = f"a beacon every {memory.stride} tokens, budget {memory.budget}" if memory.stride > 0 else "none"
    print(
        f"checkpoint {given.output}: {model.family}, {model.num_layers} layers, hidden {model.hidden_size}\n"
        f"  chunks of {memory.chunk_size} tokens; global memory: {memory.global_slots} slots; "
        f"temporary memory: {temporary}\n"
        f"  {len(memory.new_ids)} memory tokens from id {memory.first_new_id}; vocabulary {model.vocab_size}\n"
        f"next: put model.path: {given.output} into a config (examples/configs/) and train:\n"
        f"  torchrun --nproc-per-node 2 -m comet_megatron.train --config FILE"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
