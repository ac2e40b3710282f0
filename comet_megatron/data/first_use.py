"""JSONL that is named where shards could be: they are made of it once, beside the run, and used from then on."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from comet_megatron.config.schema import DataSection
from comet_megatron.data.prepare import PrepareReport, PrepareSettings, prepare_data
from comet_megatron.data.report import PICTURE_NAME, REPORT_NAME
from comet_megatron.data.sources import TRAIN, Source
from comet_megatron.data.tokenizer import tokenizer_fingerprint
from comet_megatron.data.workers import auto_workers
from comet_megatron.errors import DataError, OutputError

SUFFIX = ".data"  # of the folder beside the run's


def settings_of(data: DataSection) -> PrepareSettings:
    """How JSONL becomes samples: nothing is held out, and no piece that has something to predict is dropped."""
    return PrepareSettings(
        sequence_length=data.sequence_length, min_tokens=2, eval_fraction=0, on_bad_sample=data.on_bad_sample
    )


def prepared_folder(source: Source, *, run: str, tokenizer: Any, settings: PrepareSettings) -> Path:
    """Where the shards of a source are made: a function of the place, the tokenizer and the sequence length."""
    made_from = [str(Path(source.place).absolute()), tokenizer_fingerprint(tokenizer), settings.sequence_length]
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "_", Path(source.place).name).strip("_") or "texts"
    return Path(os.path.abspath(run) + SUFFIX) / f"{name[:100]}-{digest}"


def prepare_source(
    source: Source,
    folder: Path,
    *,
    tokenizer: Any,
    settings: PrepareSettings,
    reserved: Mapping[int, str],
    say: Callable[[str], None],
) -> int:
    """Make the shards, or find them finished; an interrupted call is continued. The number of rows left out.

    Args:
        reserved: ids that no text may have, those of the memory's tokens.
        say: called with a line when the work begins and when it is done.

    Raises:
        DataError, OutputError, ConfigError, PeerError: as prepare_data; texts that have changed since are refused.
    """
    assert source.texts is not None
    if not folder.exists():
        count = len(source.texts.files)
        size = f"{count} file{'s' * (count > 1)}, {source.texts.num_bytes / 1e6:,.1f} MB"
        say(f"preparing {source.place} ({size}) into {folder}")
    try:
        report = prepare_data(
            source.texts,
            tokenizer=tokenizer,
            output_dir=folder,
            settings=settings,
            reserved=reserved,
            num_workers=auto_workers(source.texts.num_bytes),
            may_continue=True,
        )
    except DataError as error:
        raise DataError(error.what, where=error.where, way_out=_advice_of(error, source)) from error
    except OutputError as error:
        way_out = f"go on with the unchanged texts, or delete {error.where} to have it made again"
        raise OutputError(error.what, where=error.where, way_out=way_out) from error
    if report.was_done and report.skipped:
        say(f"{len(report.skipped):,} bad rows were left out when {source.place} was prepared: {folder / REPORT_NAME}")
    if not report.was_done:
        for line in _describe(report):
            say(line)
        say(f"more of it in {folder / REPORT_NAME} and {PICTURE_NAME}")
    return len(report.skipped)


def _advice_of(error: DataError, source: Source) -> str:
    """In the settings of a run, not in the flags of tools/prepare_data.py."""
    if "--on-bad-sample" in error.way_out:
        kept = [line for line in error.way_out.splitlines() if "--" not in line]
        advice = "to leave such rows out and list them in the report: data.on_bad_sample=skip"
        return "\n  ".join([*kept, advice])
    return f"look at {source.place}, and at data.sequence_length" if "--" in error.way_out else error.way_out


def _describe(report: PrepareReport) -> list[str]:
    """What became of the documents; nothing is left out without a word."""
    train, counts = report.train, report.counts
    lines = [f"{report.num_documents:,} documents: {train.num_samples:,} samples, {train.num_tokens:,} tokens"]
    if counts.num_split:
        lines.append(f"{counts.num_split:,} texts longer than data.sequence_length were split")
    if counts.num_truncated:
        lost = f"lost their beginning, {counts.num_truncated_tokens:,} tokens"
        lines.append(f"{counts.num_truncated:,} chats longer than data.sequence_length {lost}")
    if counts.num_short:
        lines.append(f"{counts.num_short:,} pieces of one token dropped")
    if counts.num_unlabelled:
        lines.append(f"{counts.num_unlabelled:,} pieces dropped in which nothing carries loss")
    if report.skipped:
        lines.append(f"{len(report.skipped):,} bad rows left out; the first: {report.skipped[0].where}")
    return lines


def shards_in(folder: Path) -> str:
    """The folder of shards in a prepared one: nothing is held out there."""
    return str(folder / TRAIN)
