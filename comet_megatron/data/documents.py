"""Find input documents: text files, folders of them, JSONL with a `text` field, the Python standard library."""

from __future__ import annotations

import glob
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from comet_megatron.errors import DataError

PYTHON_STDLIB = "python-stdlib"  # the word a user gives instead of a file name
_GLOB_CHARACTERS = frozenset("*?[")
_NOT_STDLIB_SOURCE = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
# Generated when this Python was built: they hold the paths and flags of the machine it was built on.
_GENERATED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """One text; its name says where it came from and decides whether it is held out."""

    name: str
    text: str


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
        num_bytes: their total size.
        bytes_read: how far the last iteration came, for a progress bar.
        skipped: names of the files that the last iteration left out because they are not UTF-8.
    """

    def __init__(self, files: Iterable[SourceFile]) -> None:
        self.files = tuple(files)
        self.num_bytes = sum(file.path.stat().st_size for file in self.files)
        self.bytes_read = 0
        self.skipped: list[str] = []

    def __iter__(self) -> Iterator[Document]:
        """Yield the documents.

        Raises:
            DataError: a named file is not UTF-8, a JSONL line is not an object with a string `text`,
                a file cannot be read, or there is no document at all.
        """
        self.bytes_read, self.skipped = 0, []
        found_any = False
        for file in self.files:
            for document, num_bytes in self._documents_of(file):
                self.bytes_read += num_bytes
                if document is not None:
                    found_any = True
                    yield document
        if not found_any:
            raise DataError(
                f"none of the {len(self.files)} input files holds a document ({len(self.skipped)} are not UTF-8 text)",
                where=", ".join(file.name for file in self.files[:3]) + (", ..." if len(self.files) > 3 else ""),
                way_out='give text files in UTF-8, or .jsonl files with one {"text": ...} object a line',
            )

    def _documents_of(self, file: SourceFile) -> Iterator[tuple[Document | None, int]]:
        """(document or None where there is none, bytes of the file that it took)."""
        try:
            if file.path.suffix == ".jsonl":
                yield from _jsonl_documents(file)
                return
            data = file.path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read the file: {error.strerror}", where=str(file.path)) from error
        try:
            yield Document(file.name, data.decode("utf-8-sig")), len(data)
        except UnicodeDecodeError as error:
            if not file.may_be_skipped:
                raise DataError(
                    f"the file is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}",
                    where=str(file.path),
                    way_out="convert it, for example with iconv -f LATIN1 -t UTF-8, or leave it out",
                ) from error
            self.skipped.append(file.name)
            yield None, len(data)


def _jsonl_documents(file: SourceFile) -> Iterator[tuple[Document | None, int]]:
    with open(file.path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{file.path}:{number}"
            way_out = 'every line must be one JSON object with a string "text", in UTF-8'
            if not line.strip():
                yield None, len(line)
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except ValueError as error:  # of the decoding and of the JSON
                raise DataError(f"the line is not JSON: {error}", where=where, way_out=way_out) from error
            if not isinstance(row, dict):
                raise DataError(f"the line is a JSON {type(row).__name__}, not an object", where=where, way_out=way_out)
            if not isinstance(text := row.get("text"), str):
                what = f'"text" is a {type(text).__name__}' if "text" in row else f'no "text", only {sorted(row)[:8]}'
                raise DataError(f"the line has {what}", where=where, way_out=way_out)
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:  # JSON may hold half of a surrogate pair
                what = f"the text is not Unicode: {error.reason} at {error.start}"
                raise DataError(what, where=where, way_out=way_out) from error
            yield Document(f"{file.name}:{number}", text), len(line)


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

    A name ending in .jsonl is JSON lines, anything else is one document. Files keep the order in which they were
    given, those of a folder or pattern are sorted; a file that comes up twice is taken once.

    Raises:
        DataError: a path does not exist, a pattern fits no file, or a folder is empty; all of them at once.
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
    if _GLOB_CHARACTERS.intersection(given):
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
