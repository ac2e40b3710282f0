"""Masks told from the bytes of tokens are those told from offsets, or there are none."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from comet_megatron.data.chat import tokens_in_spans, tokens_over_bytes
from comet_megatron.data.token_bytes import TokenBytes
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = [
    "Hi ",
    " there",
    "\n\n",
    "naïve",
    "日本",
    "👍🏽",
    "e\u0301",
    "\t",
    "<|end|>",
    "<|endoftext|>",
    "  x",
    "3",
    "\u00a0",
    "б",
]


def byte_level(*, trim_offsets: bool = False, normalizer: Any = None, prefix: bool = False) -> PreTrainedTokenizerFast:
    """As Qwen's and Llama's are made, trained on a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["".join(WORDS[:8]), "日本 naïve", "Hi there, naïve"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def texts_and_spans(number: int) -> list[tuple[str, list[tuple[int, int]]]]:
    generator = random.Random(4)
    found = []
    for _ in range(number):
        text = "".join(generator.choices(WORDS, k=generator.randint(1, 15)))
        borders = sorted(generator.choices(range(len(text) + 1), k=2 * generator.randint(1, 3)))
        found.append((text, list(zip(borders[::2], borders[1::2], strict=True))))
    return found


def compare(tokenizer: Any, *, seldom: bool = False) -> None:
    """Against the offsets that the package tokenizers tells."""
    token_bytes, backend, num_told = TokenBytes(tokenizer), tokenizer.backend_tokenizer, 0
    assert token_bytes.is_known
    for text, spans in texts_and_spans(400):
        encoding = backend.encode_batch([text], add_special_tokens=False)[0]
        ids = np.asarray(encoding.ids, dtype=np.int32)
        ends = token_bytes.ends(ids, text.encode("utf-8"))
        if ends is None:
            continue
        num_told += 1
        expected = tokens_in_spans(encoding, spans, num_tokens=len(ids))
        assert list(tokens_over_bytes(ends, spans, text)) == list(expected), (text, spans)
    assert num_told < 400 if seldom else num_told == 400


def test_masks_are_those_of_the_offsets_with_a_sentencepiece_vocabulary(tokenizer: Any) -> None:
    compare(tokenizer)


def test_masks_are_those_of_the_offsets_with_a_byte_level_vocabulary() -> None:
    compare(byte_level())


@pytest.mark.parametrize("change", ["NFC", "a space in front"])
def test_where_the_tokenizer_changes_the_text_nothing_is_told(change: str) -> None:
    if change == "NFC":
        compare(byte_level(normalizer=normalizers.NFC()), seldom=True)
    else:
        compare(byte_level(prefix=True), seldom=True)


def test_a_tokenizer_that_trims_offsets_or_is_of_another_kind_is_not_known() -> None:
    assert not TokenBytes(byte_level(trim_offsets=True)).is_known
    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert not TokenBytes(PreTrainedTokenizerFast(tokenizer_object=words)).is_known
