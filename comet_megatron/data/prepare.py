"""Turn documents into folders of training and held-out shards."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from comet_megatron.data.documents import Document
from comet_megatron.data.shards import Manifest, Sample, ShardWriter
from comet_megatron.data.tokenizer import ids_of_document, tokenizer_fingerprint
from comet_megatron.errors import ConfigError, DataError
from comet_megatron.new_folder import check_is_new, new_folder

NO_LIMIT = 0


@dataclass(frozen=True)
class PrepareSettings:
    """How documents become samples."""

    sequence_length: int  # tokens of the longest sample
    min_tokens: int = 32  # shorter samples are dropped
    eval_fraction: float = 0.05  # of the documents; 0: none
    shard_bytes: int = 4 << 20  # token bytes of a shard, about
    max_documents: int = NO_LIMIT
    max_tokens: int = NO_LIMIT  # of all samples together

    def check(self) -> None:
        """Raise one ConfigError with all values that make no sense."""
        rules = [
            (self.min_tokens >= 2, f"min_tokens={self.min_tokens}", "2 or more: a sample needs a token and the next"),
            (
                self.sequence_length >= max(self.min_tokens, 2),
                f"sequence_length={self.sequence_length}",
                f"{max(self.min_tokens, 2)} (min_tokens) or more",
            ),
            (0 <= self.eval_fraction < 1, f"eval_fraction={self.eval_fraction}", "from 0 to below 1"),
            (self.shard_bytes >= 1, f"shard_bytes={self.shard_bytes}", "more than 0"),
            (self.max_documents >= 0, f"max_documents={self.max_documents}", "1 or more; 0 for all"),
            (self.max_tokens >= 0, f"max_tokens={self.max_tokens}", "1 or more; 0 for all"),
        ]
        problems = [
            ConfigError(f"{given} is out of range", way_out=f"use {use}") for fine, given, use in rules if not fine
        ]
        if problems:
            raise ConfigError.collect(problems)


@dataclass(frozen=True)
class PrepareReport:
    """What came of it."""

    num_documents: int
    num_eval_documents: int
    num_dropped_pieces: int  # shorter than min_tokens
    num_dropped_tokens: int
    train_dir: Path
    train: Manifest
    eval_dir: Path | None  # None: no document was held out
    eval: Manifest | None


def prepare_data(
    documents: Iterable[Document], *, tokenizer: Any, output_dir: str | os.PathLike[str], settings: PrepareSettings
) -> PrepareReport:
    """Tokenise, cut, and write OUTPUT/train and, if documents are held out, OUTPUT/eval.

    A document ends in the tokenizer's end-of-text token and is never joined with another. It is read until
    max_documents documents are read or the next piece would exceed max_tokens. OUTPUT appears when it is complete.
    The same documents, tokenizer and settings give the same bytes.

    Raises:
        ConfigError: settings out of range.
        OutputError: the output folder is not empty or cannot be made.
        DataError: the input is bad, or nothing is left to train on.
    """
    settings.check()
    check_is_new(output_dir)
    common: dict[str, Any] = {
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "shard_bytes": settings.shard_bytes,
    }
    num_documents = num_eval_documents = num_dropped_pieces = num_dropped_tokens = num_tokens = 0
    with new_folder(output_dir) as folder, contextlib.ExitStack() as stack:
        writers: dict[str, ShardWriter] = {}
        full = False
        for document in documents:
            held_out = is_held_out(document.name, fraction=settings.eval_fraction)
            part = "eval" if held_out else "train"
            num_documents += 1
            num_eval_documents += held_out
            pieces = split_into_pieces(
                ids_of_document(tokenizer, document.text), sequence_length=settings.sequence_length
            )
            for number, piece in enumerate(pieces):
                if len(piece) < settings.min_tokens:
                    num_dropped_pieces += 1
                    num_dropped_tokens += len(piece)
                    continue
                if full := settings.max_tokens != NO_LIMIT and num_tokens + len(piece) > settings.max_tokens:
                    break
                if part not in writers:
                    (folder / part).mkdir()
                    writers[part] = stack.enter_context(ShardWriter(folder / part, **common))
                writers[part].add(Sample(piece, {"document": document.name, "piece": number}))
                num_tokens += len(piece)
            if full or num_documents == settings.max_documents:
                break
        _check_something_is_left(writers, num_documents=num_documents, num_eval=num_eval_documents, settings=settings)
        manifests = {part: writer.finish(settings=asdict(settings)) for part, writer in writers.items()}
    target = Path(output_dir)
    return PrepareReport(
        num_documents=num_documents,
        num_eval_documents=num_eval_documents,
        num_dropped_pieces=num_dropped_pieces,
        num_dropped_tokens=num_dropped_tokens,
        train_dir=target / "train",
        train=manifests["train"],
        eval_dir=target / "eval" if "eval" in manifests else None,
        eval=manifests.get("eval"),
    )


def split_into_pieces(ids: np.ndarray, *, sequence_length: int) -> list[np.ndarray]:
    """Cut [tokens] into consecutive pieces of sequence_length tokens; the last one has what is left."""
    return [ids[start : start + sequence_length] for start in range(0, len(ids), sequence_length)]


def is_held_out(name: str, *, fraction: float) -> bool:
    """Whether the document of this name is held out: a hash of the name, so whole documents, the same every time."""
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8")).digest()[:8], "big")
    return number < fraction * 2**64


def _check_something_is_left(
    writers: dict[str, ShardWriter], *, num_documents: int, num_eval: int, settings: PrepareSettings
) -> None:
    if "train" in writers:
        return
    if not num_documents:
        raise DataError("there are no documents", way_out="check --input")
    if num_eval == num_documents:
        what = f"all documents ({num_documents}) fell into the held-out part, none is left to train on"
        raise DataError(what, way_out="use --eval-fraction 0, or give more documents")
    raise DataError(
        f"none of {num_documents} documents gives a sample of {settings.min_tokens} tokens or more to train on",
        way_out="lower --min-tokens, raise --max-tokens if it is set, or give longer documents",
    )
