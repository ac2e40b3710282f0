"""The files of a data folder, on a local disk or behind any URL that fsspec knows: listed, read whole, or in part."""

from __future__ import annotations

import glob
import os
import threading
import time
from collections import OrderedDict
from pathlib import Path
from typing import Protocol

from comet_megatron.errors import DataError

MAX_OPEN_FILES = 64
RETRY_AFTER_S = (1.0, 5.0)
_PATTERN_CHARACTERS = frozenset("*?[")
CHECK_PLACE = "check the path, and that this machine may read it"


class DataFolder(Protocol):
    """What reading needs of a folder. May be pickled, and used by several threads.

    Attributes:
        place: as the user wrote it.

    Raises:
        DataError: from every method, where the folder or a file cannot be read.
    """

    place: str

    def sizes(self) -> dict[str, int]:
        """Bytes of each file in it; of a folder that is not there, none."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def read(self, name: str) -> bytes:
        """A whole file."""

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of a file from `offset` on; fewer where it ends."""

    def close(self) -> None:
        """Let go of what is open; the folder stays usable."""


def is_url(place: str | os.PathLike[str]) -> bool:
    """Whether fsspec is to read it: s3://..., memory://..., also chains such as simplecache::s3://..."""
    return "://" in str(place)


def open_folder(place: str | os.PathLike[str]) -> DataFolder:
    """
    Raises:
        DataError: a URL of a kind that is not known, or whose package is missing.
    """
    return RemoteFolder(str(place)) if is_url(place) else LocalFolder(place)


def is_pattern(place: str) -> bool:
    """Whether it has one of * ? ["""
    return bool(_PATTERN_CHARACTERS & set(place))


def join(place: str, name: str) -> str:
    """A file or folder in it."""
    return f"{place.rstrip('/')}/{name}" if is_url(place) else str(Path(place) / name)


class _OpenFiles:
    """Files of this process that stay open for the next read: at most MAX_OPEN_FILES, of all folders together."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()  # path → file descriptor, last used at the end
        self._lock = threading.Lock()

    def read_at(self, path: str, offset: int, size: int) -> bytes:
        with self._lock:  # so that no other thread closes the file between finding and reading it
            if path not in self._open:
                while len(self._open) >= MAX_OPEN_FILES:
                    os.close(self._open.popitem(last=False)[1])
                self._open[path] = os.open(path, os.O_RDONLY)
            self._open.move_to_end(path)
            return os.pread(self._open[path], size, offset)

    def close(self, folder: str) -> None:
        """Those of one folder."""
        with self._lock:
            for path in [path for path in self._open if os.path.dirname(path) == folder]:
                os.close(self._open.pop(path))


_open_files = _OpenFiles()  # descriptors are a process's, however many folders it reads


class LocalFolder:
    """A folder on this machine's file systems."""

    def __init__(self, place: str | os.PathLike[str]) -> None:
        self.place = str(place)

    def sizes(self) -> dict[str, int]:
        try:
            return {entry.name: entry.stat().st_size for entry in os.scandir(self.place) if entry.is_file()}
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise _cannot_read(self.place, error.strerror or str(error)) from error

    def has(self, name: str) -> bool:
        return os.path.isfile(os.path.join(self.place, name))

    def read(self, name: str) -> bytes:
        try:
            return (Path(self.place) / name).read_bytes()
        except OSError as error:
            raise _cannot_read(join(self.place, name), error.strerror or str(error)) from error

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        try:
            return _open_files.read_at(os.path.join(self.place, name), offset, size)
        except OSError as error:
            raise _cannot_read(join(self.place, name), error.strerror or str(error)) from error

    def close(self) -> None:
        _open_files.close(self.place)


class RemoteFolder:
    """A folder behind a URL. Each read is one request for a stretch of bytes, made again if the network fails."""

    def __init__(self, place: str) -> None:
        import fsspec.core  # not loaded where all data is local

        self.place = place
        try:
            self._files, self._root = fsspec.core.url_to_fs(place)
        except ImportError as error:
            protocol = place.rpartition("::")[2].partition("://")[0]
            extra = "pip install 'comet-megatron[s3]'" if protocol == "s3" else "install the package that it names"
            raise DataError(f"cannot read {protocol}:// URLs: {error}", where=place, way_out=extra) from error
        except Exception as error:  # of the protocol's package
            raise _cannot_read(place, _reason(error)) from error

    def sizes(self) -> dict[str, int]:
        try:
            self._files.invalidate_cache(self._root)
            entries = [e for e in self._files.ls(self._root, detail=True) if e["type"] == "file"]
            sizes = [e["size"] if e["size"] is not None else self._files.size(e["name"]) for e in entries]
        except FileNotFoundError:
            return {}
        except Exception as error:
            raise _cannot_read(self.place, _reason(error)) from error
        names = [e["name"].rstrip("/").rpartition("/")[2] for e in entries]
        return {name: int(size or 0) for name, size in zip(names, sizes, strict=True)}

    def has(self, name: str) -> bool:
        try:
            return self._files.isfile(f"{self._root.rstrip('/')}/{name}")
        except Exception as error:
            raise _cannot_read(self.place, _reason(error)) from error

    def read(self, name: str) -> bytes:
        return self._request(name, None, None)

    def read_at(self, name: str, offset: int, size: int) -> bytes:
        return self._request(name, offset, offset + size)

    def _request(self, name: str, start: int | None, end: int | None) -> bytes:
        for pause_s in (*RETRY_AFTER_S, None):
            try:
                return self._files.cat_file(f"{self._root.rstrip('/')}/{name}", start=start, end=end)
            except Exception as error:  # each protocol has errors of its own
                if pause_s is None or isinstance(error, FileNotFoundError | PermissionError):
                    raise _cannot_read(join(self.place, name), _reason(error)) from error
                time.sleep(pause_s)
        raise AssertionError

    def match(self) -> list[str]:
        """URLs that this folder's matches as a pattern, sorted."""
        try:
            return sorted(self._files.unstrip_protocol(path) for path in self._files.glob(self._root))
        except Exception as error:
            raise _cannot_read(self.place, _reason(error)) from error

    def close(self) -> None:
        """Nothing is open."""


def find_places(pattern: str) -> list[str]:
    """What a pattern with *, ? or [ matches, sorted; URLs keep their protocol.

    Raises:
        DataError: a URL that cannot be read.
    """
    if not is_url(pattern):
        return sorted(glob.glob(pattern, recursive=True))
    chain, colons, last = pattern.rpartition("::")
    if is_pattern(chain):
        raise DataError("a pattern can only be in the last part of a chain of URLs", where=pattern, way_out=CHECK_PLACE)
    return [f"{chain}{colons}{place}" for place in RemoteFolder(last).match()]


def _reason(error: Exception) -> str:
    return (f"{type(error).__name__}: {error}" if str(error) else type(error).__name__).splitlines()[0]


def _cannot_read(where: str, reason: str) -> DataError:
    return DataError(f"cannot be read: {reason}", where=where, way_out=CHECK_PLACE)
