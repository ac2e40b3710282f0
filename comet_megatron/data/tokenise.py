"""Documents as samples: tokenise, then cut what is longer than a sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from comet_megatron.data.chat import ChatEncoder
from comet_megatron.data.documents import BadInput, JsonLine, RawDocument
from comet_megatron.data.rows import Chat
from comet_megatron.data.tokenizer import ids_of_document
from comet_megatron.errors import DataError

LONG_CHOICES = ("auto", "split", "truncate-left", "truncate-right")


@dataclass(frozen=True)
class Piece:
    """A sample to be: int32 [tokens], bool [tokens] or None; its number among the document's pieces."""

    number: int
    ids: np.ndarray
    mask: np.ndarray | None


@dataclass(frozen=True)
class Tokenised:
    """What came of one document.

    Attributes:
        name: the document's.
        num_tokens: before anything was cut or dropped.
        pieces: the samples.
        num_short: tokens of each piece that was dropped because it was too short.
        num_unlabelled: tokens of each piece that was dropped because none of its tokens carries loss.
        num_truncated: tokens that were cut off.
        error: why there is nothing; the other numbers are 0 then.
    """

    name: str
    num_tokens: int = 0
    is_chat: bool = False
    pieces: tuple[Piece, ...] = ()
    num_short: tuple[int, ...] = ()
    num_unlabelled: tuple[int, ...] = ()
    num_truncated: int = 0
    error: DataError | None = None


class DocumentTokeniser:
    """Turns one document at a time into samples; the same document gives the same samples.

    Args:
        tokenizer: a Hugging Face tokenizer.
        chat_template: Jinja text instead of the tokenizer's own; "" for its own.
        sequence_length: tokens of the longest sample.
        min_tokens: shorter samples are dropped.
        reserved: ids of tokens that are no text, and what they are called; a document with one of them is bad.
        long: one of LONG_CHOICES, what to do with longer documents; "auto" splits texts, and truncates chats at the
            left, since their last replies are the ones with the most before them.

    Raises:
        ConfigError: as ChatEncoder.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str,
        sequence_length: int,
        min_tokens: int,
        long: str,
        reserved: Mapping[int, str] = MappingProxyType({}),
    ) -> None:
        self.tokenizer = tokenizer
        self.encoder = ChatEncoder(tokenizer, chat_template=chat_template or None)
        self.sequence_length, self.min_tokens, self.long = sequence_length, min_tokens, long
        self.vocab_size, self.reserved = len(tokenizer), dict(reserved)
        self.lowest_reserved = min(reserved, default=self.vocab_size)

    def __call__(self, raw: RawDocument) -> Tokenised:
        """
        Raises:
            ConfigError: the tokenizer cannot do what such documents need. What is wrong with the document alone is
                returned.
        """
        try:
            ids, mask = self._encode(raw)
        except DataError as error:
            return Tokenised(raw.name, error=error)
        kept, short, unlabelled = [], [], []
        pieces, num_truncated = self._cut(ids, mask)
        for piece in pieces:
            if len(piece.ids) < self.min_tokens:
                short.append(len(piece.ids))
            elif piece.mask is not None and not piece.mask[1:].any():  # the first token is never predicted
                unlabelled.append(len(piece.ids))
            else:
                kept.append(piece)
        return Tokenised(
            name=raw.name,
            num_tokens=len(ids),
            is_chat=mask is not None,
            pieces=tuple(kept),
            num_short=tuple(short),
            num_unlabelled=tuple(unlabelled),
            num_truncated=num_truncated,
        )

    def _encode(self, raw: RawDocument) -> tuple[np.ndarray, np.ndarray | None]:
        if isinstance(raw, BadInput):
            raise raw.error
        where = raw.where if isinstance(raw, JsonLine) else raw.name
        document = raw.parse() if isinstance(raw, JsonLine) else raw
        mask = None
        if isinstance(document, Chat):
            ids, mask = self.encoder.encode(document, where=where)
        else:
            ids = ids_of_document(self.tokenizer, document.text)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            bad = ids.min() if ids.min() < 0 else ids.max()
            raise DataError(f"token id {bad} is outside the vocabulary of {self.vocab_size}", where=where)
        if len(ids) and ids.max() >= self.lowest_reserved and (found := np.isin(ids, list(self.reserved))).any():
            name = self.reserved[int(ids[found][0])]
            what = f"the text spells {name}, a token that stands for the memory's slots and beacons"
            raise DataError(what, where=where, way_out="write it in another way")
        return ids, mask

    def _cut(self, ids: np.ndarray, mask: np.ndarray | None) -> tuple[list[Piece], int]:
        """The pieces, and how many tokens are in none of them."""
        length, long = self.sequence_length, self.long
        if long == "auto":
            long = "split" if mask is None else "truncate-left"
        if long == "split":
            id_pieces = split_into_pieces(ids, sequence_length=length)
            mask_pieces: Sequence[np.ndarray | None] = [None] * len(id_pieces)
            if mask is not None:
                mask_pieces = split_into_pieces(mask, sequence_length=length)
            return [Piece(n, i, m) for n, (i, m) in enumerate(zip(id_pieces, mask_pieces, strict=True))], 0
        part = slice(max(0, len(ids) - length), None) if long == "truncate-left" else slice(0, length)
        return [Piece(0, ids[part], None if mask is None else mask[part])], max(0, len(ids) - length)


def split_into_pieces(ids: np.ndarray, *, sequence_length: int) -> list[np.ndarray]:
    """Cut [tokens] into consecutive pieces of sequence_length tokens; the last one has what is left."""
    return [ids[start : start + sequence_length] for start in range(0, len(ids), sequence_length)]
