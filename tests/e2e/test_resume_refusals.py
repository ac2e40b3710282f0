"""A resume with anything else than what the run was started with is refused, saying what differs; nothing is changed.

Batch size, seed, trained part and form of the optimizer: see test_bad_input.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from comet_megatron.data.cuts import CutPlan
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from comet_megatron.data.training_data import TrainingData
from comet_megatron.testing.runs import run_command, write_config, write_data, write_start
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory, tiny_sequences
from tokenizers import Tokenizer, models

TOKENIZER = Path(__file__).parents[2] / "tokenizers" / "python_stdlib_4k"
LENGTHS = (40, 50, 33)
MEMORY = {"chunk_size": 16, "global_slots": 4, "stride": 4, "budget": 8, "adapter_rank": 2}


def save_letters(folder: Path, first: str) -> None:
    """A tokenizer of 20 letters."""
    vocabulary = {chr(ord(first) + i): i for i in range(20)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [])), eos_token=first)
    tokenizer.save_pretrained(folder)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder: sizes, and when it was written."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pool) -> Iterator[Path]:
    """RUN of a checkpoint with a tokenizer, HF_RUN of a Hugging Face folder with a memory of certain sizes."""
    folder = tmp_path_factory.mktemp("refusals")
    write_data(folder / "data", tiny_sequences(LENGTHS))
    pool(1).run(write_start, folder / "start", tiny_architecture(num_layers=1), tiny_memory())
    save_letters(folder / "start" / "tokenizer", "a")
    config = write_config(folder / "c.yaml", folder, train={"steps": 2})
    run(pool, config)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "hf")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "vocab_size": 4096, "max_position_embeddings": 256}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(**sizes)).save_pretrained(folder / "hf")
    fingerprint = tokenizer_fingerprint(load_tokenizer(folder / "hf"))
    write_data(folder / "hf_data", tiny_sequences(LENGTHS), tokenizer_fingerprint=fingerprint)
    values = yaml.safe_load(config.read_text())
    values["model"], values["memory"] = {"init_from": f"hf:{folder / 'hf'}"}, MEMORY
    values["data"]["train"], values["train"]["output"] = str(folder / "hf_data"), str(folder / "hf_run")
    (folder / "hf.yaml").write_text(yaml.safe_dump(values))
    run(pool, folder / "hf.yaml")
    yield folder


def run(pool, config: Path, *typed: str) -> tuple[int, str, str]:
    return pool(1).run(run_command, "--config", str(config), "train.steps=2", *typed)[0]


@dataclass(frozen=True)
class Change:
    """What is otherwise than before, and what the message must say of it."""

    says: tuple[str, ...]
    typed: tuple[str, ...] = ()
    make: Callable[[Path], None] = lambda folder: None
    config: str = "c.yaml"


def other_letters(folder: Path) -> None:
    shutil.rmtree(folder / "start" / "tokenizer")
    save_letters(folder / "start" / "tokenizer", "A")


def other_data(folder: Path, *, fingerprint: str = "none", reverse: bool = False) -> None:
    shutil.rmtree(folder / "data")
    sequences = tiny_sequences(LENGTHS)
    write_data(folder / "data", sequences[::-1] if reverse else sequences, tokenizer_fingerprint=fingerprint)


CHANGES = {
    "a tokenizer of other letters in the model": Change(("another model than", "the tokenizer in"), make=other_letters),
    "data that another tokenizer made": Change(
        ("made with another tokenizer",), make=lambda folder: other_data(folder, fingerprint="other")
    ),
    "the same samples in another order": Change(
        ("not the data the run was started with", "its fingerprint is"),
        make=lambda folder: other_data(folder, reverse=True),
    ),
    "another way of cutting": Change(("data.chunks=random, was fixed",), ("data.chunks=random",)),
    "drawn strides": Change(("data.max_stride=8, was 0",), ("data.max_stride=8",)),
    "a memory section for a checkpoint": Change(("memory.budget would change nothing",), ("memory.budget=12",)),
    **{
        f"another memory: {name}": Change(
            (f"memory.{name} {MEMORY[name]}, not {size}",), (f"memory.{name}={size}",), config="hf.yaml"
        )
        for name, size in (("chunk_size", 32), ("global_slots", 8), ("stride", 8), ("budget", 12), ("adapter_rank", 4))
    },
    "another memory, and the model is gone": Change(
        ("memory.stride 4, not 8", "memory.budget 8, not 12"),
        ("memory.stride=8", "memory.budget=12"),
        lambda folder: shutil.rmtree(folder / "hf"),
        "hf.yaml",
    ),
    "another model than the Hugging Face one": Change(
        ("another model than", "architecture.hidden_size 32, not 64"),
        ("model.init_from=", "model.path={0}/start", *(f"memory.{name}=auto" for name in MEMORY)),
        config="hf.yaml",
    ),
}


@pytest.mark.parametrize("mode", ["--resume", "--resume auto"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_resume_is_refused(name, mode, folder, tmp_path, pool):
    change, copy = CHANGES[name], tmp_path / "copy"
    shutil.copytree(folder, copy)
    for path in copy.glob("*.yaml"):
        path.write_text(path.read_text().replace(str(folder), str(copy)))
    change.make(copy)
    before = listing(copy)
    typed = [text.format(copy) for text in change.typed]
    code, _, message = run(pool, copy / change.config, *mode.split(), *typed, "train.steps=3")
    assert code == 2, message
    assert "Traceback" not in message
    for part in change.says:
        assert part in message, message
    assert listing(copy) == before


def test_nothing_is_refused_where_nothing_was_changed(folder, tmp_path, pool):
    for config in ("c.yaml", "hf.yaml"):
        copy = tmp_path / config.partition(".")[0]
        shutil.copytree(folder, copy)
        for path in copy.glob("*.yaml"):
            path.write_text(path.read_text().replace(str(folder), str(copy)))
        code, out, err = run(pool, copy / config, "--resume", "train.steps=3")
        assert code == 0 and "resume   after step 2" in out, err


def test_data_mixed_in_other_shares_or_cut_otherwise_are_other_data(folder, tmp_path):
    write_data(tmp_path / "second", tiny_sequences(LENGTHS, seed=5))
    datasets = [ShardDataset(folder / "data"), ShardDataset(tmp_path / "second")]
    cuts = [CutPlan({"random": 1.0}, 16, 4, 7, stride) for stride in (0, 8)]
    data = [
        TrainingData(datasets, weights=weights, seed=7, cuts=cut)
        for weights in ((1.0, 1.0), (1.0, 3.0))
        for cut in (None, *cuts)
    ]
    data += [TrainingData(datasets[:1], seed=7), TrainingData(datasets[::-1], weights=(1.0, 3.0), seed=7)]
    assert len({one.fingerprint for one in data}) == len(data)
