"""Tokenizers as folders that transformers.AutoTokenizer loads: train, load, fingerprint, use."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from comet_megatron.data.documents import Document, text_files
from comet_megatron.errors import CheckpointError, ConfigError, DataError
from comet_megatron.new_folder import check_is_new, new_folder

EOS_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<|pad|>"
UNK_TOKEN = "<unk>"  # SentencePiece insists on one; with bytes to fall back to, no text becomes it
SPACE = "\u2581"  # SentencePiece's stand-in for a space
# Pieces of their own. SentencePiece trains on lines, and uses the tab internally, so it can learn neither.
USER_DEFINED = ("\n", "\t")
MIN_VOCAB_SIZE = 3 + len(USER_DEFINED) + 256
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_CHECKED_CHARACTERS = 200_000  # of the training text, on which the two forms of the tokenizer are compared


def train_sentencepiece(
    files: Iterable[str | os.PathLike[str] | Document],
    *,
    vocab_size: int,
    output_dir: str | os.PathLike[str],
    character_coverage: float = 0.9995,
    max_piece_length: int = 16,
    num_threads: int = 1,
) -> Path:
    """Train a byte-fallback BPE model and write it as a folder for AutoTokenizer and for SentencePiece alike.

    No normalisation: text comes back from the ids as it was, white space included, with one exception that all
    SentencePiece models share: the character U+2581 comes back as a space. Digits are single pieces, runs of spaces
    can be one piece, `\\n` and `\\t` are always pieces of their own.

    Args:
        files: paths of text files (as documents.text_files takes them) or Documents.
        vocab_size: pieces in all: specials and 256 bytes included. The model has exactly that many.
        output_dir: a new folder; it appears when it is complete.
        character_coverage: share of the characters of the text that get a piece; the others become bytes.
        max_piece_length: characters of the longest piece.
        num_threads: threads SentencePiece may use.

    Returns:
        The folder: tokenizer.model, tokenizer.json, tokenizer_config.json, special_tokens_map.json.

    Raises:
        ConfigError: vocab_size does not fit the text.
        OutputError: the folder is not empty or cannot be made.
        DataError: no input, or no text in it.
    """
    check_is_new(output_dir)
    if vocab_size <= MIN_VOCAB_SIZE:
        raise ConfigError(f"vocab_size={vocab_size} leaves no room for text", way_out=f"more than {MIN_VOCAB_SIZE}")
    lines = _Lines(files)
    proto_bytes = _train(
        lines,
        vocab_size=vocab_size,
        character_coverage=character_coverage,
        max_sentencepiece_length=max_piece_length,
        num_threads=num_threads,
    )
    with new_folder(output_dir) as folder:
        (folder / "tokenizer.model").write_bytes(proto_bytes)
        export_sentencepiece(proto_bytes, folder)
        _check_export(folder, proto_bytes, "\n".join(lines.first_lines))
    return Path(output_dir)


class _Lines:
    """The lines of all documents; keeps the first ones."""

    def __init__(self, files: Iterable[str | os.PathLike[str] | Document]) -> None:
        self.files = files
        self.first_lines: list[str] = []
        self.error: DataError | None = None

    def __iter__(self) -> Iterator[str]:
        kept = 0
        try:
            for document in self._documents():
                for line in document.text.split("\n"):
                    if kept < _CHECKED_CHARACTERS:
                        kept += len(line)
                        self.first_lines.append(line)
                    if line:
                        yield line
        except DataError as error:  # SentencePiece would hide it
            self.error = error

    def _documents(self) -> Iterator[Document]:
        for file in self.files:
            if isinstance(file, Document):
                yield file
            else:
                yield from text_files([file])


def _train(lines: _Lines, **settings: Any) -> bytes:
    """A serialized SentencePiece model."""
    import sentencepiece

    model = io.BytesIO()
    failure: Exception | None = None
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=list(USER_DEFINED),
            unk_id=0,
            eos_id=1,
            pad_id=2,
            bos_id=-1,
            unk_piece=UNK_TOKEN,
            eos_piece=EOS_TOKEN,
            pad_piece=PAD_TOKEN,
            max_sentence_length=1 << 24,  # longer lines would be dropped silently
            minloglevel=2,
            **settings,
        )
    except (RuntimeError, OSError) as error:
        failure = error
    if lines.error is not None:
        raise lines.error
    if not any(lines.first_lines):
        raise DataError("there is no text to train a tokenizer on", way_out="give files that are not empty")
    if failure is not None:
        reason = str(failure).rsplit("] ", 1)[-1].strip()
        raise ConfigError(
            f"vocab_size={settings['vocab_size']} does not fit the text: {reason}",
            way_out="change the vocabulary size or give more text",
        ) from failure
    return model.getvalue()


def export_sentencepiece(proto_bytes: bytes, folder: Path) -> None:
    """Write tokenizer.json and the two small files that AutoTokenizer wants, from a model that we trained."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    proto = _parsed(proto_bytes)
    pieces = [piece.piece for piece in proto.pieces]
    mergeable = {p.piece for p in proto.pieces if p.type == p.NORMAL}
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=list(bpe_merges(pieces, mergeable=mergeable)),
            unk_token=UNK_TOKEN,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special_tokens = {"eos_token": EOS_TOKEN, "pad_token": PAD_TOKEN, "unk_token": UNK_TOKEN}
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, special=True) for t in (UNK_TOKEN, EOS_TOKEN, PAD_TOKEN)]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in USER_DEFINED])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        **special_tokens,
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_tokens)):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _parsed(proto_bytes: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it at run time
    proto.ParseFromString(proto_bytes)
    return proto


def bpe_merges(pieces: list[str], *, mergeable: set[str]) -> Iterator[tuple[str, str]]:
    """All ways to make a piece out of two others, in the order in which BPE tries them.

    SentencePiece keeps pieces and no merges: two neighbours may join if the result is a piece, earlier pieces first.
    Only learned pieces take part; transformers' generate_merges would also build `<0x0A>` out of text that looks so.

    Args:
        pieces: the vocabulary, learned pieces ordered from the first learned to the last.
        mergeable: the learned pieces.
    """
    number = {piece: n for n, piece in enumerate(pieces)}
    for piece in pieces:
        if piece not in mergeable:
            continue
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        yield from sorted((c for c in cuts if mergeable.issuperset(c)), key=lambda c: (number[c[0]], number[c[1]]))


def _check_export(folder: Path, proto_bytes: bytes, text: str) -> None:
    """Compare tokenizer.json with SentencePiece on the training text."""
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_proto=proto_bytes)
    tokenizer = load_tokenizer(folder)
    for line in text.split("\n"):
        if encode(tokenizer, line) != reference.encode(line):
            raise DataError(
                "the exported tokenizer differs from the SentencePiece model",
                where=f"line {line!r}",
                way_out="please report it with this line; tokenizer.model alone would be right",
            )


def load_tokenizer(folder: str | os.PathLike[str]) -> Any:
    """The transformers tokenizer of a local folder; never runs code from it and never asks the internet.

    Raises:
        DataError: the folder is missing, holds no tokenizer, or the tokenizer is damaged.
    """
    path = Path(folder)
    way_out = "give a folder that tools/train_tokenizer.py wrote, tokenizers/python_stdlib_4k, or that of a HF model"
    if not path.is_dir():
        raise DataError("the tokenizer folder does not exist", where=str(folder), way_out=way_out)
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        names = ", ".join(_TOKENIZER_FILES)
        raise DataError(f"the folder holds no tokenizer: none of {names}", where=str(folder), way_out=way_out)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and its Rust parts raise anything here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"the tokenizer cannot be loaded: {reason}", where=str(folder), way_out=way_out) from error
    if not len(tokenizer):
        raise DataError("the tokenizer has no vocabulary", where=str(folder), way_out=way_out)
    return tokenizer


def check_has_ids(tokenizer: Any, ids: Iterable[int], *, where: str) -> None:
    """Refuse a tokenizer that lacks tokens of a model's memory.

    Args:
        ids: of the beacons and the placeholder.

    Raises:
        CheckpointError: names the ids that are not in its vocabulary: it is not the one the model was trained with.
    """
    known = set(tokenizer.get_vocab().values())
    if missing := sorted(set(ids) - known):
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise CheckpointError(
            f"the tokenizer lacks the beacon tokens: it has {len(known)} ids, and not {shown}",
            where=where,
            way_out="copy the tokenizer that was saved with this model, not the backbone's",
        )


def tokenizer_fingerprint(folder_or_tokenizer: Any, *, below: int | None = None) -> str:
    """sha256 of the vocabulary (tokens with their ids, added ones too) and of the merges; hexadecimal.

    The same before and after save_pretrained, in every version of the libraries.

    Args:
        below: leave out ids from here on: as it was before they were added.

    Raises:
        DataError: as load_tokenizer, if a folder is given.
    """
    tokenizer = folder_or_tokenizer
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    merges: list[list[str]] = []
    with contextlib.suppress(AttributeError):  # a tokenizer in pure Python has no backend, its vocabulary must do
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        # older libraries write "a b" for ["a", "b"]
        merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model.get("merges", [])]
    vocabulary = sorted((token, i) for token, i in tokenizer.get_vocab().items() if below is None or i < below)
    content = {"vocabulary": vocabulary, "merges": merges}
    return hashlib.sha256(json.dumps(content).encode("utf-8")).hexdigest()


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text, and of nothing but the text: no token is added, and `<|endoftext|>` in it is plain text."""
    if not tokenizer.is_fast:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    # No offsets: they would take a fifth to a third of the time.
    backend = plain_backend(tokenizer, split_special_tokens=True)
    return backend.encode_batch_fast([text], add_special_tokens=False)[0].ids


def plain_backend(tokenizer: Any, *, split_special_tokens: bool) -> Any:
    """The package tokenizers' part of a fast tokenizer, neither truncating nor padding, as a call of it sets it.

    Args:
        split_special_tokens: a special token that is spelled in a text is plain text, not that token.
    """
    backend = tokenizer.backend_tokenizer
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != split_special_tokens:
        backend.encode_special_tokens = split_special_tokens
    return backend


def ids_of_document(tokenizer: Any, text: str) -> np.ndarray:
    """The ids of a document and the id that ends it: int32 [tokens + 1].

    Raises:
        DataError: the tokenizer has no end-of-text token.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer has no end-of-text token",
            where=str(getattr(tokenizer, "name_or_path", "")),
            way_out='set "eos_token" in its tokenizer_config.json',
        )
    return np.asarray([*encode(tokenizer, text), tokenizer.eos_token_id], dtype=np.int32)


def load_text_tokenizer(path: str | os.PathLike[str]) -> Any:
    """The tokenizer of a folder, as load_tokenizer, or of one SentencePiece file as tools/train_tokenizer.py makes it.

    Raises:
        DataError: as load_tokenizer, or the file is no SentencePiece model of that kind.
    """
    if not Path(path).is_file():
        return load_tokenizer(path)
    from google.protobuf.message import DecodeError

    way_out = "give a tokenizer.model of tools/train_tokenizer.py, or the folder of a Hugging Face tokenizer"
    proto_bytes = Path(path).read_bytes()
    try:
        proto = _parsed(proto_bytes)
    except DecodeError as error:
        raise DataError("the file is no SentencePiece model", where=str(path), way_out=way_out) from error
    normalizer, pieces = proto.normalizer_spec, [piece.piece for piece in proto.pieces]
    changes_text = normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE or changes_text or pieces[1:3] != [EOS_TOKEN, PAD_TOKEN]:
        what = "the SentencePiece model is of another kind: not BPE, or it changes text before it cuts it"
        raise DataError(what, where=str(path), way_out=way_out)
    with tempfile.TemporaryDirectory(prefix="comet_") as folder:
        export_sentencepiece(proto_bytes, Path(folder))
        return load_tokenizer(folder)
