"""What became of the documents: counts, report.json, a picture of the lengths."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from comet_megatron.data.shards import Manifest, load_index
from comet_megatron.data.tokenise import Tokenised
from comet_megatron.errors import OutputError

REPORT_NAME = "report.json"
PICTURE_NAME = "lengths.png"
REPORT_VERSION = 1
_LENGTH_BINS = 40  # by powers of 2


@dataclass
class PartCounts:
    """What became of the documents of one part, training or held out."""

    num_documents: int = 0
    num_chats: int = 0
    num_skipped: int = 0  # documents in which something was wrong
    num_document_tokens: int = 0  # before anything was cut or dropped
    num_split: int = 0  # documents
    num_truncated: int = 0  # documents
    num_truncated_tokens: int = 0
    num_short: int = 0  # pieces
    num_short_tokens: int = 0
    num_unlabelled: int = 0  # pieces
    num_unlabelled_tokens: int = 0
    num_sample_tokens: int = 0
    lengths: list[int] = field(default_factory=lambda: [0] * _LENGTH_BINS)  # documents of 2^n to 2^(n+1) - 1 tokens

    def add(self, document: Tokenised) -> None:
        """Count all of a document but its samples."""
        self.num_documents += 1
        if document.error is not None:
            self.num_skipped += 1
            return
        self.num_chats += document.is_chat
        self.num_document_tokens += document.num_tokens
        self.num_split += len(document.pieces) + len(document.num_short) + len(document.num_unlabelled) > 1
        self.num_truncated += document.num_truncated > 0
        self.num_truncated_tokens += document.num_truncated
        self.num_short += len(document.num_short)
        self.num_short_tokens += sum(document.num_short)
        self.num_unlabelled += len(document.num_unlabelled)
        self.num_unlabelled_tokens += sum(document.num_unlabelled)
        self.lengths[max(document.num_tokens, 1).bit_length() - 1] += 1

    def copy(self) -> PartCounts:
        return replace(self, lengths=self.lengths.copy())

    @staticmethod
    def sum(parts: Sequence[PartCounts]) -> PartCounts:
        """Of training and held-out documents together."""
        total = PartCounts()
        for name in (f.name for f in fields(PartCounts)):
            values = [getattr(part, name) for part in parts]
            lists = [list(map(sum, zip(*values, strict=True)))] if name == "lengths" else [sum(values)]
            setattr(total, name, lists[0])
        return total


@dataclass(frozen=True)
class SkippedSample:
    """A document that is not in the data, and why."""

    where: str
    what: str


@dataclass(frozen=True)
class PrepareReport:
    """What came of it.

    Attributes:
        counts: of all documents together.
        skipped: the documents in which something was wrong, in their order.
        skipped_files: names of files found in folders that are not UTF-8.
        eval_dir, eval: None if no document was held out.
        was_done: an earlier call had finished it.
    """

    num_eval_documents: int
    counts: PartCounts
    skipped: tuple[SkippedSample, ...]
    skipped_files: tuple[str, ...]
    train_dir: Path
    train: Manifest
    eval_dir: Path | None
    eval: Manifest | None
    was_done: bool = False

    @property
    def num_documents(self) -> int:
        return self.counts.num_documents

    @property
    def num_dropped_pieces(self) -> int:
        """Pieces shorter than min_tokens."""
        return self.counts.num_short

    @property
    def num_dropped_tokens(self) -> int:
        return self.counts.num_short_tokens


def write_report(folder: Path, report: PrepareReport, made_from: Mapping[str, Any]) -> None:
    """report.json and lengths.png; the same data gives the same bytes.

    Args:
        folder: with the parts' shards, complete.
    """
    parts = {"train": report.train} | ({"eval": report.eval} if report.eval is not None else {})
    lengths = {name: load_index(folder / name, manifest=manifest).num_tokens for name, manifest in parts.items()}
    content = {
        "version": REPORT_VERSION,
        "made_from": dict(made_from),
        "documents": asdict(report.counts),
        "num_eval_documents": report.num_eval_documents,
        "skipped": [asdict(sample) for sample in report.skipped],
        "skipped_files": list(report.skipped_files),
        "parts": {name: _part(manifest, lengths[name]) for name, manifest in parts.items()},
    }
    draw_lengths(folder / PICTURE_NAME, report.counts, np.concatenate(list(lengths.values())))
    (folder / REPORT_NAME).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _part(manifest: Manifest, lengths: np.ndarray) -> dict[str, Any]:
    return {
        "num_samples": manifest.num_samples,
        "num_tokens": manifest.num_tokens,
        "num_labels": manifest.num_labels,
        "share_of_labels": round(manifest.num_labels / manifest.num_tokens, 6),
        "num_shards": len(manifest.shards),
        "fingerprint": manifest.fingerprint,
        "shortest": int(lengths.min()),
        "median": float(np.median(lengths)),
        "longest": int(lengths.max()),
    }


def draw_lengths(path: Path, counts: PartCounts, sample_lengths: np.ndarray) -> None:
    """Histograms of the documents' and of the samples' lengths, by powers of 2."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    samples = np.bincount(np.log2(sample_lengths).astype(np.int64), minlength=_LENGTH_BINS)
    documents = np.asarray(counts.lengths)
    used = np.flatnonzero(samples + documents)
    bins = np.arange(used.min(), used.max() + 1)
    figure = Figure(figsize=(8, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.bar(bins - 0.2, documents[bins], width=0.4, label="documents, as they are")
    axes.bar(bins + 0.2, samples[bins], width=0.4, label="samples, as written")
    axes.set_xticks(bins, [f"{1 << n:,}+" for n in bins.tolist()], rotation=45)
    axes.set_xlabel("tokens")
    axes.set_ylabel("number")
    axes.legend()
    figure.savefig(path, dpi=100, metadata={"Software": None})


def load_report(folder: Path) -> dict[str, Any] | None:
    """The content of report.json; None if it is not there or is not one.

    Raises:
        OutputError: it is of another version.
    """
    path = folder / REPORT_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, is_ours = content["version"], isinstance(content["made_from"], dict)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if is_ours and version != REPORT_VERSION:
        what = f"the output is finished, its report of version {version}, but this program reads {REPORT_VERSION}"
        raise OutputError(what, where=str(path), way_out="give the name of a new folder, or delete this one first")
    return content if is_ours else None
