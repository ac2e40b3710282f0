"""Make a small Qwen3 model with random weights, so that the demo starts from a Hugging Face folder without a download.

python examples/make_small_model.py --tokenizer tokenizers/python_stdlib_4k --output runs/demo/qwen3_small
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.errors import report_user_errors
from comet_megatron.new_folder import new_folder


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, type=Path, help="folder that AutoTokenizer loads")
    parser.add_argument("--output", required=True, type=Path, help="new folder")
    parser.add_argument("--hidden-size", type=int, default=192, help="default %(default)s")
    parser.add_argument("--layers", type=int, default=4, help="default %(default)s")
    parser.add_argument("--heads", type=int, default=4, help="half as many K/V heads (default %(default)s)")
    parser.add_argument("--untied", action="store_true", help="a head of its own, not the embedding")
    parser.add_argument("--seed", type=int, default=1234, help="default %(default)s")
    given = parser.parse_args(arguments)

    quiet_libraries()
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from comet_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(given.tokenizer)
    torch.manual_seed(given.seed)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=given.hidden_size,
        intermediate_size=given.hidden_size * 8 // 3 // 32 * 32,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        num_key_value_heads=max(given.heads // 2, 1),
        head_dim=given.hidden_size // given.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=not given.untied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with new_folder(given.output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    print(f"model {given.output}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M weights, random")
    return 0


if __name__ == "__main__":
    sys.exit(main())
