"""data.train names JSONL: process 0 makes shards of it once, beside the run; the others wait for it."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from comet_megatron.testing.hf_models import save_family
from comet_megatron.testing.runs import run_command
from comet_megatron.train.callbacks.curve import read_metrics

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Path:
    """A Hugging Face model and JSONL of texts and of pairs."""
    folder = tmp_path_factory.mktemp("directly")
    save_family(folder / "model", "qwen3", num_hidden_layers=2, hidden_size=32, intermediate_size=48, head_dim=8)
    chance = random.Random(0)

    def words(count: int) -> str:
        return " ".join(f"t{chance.randrange(1, 290)}" for _ in range(count))

    texts = [{"text": words(chance.randrange(35, 90))} for _ in range(30)]
    pairs = [{"prompt": words(20), "response": words(20)} for _ in range(30)]
    for name, rows in (("texts", texts), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(ready: Path, run: Path, **data: object) -> Path:
    values = {
        "model": {"init_from": f"hf:{ready / 'model'}"},
        "memory": {"chunk_size": 16, "global_slots": 4, "stride": 4, "budget": 8},
        "data": {"train": str(ready / "texts.jsonl"), "sequence_length": 64, **data},
        "train": {"output": str(run), "steps": 3, "global_batch_size": 4},
        "optimizer": {"warmup_steps": 1},
        "logging": {"tensorboard": False},
    }
    run.parent.mkdir(exist_ok=True)
    path = run.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run) if "loss" in r]


def test_jsonl_is_prepared_once_beside_the_run_and_a_resume_finds_it(ready, tmp_path, pool):
    config = config_of(
        ready, tmp_path / "run", train=[[str(ready / "texts.jsonl"), 2], [str(ready / "pairs.jsonl"), 1]]
    )
    results = pool(2).run(run_command, "--config", str(config), "train.steps=2")
    assert {code for code, _, _ in results} == {0}, results[0][2]
    assert results[0][1].count("preparing ") == 2 and "preparing" not in results[1][1]
    assert "30 documents: " in results[0][1]
    folders = sorted(path.name.partition("-")[0] for path in (tmp_path / "run.data").iterdir())
    assert folders == ["pairs.jsonl", "texts.jsonl"]
    results = pool(2).run(run_command, "--config", str(config), "--resume")
    assert {code for code, _, _ in results} == {0}, results[0][2]
    assert "preparing" not in results[0][1] and len(losses(tmp_path / "run")) == 3


def test_what_is_wrong_with_a_row_is_told_by_process_0_and_all_end(ready, tmp_path, pool):
    shutil.copyfile(ready / "texts.jsonl", tmp_path / "bad.jsonl")
    with open(tmp_path / "bad.jsonl", "a") as file:
        file.write('{"messages": []}\n')
    config = config_of(ready, tmp_path / "run", train=str(tmp_path / "bad.jsonl"))
    results = pool(2).run(run_command, "--config", str(config))
    assert [code for code, _, _ in results] == [2, 2]
    assert "the conversation is empty" in results[0][2] and "bad.jsonl:31" in results[0][2]
    assert not (tmp_path / "run").exists()
    results = pool(2).run(run_command, "--config", str(config), "data.on_bad_sample=skip")
    assert {code for code, _, _ in results} == {0}, results[0][2]
    assert "1 bad rows left out" in results[0][1]
    (report,) = (tmp_path / "run.data").glob("*/report.json")
    assert [sample["where"] for sample in json.loads(report.read_text())["skipped"]] == [f"{tmp_path}/bad.jsonl:31"]


@pytest.mark.slow
def test_under_torchrun_batches_are_read_ahead_and_behind_a_url_as_on_the_disk(ready, tmp_path, pool):
    config = config_of(ready, tmp_path / "plain")
    assert pool(2).run(run_command, "--config", str(config))[0][0] == 0
    (prepared,) = (tmp_path / "plain.data").iterdir()
    for name, more in {
        "jsonl": ["data.workers=1"],
        "url": [f"data.train=file://{prepared}"],
    }.items():
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["-m", "comet_megatron.train", "--config", str(config), f"train.output={tmp_path / name}", *more]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "read ahead by 1 process a rank" in done.stdout
        assert losses(tmp_path / name) == losses(tmp_path / "plain")


def without_torchrun(config: Path, port: int, *more: str) -> list[tuple[int, str]]:
    """Two processes by environment variables alone, as srun starts them: the first one holds the store."""
    processes = []
    for rank in range(2):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**os.environ, **{k: str(v) for k, v in names.items()}, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "comet_megatron.train", "--config", str(config), *more]
        given = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env={**environment, "OMP_NUM_THREADS": "1"}, **given))
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return [(process.returncode, out) for process, out in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_where_the_first_process_holds_the_store_the_others_wait_for_it_as_well(ready, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = config_of(ready, tmp_path / "run")
    for code, out in without_torchrun(config, port):
        assert code == 0, out
    assert len(losses(tmp_path / "run")) == 3
    shutil.copyfile(ready / "texts.jsonl", tmp_path / "bad.jsonl")
    with open(tmp_path / "bad.jsonl", "a") as file:
        file.write("not JSON\n")
    config = config_of(ready, tmp_path / "bad", train=str(tmp_path / "bad.jsonl"))
    results = without_torchrun(config, port)
    assert [code for code, _ in results] == [2, 2], results
    assert "bad.jsonl:31" in results[0][1] and "Traceback" not in results[0][1] + results[1][1]
