"""A folder that appears complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from comet_megatron.errors import OutputError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents.

    Raises:
        OutputError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise OutputError(
            f"the output folder cannot be made: {error.strerror}",
            where=str(folder),
            way_out="choose a folder that you may write to",
        ) from error


def copy_files(source: Path, target: Path) -> None:
    """Copy a folder's files and folders into another, with the permissions that new files have here."""
    target.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.is_dir():
            copy_files(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def check_is_new(output_dir: str | os.PathLike[str]) -> Path:
    """The absolute path of a folder that may be written.

    Raises:
        OutputError: it is a file, or a folder that holds something.
    """
    target = Path(output_dir).resolve()
    if target.exists() and not target.is_dir():
        raise OutputError(
            "the output is an existing file", where=str(output_dir), way_out="give the name of a new folder"
        )
    if target.is_dir() and any(target.iterdir()):
        raise OutputError(
            "the output folder is not empty",
            where=str(output_dir),
            way_out="give the name of a new folder, or delete this one first; nothing is overwritten",
        )
    return target


@contextmanager
def told_of_a_full_disk(where: str | os.PathLike[str]) -> Iterator[None]:
    """Turn what the system says of a disk that is full or may not be written into a message.

    Raises:
        OutputError: instead of that OSError; others pass.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise OutputError(
            f"cannot write: {error.strerror}", where=str(where), way_out="free space on the disk; nothing was written"
        ) from error


@contextmanager
def new_folder(output_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary folder next to `output_dir`; rename it to `output_dir` at the end, or delete it on an error.

    Raises:
        OutputError: `output_dir` is not empty, or its parent cannot be written.
    """
    target = check_is_new(output_dir)
    temporary = target.parent / f".{target.name}.partial-{os.getpid()}"
    make_folder(temporary)
    try:
        with told_of_a_full_disk(target):
            yield temporary
        check_is_new(target)  # somebody may have filled it meanwhile
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
