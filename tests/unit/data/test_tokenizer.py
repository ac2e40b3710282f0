"""Tokenizers: exact, the same in both forms, and refused when damaged."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from comet_megatron.data.documents import Document, python_stdlib_files
from comet_megatron.data.tokenizer import (
    bpe_merges,
    encode,
    ids_of_document,
    load_tokenizer,
    tokenizer_fingerprint,
    train_sentencepiece,
)
from comet_megatron.errors import ConfigError, DataError

CORPUS = [Document(f"d{n}", f"def f{n}(x):\n    if x:\n        return x * {n}\n\ttab\n") for n in range(200)]
SCRIPTS = {  # inclusive ranges of characters
    "ASCII": [(0x20, 0x7E)],
    "Latin with diacritics": [(0x61, 0x7A), (0xC0, 0x24F), (0x1E00, 0x1EFF)],
    "Cyrillic": [(0x400, 0x52F)],
    "Greek": [(0x370, 0x3FF), (0x1F00, 0x1FFF)],
    "Arabic": [(0x600, 0x6FF)],
    "Hebrew": [(0x590, 0x5F4)],
    "Devanagari": [(0x900, 0x97F)],
    "Thai": [(0xE01, 0xE5B)],
    "Han": [(0x4E00, 0x9FFF), (0x20000, 0x2A6DF)],
    "kana": [(0x3041, 0x30FF), (0xFF66, 0xFF9D)],
    "Hangul": [(0xAC00, 0xD7A3), (0x1100, 0x11FF)],
    "emoji with joiners": [(0x1F300, 0x1FAFF), (0x200D, 0x200D), (0xFE0F, 0xFE0F), (0x1F3FB, 0x1F3FF)],
    "combining marks": [(0x61, 0x7A), (0x300, 0x36F), (0x1AB0, 0x1ACE), (0x20D0, 0x20F0)],
    "control characters": [(0x00, 0x1F), (0x7F, 0x9F), (0xAD, 0xAD), (0x200B, 0x200F), (0x202A, 0x202E)],
    "white space": [(0x09, 0x0D), (0x20, 0x20), (0x85, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x3000)],
    "private use, compatibility forms": [(0xE000, 0xFFFF)],
    "all other planes": [(0x10000, 0x10FFFF)],
}
SPECIAL_CASES = [
    " " * 37,
    "\t\t",
    "\n\n\n",
    "\r\n",
    "👨‍👩‍👧‍👦",
    "👍🏽",
    "e\u0301",
    "<0x0A>",
    "<|endoftext|>",
    "<unk>",
    "</s>",
    "\x00",
    "\ufeff",
    "\u2580\u2582",  # on either side of SentencePiece's own character
]


def random_word(generator: random.Random, script: str) -> str:
    ranges = SCRIPTS[script]
    characters = (chr(generator.randint(*generator.choice(ranges))) for _ in range(generator.randint(1, 8)))
    return "".join(characters).replace("\u2581", "\u2582")  # see test_the_character_of_sentencepiece


def random_texts(number: int, *, words: tuple[str, ...] = ()) -> list[str]:
    """The same each time; every script is in many of them.

    Args:
        words: what a tokenizer was trained on: random characters alone would seldom be pieces of it.
    """
    generator = random.Random(1)
    texts = []
    for _ in range(number):
        parts = []
        for _ in range(generator.randint(0, 16)):
            kind = generator.random()
            if kind < 0.3:
                parts.append(generator.choice(SPECIAL_CASES) * generator.randint(1, 2))
            elif kind < 0.6 and words:
                parts.append(generator.choice(words)[generator.randint(0, 2) :])
            else:
                parts.append(random_word(generator, generator.choice(list(SCRIPTS))))
        texts.append("".join(parts))
    return texts


@pytest.fixture(scope="module")
def small_tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_sentencepiece(CORPUS, vocab_size=310, output_dir=tmp_path_factory.mktemp("tokenizer") / "small")


@pytest.fixture(scope="module")
def words_of_all_scripts() -> tuple[str, ...]:
    generator = random.Random(2)
    return tuple(random_word(generator, script) for script in SCRIPTS for _ in range(12))


@pytest.fixture(scope="module")
def tokenizer_of_all_scripts(tmp_path_factory: pytest.TempPathFactory, words_of_all_scripts: tuple[str, ...]) -> Path:
    generator = random.Random(3)
    lines = [" ".join(generator.choices(words_of_all_scripts, k=40)) for _ in range(300)]
    folder = tmp_path_factory.mktemp("tokenizer") / "scripts"
    return train_sentencepiece([Document("words", "\n".join(lines))], vocab_size=1800, output_dir=folder)


@pytest.fixture(scope="session")
def reference(tokenizer_dir: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))


def check_ids_are_those_of_sentencepiece(folder: Path, texts: list[str]) -> None:
    """As AutoTokenizer loads the folder and calls it, and as prepare_data does; and the texts come back."""
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in texts:
        ids = reference.encode(text)
        assert encode(tokenizer, text) == ids, repr(text)
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == ids, repr(text)
        assert tokenizer.decode(ids) == reference.decode(ids) == text


def test_ids_are_those_of_sentencepiece_on_1000_random_texts_which_come_back_unchanged(tokenizer_dir: Path) -> None:
    check_ids_are_those_of_sentencepiece(tokenizer_dir, random_texts(1000))


def test_a_tokenizer_trained_on_all_scripts_has_the_ids_of_sentencepiece_on_1000_random_texts(
    tokenizer_of_all_scripts: Path, words_of_all_scripts: tuple[str, ...]
) -> None:
    texts = random_texts(1000, words=words_of_all_scripts)
    check_ids_are_those_of_sentencepiece(tokenizer_of_all_scripts, texts)
    tokenizer = load_tokenizer(tokenizer_of_all_scripts)
    assert len({i for text in texts for i in encode(tokenizer, text)}) > 1000, (
        "the texts must meet learned pieces of many scripts, and bytes"
    )


def test_the_character_of_sentencepiece_has_its_ids_and_comes_back_as_a_space(tokenizer, reference) -> None:
    for text in ("\u2581", "a\u2581 b", "\u2581\u2581x"):
        assert encode(tokenizer, text) == reference.encode(text)
        assert tokenizer.decode(encode(tokenizer, text)) == text.replace("\u2581", " ")


def test_ids_are_those_of_sentencepiece_on_source_code_which_comes_back_unchanged(tokenizer, reference) -> None:
    for document in list(python_stdlib_files())[::30]:
        ids = encode(tokenizer, document.text)
        assert ids == reference.encode(document.text), document.name
        assert tokenizer.decode(ids) == document.text


@given(st.text(st.sampled_from("ab =-_#\n"), max_size=60))
def test_ids_are_those_of_sentencepiece_where_many_pieces_overlap(tokenizer, reference, text: str) -> None:
    assert encode(tokenizer, text) == reference.encode(text)


def test_the_plain_call_of_the_tokenizer_adds_nothing(tokenizer) -> None:
    text = "def f(x):\n    return x\n"
    assert tokenizer(text)["input_ids"] == encode(tokenizer, text)
    assert len(tokenizer) == tokenizer.vocab_size == 4096
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")


def test_indentation_is_one_token_and_digits_are_single(tokenizer) -> None:
    assert tokenizer.convert_ids_to_tokens(encode(tokenizer, "\n        return 123"))[:2] == ["\n", "\u2581" * 8]
    assert len(encode(tokenizer, "2024")) == 4


def test_a_document_ends_in_one_end_of_text_and_text_cannot_forge_it(tokenizer) -> None:
    ids = ids_of_document(tokenizer, "a<|endoftext|>b<|pad|>")
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert list(np.flatnonzero(ids == tokenizer.eos_token_id)) == [len(ids) - 1]
    assert tokenizer.pad_token_id not in ids
    assert tokenizer.decode(ids) == "a<|endoftext|>b<|pad|><|endoftext|>"
    assert list(ids_of_document(tokenizer, "")) == [tokenizer.eos_token_id]


def test_no_token_is_added_where_a_tokenizer_would_add_some(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    content = json.loads((tmp_path / "t" / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|pad|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|pad|>": {"id": "<|pad|>", "ids": [2], "tokens": ["<|pad|>"]}},
    }
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    eager = load_tokenizer(tmp_path / "t")
    assert eager("a")["input_ids"][0] == 2  # it does add one when asked plainly
    assert list(ids_of_document(eager, "a"))[0] != 2


def test_a_text_is_whole_with_a_tokenizer_that_says_to_truncate_and_pad(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "t")
    content = json.loads((tmp_path / "t" / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    content["padding"] = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None}
    content["padding"] |= {"pad_id": 2, "pad_type_id": 0, "pad_token": "<|pad|>"}
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    text = "def f(x):\n    return '<|pad|>'\n"
    plain, eager = load_tokenizer(tokenizer_dir), load_tokenizer(tmp_path / "t")
    ids = encode(eager, text)
    assert ids == plain(text, split_special_tokens=True)["input_ids"] and plain.decode(ids) == text


def test_a_tokenizer_without_end_of_text_cannot_end_documents(tokenizer_dir: Path) -> None:
    crippled = load_tokenizer(tokenizer_dir)
    crippled.eos_token = None
    with pytest.raises(DataError, match="no end-of-text token"):
        ids_of_document(crippled, "a")


def test_training_gives_the_size_asked_for_and_the_same_files_twice(small_tokenizer_dir: Path, tmp_path: Path) -> None:
    assert len(load_tokenizer(small_tokenizer_dir)) == 310
    again = train_sentencepiece(CORPUS, vocab_size=310, output_dir=tmp_path / "again")
    names = sorted(path.name for path in again.iterdir())
    assert names == ["special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json"]
    for name in names:
        assert (again / name).read_bytes() == (small_tokenizer_dir / name).read_bytes(), name


def test_a_newly_trained_tokenizer_is_exact_too(small_tokenizer_dir: Path) -> None:
    tokenizer = load_tokenizer(small_tokenizer_dir)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(small_tokenizer_dir / "tokenizer.model"))
    for text in [*random_texts(60), CORPUS[0].text, CORPUS[199].text]:
        assert encode(tokenizer, text) == reference.encode(text)
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_training_takes_paths_of_text_files(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("".join(document.text for document in CORPUS))
    folder = train_sentencepiece([tmp_path / "in.txt"], vocab_size=300, output_dir=tmp_path / "out")
    assert len(load_tokenizer(folder)) == 300


@pytest.mark.parametrize("vocab_size", [0, 261, 5000])
def test_a_vocabulary_that_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, vocab_size: int) -> None:
    with pytest.raises(ConfigError, match=f"vocab_size={vocab_size}"):
        train_sentencepiece(CORPUS[:2], vocab_size=vocab_size, output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_training_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        train_sentencepiece([Document("empty", "\n\n")], vocab_size=300, output_dir=tmp_path / "out")
    with pytest.raises(DataError, match="does not exist"):
        train_sentencepiece([tmp_path / "nowhere.txt"], vocab_size=300, output_dir=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_merges_are_ordered_by_the_piece_they_make_and_never_make_bytes() -> None:
    pieces = ["<0x0A>", "ab", "abc", "bc", "a", "b", "c", "<0x0", "A>", "<0x0A>a"]
    merges = list(bpe_merges(pieces, mergeable=set(pieces) - {"<0x0A>"}))
    assert merges == [("a", "b"), ("ab", "c"), ("a", "bc"), ("b", "c")]


def test_the_fingerprint_survives_saving_and_sees_a_changed_merge(
    tokenizer: Any, tokenizer_dir: Path, tmp_path
) -> None:
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert len(fingerprint) == 64 and fingerprint == tokenizer_fingerprint(tokenizer_dir)
    tokenizer.save_pretrained(tmp_path / "saved")
    assert tokenizer_fingerprint(tmp_path / "saved") == fingerprint
    content = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
    (tmp_path / "saved" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert tokenizer_fingerprint(tmp_path / "saved") != fingerprint


def test_the_fingerprint_sees_an_added_token(tokenizer_dir: Path) -> None:
    grown = load_tokenizer(tokenizer_dir)
    before = tokenizer_fingerprint(grown)
    grown.add_tokens(["<one more>"])
    assert tokenizer_fingerprint(grown) != before


def test_the_fingerprint_of_the_shipped_tokenizer_is_known(tokenizer: Any) -> None:
    assert tokenizer_fingerprint(tokenizer) == "c2cb39193a210eec55cb88e73779d718b6a63ffca36d310fd98391ed3abda3d6"


def test_the_tokenizers_folder_holds_no_python(tokenizer_dir: Path) -> None:
    assert not list(tokenizer_dir.parent.rglob("*.py"))


def test_a_missing_tokenizer_folder_and_one_without_a_tokenizer_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist") as caught:
        load_tokenizer(tmp_path / "gone")
    assert str(tmp_path / "gone") == caught.value.where and caught.value.way_out
    with pytest.raises(DataError, match="holds no tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty object", "wrong merges", "no config"])
def test_a_damaged_tokenizer_is_refused_although_tokenizer_model_is_whole(
    tokenizer_dir: Path, tmp_path: Path, damage: str
) -> None:
    folder = tmp_path / "t"
    shutil.copytree(tokenizer_dir, folder)
    path = folder / "tokenizer.json"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "empty object":
        path.write_text("{}")
    elif damage == "wrong merges":
        content = json.loads(path.read_text(encoding="utf-8"))
        content["model"]["merges"].append(["nowhere", "to be found"])
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        (folder / "tokenizer_config.json").write_text("not JSON")
    with pytest.raises(DataError) as caught:
        load_tokenizer(folder)
    assert str(folder) in caught.value.where
