"""Turn documents into folders of training and held-out shards."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from comet_megatron.data.documents import Document, DocumentSource, RawDocument
from comet_megatron.data.journal import Journal, continued_folder, differences, passing_folder
from comet_megatron.data.report import PartCounts, PrepareReport, SkippedSample, load_report, write_report
from comet_megatron.data.shard_writer import ShardWriter
from comet_megatron.data.shards import Manifest, Sample, ShardInfo, load_manifest
from comet_megatron.data.tokenise import LONG_CHOICES, DocumentTokeniser, Tokenised, split_into_pieces
from comet_megatron.data.tokenizer import tokenizer_fingerprint
from comet_megatron.data.workers import tokenise_all
from comet_megatron.errors import ConfigError, DataError, OutputError
from comet_megatron.new_folder import check_is_new

__all__ = ["NO_LIMIT", "PrepareReport", "PrepareSettings", "is_held_out", "prepare_data", "split_into_pieces"]

NO_LIMIT = 0
ON_BAD_SAMPLE = ("stop", "skip")
_PARTS = ("train", "eval")

ProgressReport = Callable[[int, int], None]  # documents, tokens since the start of this call


@dataclass(frozen=True)
class PrepareSettings:
    """How documents become samples."""

    sequence_length: int  # tokens of the longest sample
    min_tokens: int = 32  # shorter samples are dropped
    eval_fraction: float = 0.05  # of the documents; 0: none
    shard_bytes: int = 4 << 20  # token bytes of a shard, about
    max_documents: int = NO_LIMIT
    max_tokens: int = NO_LIMIT  # of all samples together
    long: str = "auto"  # what to do with longer documents, see tokenise.DocumentTokeniser
    on_bad_sample: str = "stop"  # or skip: leave it out and list it in the report

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
            (self.long in LONG_CHOICES, f"long={self.long}", ", ".join(LONG_CHOICES)),
            (self.on_bad_sample in ON_BAD_SAMPLE, f"on_bad_sample={self.on_bad_sample}", " or ".join(ON_BAD_SAMPLE)),
        ]
        problems = [
            ConfigError(f"{given} is out of range", way_out=f"use {use}") for fine, given, use in rules if not fine
        ]
        if problems:
            raise ConfigError.collect(problems)


def prepare_data(
    documents: Iterable[Document],
    *,
    tokenizer: Any,
    output_dir: str | os.PathLike[str],
    settings: PrepareSettings,
    chat_template: str = "",
    reserved: Mapping[int, str] = MappingProxyType({}),
    num_workers: int = 1,
    may_continue: bool = False,
    on_progress: ProgressReport | None = None,
) -> PrepareReport:
    """Tokenise, cut, and write OUTPUT/train and, if documents are held out, OUTPUT/eval; and a report of it.

    A text ends in the tokenizer's end-of-text token, a chat as its template has it; none is joined with another. The
    input is read until max_documents documents are read or the next piece would exceed max_tokens. OUTPUT appears when
    it is complete. The same documents, tokenizer and settings give the same bytes, with any number of workers.

    Args:
        documents: plain ones, or a DocumentSource, whose rows may be chats.
        chat_template: Jinja text instead of the tokenizer's own.
        reserved: ids that no text may have, see DocumentTokeniser.
        num_workers: processes that tokenise; 1: this one.
        may_continue: keep what is finished after an error or an interruption, and take it up if it is there; do
            nothing if OUTPUT is finished with the same input and settings. Needs a DocumentSource.
        on_progress: called after each document.

    Raises:
        ConfigError: settings out of range, or a tokenizer that cannot do what the documents need.
        OutputError: the output folder is not empty or cannot be made, or another call's unfinished work is there.
        DataError: the input is bad, or nothing is left to train on.
        PeerError: a process that tokenised died.
    """
    settings.check()
    is_source = isinstance(documents, DocumentSource)
    assert is_source or not may_continue, "only files can be told to be the same"
    tokenise = DocumentTokeniser(
        tokenizer,
        chat_template=chat_template,
        sequence_length=settings.sequence_length,
        min_tokens=settings.min_tokens,
        long=settings.long,
        reserved=reserved,
    )
    made_from = {
        **asdict(settings),
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "chat_template_sha256": hashlib.sha256((tokenise.encoder.template or "").encode("utf-8")).hexdigest(),
        "input_sha256": documents.fingerprint() if isinstance(documents, DocumentSource) else "",
    }
    if may_continue and (done := _finished(Path(output_dir), made_from)) is not None:
        return done
    check_is_new(output_dir)
    rows: Iterable[RawDocument] = documents.rows() if isinstance(documents, DocumentSource) else documents
    given = continued_folder(output_dir, made_from) if may_continue else passing_folder(output_dir)
    with given as (folder, journal), contextlib.ExitStack() as stack:
        preparation = _Preparation(folder, journal, made_from, settings, vocab_size=len(tokenizer), stack=stack)
        preparation.take_up()
        preparation.run(rows, tokenise, num_workers=num_workers, on_progress=on_progress)
        manifests = preparation.finish()
        target = Path(output_dir)
        report = PrepareReport(
            num_eval_documents=preparation.parts["eval"].counts.num_documents,
            counts=PartCounts.sum([part.counts for part in preparation.parts.values()]),
            skipped=preparation.skipped(),
            skipped_files=tuple(getattr(documents, "skipped", ())),
            train_dir=target / "train",
            train=manifests["train"],
            eval_dir=target / "eval" if "eval" in manifests else None,
            eval=manifests.get("eval"),
        )
        write_report(folder, report, made_from)
    return report


@dataclass
class _Part:
    """Training or held-out documents: how far they are, and how far an earlier run's finished shards reach.

    Attributes:
        skipped: (number of the document, what was wrong).
        num_journaled: of `skipped`.
        continue_at: the document in which the last finished shard ends.
        continue_piece: the first of its pieces that is in no finished shard.
    """

    writer: ShardWriter | None = None
    counts: PartCounts = field(default_factory=PartCounts)
    skipped: list[tuple[int, SkippedSample]] = field(default_factory=list)
    num_journaled: int = 0
    continue_at: int = -1
    continue_piece: int = 0


class _Preparation:
    """The work on one output folder."""

    def __init__(
        self,
        folder: Path,
        journal: Journal | None,
        made_from: Mapping[str, Any],
        settings: PrepareSettings,
        *,
        vocab_size: int,
        stack: contextlib.ExitStack,
    ) -> None:
        self.folder, self.journal, self.made_from, self.settings = folder, journal, made_from, settings
        self.vocab_size, self.stack = vocab_size, stack
        self.parts = {name: _Part() for name in _PARTS}

    def take_up(self) -> None:
        """Continue with the shards that an earlier run finished; remove what it did not finish."""
        if self.journal is None:
            return
        taken, whole = [], dict.fromkeys(_PARTS, True)
        for entry in self.journal.entries:
            name = entry.get("part")
            if name in self.parts and whole[name]:
                whole[name] = self._take_up_shard(name, entry)
                if whole[name]:
                    taken.append(entry)
        self.journal.rewrite(taken)
        known = {(entry["part"], entry["shard"]["name"]) for entry in taken}
        for name in _PARTS:
            for path in (self.folder / name).glob("*"):
                if (name, path.name) not in known:
                    path.unlink()

    def run(
        self,
        rows: Iterable[RawDocument],
        tokenise: DocumentTokeniser,
        *,
        num_workers: int,
        on_progress: ProgressReport | None,
    ) -> None:
        """Write the samples of all documents that are not in finished shards."""
        numbers: deque[int] = deque()  # of the documents handed to `tokenise`
        done = itertools.count(1)
        num_tokens = 0
        results = tokenise_all(self._to_do(rows, numbers), tokenise, num_workers=num_workers)
        with contextlib.closing(results):
            for document in results:
                if not self._add(numbers.popleft(), document):
                    return
                num_tokens += document.num_tokens
                if on_progress is not None:
                    on_progress(next(done), num_tokens)

    def finish(self) -> dict[str, Manifest]:
        """Write the indexes and manifests.

        Raises:
            DataError: nothing is left to train on.
        """
        counts = {name: part.counts for name, part in self.parts.items()}
        if self.parts["train"].writer is None:
            raise _nothing_left(counts["train"].num_documents, counts["eval"].num_documents, settings=self.settings)
        settings = {k: v for k, v in self.made_from.items() if k != "tokenizer_fingerprint"}
        return {n: p.writer.finish(settings=settings) for n, p in self.parts.items() if p.writer is not None}

    def skipped(self) -> tuple[SkippedSample, ...]:
        """All documents with something wrong in them, in their order."""
        found = sorted(itertools.chain(*(part.skipped for part in self.parts.values())), key=lambda pair: pair[0])
        return tuple(sample for _, sample in found)

    def _to_do(self, rows: Iterable[RawDocument], numbers: deque[int]) -> Iterator[RawDocument]:
        limit = None if self.settings.max_documents == NO_LIMIT else self.settings.max_documents
        for number, raw in enumerate(itertools.islice(rows, limit)):
            if number >= self.parts[self._part_of(raw.name)].continue_at:
                numbers.append(number)
                yield raw

    def _part_of(self, name: str) -> str:
        return "eval" if is_held_out(name, fraction=self.settings.eval_fraction) else "train"

    def _add(self, number: int, document: Tokenised) -> bool:
        """Count a document and write its samples; False when max_tokens is reached.

        Raises:
            DataError: something is wrong with it, and on_bad_sample is "stop".
        """
        name = self._part_of(document.name)
        part = self.parts[name]
        before = part.counts.copy()
        part.counts.add(document)
        if document.error is not None:
            if self.settings.on_bad_sample == "stop":
                raise _with_advice(document.error)
            part.skipped.append((number, SkippedSample(document.error.where, document.error.what)))
        for nth, piece in enumerate(document.pieces):
            is_written = number == part.continue_at and nth < part.continue_piece
            if not is_written and self._would_be_full(number, len(piece.ids)):
                return False
            part.counts.num_sample_tokens += len(piece.ids)
            if not is_written:
                writer = self._writer(name)
                num_shards = len(writer.shards)
                writer.add(Sample(piece.ids, {"document": document.name, "piece": piece.number}, piece.mask))
                if len(writer.shards) > num_shards:
                    self._note_shard(name, number, nth + 1, before)
        return True

    def _would_be_full(self, number: int, num_tokens: int) -> bool:
        if self.settings.max_tokens == NO_LIMIT or number < max(part.continue_at for part in self.parts.values()):
            return False  # an earlier run came further, so the limit is not reached here
        total = sum(part.counts.num_sample_tokens for part in self.parts.values())
        return total + num_tokens > self.settings.max_tokens

    def _writer(self, name: str) -> ShardWriter:
        part = self.parts[name]
        if part.writer is None:
            (self.folder / name).mkdir(exist_ok=True)
            part.writer = self.stack.enter_context(
                ShardWriter(
                    self.folder / name,
                    tokenizer_fingerprint=self.made_from["tokenizer_fingerprint"],
                    vocab_size=self.vocab_size,
                    shard_bytes=self.settings.shard_bytes,
                )
            )
        return part.writer

    def _note_shard(self, name: str, number: int, num_pieces: int, before: PartCounts) -> None:
        """Write into the journal that a shard is finished.

        Args:
            number: of the document that was being written.
            num_pieces: of its samples, those in finished shards.
            before: the part's counts without this document.
        """
        if self.journal is None:
            return
        part = self.parts[name]
        assert part.writer is not None
        last = len(part.writer.shards) - 1
        self.journal.write(
            {
                "part": name,
                "shard": asdict(part.writer.shards[last]),
                "checksum": part.writer.checksum(last),
                "document": number,
                "pieces": num_pieces,
                "counts": asdict(before),
                "skipped": [[n, asdict(sample)] for n, sample in part.skipped[part.num_journaled :]],
            }
        )
        part.num_journaled = len(part.skipped)

    def _take_up_shard(self, name: str, entry: Mapping[str, Any]) -> bool:
        """Whether the shard of a journal's entry is as it was written; then it is this run's too."""
        part = self.parts[name]
        try:
            info, checksum = ShardInfo(**entry["shard"]), int(entry["checksum"])
            counts, at, piece = PartCounts(**entry["counts"]), int(entry["document"]), int(entry["pieces"])
            skipped = [(int(n), SkippedSample(**sample)) for n, sample in entry["skipped"]]
        except (KeyError, TypeError, ValueError):
            return False
        if not (self.folder / name / info.name).is_file():
            return False
        if not self._writer(name).continue_with(info, checksum=checksum):
            return False
        part.counts, part.continue_at, part.continue_piece = counts, at, piece
        part.skipped += skipped
        part.num_journaled = len(part.skipped)
        return True


def is_held_out(name: str, *, fraction: float) -> bool:
    """Whether the document of this name is held out: a hash of the name, so whole documents, the same every time."""
    number = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
    return number < fraction * 2**64


def _finished(target: Path, made_from: Mapping[str, Any]) -> PrepareReport | None:
    """The report of an output that is finished; None if there is none.

    Raises:
        OutputError: it is made from something else.
        DataError: it is damaged.
    """
    content = load_report(target)
    if content is None:
        return None
    if different := differences(content["made_from"], made_from):
        raise OutputError(
            "the output folder is not empty, it was prepared otherwise: " + "; ".join(different),
            where=str(target),
            way_out="give the name of a new folder, or delete this one first; nothing is overwritten",
        )
    manifests = {name: load_manifest(target / name) for name in content["parts"]}
    try:
        return PrepareReport(
            num_eval_documents=content["num_eval_documents"],
            counts=PartCounts(**content["documents"]),
            skipped=tuple(SkippedSample(**sample) for sample in content["skipped"]),
            skipped_files=tuple(content["skipped_files"]),
            train_dir=target / "train",
            train=manifests["train"],
            eval_dir=target / "eval" if "eval" in manifests else None,
            eval=manifests.get("eval"),
            was_done=True,
        )
    except (KeyError, TypeError) as error:
        raise DataError(f"the report is damaged: {error}", where=str(target), way_out="delete the folder") from error


def _with_advice(error: DataError) -> DataError:
    """The error of a document, and how to go on without it."""
    advice = "to leave such documents out and list them in the report: --on-bad-sample skip"
    return DataError(error.what, where=error.where, way_out="\n  ".join(filter(None, (error.way_out, advice))))


def _nothing_left(num_train: int, num_eval: int, *, settings: PrepareSettings) -> DataError:
    num_documents = num_train + num_eval
    if not num_documents:
        return DataError("there are no documents", way_out="check --input")
    if not num_train:
        what = f"all documents ({num_documents}) fell into the held-out part, none is left to train on"
        return DataError(what, way_out="use --eval-fraction 0, or give more documents")
    return DataError(
        f"none of {num_documents} documents gives a sample of {settings.min_tokens} tokens or more to train on",
        way_out="lower --min-tokens, raise --max-tokens if it is set, or give longer documents",
    )
