"""Finding documents."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from comet_megatron.data.documents import Document, find_documents, python_stdlib_files, text_files
from comet_megatron.errors import DataError


def test_the_standard_library_is_found_sorted_and_without_tests() -> None:
    source = python_stdlib_files()
    names = [file.name for file in source.files]
    assert {"python-stdlib/json/decoder.py", "python-stdlib/ast.py"} <= set(names)
    assert names == sorted(names)
    assert source.num_bytes > 3_000_000
    unwanted = ("/test/", "/tests/", "/idle_test/", "/site-packages/", "/__pycache__/", "/_sysconfigdata")
    assert not [name for name in names if any(part in name for part in unwanted)]


def test_the_standard_library_is_text_that_this_python_can_import() -> None:
    texts = {document.name: document.text for document in python_stdlib_files()}
    assert texts["python-stdlib/json/decoder.py"] == Path(json.decoder.__file__).read_text(encoding="utf-8")


def test_a_folder_gives_its_files_sorted_with_names_that_do_not_depend_on_where_it_is(tmp_path: Path) -> None:
    for place in ("here", "there/deeper"):
        folder = tmp_path / place / "corpus"
        (folder / "sub").mkdir(parents=True)
        (folder / ".hidden").mkdir()
        (folder / ".hidden" / "no.txt").write_text("no")
        (folder / "b.txt").write_text("b")
        (folder / "sub" / "a.txt").write_text("a\r\n")
        assert list(text_files([folder])) == [Document("corpus/b.txt", "b"), Document("corpus/sub/a.txt", "a\r\n")]


def test_a_pattern_and_a_file_that_meet_give_each_file_once(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    found = text_files([tmp_path / "b.txt", f"{tmp_path}/../{tmp_path.name}/*.txt"])
    assert [document.text for document in found] == ["b.txt", "a.txt"]


def test_jsonl_gives_one_document_a_line_named_by_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "eins", "id": 7}\n\n{"text": "zw\\u00f6lf"}\n', encoding="utf-8")
    found = list(text_files([path]))
    assert found == [Document(f"{path.as_posix()}:1", "eins"), Document(f"{path.as_posix()}:3", "zwölf")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{broken", "not JSON"),
        (b"[1]", "not an object"),
        (b'{"txt": "a"}', "txt"),
        (b'{"text": 3}', "is a int"),
        (b'{"text": "\xff"}', "not JSON"),
        (b'{"text": "\\ud800"}', "not Unicode"),
    ],
)
def test_a_bad_jsonl_line_is_named_by_file_and_line(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=complaint) as caught:
        list(text_files([path]))
    assert caught.value.where == f"{path}:2"


def test_a_named_file_that_is_not_utf8_is_an_error_and_one_in_a_folder_is_skipped_and_counted(tmp_path: Path) -> None:
    bad = tmp_path / "latin.txt"
    bad.write_bytes("é".encode("latin-1"))
    (tmp_path / "good.txt").write_text("good")
    with pytest.raises(DataError, match="0xe9"):
        list(text_files([bad]))
    source = text_files([tmp_path])
    for _ in range(2):  # counting starts anew
        assert [document.text for document in source] == ["good"]
        assert source.skipped == [f"{tmp_path.name}/latin.txt"]
        assert source.bytes_read == source.num_bytes


def test_missing_input_names_all_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        text_files([tmp_path / "nowhere", str(tmp_path / "*.none"), tmp_path])
    for part in ("nowhere", "*.none", "holds no files"):
        assert part in str(caught.value)


def test_input_without_any_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="1 are not UTF-8"):
        list(text_files([tmp_path]))


def test_the_standard_library_and_files_may_be_given_together(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    files = find_documents([tmp_path / "mine.txt", "python-stdlib"]).files
    assert files[-1].path == tmp_path / "mine.txt" and len(files) == 1 + len(python_stdlib_files().files)


ROWS = b'{"text": "eins"}\n\n{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def write_compressed(path: Path, content: bytes) -> None:
    if path.suffix == ".gz":
        half = len(content) // 2  # two members, as when files are joined
        path.write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    elif path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(content) // 2
        path.write_bytes(zstandard.compress(content[:half]) + zstandard.compress(content[half:]))
    else:
        path.write_bytes(content)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_jsonl_is_read_compressed_or_not_and_the_progress_is_that_of_the_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_compressed(path, ROWS)
    source = text_files([f"{tmp_path}/*.jsonl*"])
    assert [(d.name.rpartition(":")[2], d.text) for d in source] == [("1", "eins"), ("3", "a\nb")]
    assert source.bytes_read == source.num_bytes == path.stat().st_size
    assert [type(raw).__name__ for raw in source.rows()] == ["JsonLine", "JsonLine"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "not compressed"])
def test_a_damaged_compressed_file_is_named_with_the_last_good_line(tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    write_compressed(path, ROWS * 200)
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[: len(content) - 3]
    elif damage == "flipped":
        content[len(content) // 2 : len(content) // 2 + 8] = b"\xff" * 8
    else:
        content = bytearray(ROWS)
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged or cut off") as caught:
        list(text_files([path]).rows())
    assert caught.value.where.startswith(f"{path}, after line ")


def test_a_zst_file_without_the_package_is_an_error_that_names_it_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="2 problems") as caught:
        text_files([tmp_path / "a.jsonl.zst", tmp_path / "nowhere"])
    assert "package zstandard" in str(caught.value) and "pip install zstandard" in str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.txt"])
def test_a_named_file_of_0_bytes_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match="the file is empty") as caught:
        list(text_files([tmp_path / name]))
    assert caught.value.where == str(tmp_path / name)


def test_the_fingerprint_of_the_input_sees_names_sizes_and_both_ends(tmp_path: Path) -> None:
    def fingerprint(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        return text_files([tmp_path / name]).fingerprint()

    long = b"a" * 200_000
    assert fingerprint("a.txt", long) == fingerprint("a.txt", long)
    others = {fingerprint("a.txt", x) for x in (long + b"a", b"b" + long[1:], long[:-1] + b"b", b"")}
    assert len(others | {fingerprint("b.txt", long), fingerprint("a.txt", long)}) == 6
