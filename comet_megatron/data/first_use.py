"""JSONL that is named where shards could be: they are made of it once, beside the run, and used from then on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from comet_megatron.data.prepare import PrepareReport, PrepareSettings, prepare_data
from comet_megatron.data.sources import TRAIN, Source
from comet_megatron.data.tokenizer import tokenizer_fingerprint
from comet_megatron.data.workers import auto_workers

SUFFIX = ".data"  # of the folder beside the run's


def prepared_folder(source: Source, *, run: Path, tokenizer: Any, settings: PrepareSettings) -> Path:
    """Where the shards of a source are made: a function of the place, the tokenizer and the sequence length."""
    made_from = [str(Path(source.place).absolute()), tokenizer_fingerprint(tokenizer), settings.sequence_length]
    digest = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "_", Path(source.place).name).strip("_") or "texts"
    return run.with_name(f"{run.name}{SUFFIX}") / f"{name}-{digest}"


def prepare_source(
    source: Source, folder: Path, *, tokenizer: Any, settings: PrepareSettings, say: Callable[[str], None]
) -> None:
    """Make the shards, or find them finished; an interrupted call is continued.

    Args:
        say: called with a line when the work begins and when it is done.

    Raises:
        DataError, OutputError, ConfigError, PeerError: as prepare_data; texts that have changed since are refused.
    """
    assert source.texts is not None
    if not folder.exists():
        size = f"{len(source.texts.files)} files, {source.texts.num_bytes / 1e6:,.1f} MB"
        say(f"preparing {source.place} ({size}) into {folder}")
    report = prepare_data(
        source.texts,
        tokenizer=tokenizer,
        output_dir=folder,
        settings=settings,
        num_workers=auto_workers(source.texts.num_bytes),
        may_continue=True,
    )
    if not report.was_done:
        say(f"prepared  {_describe(report)}; shares and lengths: {folder}/report.json, lengths.png")


def _describe(report: PrepareReport) -> str:
    train = report.train
    skipped = f", {len(report.skipped)} bad rows left out" if report.skipped else ""
    return f"{report.num_documents:,} documents: {train.num_samples:,} samples, {train.num_tokens:,} tokens{skipped}"


def shards_in(folder: Path) -> str:
    """The folder of shards in a prepared one: nothing is held out there."""
    return str(folder / TRAIN)
