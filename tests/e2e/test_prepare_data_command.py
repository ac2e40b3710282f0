"""tools/prepare_data.py killed and called again, as a user does it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENIZER = REPOSITORY / "tokenizers" / "python_stdlib_4k"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + eos_token }}{% endfor %}"


def command(folder: Path, output: str, *more: str) -> list[str]:
    values = {"input": "rows.jsonl", "tokenizer": TOKENIZER, "output": output, "sequence-length": 256}
    values |= {"shard-mb": 0.02, "eval-fraction": 0.2, "chat-template": "template.jinja"}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(REPOSITORY / "tools" / "prepare_data.py"), *words, *more]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_input(folder: Path, num_rows: int) -> None:
    rows = []
    for number in range(num_rows):
        words = " ".join(f"word{number}_{i}" for i in range(number % 40 + 5))
        messages = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
        rows.append({"text": words} if number % 2 else {"uniq_id": number, "messages": json.dumps(messages)})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "template.jinja").write_text(TEMPLATE)


def alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
def test_killed_in_the_middle_its_processes_end_and_the_same_command_gives_the_same_bytes(tmp_path: Path) -> None:
    write_input(tmp_path, 4000)
    run = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(REPOSITORY)}, "text": True}
    subprocess.run(command(tmp_path, "undisturbed"), check=True, capture_output=True, **run)
    started = subprocess.Popen(
        command(tmp_path, "out", "--workers", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **run
    )
    journal = tmp_path / ".out.partial" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        assert started.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = [int(c) for c in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()]
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    while any(map(alive, children)):
        assert time.monotonic() < deadline, "processes that tokenise are left behind"
        time.sleep(0.05)
    assert children and not (tmp_path / "out").exists() and journal.exists()
    again = subprocess.run(command(tmp_path, "out"), capture_output=True, check=True, **run)
    assert "continuing what lies in" in again.stdout
    assert content_of(tmp_path / "out") == content_of(tmp_path / "undisturbed")
    assert not journal.parent.exists()
    third = subprocess.run(command(tmp_path, "out"), capture_output=True, check=True, **run)
    assert "finished already" in third.stdout
    other = subprocess.run(command(tmp_path, "out", "--long", "split"), capture_output=True, **run)
    assert other.returncode == 2 and "long is split, was auto" in other.stderr and "Traceback" not in other.stderr


def test_a_bad_row_ends_it_with_code_2_naming_file_and_line(tmp_path: Path) -> None:
    write_input(tmp_path, 50)
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('\n{"messages": [{"role": "robot", "content": "x"}]}\n')
    run = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": str(REPOSITORY)}, "text": True}
    ended = subprocess.run(command(tmp_path, "out", "--shard-mb", "4"), capture_output=True, **run)
    assert ended.returncode == 2 and "rows.jsonl:51" in ended.stderr and "robot" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "template.jinja"]
    skipped = subprocess.run(command(tmp_path, "out", "--on-bad-sample", "skip"), capture_output=True, **run)
    assert skipped.returncode == 0 and "1 bad documents" in skipped.stdout and "rows.jsonl:51" in skipped.stdout
