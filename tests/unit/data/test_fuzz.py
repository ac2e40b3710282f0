"""Whatever is given to prepare_data and to the reader: data that is right, or one CometError that names the place."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.documents import text_files
from comet_megatron.data.prepare import PrepareSettings, prepare_data
from comet_megatron.data.shard_writer import write_shards
from comet_megatron.data.shards import Sample, manifest_text
from comet_megatron.errors import CometError, DataError

TEMPLATE = "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + eos_token }}{% endfor %}"
# A hang fails, a busy machine does not; the same examples each time.
FUZZ = settings(
    deadline=timedelta(seconds=20),
    derandomize=True,
    max_examples=120,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)
CONTENTS = st.text(max_size=8) | st.sampled_from(["a reply", "<|endoftext|>", "assistant:\n", "the-reply-is-here0:"])
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": CONTENTS})
    | JSON_VALUES,
    max_size=4,
)
ROWS = st.one_of(
    st.fixed_dictionaries({"text": CONTENTS}),
    st.fixed_dictionaries({"messages": MESSAGES}, optional={"tools": JSON_VALUES, "uniq_id": JSON_VALUES}),
    st.fixed_dictionaries({"messages": MESSAGES.map(json.dumps)}),
    st.fixed_dictionaries({"prompt": CONTENTS | JSON_VALUES, "response": CONTENTS}),
    st.dictionaries(st.sampled_from(["messages", "prompt", "response", "text", "tools"]), JSON_VALUES),
    JSON_VALUES,
)


@st.composite
def mutated(draw: st.DrawFn, content: st.SearchStrategy[bytes]) -> bytes:
    """Bytes of which some are changed, cut off or put in."""
    given_bytes = bytearray(draw(content))
    at = draw(st.integers(0, max(0, len(given_bytes) - 1)))
    kind = draw(st.sampled_from(["flip", "cut", "insert", "remove"]))
    if kind == "flip" and given_bytes:
        given_bytes[at] ^= draw(st.integers(1, 255))
    elif kind == "cut":
        del given_bytes[at:]
    elif kind == "insert":
        given_bytes[at:at] = draw(st.binary(min_size=1, max_size=8))
    else:
        del given_bytes[at : at + draw(st.integers(1, 8))]
    return bytes(given_bytes)


LINE = ROWS.map(lambda row: json.dumps(row).encode())
LINES = st.lists(st.binary(max_size=40) | LINE | mutated(LINE), max_size=6)


def prepare_or_refuse(tokenizer: Any, folder: Path, name: str, content: bytes, *, skip: bool) -> ShardDataset | None:
    """What prepare_data makes of a file; None after a CometError, which must name the file and leave nothing."""
    (folder / name).write_bytes(content)
    options = PrepareSettings(
        sequence_length=6, min_tokens=2, eval_fraction=0, on_bad_sample="skip" if skip else "stop", shard_bytes=200
    )
    try:
        report = prepare_data(
            text_files([folder / name]),
            tokenizer=tokenizer,
            output_dir=folder / "out",
            settings=options,
            chat_template=TEMPLATE,
            may_continue=True,
        )
    except CometError as error:
        assert name in str(error) or "to train on" in error.what
        assert sorted(path.name for path in folder.iterdir()) in ([name], sorted([name, ".out.partial"]))
        return None
    dataset = ShardDataset(folder / "out" / "train")
    counts = report.counts
    assert sum(len(dataset[n]) for n in range(len(dataset))) == counts.num_sample_tokens == dataset.num_tokens
    assert counts.num_skipped == len(report.skipped) and (skip or not report.skipped)
    assert all(f"{name}:" in sample.where for sample in report.skipped)
    return dataset


@FUZZ
@given(lines=LINES, skip=st.booleans())
def test_whatever_the_lines_are_prepare_data_makes_data_or_names_the_file(
    tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], skip: bool
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    prepare_or_refuse(tokenizer, folder, "rows.jsonl", b"\n".join(lines), skip=skip)
    shutil.rmtree(folder)


def compressed(kind: str, content: bytes) -> bytes:
    if kind == "gz":
        return gzip.compress(content, mtime=0)
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(content)


PLAIN = b"\n".join(
    json.dumps({"text": f"a text with the number {n} {'and more' * (n % 5)}"}).encode() for n in range(40)
)


@pytest.fixture(scope="module")
def fingerprint(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of PLAIN, prepared."""
    dataset = prepare_or_refuse(tokenizer, tmp_path_factory.mktemp("plain"), "rows.jsonl", PLAIN, skip=False)
    assert dataset is not None
    return dataset.fingerprint


@settings(FUZZ, max_examples=60)
@given(data=st.data(), kind=st.sampled_from(["gz", "zst"]), skip=st.booleans())
def test_a_compressed_stream_that_is_changed_anywhere_gives_the_same_data_or_is_named(
    tokenizer: Any,
    fingerprint: str,
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    kind: str,
    skip: bool,
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    stream = data.draw(mutated(st.just(compressed(kind, PLAIN))))
    found = prepare_or_refuse(tokenizer, folder, f"rows.jsonl.{kind}", stream, skip=skip)
    assert found is None or found.fingerprint == fingerprint
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def whole_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few shards, half of the samples with masks."""
    random = np.random.default_rng(0)
    ids = [random.integers(0, 1000, size=n) for n in random.integers(2, 60, size=12)]
    samples = [Sample(i, {"document": "d"}, random.random(len(i)) < 0.5 if n % 2 else None) for n, i in enumerate(ids)]
    folder = tmp_path_factory.mktemp("whole") / "shards"
    options = {"tokenizer_fingerprint": "f" * 64, "vocab_size": 1000, "settings": {}}
    write_shards(samples, output_dir=folder, shard_bytes=1000, **options)
    return folder


def read_all(folder: Path) -> list[tuple[bytes, bytes]]:
    dataset = ShardDataset(folder)
    masks = [dataset.loss_mask(n) for n in range(len(dataset))]
    return [(dataset[n].tobytes(), b"" if mask is None else mask.tobytes()) for n, mask in enumerate(masks)]


def edited(value: Any, data: st.DataObject) -> Any:
    """A JSON value in which one value, at any depth, is another."""
    if isinstance(value, dict) and value and data.draw(st.integers(0, 3)):
        key = data.draw(st.sampled_from(sorted(value)))
        return {**value, key: edited(value[key], data)}
    if isinstance(value, list) and value and data.draw(st.integers(0, 3)):
        at = data.draw(st.integers(0, len(value) - 1))
        return [*value[:at], edited(value[at], data), *value[at + 1 :]]
    return data.draw(JSON_VALUES | st.integers(0, 20_000) | st.just("shard-000001.tar"))


@FUZZ
@given(data=st.data())
def test_whatever_a_manifest_says_the_reader_gives_the_samples_or_one_error(
    whole_dir: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("manifest") / "shards"
    shutil.copytree(whole_dir, folder)
    values = json.loads((folder / "manifest.json").read_text())
    del values["checksum"]
    content = edited(values, data)
    # Mostly with a checksum that is right, so that what the values say is looked at.
    is_summed = isinstance(content, dict) and data.draw(st.integers(0, 9)) > 0
    (folder / "manifest.json").write_text(manifest_text(content) if is_summed else json.dumps(content))
    try:
        found = read_all(folder)
    except DataError as error:
        assert str(folder) in error.where
    else:
        assert found == read_all(whole_dir)
    shutil.rmtree(folder.parent)


@FUZZ
@given(data=st.data())
def test_whatever_an_index_says_the_reader_gives_the_samples_or_one_error_even_if_the_manifest_agrees(
    whole_dir: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """A wrong index whose checksum is right: numbers changed, columns left out, of other types or lengths."""
    folder = tmp_path_factory.mktemp("index") / "shards"
    shutil.copytree(whole_dir, folder)
    with np.load(folder / "index.npz") as columns:
        values = dict(columns)
    name = data.draw(st.sampled_from(sorted(values)))
    kind = data.draw(st.sampled_from(["number", "type", "missing", "short", "text"]))
    if kind == "number":
        at = data.draw(st.integers(0, len(values[name]) - 1))
        limits = np.iinfo(values[name].dtype)
        values[name][at] = data.draw(st.integers(limits.min, limits.max) | st.integers(0, 5000))
    elif kind == "type":
        values[name] = values[name].astype(data.draw(st.sampled_from([np.float64, np.int8, np.complex128, np.bool_])))
    elif kind == "missing":
        del values[name]
    elif kind == "short":
        values[name] = values[name][: data.draw(st.integers(0, len(values[name]) - 1))]
    else:
        values[name] = np.asarray(["x"] * len(values[name]))
    buffer = io.BytesIO()
    np.savez(buffer, **values)
    (folder / "index.npz").write_bytes(buffer.getvalue())
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["index_sha256"] = hashlib.sha256(buffer.getvalue()).hexdigest()
    del manifest["checksum"]
    (folder / "manifest.json").write_text(manifest_text(manifest))
    try:
        found = read_all(folder)
    except DataError as error:
        assert str(folder) in error.where
    else:
        assert found == read_all(whole_dir)
    shutil.rmtree(folder.parent)
