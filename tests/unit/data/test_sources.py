"""What a place of data.train is, and what is made of JSONL on first use."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.first_use import prepare_source, prepared_folder, shards_in
from comet_megatron.data.prepare import PrepareSettings
from comet_megatron.data.sources import EVAL, TRAIN, find_source
from comet_megatron.errors import CometError, DataError

SETTINGS = PrepareSettings(sequence_length=64, min_tokens=4, eval_fraction=0)


def found(place: object, part: str = TRAIN):
    return find_source(str(place), part=part, key=f"data.{part}")


def write_rows(path: Path, *texts: str) -> Path:
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def prepare(source, folder: Path, tokenizer, say=lambda text: None, *, settings=SETTINGS, reserved=None) -> int:
    return prepare_source(source, folder, tokenizer=tokenizer, settings=settings, reserved=reserved or {}, say=say)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "some.jsonl", *(f"def f{n}(x):\n    return x * {n} + 1\n" for n in range(20)))


def test_a_folder_of_shards_counts_itself_or_as_the_output_of_prepare_data(shard_dir: Path, tmp_path: Path) -> None:
    assert found(shard_dir).shards == (str(shard_dir),)
    output = tmp_path / "output"
    output.mkdir()
    (output / "train").symlink_to(shard_dir)
    assert found(output).shards == (str(output / "train"),)
    with pytest.raises(DataError, match="no documents were held out there"):
        found(output, EVAL)
    (output / "eval").symlink_to(shard_dir)
    assert found(output, EVAL).shards == (str(output / "eval"),)


def test_a_pattern_joins_what_it_matches_in_the_order_of_names(shard_dir: Path, tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / "many").mkdir(exist_ok=True)
        (tmp_path / "many" / name).symlink_to(shard_dir)
    assert found(tmp_path / "many" / "*").shards == tuple(str(tmp_path / "many" / n) for n in "ab")
    with pytest.raises(DataError, match="data.train: no file or folder matches"):
        found(tmp_path / "nothing*")


def test_jsonl_is_texts_alone_in_a_folder_and_by_a_pattern(tmp_path: Path, rows: Path) -> None:
    write_rows(tmp_path / "more.jsonl.gz", "x = 1\n")
    for place, names in (
        (rows, ["some.jsonl"]),
        (tmp_path, ["more.jsonl.gz", "some.jsonl"]),
        (tmp_path / "*.jsonl*", ["more.jsonl.gz", "some.jsonl"]),
    ):
        source = found(place)
        assert not source.shards and [file.path.name for file in source.texts.files] == names


def test_shards_beside_jsonl_are_refused_by_name(shard_dir: Path, rows: Path) -> None:
    with pytest.raises(DataError, match=r"matches both JSONL \(.*some.jsonl\) and shards \(.*shards\)"):
        found(shard_dir.parent / "s*")


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("nowhere", "does not exist"),
        ("memory://nowhere/train", "no manifest.json"),
        ("memory://nowhere/texts.jsonl", "behind a URL is not read directly"),
    ],
)
def test_what_holds_no_data_is_named(place: str, complaint: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=complaint) as caught:
        found(place)
    assert place in str(caught.value) and caught.value.way_out


def test_jsonl_is_made_into_shards_beside_the_run_once(rows: Path, tmp_path: Path, tokenizer) -> None:
    source, run, said = found(rows), str(tmp_path / "runs" / "first"), []
    folder = prepared_folder(source, run=run, tokenizer=tokenizer, settings=SETTINGS)
    assert folder.parent == tmp_path / "runs" / "first.data" and folder.name.startswith("some.jsonl-")
    assert prepare(source, folder, tokenizer, said.append) == 0
    assert len(said) == 3 and "1 file," in said[0] and "20 documents: 20 samples" in said[1]
    dataset = ShardDataset(shards_in(folder))
    assert len(dataset) == 20 and tokenizer.decode(dataset[3]).startswith("def f3(x)")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    prepare(source, folder, tokenizer, said.append)
    assert len(said) == 3 and before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_jsonl_that_has_changed_since_is_refused_with_the_way_out(rows: Path, tmp_path: Path, tokenizer) -> None:
    folder = prepared_folder(found(rows), run=str(tmp_path / "run"), tokenizer=tokenizer, settings=SETTINGS)
    prepare(found(rows), folder, tokenizer)
    with open(rows, "a") as file:
        file.write('{"text": "one more row, at the end of it"}\n')
    with pytest.raises(CometError, match="prepared otherwise: input_sha256") as caught:
        prepare(found(rows), folder, tokenizer)
    assert str(folder) in caught.value.where


def test_another_length_or_place_gets_a_folder_of_its_own(rows: Path, tmp_path: Path, tokenizer) -> None:
    def folder(source=None, length: int = 64) -> Path:
        settings = PrepareSettings(sequence_length=length)
        return prepared_folder(source or found(rows), run=str(tmp_path / "run"), tokenizer=tokenizer, settings=settings)

    other = write_rows(tmp_path / "other.jsonl", "x")
    assert len({folder(), folder(length=32), folder(found(other)), folder(found(tmp_path / "*.jsonl"))}) == 4
    assert "*" not in folder(found(tmp_path / "*.jsonl")).name


def test_ids_of_jsonl_read_directly_are_those_of_prepare_data(rows: Path, tmp_path: Path, tokenizer) -> None:
    folder = tmp_path / "run.data" / "x"
    prepare(found(rows), folder, tokenizer)
    dataset = ShardDataset(shards_in(folder))
    texts = [json.loads(line)["text"] for line in rows.read_text().splitlines()]
    for number, text in enumerate(texts):
        wanted = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        np.testing.assert_array_equal(dataset[number], wanted)


def test_the_same_file_spelt_otherwise_is_the_same_source(rows: Path, tmp_path: Path, tokenizer, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"run": str(tmp_path / "run"), "tokenizer": tokenizer, "settings": SETTINGS}
    folder = prepared_folder(found(rows), **given)
    prepare(found(rows), folder, tokenizer)
    said: list[str] = []
    assert prepared_folder(found("some.jsonl"), **given) == folder
    prepare(found("some.jsonl"), folder, tokenizer, said.append)
    assert not said


def test_after_a_bad_row_the_advice_can_be_followed_and_finished_shards_are_kept(tmp_path: Path, tokenizer) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", *(f"x = {n}\n" * 40 for n in range(50)))
    with open(bad, "a") as file:
        file.write("{}\n")
    stop = dataclasses.replace(SETTINGS, shard_bytes=2000)
    skip = dataclasses.replace(stop, on_bad_sample="skip")
    with pytest.raises(DataError, match='no "text"') as caught:
        prepare(found(bad), tmp_path / "out", tokenizer, settings=stop)
    assert "data.on_bad_sample=skip" in caught.value.way_out and "--on-bad-sample" not in caught.value.way_out
    assert (tmp_path / ".out.partial").exists()
    assert prepare(found(bad), tmp_path / "out", tokenizer, settings=skip) == 1
    said: list[str] = []
    assert prepare(found(bad), tmp_path / "out", tokenizer, said.append, settings=stop) == 1
    assert len(said) == 1 and "1 bad rows were left out when" in said[0]


def test_what_is_split_cut_or_left_out_is_said(tmp_path: Path, tokenizer) -> None:
    file = write_rows(tmp_path / "long.jsonl", "x = 1\n" * 100, "y = 2\n")
    said: list[str] = []
    prepare(found(file), tmp_path / "out", tokenizer, said.append)
    assert any("1 texts longer than data.sequence_length were split" in line for line in said)


def test_a_text_that_spells_a_token_of_the_memory_is_a_bad_row(tmp_path: Path, tokenizer) -> None:
    spelt = tokenizer("def", add_special_tokens=False)["input_ids"][0]
    file = write_rows(tmp_path / "some.jsonl", "x = 1\ny = 2\n", "def f(x):\n    return x\n")
    with pytest.raises(DataError, match="the text spells <beacon>") as caught:
        prepare(found(file), tmp_path / "out", tokenizer, reserved={spelt: "<beacon>"})
    assert caught.value.where == f"{file}:2"


@pytest.mark.parametrize("name", ["texts.txt", "shard-000000.tar"])
def test_a_file_that_is_no_data_says_what_may_be_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("x")
    for place in (tmp_path / name, tmp_path / "*"):
        with pytest.raises(DataError, match="a file that is neither shards nor JSONL") as caught:
            found(place)
        assert str(tmp_path / name) == caught.value.where and ".jsonl.gz" in caught.value.way_out


def test_jsonl_beside_shards_in_one_folder_is_refused(shard_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "train").symlink_to(shard_dir)
    write_rows(tmp_path / "both" / "a.jsonl", "x")
    with pytest.raises(DataError, match="holds both JSONL"):
        found(tmp_path / "both")


def test_a_name_that_no_file_can_have_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read|does not exist") as caught:
        found(tmp_path / ("x" * 300))
    assert caught.value.way_out


def test_patterns_reach_into_folders(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    write_rows(tmp_path / "a" / "b" / "deep.jsonl", "x")
    assert [f.path.name for f in found(tmp_path / "**" / "*.jsonl").texts.files] == ["deep.jsonl", "some.jsonl"]
