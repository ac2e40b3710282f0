"""A folder that is filled beside its place, with a journal by which an interrupted run continues.

.NAME.partial/journal.jsonl   first what the folder is made from, then a line for each finished shard
.NAME.partial/lock            held by the process that writes
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from comet_megatron.errors import OutputError
from comet_megatron.new_folder import check_is_new, make_folder, new_folder, told_of_a_full_disk

JOURNAL_NAME = "journal.jsonl"
JOURNAL_VERSION = 1
_LOCK_NAME = "lock"
MAY_CHANGE = {"on_bad_sample"}  # after a bad row it may be skipped; where rows were skipped, the report lists them


class Journal:
    """What is finished in a folder; each entry is on disk when `write` returns.

    Attributes:
        entries: those of an earlier run, in order, without what the folder is made from.
    """

    def __init__(self, folder: Path, made_from: Mapping[str, Any]) -> None:
        """
        Raises:
            OutputError: the folder holds what another call left unfinished; names what differs. Or a journal of
                another version.
        """
        self.path = folder / JOURNAL_NAME
        self.entries: list[dict[str, Any]] = []
        self._first = {"journal_version": JOURNAL_VERSION, **made_from}
        first, *self.entries = _read_entries(self.path) or [dict(self._first)]
        # The first journals told no version.
        if (version := first.pop("journal_version", 1)) != JOURNAL_VERSION:
            raise OutputError(
                f"the journal of an interrupted run is of version {version}, but this program reads {JOURNAL_VERSION}",
                where=str(self.path),
                way_out=f"continue with the version of comet_megatron that began it, or begin anew: rm -r {folder}",
            )
        if different := differences(first, made_from):
            raise OutputError(
                "an interrupted run with other settings lies here: " + "; ".join(different),
                where=str(folder),
                way_out=f"give the same settings to continue it, or delete it to begin anew: rm -r {folder}",
            )
        self.rewrite(self.entries)

    @property
    def is_worth_keeping(self) -> bool:
        """Whether a shard is finished."""
        return self._num_written > 1

    def write(self, entry: Mapping[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._num_written += 1

    def rewrite(self, entries: list[dict[str, Any]]) -> None:
        """Put these in the place of all; what the folder is made from stays."""
        new = self.path.with_suffix(".new")
        new.write_text("".join(json.dumps(entry) + "\n" for entry in (self._first, *entries)), encoding="utf-8")
        os.replace(new, self.path)
        self.entries, self._num_written = entries, 1 + len(entries)

    def close(self) -> None:
        """Take the journal and the lock away: the folder is complete."""
        self.path.unlink()
        (self.path.parent / _LOCK_NAME).unlink()


@contextmanager
def continued_folder(
    output_dir: str | os.PathLike[str], made_from: Mapping[str, Any]
) -> Iterator[tuple[Path, Journal]]:
    """Give the folder `.NAME.partial` next to `output_dir`, new or as an earlier run left it; rename it at the end.

    After an error it stays if a shard is finished in it.

    Raises:
        OutputError: `output_dir` is not empty, its parent cannot be written, another process is at it, or what is
            there is made from something else.
    """
    target = check_is_new(output_dir)
    folder = partial_folder(target)
    make_folder(folder)
    with open(folder / _LOCK_NAME, "wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(
                "another process is writing this output", where=str(folder), way_out="wait for it, or end it"
            ) from error
        journal = Journal(folder, made_from)
        try:
            with told_of_a_full_disk(target):
                yield folder, journal
                journal.close()
            check_is_new(target)  # somebody may have filled it meanwhile
            os.rename(folder, target)
        except BaseException:
            if not journal.is_worth_keeping:
                shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def passing_folder(output_dir: str | os.PathLike[str]) -> Iterator[tuple[Path, None]]:
    """As new_folder, in the form of continued_folder."""
    with new_folder(output_dir) as folder:
        yield folder, None


def partial_folder(output_dir: Path) -> Path:
    """Where the work on an output lies until it is finished."""
    target = output_dir.resolve()
    return target.parent / f".{target.name}.partial"


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """`name is wanted, was found` for each value that is not the same, but those that may change on the way."""
    names = sorted({*found, *wanted} - MAY_CHANGE)
    return [
        f"{name} is {_shown(wanted.get(name))}, was {_shown(found.get(name))}"
        for name in names
        if found.get(name) != wanted.get(name)
    ]


def _shown(value: Any) -> str:
    text = str(value)
    return text[:12] + "..." if len(text) > 40 else text


def _read_entries(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a run that is killed may leave a part of the last one."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    entries: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict):
            break
        entries.append(entry)
    return entries
