"""From a Hugging Face model to a Hugging Face model: what comes out equals what went in, and stands alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from comet_megatron.checkpoint.hf_export import export_hf
from comet_megatron.checkpoint.hf_import import AskedMemory, import_hf
from comet_megatron.data.dataset import ShardDataset
from comet_megatron.data.prepare import PrepareSettings, prepare_data
from comet_megatron.hf.modeling_comet import CometForCausalLM
from comet_megatron.parallel.alone import alone
from comet_megatron.testing.runs import run_command, write_config

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = REPOSITORY / "tokenizers" / "python_stdlib_4k"
ASKED = AskedMemory(chunk_size=32, global_slots=4, stride=8, budget=12)


def save_qwen3(
    folder: Path, *, tie: bool, dtype: torch.dtype = torch.float32, vocab_size: int = 4096
) -> Qwen3ForCausalLM:
    """A tiny Qwen3 with random weights and the shipped tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=tie,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Qwen3ForCausalLM(config).to(dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def there_and_back(process, source: Path, start: Path, target: Path, asked: AskedMemory) -> None:
    with alone() as layout:
        import_hf(source, start, asked, layout)
    with alone() as layout:
        export_hf(start, target, layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [4096, 4500], ids=["exact vocabulary", "room in the old matrix"])
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_import_then_export_gives_bit_equal_weights(tie, vocab_size, dtype, tmp_path, pool):
    save_qwen3(tmp_path / "qwen3", tie=tie, dtype=dtype, vocab_size=vocab_size)
    pool(1).run(there_and_back, tmp_path / "qwen3", tmp_path / "start", tmp_path / "out", ASKED)
    before = load_file(tmp_path / "qwen3" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in after) != tie
    for name, old in before.items():
        new = after[name.replace("layers.0.", "layers.0.inner_layer.").replace("layers.1.", "layers.1.inner_layer.")]
        assert new.dtype == dtype
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert len(new) % 256 == 0 and len(new) >= max(vocab_size, 4096 + 6)
            rows, mean = new[4096:].float(), old[:4096].float().mean(0)
            new, old = new[:4096], old[:4096]
            # Every row from the first new id on lies around the mean of the old ones, and no two are the same.
            assert (rows - mean).abs().max() < 0.1 * before[name].float().std()
            assert len(rows.unique(dim=0)) == len(rows)
        assert torch.equal(new, old), name


def test_a_text_shorter_than_a_chunk_gives_the_logits_of_the_original_model(tmp_path, pool):
    qwen3 = save_qwen3(tmp_path / "qwen3", tie=False)
    no_beacons = AskedMemory(chunk_size=32, global_slots=4, stride=-1, budget=0)
    pool(1).run(there_and_back, tmp_path / "qwen3", tmp_path / "start", tmp_path / "out", no_beacons)
    comet = CometForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 4096, (2, 31), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, found = qwen3(ids).logits, comet(ids).logits[..., :4096]
    assert (found - want).abs().max() < 1e-5
    assert want.abs().max() > 0.1


FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert not [m for m in sys.modules if m.startswith("comet_megatron")]
ids = tokenizer("def main(argv):\\n    return len(argv)\\n" * 6, return_tensors="pt").input_ids
assert ids.shape[1] > 64, ids.shape  # several chunks
with torch.no_grad():
    print("LOSS", model(ids, labels=ids).loss.item())
print("NEW", model.generate(ids, max_new_tokens=40).shape[1] - ids.shape[1])
print("HIDDEN", tokenizer.decode(tokenizer.convert_tokens_to_ids(["<beacon>", "<beacon_0>"]), skip_special_tokens=True))
"""


def command(*arguments: object, **environment: str) -> subprocess.CompletedProcess:
    """A command as a user types it, in the repository's folder."""
    import os

    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **environment},
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )


def test_the_commands_train_with_two_processes_and_the_export_stands_alone(tmp_path):
    """The demo's commands on a small model: prepare, convert, torchrun, resume, export, load elsewhere, generate."""
    source = tmp_path / "texts"
    source.mkdir()
    for i in range(12):
        body = "".join(f"def function_{i}_{j}(value):\n    return value + {j}\n\n\n" for j in range(12))
        (source / f"file_{i}.py").write_text(body)

    def run(*arguments: object) -> str:
        done = command(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    data = tmp_path / "data"
    out = run(
        "tools/prepare_data.py", "--input", source, "--tokenizer", TOKENIZER, "--output", data, "--sequence-length", 200
    )
    assert "next:" in out
    model = tmp_path / "small"
    run("examples/make_small_model.py", "--tokenizer", TOKENIZER, "--output", model, "--hidden-size", 32, "--layers", 2)
    sizes = ("--chunk-size", 32, "--global-slots", 4, "--stride", 8, "--budget", 12)
    run("tools/convert_from_hf.py", "--hf", model, "--output", tmp_path / "start", *sizes)
    config = write_config(
        tmp_path / "c.yaml",
        tmp_path,
        data={"train": str(data / "train")},
        parallel={"pp": 2},
        optimizer={"lr": 3e-3, "decay_steps": 12},
        train={"steps": 6},
    )
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "comet_megatron.train")
    out = run(*torchrun, "--config", config)
    assert "2 processes on cpu, 1 thread each: TP 1, PP 2, DP 1, ZeRO-1" in out and "training loss fell" in out
    out = run(*torchrun, "--config", config, "--resume", "train.steps=12", "parallel.zero1=true")
    assert "resume   after step 6" in out
    last = tmp_path / "run" / "checkpoints" / "step_0000012"
    assert f"--checkpoint {last}" in out
    out = run("tools/convert_to_hf.py", "--checkpoint", last, "--output", tmp_path / "hf")
    assert (tmp_path / "hf" / "modeling_comet.py").exists()
    alone_script = tmp_path / "alone.py"
    alone_script.write_text(FRESH_PROCESS)
    done = command(alone_script, tmp_path / "hf", HF_HOME=str(tmp_path / "home"), PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    said = dict(
        line.split(" ", 1) for line in done.stdout.splitlines() if line.split(" ")[0] in ("LOSS", "NEW", "HIDDEN")
    )
    assert float(said["LOSS"]) < 8.3  # log(4352) = 8.38: better than not knowing
    assert 1 <= int(said["NEW"]) <= 40
    assert said["HIDDEN"] == ""
    out = run("tools/generate.py", "--model", tmp_path / "hf", "--prompt", "def ", "--max-new-tokens", 5)
    assert out.startswith("def ")


def test_two_exports_of_one_checkpoint_saved_by_two_processes_equal_the_trained_weights(tmp_path, pool):
    """What TP2 trained is what the export holds: the loss of the exported model equals the run's own evaluation."""
    save_qwen3(tmp_path / "qwen3", tie=True)
    pool(1).run(there_and_back, tmp_path / "qwen3", tmp_path / "start", tmp_path / "out", ASKED)
    texts = tmp_path / "text.txt"
    texts.write_text("for line in file:\n    print(line)\n" * 40)
    from comet_megatron.data.documents import text_files

    settings = PrepareSettings(sequence_length=150, eval_fraction=0.0)
    prepare_data(
        text_files([texts]),
        tokenizer=AutoTokenizer.from_pretrained(TOKENIZER),
        output_dir=tmp_path / "prepared",
        settings=settings,
    )
    data = tmp_path / "prepared" / "train"
    config = write_config(
        tmp_path / "c.yaml",
        tmp_path,
        data={"train": str(data), "eval": str(data)},
        train={"steps": 3, "eval_every": 3, "eval_sequences": 4, "global_batch_size": 2},
        parallel={"tp": 2, "sequence_parallel": True},
    )
    code, out, err = pool(2).run(run_command, "--config", str(config))[0]
    assert code == 0, err
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [m["eval_loss"] for m in metrics if "eval_loss" in m][-1]

    pool(1).run(export_alone, tmp_path / "run" / "checkpoints" / "step_0000003", tmp_path / "trained")
    model = CometForCausalLM.from_pretrained(tmp_path / "trained")
    shards = ShardDataset(data)
    total = labels = 0.0
    for i in range(min(4, len(shards))):
        ids = torch.from_numpy(shards[i].astype("int64"))[None]
        with torch.no_grad():
            total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        labels += ids.shape[1] - 1
    assert total / labels == pytest.approx(evaluated, abs=1e-5)


def export_alone(process, checkpoint: Path, target: Path) -> None:
    with alone() as layout:
        export_hf(checkpoint, target, layout)
