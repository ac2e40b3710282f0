"""examples/finetune_comet_128k.sh starts in every way it promises, and says at once what is missing or wrong.

Torchrun reports a failed process with its own exit code 1, after our message; without it the exit code is 2.
"""

from __future__ import annotations

import json
import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from comet_megatron.config.load import load_config
from comet_megatron.config.rules import check_config
from comet_megatron.errors import PeerError
from comet_megatron.launch.main import main
from comet_megatron.launch.order import Order
from comet_megatron.launch.recipe import read_recipe
from comet_megatron.launch.settings import choose_stages
from comet_megatron.launch.small_model import SmallModel, make_small_model
from comet_megatron.parallel.hand_over import HandOver

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "examples" / "finetune_comet_128k.sh"
CONFIGS = REPOSITORY / "examples" / "configs"
TOKENIZER = REPOSITORY / "tokenizers" / "python_stdlib_4k"
SETTINGS = ("CONFIG", "MODEL", "DATA", "OUTPUT", "TP", "PP", "NPROC", "PYTHON")
TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def small_recipe(folder: Path, **sections: dict) -> Path:
    """A recipe of the same form as the shipped ones, seconds long; `sections` replace values."""
    values: dict[str, dict] = {
        "recipe": {
            "small_model": {
                "tokenizer": str(TOKENIZER),
                "hidden_size": 32,
                "layers": 2,
                "heads": 2,
            },
            "data": "text.txt",
            "max_sequences": 6,
            "sequence_length": 512,
            "chunk_size": 32,
            "global_slots": 4,
            "stride": 8,
            "budget": 12,
            "needs_gpu": False,
        },
        "model": {"precision": "fp32"},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1},
        "train": {"steps": 1, "global_batch_size": 2, "recompute": "full"},
        "logging": {"tensorboard": False},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


@pytest.fixture
def here(tmp_path) -> Path:
    """A folder far from the repository with a recipe and a text."""
    small_recipe(tmp_path)
    text = Path(os.__file__).read_text(encoding="utf-8")
    (tmp_path / "text.txt").write_text(text[:20_000], encoding="utf-8")
    return tmp_path


def environment_of(settings: Mapping[str, str]) -> dict[str, str]:
    """The tests' environment, with these settings only and the tests' Python first."""
    kept = {k: v for k, v in os.environ.items() if k not in SETTINGS + TORCHRUN_VARIABLES}
    path = os.pathsep.join((str(Path(sys.executable).parent), kept.get("PATH", "")))
    return {**kept, "PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **settings}


def start(command: Sequence[object], folder: Path, **settings: str) -> subprocess.Popen:
    """A command as a user types it in `folder`; torchrun ends its processes when it is told to end."""
    return subprocess.Popen(
        ["timeout", "-k", "10", "200", *map(str, command)],
        cwd=folder,
        env=environment_of(settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(command: Sequence[object], folder: Path, **settings: str) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    process = start(command, folder, **settings)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def assert_trained(folder: Path, result: tuple[int, str, str], *, processes: int, steps: int = 1) -> None:
    """The run is there, was one of so many processes, and was told once."""
    code, out, err = result
    assert code == 0, out + err
    assert (folder / "out" / "train" / "checkpoints" / f"step_{steps:07d}" / "complete").exists()
    assert f"{processes} process{'es' * (processes > 1)} on cpu" in out
    assert out.count("CONFIG ") == out.count("done. The run is in") == 1
    assert "Traceback" not in out + err


# --- the file --------------------------------------------------------------------------------------------------------


def test_the_file_is_executable_and_both_shell_and_python_read_it(tmp_path):
    assert os.access(SCRIPT, os.X_OK)
    assert subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True).stderr == ""
    copy = shutil.copy(SCRIPT, tmp_path)  # the compiled file lies beside its source
    py_compile.compile(str(copy), doraise=True)


def test_its_executable_bit_is_known_to_git():
    listed = subprocess.run(["git", "ls-files", "-s", SCRIPT], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not in a git checkout, or not added yet")
    assert listed.stdout.startswith("100755")


@pytest.mark.parametrize("name", ["comet_128k.yaml", "tiny_128k.yaml"])
def test_a_shipped_recipe_has_the_full_length_and_needs_only_its_folders(name):
    file = read_recipe(CONFIGS / name, shipped=CONFIGS)
    folders = ["model.path=m", "data.train=d", "data.eval=e", "train.output=o"]
    assert check_config(load_config(file.path, folders).config) == []
    assert file.recipe.sequence_length == 131_072


def test_the_papers_recipe_is_the_default(monkeypatch, capsys):
    clean(monkeypatch)
    assert main(["--check"], repository=REPOSITORY) == 2
    told = capsys.readouterr().err
    recipe = read_recipe(CONFIGS / "comet_128k.yaml", shipped=CONFIGS).recipe
    sizes = (recipe.chunk_size, recipe.global_slots, recipe.stride, recipe.budget)
    assert sizes == (2048, 512, 8, 2048)
    assert recipe.hub_model == "Qwen/Qwen3-4B"
    assert "comet_128k.yaml" in told.splitlines()[0]


# --- ways to start ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bash_starts_two_processes_and_torchrun_without_python_goes_on_with_one_in_the_same_folders(here):
    given = {"CONFIG": "small.yaml", "DATA": "text.txt", "OUTPUT": "out"}
    result = run(["bash", SCRIPT, "train.seed=7"], here, **given)
    assert_trained(here, result, processes=2)
    written = yaml.safe_load((here / "out" / "train" / "config.yaml").read_text())
    assert written["train"]["seed"] == 7
    assert written["parallel"]["pp"] == 2
    sizes = json.loads((here / "out" / "start" / "model.json").read_text())["memory"]
    assert (sizes["chunk_size"], sizes["stride"], sizes["budget"], len(sizes["global_beacon_ids"])) == (32, 8, 12, 4)
    settings = [line.split() for line in result[1].splitlines()[:6]]
    assert [line[0] for line in settings] == ["CONFIG", "MODEL", "DATA", "OUTPUT", "TP", "PP"]
    assert settings[0][1:] == ["small.yaml", "(environment)"]
    assert settings[4][1:] == ["1", "(default)"]

    result = run(["torchrun", "--no-python", SCRIPT, "--resume", "train.steps=2", "train.seed=7"], here, **given)
    assert_trained(here, result, processes=1, steps=2)
    assert result[1].count("made by an earlier launch") == 2
    assert "resume   after step 1" in result[1]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-python"]], ids=["python", "no python"])
def test_torchrun_starts_several_processes(options, here):
    command = ["torchrun", *options, "--standalone", "--nproc-per-node", 2, SCRIPT]
    result = run(command, here, CONFIG="small.yaml", DATA="text.txt", OUTPUT="out", PP="1")
    assert_trained(here, result, processes=2)


@pytest.mark.slow
def test_the_file_starts_by_itself_on_a_hugging_face_model_and_a_folder_of_texts(here):
    small = SmallModel(tokenizer=str(TOKENIZER), hidden_size=64, layers=2)
    make_small_model(small, here / "qwen3")
    (here / "texts").mkdir()
    text = (here / "text.txt").read_text()
    lines = [json.dumps({"text": text[at : at + 2000]}) for at in range(0, 15_000, 200)]
    (here / "texts" / "many.jsonl").write_text("\n".join(lines))
    shutil.copy(here / "text.txt", here / "texts")
    small_recipe(here, train={"eval_every": 1, "eval_sequences": 1}, recipe={"max_sequences": 0})
    given = {"MODEL": "qwen3", "DATA": "texts", "NPROC": "1", "PYTHON": sys.executable}
    result = run([SCRIPT], here, CONFIG="small.yaml", OUTPUT="out", **given)
    assert_trained(here, result, processes=1)
    assert "qwen3, 2 layers, hidden 64" in result[1]
    assert "tokens held out" in result[1] and "step 1/1  held-out loss" in result[1]


@pytest.mark.slow
def test_a_checkpoint_and_shards_are_used_as_they_are(here):
    first = run(["torchrun", SCRIPT], here, CONFIG="small.yaml", DATA="text.txt", OUTPUT="first")
    assert first[0] == 0, first
    given = {"CONFIG": "small.yaml", "MODEL": "first/start", "DATA": "first/data", "OUTPUT": "out"}
    assert_trained(here, run(["torchrun", SCRIPT], here, **given), processes=1)
    assert sorted(p.name for p in (here / "out").iterdir()) == ["train"]


def two_nodes(folder: Path, **settings: str) -> list[subprocess.Popen]:
    """torchrun on two "machines" of one process each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = ["torchrun", "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-endpoint", f"localhost:{port}"]
    return [start([*common, "--node-rank", rank, SCRIPT], folder, **settings) for rank in (0, 1)]


@pytest.mark.slow
def test_two_machines_train_together(here):
    nodes = two_nodes(here, CONFIG="small.yaml", DATA="text.txt", OUTPUT="out", PP="1")
    (out, err), (other_out, other_err) = [node.communicate(timeout=240) for node in nodes]
    assert_trained(here, (nodes[0].returncode, out, err), processes=2)
    assert (nodes[1].returncode, other_out) == (0, ""), other_err


@pytest.mark.slow
def test_the_second_machine_ends_when_the_first_one_gives_up(here):
    nodes = two_nodes(here, CONFIG="small.yaml", DATA="nowhere", OUTPUT="out", PP="1")
    (_, err), (_, other_err) = [node.communicate(timeout=240) for node in nodes]
    assert nodes[0].returncode == nodes[1].returncode == 1
    assert "there is no data: DATA=nowhere does not exist" in err
    assert not (here / "out").exists()


@pytest.mark.slow
def test_the_second_machine_ends_when_the_first_one_is_gone(here):
    (here / "long.txt").write_text((here / "text.txt").read_text() * 1000)  # preparing takes its time
    small_recipe(here, recipe={"max_sequences": 0})
    nodes = two_nodes(here, CONFIG="small.yaml", DATA="long.txt", OUTPUT="out", PP="1")
    while not (here / "out" / "start").exists():
        assert nodes[0].poll() is None
        time.sleep(0.2)
    nodes[0].send_signal(signal.SIGTERM)  # `timeout` hands it on to torchrun
    _, other_err = nodes[1].communicate(timeout=120)
    nodes[0].communicate(timeout=60)
    assert nodes[1].returncode != 0
    assert "the process that prepares the run is gone" in other_err
    assert not (here / "out" / "data").exists()


# --- what is missing or wrong ----------------------------------------------------------------------------------------


def clean(monkeypatch, **settings: str) -> None:
    """An environment with these settings only."""
    for name in SETTINGS + TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)


def refused(capsys, *arguments: str) -> str:
    """What the launcher says when it refuses, in this process; nothing is written."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(list(arguments), repository=REPOSITORY) == 2
    assert sorted(Path.cwd().rglob("*")) == before
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return told


def test_missing_model_data_and_gpus_are_told_together_with_exit_code_2(tmp_path):
    code, out, err = run(["bash", SCRIPT], tmp_path, MODEL="nowhere", NPROC="3")
    assert code == 2
    assert "Traceback" not in out + err
    assert "3 problems" in err
    assert "MODEL=nowhere does not exist\n  hf download Qwen/Qwen3-4B --local-dir nowhere" in err
    assert "data/long_documents does not exist" in err and ".jsonl" in err
    assert "a GPU for each process, 3 on this machine, and torch sees none" in err
    assert "72 GB on 1, 36 GB on 2, 18 GB on 4, 9 GB on 8" in err
    assert "examples/configs/tiny_128k.yaml" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_under_torchrun_our_message_comes_before_its_report(tmp_path):
    code, out, err = run(["torchrun", "--standalone", "--nproc-per-node", 2, SCRIPT], tmp_path)
    assert code == 1
    assert err.count("configuration error: 3 problems") == 1
    assert err.index("3 problems") < err.index("Traceback")  # torchrun's


def test_an_unknown_recipe_is_told_with_those_there_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    clean(monkeypatch, CONFIG="nowhere.yaml", PP="0")
    told = refused(capsys)
    assert "the recipe CONFIG does not exist" in told and "comet_128k.yaml, tiny_128k.yaml" in told
    assert "PP=0 is not a whole number of 1 or more (environment)" in told


@pytest.mark.parametrize(
    "settings, arguments, parts",
    [
        ({"PP": "many"}, [], ["PP=many is not a whole number"]),
        ({"TP": "-1"}, [], ["TP=-1 is not a whole number"]),
        ({"CONFIG": "nowhere.yaml", "TP": "1.5"}, [], ["does not exist", "TP=1.5 is not a whole number", "2 problems"]),
        ({"TP": "4", "WORLD_SIZE": "4"}, ["--check"], ["parallel.tp=4 does not divide", "num_query_groups=1"]),
        ({"TP": "2", "PP": "3", "WORLD_SIZE": "8"}, ["--check"], ["TP=2 with PP=3 needs a multiple of 6 processes"]),
        ({}, ["parallel.pp=x"], ["PP=x is not a whole number", "argument parallel.pp"]),
        ({}, ["train.step=3"], ["unknown key train.step", "train.steps"]),
        ({"MODEL": "."}, [], ["MODEL=. holds no model: neither config.json"]),
        ({"DATA": "empty"}, [], ["DATA=empty holds no files"]),
        ({"OUTPUT": "text.txt/run"}, [], ["text.txt is a file"]),
        ({}, ["--resume"], ["nothing to resume"]),
        ({"OUTPUT": "used"}, [], ["used/train is not empty", "add --resume", "OUTPUT another folder"]),
        ({"OUTPUT": "stale"}, [], ["stale/start is of an earlier launch", "chunk_size 64, now 32"]),
        ({"OUTPUT": "foreign"}, [], ["foreign/data exists, and this launcher did not make it"]),
        ({"WORLD_SIZE": "3"}, ["--check"], ["train.global_batch_size=2 cannot be shared evenly by 3", "small.yaml:22"]),
    ],
)
def test_a_bad_setting_is_told_before_anything_is_written(settings, arguments, parts, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    (here / "empty").mkdir()
    for file in ("used/train/log.txt", "foreign/data/mine.txt"):
        (here / file).parent.mkdir(parents=True)
        (here / file).touch()
    (here / "stale" / "start").mkdir(parents=True)
    (here / "stale" / "start" / "made_from.json").write_text('{"chunk_size": 64}')
    clean(monkeypatch, **{"CONFIG": "small.yaml", "DATA": "text.txt", "OUTPUT": "out", **settings})
    told = refused(capsys, *arguments)
    for part in parts:
        assert part in told, told


@pytest.mark.parametrize(
    "recipe, parts",
    [
        ({"chunksize": 8}, ["unknown key recipe.chunksize (small.yaml:15)", "did you mean recipe.chunk_size?"]),
        ({"chunk_size": "big"}, ["recipe.chunk_size=big is not a whole number (small.yaml:10)"]),
        ({"needs_gpu": 1}, ["recipe.needs_gpu=1 is not true or false"]),
        ({"model": "m"}, ["recipe has both model and small_model"]),
        ({"small_model": {"layers": 2}}, ["recipe.small_model lacks tokenizer"]),
        ({"small_model": {"tokenizer": "t", "heads": 5}}, ["hidden_size=192 must be a multiple of twice heads=5"]),
        ({"sequence_length": 8, "data": ""}, ["sequence_length=8 must be 32 or more", "recipe.data= must be"]),
        ({"stride": 5}, ["stride=5 does not divide chunk_size=32"]),
        ({"budget": 5000}, ["a chunk needs", "small.yaml, section recipe"]),
    ],
)
def test_a_bad_recipe_is_told_with_its_line(recipe, parts, here, monkeypatch, capsys):
    monkeypatch.chdir(here)
    small_recipe(here, recipe=recipe)
    clean(monkeypatch, CONFIG="small.yaml", DATA="text.txt", OUTPUT="out")
    told = refused(capsys)
    for part in parts:
        assert part in told, told


def test_a_configuration_without_a_recipe_is_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    clean(monkeypatch, CONFIG=str(CONFIGS / "finetune.yaml"))
    assert "has no section recipe" in refused(capsys)


class FakeStore:
    """torchrun's store with one answer, there after some looks; no answer: the machine that holds it is gone."""

    def __init__(self, answer: object = ..., *, looks: int = 3) -> None:
        self.answer, self.looks = answer, looks

    def check(self, keys: list[str]) -> bool:
        self.looks -= 1
        if self.looks < 0 and self.answer is ...:
            raise RuntimeError("connection reset by peer")
        return self.looks < 0

    def get(self, key: str) -> bytes:
        return json.dumps(self.answer).encode()


def waited(monkeypatch, store: FakeStore) -> tuple[Order | None, list[str]]:
    """What a waiting process gets, and says meanwhile."""
    hand_over = object.__new__(HandOver)
    hand_over._store, hand_over._key = store, "key"
    monkeypatch.setattr("comet_megatron.parallel.hand_over.LOOK_EVERY_S", 0)
    monkeypatch.setattr("comet_megatron.parallel.hand_over.TELL_EVERY_S", 0)
    said: list[str] = []
    told = hand_over.wait(said.append, what_for="process 0")
    return told and Order.of(told), said


def test_a_waiting_process_says_what_it_waits_for_and_gets_what_the_first_one_told(monkeypatch):
    order = Order("a.yaml", ("--resume", "parallel.tp=1"), ("start",), needs_gpu=False)
    assert waited(monkeypatch, FakeStore(asdict(order))) == (order, ["waiting for process 0, for 0 min"] * 3)
    assert waited(monkeypatch, FakeStore(None, looks=0)) == (None, [])
    with pytest.raises(PeerError, match="is gone"):
        waited(monkeypatch, FakeStore())


@pytest.mark.parametrize(
    "processes, tp, layers, stages",
    [(1, 1, 36, 1), (2, 1, 36, 2), (8, 1, 36, 8), (16, 1, 36, 8), (8, 2, 36, 4), (6, 1, 36, 2), (8, 1, 2, 2)]
    + [(8, 3, 36, 1), (8, 1, None, 8), (3, 1, 36, 1)],
)
def test_stages_are_the_largest_power_of_two_that_fits(processes, tp, layers, stages):
    assert choose_stages(processes, tp, layers) == stages
