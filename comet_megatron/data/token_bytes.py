"""Which bytes of a text each token stands for, told from the tokens alone.

The package tokenizers can tell it too, but a call that does takes a quarter longer than one that does not. Most
vocabularies are of one of two kinds, byte-level or SentencePiece with a byte fallback, in which the bytes of the
tokens, one after the other, are the text. Whether they are is checked each time, so a normaliser, a space put in front
or a vocabulary of another kind leads to no wrong answer but to none. (A normaliser that takes a space off the front and
puts one there again is not seen: the first token may then count as holding that space.)
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

_FALLBACK_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_NOT_IN_UTF8 = b"\xff"  # in the place of a token whose bytes are not known: no text has it


class TokenBytes:
    """The bytes of the tokens of a fast tokenizer.

    Attributes:
        is_known: whether the vocabulary is of one of the two kinds, and the tokenizer tells offsets as the bytes do:
            some leave white space at the ends of a token out of it.
    """

    def __init__(self, tokenizer: Any) -> None:
        parts = json.loads(tokenizer.backend_tokenizer.to_str())
        decoder, post_processor = json.dumps(parts["decoder"]), json.dumps(parts["post_processor"])
        is_byte_level, has_fallback = '"ByteLevel"' in decoder, '"ByteFallback"' in decoder
        self.is_known = (is_byte_level or has_fallback) and '"trim_offsets": true' not in post_processor
        if not self.is_known:
            return
        to_bytes = _of_byte_level if is_byte_level else _of_sentencepiece
        added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        vocabulary = tokenizer.get_vocab()
        self._pieces = [_NOT_IN_UTF8] * (max(vocabulary.values(), default=-1) + 1)
        for piece, number in vocabulary.items():
            self._pieces[number] = added[number].encode("utf-8") if number in added else to_bytes(piece)
        self._lengths = np.asarray([len(piece) for piece in self._pieces], dtype=np.int64)

    def ends(self, ids: np.ndarray, text: bytes) -> np.ndarray | None:
        """Where each token ends in the text, in bytes: int64 [tokens]; None: the tokens' bytes are not the text.

        Args:
            ids: of the text, int32 [tokens].
        """
        if b"".join(map(self._pieces.__getitem__, ids.tolist())) != text:
            return None
        return np.cumsum(self._lengths[ids])


def _of_sentencepiece(piece: str) -> bytes:
    if match := _FALLBACK_BYTE.fullmatch(piece):
        return bytes([int(match[1], 16)])
    return piece.replace(_SPACE, " ").encode("utf-8", "replace")


def _of_byte_level(piece: str) -> bytes:
    try:
        return bytes([_BYTES_OF_CHARACTERS[character] for character in piece])
    except KeyError:
        return _NOT_IN_UTF8


def _byte_level_alphabet() -> dict[str, int]:
    """Characters that stand for bytes: a printable one of Latin-1 for itself, those from U+0100 on for the others."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTES_OF_CHARACTERS = _byte_level_alphabet()
