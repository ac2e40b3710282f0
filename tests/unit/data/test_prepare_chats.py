"""prepare_data with chats: masks, long conversations, bad rows and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.documents import text_files
from comet_megatron.data.prepare import PrepareReport, PrepareSettings, prepare_data
from comet_megatron.data.tokenizer import encode
from comet_megatron.errors import CometError, ConfigError

Tool = Callable[[Sequence[str]], int]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
)


def write_rows(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def conversation(*texts: str) -> list[dict[str, str]]:
    """Of a user and the assistant by turns."""
    return [{"role": "assistant" if n % 2 else "user", "content": text} for n, text in enumerate(texts)]


def prepare(rows: Sequence[Any], tokenizer: Any, folder: Path, **values: Any) -> PrepareReport:
    given_settings = {"sequence_length": 64, "min_tokens": 2, "eval_fraction": 0, **values}
    return prepare_data(
        text_files([write_rows(folder / "rows.jsonl", rows)]),
        tokenizer=tokenizer,
        output_dir=folder / "out",
        settings=PrepareSettings(**given_settings),
        chat_template=TEMPLATE,
    )


def labelled_text(dataset: ShardDataset, sample: int, tokenizer: Any) -> str:
    return tokenizer.decode(dataset[sample][dataset.loss_mask(sample)])


def test_only_what_the_assistant_says_carries_loss_and_texts_carry_it_whole(tokenizer: Any, tmp_path: Path) -> None:
    messages = conversation("what?", "this", "why?", "so")
    rows = [{"messages": messages}, {"text": "plain text"}, {"uniq_id": 7, "messages": json.dumps(messages)}]
    report = prepare(rows, tokenizer, tmp_path)
    dataset = ShardDataset(tmp_path / "out" / "train")
    whole = "user:\nwhat?<|endoftext|>assistant:\nthis<|endoftext|>user:\nwhy?<|endoftext|>assistant:\nso<|endoftext|>"
    for sample in (0, 2):
        assert tokenizer.decode(dataset[sample]) == whole
        assert labelled_text(dataset, sample, tokenizer) == "this<|endoftext|>so<|endoftext|>"
    assert dataset.loss_mask(1) is None and tokenizer.decode(dataset[1]) == "plain text<|endoftext|>"
    labels = 2 * len(encode(tokenizer, "this")) + 2 * len(encode(tokenizer, "so")) + 4 + len(dataset[1])
    assert report.train.num_labels == labels == dataset.label_counts.sum()
    assert (report.counts.num_chats, report.num_documents) == (2, 3)
    assert report.train.settings["chat_template_sha256"] and report.train.settings["long"] == "auto"


LONG = conversation("1" * 50, "2" * 20, "3" * 30, "4" * 10)  # digits are tokens: 110 and the template's


@pytest.mark.parametrize(
    ("long", "labels", "dropped"),
    [
        ("auto", ["4444444444<|endoftext|>"], 0),
        ("truncate-left", ["4444444444<|endoftext|>"], 0),
        ("truncate-right", [], 1),
        ("split", ["22222222222222222222<|endoftext|>", "4444444444<|endoftext|>"], 1),
    ],
)
def test_a_long_chat_is_cut_as_asked_and_pieces_in_which_nothing_carries_loss_are_dropped(
    tokenizer: Any, tmp_path: Path, long: str, labels: list[str], dropped: int
) -> None:
    short = {"messages": conversation("a", "b")}
    report = prepare([{"messages": LONG}, short], tokenizer, tmp_path, long=long, sequence_length=50)
    dataset = ShardDataset(tmp_path / "out" / "train")
    assert [labelled_text(dataset, n, tokenizer) for n in range(len(dataset))] == [*labels, "b<|endoftext|>"]
    counts = report.counts
    assert counts.num_unlabelled == dropped and counts.num_unlabelled_tokens == 50 * dropped
    assert counts.num_truncated == (long != "split") and counts.num_split == (long == "split")
    assert counts.num_document_tokens == (
        counts.num_sample_tokens + counts.num_truncated_tokens + counts.num_unlabelled_tokens + counts.num_short_tokens
    )


def test_a_long_text_may_be_truncated_at_either_end(tokenizer: Any, tmp_path: Path) -> None:
    for long, expected in (("truncate-left", "2<|endoftext|>"), ("truncate-right", "01")):
        folder = tmp_path / long
        folder.mkdir()
        report = prepare([{"text": "012"}], tokenizer, folder, long=long, sequence_length=2)
        assert tokenizer.decode(ShardDataset(folder / "out" / "train")[0]) == expected
        assert (report.counts.num_truncated, report.counts.num_truncated_tokens) == (1, 2)


def test_bad_rows_are_skipped_if_asked_and_listed_in_the_report(tokenizer: Any, tmp_path: Path) -> None:
    fine = {"messages": conversation("a", "b")}
    unknown = {"messages": [{"role": "robot", "content": "x"}]}
    report = prepare([fine, unknown, {"text": 1}, fine], tokenizer, tmp_path, on_bad_sample="skip")
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [row["where"].rpartition(":")[2] for row in content["skipped"]] == ["2", "3"]
    assert "robot" in content["skipped"][0]["what"]
    assert (report.counts.num_skipped, report.num_documents, report.train.num_samples) == (2, 4, 2)


def test_the_report_counts_and_draws_the_lengths(tokenizer: Any, tmp_path: Path) -> None:
    report = prepare([{"text": "1" * n} for n in (3, 7, 100)], tokenizer, tmp_path)
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [n for n, count in enumerate(content["documents"]["lengths"]) if count] == [2, 3, 6]
    part = content["parts"]["train"]
    assert part["fingerprint"] == report.train.fingerprint and part["share_of_labels"] == 1
    assert (part["num_samples"], part["shortest"], part["longest"]) == (4, 4, 64)
    assert content["made_from"]["sequence_length"] == 64
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_chats_without_any_template_are_an_error_that_names_the_option_even_when_skipping(
    prepare_data_tool: Tool, tokenizer_dir: Path, tmp_path: Path, capsys
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"messages": conversation("a", "b")}])
    words = f"--input {rows} --tokenizer {tokenizer_dir} --output {tmp_path / 'out'} --sequence-length 64".split()
    assert prepare_data_tool([*words, "--on-bad-sample", "skip"]) == 2
    shown = capsys.readouterr().err
    assert "rows.jsonl:1" in shown and "--chat-template FILE" in shown
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    words += ["--chat-template", str(tmp_path / "template.jinja"), "--min-tokens", "2", "--eval-fraction", "0"]
    assert prepare_data_tool(words) == 0
    assert "1 of them chats" in (first := capsys.readouterr().out) and "carry loss" in first
    assert prepare_data_tool(words) == 0
    again = capsys.readouterr().out
    assert "finished already" in again and again.endswith(first)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--workers", "0"], "--workers=0"),
        (["--workers", "many"], "--workers=many"),
        (["--chat-template", "/nowhere"], "/nowhere cannot be read"),
        (["--min-tokens", "1"], "min_tokens=1"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    prepare_data_tool: Tool, tokenizer_dir: Path, tmp_path: Path, capsys, more: list[str], complaint: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    words = f"--input {rows} --tokenizer {tokenizer_dir} --output {tmp_path / 'out'} --sequence-length 64".split()
    assert prepare_data_tool([*words, *more]) == 2
    assert complaint in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_sentencepiece_file_is_a_tokenizer_too(prepare_data_tool: Tool, tokenizer_dir: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "def f(x): return x" * 9}])
    for name, tokenizer in (("a", tokenizer_dir), ("b", tokenizer_dir / "tokenizer.model")):
        words = f"--input {rows} --tokenizer {tokenizer} --output {tmp_path / name} --sequence-length 64".split()
        assert prepare_data_tool([*words, "--eval-fraction", "0"]) == 0
    manifests = [ShardDataset(tmp_path / name / "train").manifest for name in ("a", "b")]
    assert manifests[0] == manifests[1]
    (tmp_path / "bad.model").write_bytes(b"\xff" * 50)
    words = f"--input {rows} --tokenizer {tmp_path / 'bad.model'} --output {tmp_path / 'c'} --sequence-length 64"
    assert prepare_data_tool(words.split()) == 2


def test_settings_of_the_new_kind_are_checked() -> None:
    with pytest.raises(ConfigError, match="2 problems") as caught:
        PrepareSettings(sequence_length=64, long="cut", on_bad_sample="ignore").check()
    assert "long=cut" in str(caught.value) and "on_bad_sample=ignore" in str(caught.value)


LINES = st.lists(
    st.binary(max_size=40)
    | st.sampled_from(
        [
            b'{"text": "fine text"}',
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            b'{"messages": [{"role": "assistant", "content": ""}]}',
            b'{"prompt": "", "response": ""}',
            b'{"text": ""}',
            b"\xef\xbb\xbf{}",
        ]
    ),
    max_size=6,
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=LINES, skip=st.booleans(), long=st.sampled_from(["auto", "split", "truncate-left", "truncate-right"]))
def test_whatever_the_lines_hold_there_is_whole_data_or_one_error(
    tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], skip: bool, long: str
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "rows.jsonl").write_bytes(b"\n".join(lines))
    options = PrepareSettings(
        sequence_length=4, min_tokens=2, eval_fraction=0.3, long=long, on_bad_sample="skip" if skip else "stop"
    )
    try:
        source = text_files([folder / "rows.jsonl"])
        report = prepare_data(
            source, tokenizer=tokenizer, output_dir=folder / "out", settings=options, chat_template=TEMPLATE
        )
    except CometError as error:
        assert error.what
        assert [path.name for path in folder.iterdir()] == ["rows.jsonl"]
        return
    dataset = ShardDataset(folder / "out" / "train")
    for number in range(len(dataset)):
        mask = dataset.loss_mask(number)
        assert mask is None or mask[1:].any()
        assert len(dataset[number]) <= 4
    counts = report.counts
    assert counts.num_document_tokens == (
        counts.num_sample_tokens + counts.num_truncated_tokens + counts.num_unlabelled_tokens + counts.num_short_tokens
    )
    assert counts.num_sample_tokens == sum(m.num_tokens for m in (report.train, report.eval) if m is not None)
