"""tools/prepare_data.py and tools/train_tokenizer.py, as a user calls them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.documents import Document, text_files
from comet_megatron.data.prepare import PrepareSettings, is_held_out, prepare_data, split_into_pieces
from comet_megatron.data.tokenizer import ids_of_document, tokenizer_fingerprint
from comet_megatron.errors import ConfigError, DataError

Tool = Callable[[Sequence[str]], int]
REPOSITORY = Path(__file__).resolve().parents[3]


def arguments(*, source: Path | str, tokenizer: Path, output: Path, length: int = 64, **more: object) -> list[str]:
    values = {"input": source, "tokenizer": tokenizer, "output": output, "sequence-length": length, **more}
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def meta_of(folder: Path) -> list[dict]:
    """The meta data of all samples, in order."""
    rows = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            rows += [json.load(tar.extractfile(m)) for m in tar if m.name.endswith(".meta.json")]
    return rows


def test_the_samples_are_the_documents_cut_and_nothing_else(
    prepare_data_tool: Tool, corpus_dir: Path, tokenizer_dir: Path, tokenizer, tmp_path: Path, capsys
) -> None:
    output = tmp_path / "out"
    given_arguments = arguments(
        source=corpus_dir, tokenizer=tokenizer_dir, output=output, eval_fraction=0.3, shard_mb=0.01
    )
    assert prepare_data_tool(given_arguments) == 0
    documents = {document.name: ids_of_document(tokenizer, document.text) for document in text_files([corpus_dir])}
    written: dict[str, set[str]] = {}
    num_tokens = 0
    for part in ("train", "eval"):
        dataset = ShardDataset(output / part)
        meta = meta_of(output / part)
        assert len(meta) == len(dataset)
        for number, row in enumerate(meta):
            start = row["piece"] * 64
            np.testing.assert_array_equal(dataset[number], documents[row["document"]][start : start + 64])
        num_tokens += dataset.num_tokens
        written[part] = {row["document"] for row in meta}
        assert dataset.manifest.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
        assert (dataset.manifest.vocab_size, dataset.manifest.settings["sequence_length"]) == (4096, 64)
    assert len(ShardDataset(output / "train").manifest.shards) > 1
    assert not written["train"] & written["eval"], "a document is in both parts"
    assert written["eval"] == {n for n in documents if is_held_out(n, fraction=0.3) and len(documents[n]) >= 32}
    kept = sum(len(p) for ids in documents.values() for p in np.split(ids, range(64, len(ids), 64)) if len(p) >= 32)
    dropped = [len(p) for ids in documents.values() for p in np.split(ids, range(64, len(ids), 64)) if len(p) < 32]
    assert num_tokens == kept
    shown = capsys.readouterr().out
    assert f"{len(dropped)} pieces too short, {sum(dropped)} tokens" in shown
    assert f"data.train={output}/train data.eval={output}/eval" in shown


def test_the_same_input_gives_the_same_bytes(
    prepare_data_tool: Tool, corpus_dir: Path, tokenizer_dir: Path, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        given_arguments = arguments(source=corpus_dir, tokenizer=tokenizer_dir, output=tmp_path / name)
        assert prepare_data_tool(given_arguments) == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert len(files) == 8
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_without_held_out_documents_there_is_no_eval_folder(
    prepare_data_tool: Tool, corpus_dir: Path, tokenizer_dir: Path, tmp_path: Path, capsys
) -> None:
    given_arguments = arguments(source=corpus_dir, tokenizer=tokenizer_dir, output=tmp_path / "out", eval_fraction=0)
    assert prepare_data_tool(given_arguments) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["lengths.png", "report.json", "train"]
    shown = capsys.readouterr().out
    assert "no document fell into the held-out part" in shown and "data.eval" not in shown


def test_a_piece_of_the_minimum_is_kept_and_a_shorter_one_is_dropped(tokenizer, tmp_path: Path) -> None:
    document = Document("digits", "1" * 31)  # and the end of text: 32 tokens
    for min_tokens, other in ((32, Document("more", "1" * 30)), (31, Document("less", "1" * 29))):
        report = prepare_data(
            [document, other],
            tokenizer=tokenizer,
            output_dir=tmp_path / str(min_tokens),
            settings=PrepareSettings(sequence_length=64, min_tokens=min_tokens, eval_fraction=0),
        )
        assert (report.train.num_tokens, report.num_dropped_pieces) == (32, 1)
        assert report.num_dropped_tokens == min_tokens - 1


def test_limits_of_documents_and_tokens_are_kept(corpus_dir: Path, tokenizer, tmp_path: Path) -> None:
    def prepare(name: str, **limits: int):
        settings = PrepareSettings(sequence_length=64, eval_fraction=0.3, **limits)
        return prepare_data(
            text_files([corpus_dir]), tokenizer=tokenizer, output_dir=tmp_path / name, settings=settings
        )

    assert prepare("documents", max_documents=7).num_documents == 7
    report = prepare("tokens", max_tokens=1000)
    total = report.train.num_tokens + (report.eval.num_tokens if report.eval else 0)
    assert 1000 - 64 < total <= 1000


def test_a_bigger_held_out_part_contains_the_smaller_one_and_has_the_size_asked_for() -> None:
    names = [f"file{n}.py" for n in range(4000)]
    small = {name for name in names if is_held_out(name, fraction=0.05)}
    big = {name for name in names if is_held_out(name, fraction=0.2)}
    assert small < big
    assert 140 < len(small) < 260 and 700 < len(big) < 900
    assert not any(is_held_out(name, fraction=0) for name in names)


@given(length=st.integers(1, 300), sequence_length=st.integers(1, 70))
def test_the_pieces_together_are_the_document_and_only_the_last_is_short(length: int, sequence_length: int) -> None:
    ids = np.arange(length, dtype=np.int32)
    pieces = split_into_pieces(ids, sequence_length=sequence_length)
    np.testing.assert_array_equal(np.concatenate(pieces), ids)
    assert all(len(piece) == sequence_length for piece in pieces[:-1]) and 0 < len(pieces[-1]) <= sequence_length


def test_all_settings_out_of_range_are_reported_at_once() -> None:
    bad = PrepareSettings(sequence_length=0, min_tokens=1, eval_fraction=1, shard_bytes=0, max_tokens=-1)
    with pytest.raises(ConfigError) as caught:
        bad.check()
    for name in ("sequence_length=0", "min_tokens=1", "eval_fraction=1", "shard_bytes=0", "max_tokens=-1"):
        assert name in str(caught.value)


def make_bad_input(kind: str, values: dict[str, object], tmp_path: Path, tokenizer_dir: Path) -> None:
    """Spoil one of the arguments of a call that would work."""
    if kind == "missing input":
        values["source"] = tmp_path / "nowhere"
    elif kind == "empty input folder":
        (tmp_path / "empty").mkdir()
        values["source"] = tmp_path / "empty"
    elif kind == "nothing but a short file":
        (tmp_path / "short.txt").write_text("x")
        values["source"] = tmp_path / "short.txt"
    elif kind == "bad JSONL":
        (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n{"no": 1}\n')
        values["source"] = tmp_path / "rows.jsonl"
    elif kind == "missing tokenizer":
        values["tokenizer"] = tmp_path / "no_tokenizer"
    elif kind == "damaged tokenizer":
        shutil.copytree(tokenizer_dir, tmp_path / "damaged")
        (tmp_path / "damaged" / "tokenizer.json").write_text("{")
        values["tokenizer"] = tmp_path / "damaged"
    elif kind == "full output folder":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("mine")
    elif kind == "output is a file":
        (tmp_path / "out").write_text("mine")
    elif kind == "output in a file":
        (tmp_path / "file").write_text("mine")
        values["output"] = tmp_path / "file" / "out"
    elif kind == "sequence too short":
        values["length"] = 8


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        ("missing input", "nowhere"),
        ("empty input folder", "holds no files"),
        ("nothing but a short file", "none of 1 documents"),
        ("bad JSONL", "rows.jsonl:2"),
        ("missing tokenizer", "no_tokenizer"),
        ("damaged tokenizer", "damaged"),
        ("full output folder", "not empty"),
        ("output is a file", "existing file"),
        ("output in a file", "cannot be made"),
        ("sequence too short", "sequence_length=8"),
    ],
)
def test_a_bad_call_gives_one_message_and_exit_code_2_and_writes_nothing(
    prepare_data_tool: Tool, corpus_dir: Path, tokenizer_dir: Path, tmp_path: Path, capsys, kind: str, complaint: str
) -> None:
    values = {"source": corpus_dir, "tokenizer": tokenizer_dir, "output": tmp_path / "out", "eval_fraction": 0}
    make_bad_input(kind, values, tmp_path, tokenizer_dir)
    before = sorted(tmp_path.rglob("*"))
    assert prepare_data_tool(arguments(**values)) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err and "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_error_in_the_middle_leaves_nothing(corpus_dir: Path, tokenizer, tmp_path: Path) -> None:
    def documents():
        yield from text_files([corpus_dir])
        assert list(tmp_path.glob(".out.partial-*/train/*.tar"))
        raise RuntimeError("boom")

    settings = PrepareSettings(sequence_length=64, shard_bytes=100)
    with pytest.raises(RuntimeError, match="boom"):
        prepare_data(documents(), tokenizer=tokenizer, output_dir=tmp_path / "out", settings=settings)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_all_documents_held_out_is_an_error_that_says_so(tokenizer, tmp_path: Path) -> None:
    name = next(f"d{n}" for n in range(1000) if is_held_out(f"d{n}", fraction=0.05))
    with pytest.raises(DataError, match="none is left to train on"):
        prepare_data(
            [Document(name, "some text " * 50)],
            tokenizer=tokenizer,
            output_dir=tmp_path / "out",
            settings=PrepareSettings(sequence_length=64),
        )
    assert not list(tmp_path.iterdir())


def run(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, cwd=REPOSITORY)


def test_the_command_itself_ends_with_code_2_and_no_traceback_on_a_bad_call(
    tokenizer_dir: Path, tmp_path: Path
) -> None:
    bad = arguments(source=tmp_path / "nowhere", tokenizer=tokenizer_dir, output=tmp_path / "out")
    ended = run("tools/prepare_data.py", *bad)
    assert ended.returncode == 2
    assert ended.stderr.startswith("data error: the input does not exist")
    assert "Traceback" not in ended.stderr and not ended.stdout and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["prepare_data", "train_tokenizer"])
def test_help_says_what_it_does_with_an_example(name: str) -> None:
    ended = run(f"tools/{name}.py", "--help")
    assert ended.returncode == 0 and "python-stdlib --" in ended.stdout and "--output DIR" in ended.stdout


def test_a_tokenizer_trained_by_the_tool_prepares_data(
    train_tokenizer_tool: Tool, prepare_data_tool: Tool, corpus_dir: Path, tmp_path: Path, capsys
) -> None:
    words = ["--input", str(corpus_dir), "--vocab-size", "300", "--output", str(tmp_path / "tokenizer")]
    assert train_tokenizer_tool(words) == 0
    shown = capsys.readouterr().out
    assert "300 pieces" in shown and "next: python tools/prepare_data.py" in shown
    given_arguments = arguments(source=corpus_dir, tokenizer=tmp_path / "tokenizer", output=tmp_path / "out")
    assert prepare_data_tool(given_arguments) == 0
    assert ShardDataset(tmp_path / "out" / "train").manifest.vocab_size == 300


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"--input": "nowhere"}, "does not exist"),
        ({"--vocab-size": "100"}, "vocab_size=100"),
        ({"--vocab-size": "99999"}, "does not fit"),
    ],
)
def test_a_bad_call_of_the_training_tool_gives_exit_code_2_and_writes_nothing(
    train_tokenizer_tool: Tool, corpus_dir: Path, tmp_path: Path, capsys, changed: dict[str, str], complaint: str
) -> None:
    values = {"--input": str(corpus_dir), "--vocab-size": "300", "--output": str(tmp_path / "out"), **changed}
    assert train_tokenizer_tool([word for item in values.items() for word in item]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err and "Traceback" not in captured.err
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
