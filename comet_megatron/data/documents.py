"""Find input documents: text files, folders of them, JSONL (plain, .gz, .zst), the Python standard library."""

from __future__ import annotations

import glob
import gzip
import hashlib
import importlib.util
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from comet_megatron.data.rows import ROW_FORMS, Chat, Document, parse_row
from comet_megatron.data.storage import CHECK_PLACE, is_pattern
from comet_megatron.errors import DataError

PYTHON_STDLIB = "python-stdlib"  # the word a user gives instead of a file name
_NOT_STDLIB_SOURCE = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Generated when this Python was built: they hold the paths and flags of the machine it was built on.
_GENERATED_PREFIXES = ("_sysconfigdata", "config-")
_JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
_LOOKED_AT = 1 << 16  # bytes of either end of a file, to tell whether it is the same


@dataclass(frozen=True)
class JsonLine:
    """One line of a JSONL file, not yet looked at; `where` is its file and line."""

    name: str
    where: str
    line: bytes

    def parse(self) -> Document | Chat:
        """
        Raises:
            DataError: as rows.parse_row.
        """
        return parse_row(self.line, name=self.name, where=self.where)


@dataclass(frozen=True)
class BadInput:
    """A named file that holds no document."""

    name: str
    error: DataError


RawDocument = Document | JsonLine | BadInput


@dataclass(frozen=True)
class SourceFile:
    """One input file. A file found in a folder may be skipped if it is no text; a file that was named may not."""

    name: str
    path: Path
    may_be_skipped: bool


class DocumentSource:
    """Documents of a list of files, read one at a time in a fixed order; may be iterated again.

    Attributes:
        files: the input files, in the order of reading.
        num_bytes: their total size on disk.
        bytes_read: how far the last iteration came, for a progress bar.
        skipped: names of the files that the last iteration left out because they are not UTF-8.
    """

    def __init__(self, files: Iterable[SourceFile]) -> None:
        self.files = tuple(files)
        self.num_bytes = sum(file.path.stat().st_size for file in self.files)
        self.bytes_read = 0
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents; of a chat, what is said in it.

        Raises:
            DataError: a named file is empty or not UTF-8, a JSONL line is not one of rows.ROW_FORMS, a file cannot be
                read, or there is no document at all.
        """
        for raw in self.rows():
            if isinstance(raw, BadInput):
                raise raw.error
            found = raw.parse() if isinstance(raw, JsonLine) else raw
            if isinstance(found, Chat):
                found = Document(found.name, "\n".join(message.get("content") or "" for message in found.messages))
            yield found

    def rows(self) -> Iterator[RawDocument]:
        """Yield the documents as they lie in the files, so that another process can parse them.

        Raises:
            DataError: a file cannot be read, or there is no document at all.
        """
        self.bytes_read, self.skipped = 0, []
        found_any = False
        for file in self.files:
            read_before = self.bytes_read
            for raw, position in self._rows_of(file):
                self.bytes_read = read_before + position
                if raw is not None:
                    found_any = True
                    yield raw
        if not found_any:
            raise DataError(
                f"none of the {len(self.files)} input files holds a document ({len(self.skipped)} are not UTF-8 text)",
                where=", ".join(file.name for file in self.files[:3]) + (", ..." if len(self.files) > 3 else ""),
                way_out=f"give text files in UTF-8, or .jsonl files, each line an object with {ROW_FORMS}",
            )

    def fingerprint(self) -> str:
        """sha256 of the names and sizes of the files and of their first and last bytes; hexadecimal.

        Raises:
            DataError: a file cannot be read.
        """
        digest = hashlib.sha256()
        for file in self.files:
            try:
                with open(file.path, "rb") as content:
                    size = os.fstat(content.fileno()).st_size
                    ends = content.read(_LOOKED_AT)
                    content.seek(max(0, size - _LOOKED_AT))
                    ends += content.read(_LOOKED_AT)
            except OSError as error:
                raise _cannot_read(error, file) from error
            digest.update(json.dumps([file.name, size, hashlib.sha256(ends).hexdigest()]).encode("utf-8"))
        return digest.hexdigest()

    def _rows_of(self, file: SourceFile) -> Iterator[tuple[RawDocument | None, int]]:
        """(document or None where there is none, bytes of the file that are read)."""
        if is_jsonl(file.path):
            yield from _jsonl_rows(file)
            return
        try:
            data = file.path.read_bytes()
        except OSError as error:
            raise _cannot_read(error, file) from error
        if not data and not file.may_be_skipped:
            yield BadInput(file.name, DataError("the file is empty", where=str(file.path))), 0
            return
        try:
            yield Document(file.name, data.decode("utf-8-sig")), len(data)
        except UnicodeDecodeError as error:
            if file.may_be_skipped:
                self.skipped.append(file.name)
                yield None, len(data)
                return
            problem = DataError(
                f"the file is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}",
                where=str(file.path),
                way_out="convert it, for example with iconv -f LATIN1 -t UTF-8, or leave it out",
            )
            yield BadInput(file.name, problem), len(data)


def is_jsonl(path: Path) -> bool:
    """Whether the file's name says that it is JSON lines, compressed or not."""
    return path.name.endswith(_JSONL_SUFFIXES)


def _jsonl_rows(file: SourceFile) -> Iterator[tuple[RawDocument | None, int]]:
    number = 0
    try:
        with open(file.path, "rb") as raw:
            if not os.fstat(raw.fileno()).st_size:
                yield BadInput(file.name, DataError("the file is empty", where=str(file.path))), 0
                return
            for number, line in enumerate(_decompressed(raw, file.path), start=1):  # noqa: B007 (the errors need it)
                if line.strip():
                    yield JsonLine(f"{file.name}:{number}", f"{file.path}:{number}", line), raw.tell()
                else:
                    yield None, raw.tell()
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise _cannot_read(error, file) from error
        raise _damaged(error, file, number) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "zstandard":
            raise
        raise _damaged(error, file, number) from error


def _decompressed(raw: BinaryIO, path: Path) -> Iterable[bytes]:
    """The lines of a file."""
    if path.suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if path.suffix == ".zst":
        return io.BufferedReader(_ZstandardReader(raw), buffer_size=1 << 20)
    return raw


class _ZstandardReader(io.RawIOBase):
    """The content of a .zst file of any number of frames; the package's own reader takes a cut-off one for whole."""

    def __init__(self, raw: BinaryIO) -> None:
        import zstandard

        self._raw = raw
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame = self._new_frame()
        self._ready = memoryview(b"")
        self._is_between_frames = True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # the name of the argument is free
        """
        Raises:
            EOFError: the last frame is cut off.
        """
        while not self._ready:
            compressed = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame, self._is_between_frames = self._new_frame(), True
            compressed = compressed or self._raw.read(1 << 17)
            if not compressed:
                if not self._is_between_frames:
                    raise EOFError("its last frame has no end")
                return 0
            self._is_between_frames = False
            self._ready = memoryview(self._frame.decompress(compressed))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


def _check_zstandard(files: Iterable[SourceFile]) -> None:
    """
    Raises:
        DataError: a file needs the package zstandard, and it is not there.
    """
    needing = [file for file in files if file.path.name.endswith(".jsonl.zst")]
    if needing and importlib.util.find_spec("zstandard") is None:
        raise DataError(
            "reading .zst files needs the Python package zstandard, which is not installed",
            where=str(needing[0].path),
            way_out="pip install zstandard, or decompress the files: zstd -d FILE",
        )


def _cannot_read(error: OSError, file: SourceFile) -> DataError:
    return DataError(f"cannot read the file: {error.strerror}", where=str(file.path), way_out=CHECK_PLACE)


def _damaged(error: Exception, file: SourceFile, number: int) -> DataError:
    return DataError(
        f"the compressed file is damaged or cut off: {error}",
        where=f"{file.path}, after line {number}",
        way_out="copy it again",
    )


def python_stdlib_files() -> DocumentSource:
    """The standard library's own .py files, a few MB that every machine has, without tests and generated files.

    They depend on the Python version. Names are `python-stdlib/` and the relative path, which is also the order.

    Raises:
        DataError: this Python has no standard library in files (it may be in a zip).
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if not _NOT_STDLIB_SOURCE.intersection(parts) and not any(p.startswith(_GENERATED_PREFIXES) for p in parts):
            found.append((PYTHON_STDLIB + "/" + "/".join(parts), path))
    if not found:
        raise DataError("this Python has no .py files of the standard library", where=str(root))
    return DocumentSource(SourceFile(name, path, may_be_skipped=True) for name, path in sorted(found))


def text_files(paths_or_globs: Sequence[str | os.PathLike[str]]) -> DocumentSource:
    """The files that a user named: files, folders (all files below, no hidden ones) and glob patterns (`**` too).

    A name ending in .jsonl, .jsonl.gz or .jsonl.zst is JSON lines, anything else is one document. Files keep the order
    in which they were given, those of a folder or pattern are sorted; a file that comes up twice is taken once.

    Raises:
        DataError: a path does not exist, a pattern fits no file, a folder is empty, or a .zst file needs a package
            that is not there; all of them at once.
    """
    return DocumentSource(_find_all(paths_or_globs))


def find_documents(inputs: Sequence[str | os.PathLike[str]]) -> DocumentSource:
    """What --input of the tools means: files, folders and patterns, or the word python-stdlib.

    Raises:
        DataError: as text_files and python_stdlib_files.
    """
    files: list[SourceFile] = []
    if PYTHON_STDLIB in map(str, inputs):
        files.extend(python_stdlib_files().files)
    if others := [given for given in inputs if str(given) != PYTHON_STDLIB]:
        files.extend(_find_all(others))
    if not files:
        raise DataError("no input was given", way_out=f"name files or folders, or {PYTHON_STDLIB}")
    return DocumentSource(files)


def _find_all(paths_or_globs: Sequence[str | os.PathLike[str]]) -> list[SourceFile]:
    files: dict[Path, SourceFile] = {}
    problems: list[DataError] = []
    for given in [os.fspath(path) for path in paths_or_globs]:
        try:
            for file in _find(given):
                files.setdefault(file.path.resolve(), file)
        except DataError as problem:
            problems.append(problem)
    try:
        _check_zstandard(files.values())
    except DataError as problem:
        problems.append(problem)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise DataError(f"{len(problems)} problems with the input:\n" + "\n".join(f"- {p}" for p in problems))
    return list(files.values())


def _find(given: str) -> list[SourceFile]:
    path = Path(given)
    if path.is_dir():
        found = sorted(_files_below(path))
        if not found:
            raise DataError("the input folder holds no files", where=given, way_out="hidden files are not looked at")
        prefix = path.resolve().name
        return [SourceFile(f"{prefix}/{f.relative_to(path).as_posix()}", f, may_be_skipped=True) for f in found]
    if path.is_file():
        return [SourceFile(path.as_posix(), path, may_be_skipped=False)]
    if is_pattern(given):
        matches = sorted(match for match in glob.glob(given, recursive=True) if os.path.isfile(match))
        if not matches:
            raise DataError("no file fits the pattern", where=given, way_out="check it with ls")
        return [SourceFile(Path(m).as_posix(), Path(m), may_be_skipped=True) for m in matches]
    raise DataError(
        "the input does not exist", where=given, way_out=f"name files, folders or patterns, or {PYTHON_STDLIB}"
    )


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith(".") and Path(parent, name).is_file())
