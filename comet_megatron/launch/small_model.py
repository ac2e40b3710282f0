"""A small Qwen3 with random weights, in a Hugging Face folder: something to start from without a download."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.errors import ConfigError
from comet_megatron.new_folder import check_is_new, new_folder


@dataclass(frozen=True)
class SmallModel:
    """Sizes of the model.

    Attributes:
        tokenizer: folder that AutoTokenizer loads; it decides the vocabulary.
        heads: attention heads; there are half as many K/V heads.
        max_positions: a chunk and its slots must fit.
    """

    tokenizer: str
    hidden_size: int = 192
    layers: int = 4
    heads: int = 4
    max_positions: int = 4096
    tied: bool = True  # the head is the embedding
    seed: int = 1234

    def check(self, *, where: str = "") -> None:
        """
        Raises:
            ConfigError: sizes of which there is no model, all of them together.
        """
        names = ("hidden_size", "layers", "heads", "max_positions")
        problems = [
            ConfigError(f"{name}={getattr(self, name)} must be 1 or more", where=where)
            for name in names
            if getattr(self, name) < 1
        ]
        if self.hidden_size < 32:  # the FFN has 8/3 of it, in steps of 32
            problems.append(ConfigError(f"hidden_size={self.hidden_size} is too small; use 32 or more", where=where))
        elif self.heads > 0 and self.hidden_size % (2 * self.heads):
            what = f"hidden_size={self.hidden_size} must be a multiple of twice heads={self.heads}"
            problems.append(ConfigError(f"{what}: each head turns pairs", where=where))
        if self.heads > 1 and self.heads % 2:
            problems.append(ConfigError(f"heads={self.heads} must be 1 or even", where=where))
        if problems:
            raise ConfigError.collect(problems)

    @property
    def key_value_heads(self) -> int:
        return max(self.heads // 2, 1)

    @property
    def ffn_hidden_size(self) -> int:
        return self.hidden_size * 8 // 3 // 32 * 32


def make_small_model(small: SmallModel, output: Path) -> int:
    """Write the model and its tokenizer to a new folder; the number of its weights.

    Raises:
        ConfigError, DataError, OutputError: the sizes, the tokenizer or the folder; nothing is written.
    """
    small.check()
    check_is_new(output)
    quiet_libraries()
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from comet_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(small.tokenizer)
    torch.manual_seed(small.seed)
    config = Qwen3Config(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=small.hidden_size,
        intermediate_size=small.ffn_hidden_size,
        num_hidden_layers=small.layers,
        num_attention_heads=small.heads,
        num_key_value_heads=small.key_value_heads,
        head_dim=small.hidden_size // small.heads,
        max_position_embeddings=small.max_positions,
        tie_word_embeddings=small.tied,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM(config)
    with new_folder(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())
