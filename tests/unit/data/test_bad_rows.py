"""tools/prepare_data.py on bad input: file and line in the message, exit code 2, nothing written; or it is listed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

TEMPLATE = "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + eos_token }}{% endfor %}"
FINE = b'{"text": "a text that is fine, and long enough to be a sample of its own"}'
ASSISTANT = '{"role": "assistant", "content": "b"}'
BAD_ROWS = {
    "invalid JSON": (b"{broken", "not JSON"),
    "not an object": (b"[1, 2]", "a JSON list, not an object"),
    "a wrong type": (b'{"text": 5}', '"text" is a int'),
    "messages of a wrong type": (b'{"messages": {"role": "user"}}', '"messages" is a dict'),
    "a message of a wrong type": (b'{"messages": ["hello"]}', "message 1 is a str"),
    "content of a wrong type": (b'{"messages": [{"role": "user", "content": 1}]}', '"content" is a int'),
    "an unknown role": (b'{"messages": [{"role": "robot", "content": "x"}]}', "the role 'robot'"),
    "an empty conversation": (b'{"messages": []}', "the conversation is empty"),
    "an empty conversation in a string": (b'{"uniq_id": 7, "messages": "[]"}', "the conversation is empty"),
    "no assistant turn": (b'{"messages": [{"role": "user", "content": "x"}]}', "no turn of the assistant"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}', "invalid start byte"),
    "half of a surrogate pair": (b'{"text": "\\ud83d"}', "not Unicode"),
    "no known key": (b'{"txt": "x"}', "only ['txt']"),
    "an empty object": (b"{}", '"text"'),
}

Tool = Callable[[Sequence[str]], int]


def words(folder: Path, *inputs: Path, more: Sequence[str] = ()) -> list[str]:
    (folder / "template.jinja").write_text(TEMPLATE)
    tokenizer = Path(__file__).resolve().parents[3] / "tokenizers" / "python_stdlib_4k"
    options = {"tokenizer": tokenizer, "output": folder / "out", "chat-template": folder / "template.jinja"}
    options |= {"sequence-length": 64, "min-tokens": 2, "eval-fraction": 0}
    typed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["--input", *map(str, inputs), *typed, *more]


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_ends_the_command_with_its_file_and_line(
    name: str, prepare_data_tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row, complaint = BAD_ROWS[name]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([FINE, FINE, row, FINE]))
    assert prepare_data_tool(words(tmp_path, tmp_path / "rows.jsonl")) == 2
    shown = capsys.readouterr()
    assert "rows.jsonl:3" in shown.err and complaint in shown.err and "--on-bad-sample skip" in shown.err
    assert "Traceback" not in shown.err and not shown.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "template.jinja"]


def test_skipped_rows_are_listed_each_with_its_file_and_line_and_the_others_are_written(
    prepare_data_tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [line for row, _ in BAD_ROWS.values() for line in (row, FINE)]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(rows))
    assert prepare_data_tool(words(tmp_path, tmp_path / "rows.jsonl", more=["--on-bad-sample", "skip"])) == 0
    assert f"skipped    {len(BAD_ROWS)} bad documents" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [s["where"].rpartition("/")[2] for s in report["skipped"]] == [
        f"rows.jsonl:{2 * n + 1}" for n in range(len(BAD_ROWS))
    ]
    for skipped, (_, complaint) in zip(report["skipped"], BAD_ROWS.values(), strict=True):
        assert complaint in skipped["what"]
    assert report["documents"]["num_skipped"] == len(BAD_ROWS)
    assert report["parts"]["train"]["num_samples"] == len(BAD_ROWS)


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.jsonl.gz", "empty.txt"])
def test_a_file_of_0_bytes_is_named_or_skipped_if_asked(
    name: str, prepare_data_tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(b"")
    (tmp_path / "rows.jsonl").write_bytes(FINE)
    files = (tmp_path / "rows.jsonl", tmp_path / name)
    assert prepare_data_tool(words(tmp_path, *files)) == 2
    assert str(tmp_path / name) in (shown := capsys.readouterr().err) and "the file is empty" in shown
    assert prepare_data_tool(words(tmp_path, *files, more=["--on-bad-sample", "skip"])) == 0
    (skipped,) = json.loads((tmp_path / "out" / "report.json").read_text())["skipped"]
    assert skipped == {"where": str(tmp_path / name), "what": "the file is empty"}


@pytest.mark.parametrize("skip", [False, True])
def test_a_cut_off_gz_file_is_named_with_the_last_line_read_and_never_skipped(
    skip: bool, prepare_data_tool: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = gzip.compress(b"\n".join([FINE] * 50))
    (tmp_path / "rows.jsonl.gz").write_bytes(content[:-9])
    typed = words(tmp_path, tmp_path / "rows.jsonl.gz", more=["--on-bad-sample", "skip"] if skip else [])
    assert prepare_data_tool(typed) == 2
    assert "rows.jsonl.gz, after line " in (shown := capsys.readouterr().err) and "cut off" in shown
    assert not (tmp_path / "out").exists()
