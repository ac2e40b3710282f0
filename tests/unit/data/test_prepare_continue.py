"""prepare_data interrupted, continued, in several processes: always the same bytes."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from comet_megatron.data import prepare as prepare_module
from comet_megatron.data.documents import text_files
from comet_megatron.data.journal import JOURNAL_NAME, partial_folder
from comet_megatron.data.prepare import PrepareReport, PrepareSettings, prepare_data
from comet_megatron.errors import DataError, OutputError

SETTINGS = PrepareSettings(
    sequence_length=64, eval_fraction=0.3, shard_bytes=1500, on_bad_sample="skip", max_tokens=5000
)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Rows of a few lengths, chats among them, some of them bad; with the same names in every run of the tests."""
    monkeypatch.chdir(tmp_path)
    lines = []
    for number in range(120):
        words = " ".join(f"word{number}_{i}" for i in range(number % 23 + 1))
        if number % 10 == 3:
            lines.append('{"text": 5}')
        elif number % 3 == 0:
            lines.append(json.dumps({"prompt": words, "response": words}))
        else:
            lines.append(json.dumps({"text": words}))
    Path("rows.jsonl").write_text("\n".join(lines))
    return Path("rows.jsonl")


def prepare(rows: Path, tokenizer: Any, output: Path, **more: Any) -> PrepareReport:
    options = {"settings": SETTINGS, "may_continue": True, **more}
    return prepare_data(text_files([rows]), tokenizer=tokenizer, output_dir=output, **options)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def undisturbed(rows: Path, tokenizer: Any, tmp_path: Path) -> dict[str, bytes]:
    report = prepare(rows, tokenizer, tmp_path / "undisturbed", may_continue=False)
    assert len(report.train.shards) > 5 and report.eval is not None and len(report.eval.shards) > 1
    assert report.skipped and report.counts.num_sample_tokens > 4900, "the limit of tokens is reached"
    return content_of(tmp_path / "undisturbed")


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest keeps for itself."""


def stop_after(number: int):
    def on_progress(num_documents: int, num_tokens: int) -> None:
        if num_documents == number:
            raise Interrupted

    return on_progress


@pytest.mark.parametrize("every", [1, 7, 30])
def test_interrupted_again_and_again_it_gives_the_same_bytes(
    rows: Path, tokenizer: Any, tmp_path: Path, undisturbed: dict[str, bytes], every: int
) -> None:
    calls = 0
    number = 20  # documents until the first interruption; then `every` documents more each time
    while True:
        calls += 1
        try:
            prepare(rows, tokenizer, tmp_path / "out", on_progress=stop_after(number))
            break
        except Interrupted:
            assert not (tmp_path / "out").exists()
            number += every if calls % 2 else 0
            assert calls < 300
    assert calls > 2
    assert content_of(tmp_path / "out") == undisturbed
    assert not partial_folder(tmp_path / "out").exists()


def leave_unfinished(rows: Path, tokenizer: Any, output: Path) -> Path:
    with pytest.raises(Interrupted):
        prepare(rows, tokenizer, output, on_progress=stop_after(60))
    partial = partial_folder(output)
    assert len(list(partial.glob("train/*.tar"))) > 2
    return partial


def set_version(path: Path, key: str, version: int | None) -> None:
    """In the first line, which is a JSON object, or in the one object that the file holds."""
    first, *rest = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    content = json.loads(first)
    content.pop(key)
    path.write_text("\n".join([json.dumps(content if version is None else {key: version, **content}), *rest]) + "\n")


def test_a_journal_of_a_newer_version_is_refused_by_name_and_one_without_a_version_is_continued(
    rows: Path, tokenizer: Any, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    journal = leave_unfinished(rows, tokenizer, tmp_path / "out") / JOURNAL_NAME
    set_version(journal, "journal_version", 2)
    before = content_of(journal.parent)
    with pytest.raises(OutputError, match="is of version 2, but this program reads 1") as caught:
        prepare(rows, tokenizer, tmp_path / "out")
    assert caught.value.where == str(journal) and content_of(journal.parent) == before
    set_version(journal, "journal_version", None)
    prepare(rows, tokenizer, tmp_path / "out")
    assert content_of(tmp_path / "out") == undisturbed


def test_a_report_of_a_newer_version_is_refused_by_name(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    prepare(rows, tokenizer, tmp_path / "out")
    set_version(tmp_path / "out" / "report.json", "version", 2)
    with pytest.raises(OutputError, match="report of version 2, but this program reads 1"):
        prepare(rows, tokenizer, tmp_path / "out")


def damage_last_line(partial: Path) -> None:
    journal = partial / JOURNAL_NAME
    journal.write_bytes(journal.read_bytes()[:-10])


def damage_middle_line(partial: Path) -> None:
    lines = (partial / JOURNAL_NAME).read_text().splitlines()
    lines[2] = '{"part": "train"}'
    (partial / JOURNAL_NAME).write_text("\n".join(lines))


def flip_a_byte(partial: Path) -> None:
    path = partial / "train" / "shard-000001.tar"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut_a_shard(partial: Path) -> None:
    path = partial / "train" / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:1000])


def remove_eval(partial: Path) -> None:
    shutil.rmtree(partial / "eval", ignore_errors=True)


@pytest.mark.parametrize("damage", [damage_last_line, damage_middle_line, flip_a_byte, cut_a_shard, remove_eval])
def test_what_was_damaged_meanwhile_is_done_again(
    rows: Path, tokenizer: Any, tmp_path: Path, undisturbed: dict[str, bytes], damage: Any
) -> None:
    damage(leave_unfinished(rows, tokenizer, tmp_path / "out"))
    prepare(rows, tokenizer, tmp_path / "out")
    assert content_of(tmp_path / "out") == undisturbed


def test_finished_shards_are_not_tokenised_again(
    rows: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    original = prepare_module.DocumentTokeniser.__call__

    def counted(self: Any, raw: Any) -> Any:
        names.append(raw.name)
        return original(self, raw)

    leave_unfinished(rows, tokenizer, tmp_path / "out")
    monkeypatch.setattr(prepare_module.DocumentTokeniser, "__call__", counted)
    prepare(rows, tokenizer, tmp_path / "out")
    assert len(names) < 90
    assert len(set(names)) == len(names)


def test_other_settings_are_refused_with_what_differs_and_the_work_is_kept(
    rows: Path, tokenizer: Any, tmp_path: Path
) -> None:
    partial = leave_unfinished(rows, tokenizer, tmp_path / "out")
    kept = content_of(partial)
    other = PrepareSettings(**{**vars(SETTINGS), "sequence_length": 65})
    with pytest.raises(OutputError, match="sequence_length is 65, was 64") as caught:
        prepare(rows, tokenizer, tmp_path / "out", settings=other)
    assert str(partial) in caught.value.where
    rows.write_text(rows.read_text() + "\n")
    with pytest.raises(OutputError, match="input_sha256"):
        prepare(rows, tokenizer, tmp_path / "out")
    assert content_of(partial) == kept


def test_a_finished_output_is_not_done_again(
    rows: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(rows, tokenizer, tmp_path / "out")
    monkeypatch.setattr(prepare_module, "tokenise_all", None)
    second = prepare(rows, tokenizer, tmp_path / "out")
    assert second.was_done and not first.was_done
    assert {**vars(second), "was_done": False} == vars(first)
    other = PrepareSettings(**{**vars(SETTINGS), "long": "split"})
    with pytest.raises(OutputError, match="long is split, was auto"):
        prepare(rows, tokenizer, tmp_path / "out", settings=other)


def test_two_calls_at_once_do_not_mix(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    partial = leave_unfinished(rows, tokenizer, tmp_path / "out")
    with open(partial / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another process is writing"):
            prepare(rows, tokenizer, tmp_path / "out")


def test_an_error_before_the_first_finished_shard_leaves_nothing(rows: Path, tokenizer: Any, tmp_path: Path) -> None:
    settings = PrepareSettings(sequence_length=64, shard_bytes=1 << 20)
    with pytest.raises(DataError, match='"text" is a int') as caught:
        prepare(rows, tokenizer, tmp_path / "out", settings=settings)
    assert caught.value.where == f"{rows}:4" and "--on-bad-sample skip" in caught.value.way_out
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.fixture
def several_batches(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("comet_megatron.data.workers._BATCH_BYTES", 1000)
    yield


@pytest.mark.usefixtures("several_batches")
def test_two_processes_give_the_same_bytes_and_continue_what_one_began(
    rows: Path, tokenizer: Any, tmp_path: Path, undisturbed: dict[str, bytes]
) -> None:
    leave_unfinished(rows, tokenizer, tmp_path / "out")
    prepare(rows, tokenizer, tmp_path / "out", num_workers=2)
    assert content_of(tmp_path / "out") == undisturbed
    with pytest.raises(DataError) as caught:
        prepare(rows, tokenizer, tmp_path / "stopped", num_workers=2, settings=PrepareSettings(sequence_length=64))
    assert caught.value.where == f"{rows}:4"
