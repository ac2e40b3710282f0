"""Each mistake a user can make gives one clear message, exit code 2, no traceback, and nothing is written."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from comet_megatron.testing.hf_models import save_official, save_tokenizer
from comet_megatron.testing.runs import run_command, write_config, write_data, write_start
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory, tiny_sequences

REPOSITORY = Path(__file__).parents[2]
TOKENIZER = REPOSITORY / "tokenizers" / "python_stdlib_4k"
GOLDEN = REPOSITORY / "tests" / "golden" / "caseA"


def run_tool(process, name: str, arguments: list[str]) -> tuple[int, str, str]:
    """A tool's main in this process: exit code, stdout, stderr."""
    spec = importlib.util.spec_from_file_location(f"tool_{name}", REPOSITORY / "tools" / f"{name}.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = tool.main(arguments)
    return code, out.getvalue(), err.getvalue()


def listing(folder: Path) -> dict[str, int]:
    """Everything below a folder, with sizes."""
    return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}


def assert_refused(result: tuple[int, str, str], parts: tuple[str, ...]) -> None:
    code, _, message = result
    assert code == 2, message
    assert "Traceback" not in message
    for part in parts:
        assert part in message, message
    first = message.splitlines()[0]
    assert first.split(":")[0] in (
        "configuration error",
        "checkpoint error",
        "data error",
        "output error",
    ), first


@pytest.fixture(scope="module")
def ready(tmp_path_factory, pool) -> Path:
    """A start checkpoint, data, a Hugging Face model and a finished run, to be copied and spoilt."""
    folder = tmp_path_factory.mktemp("ready")
    write_data(folder / "data", tiny_sequences((40, 50, 33)))
    pool(1).run(write_start, folder / "start", tiny_architecture(num_layers=1), tiny_memory())
    other = tiny_memory(global_slots=3)
    pool(1).run(write_start, folder / "other", tiny_architecture(num_layers=1), other)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    golden = json.loads((GOLDEN / "golden.json").read_text())
    save_official(folder / "comet", golden, load_file(GOLDEN / "weights.safetensors"))
    finished = write_config(folder / "finished.yaml", folder, train={"output": str(folder / "finished"), "steps": 2})
    code, _, err = pool(1).run(run_command, "--config", str(finished))[0]
    assert code == 0, err
    return folder


@pytest.fixture
def place(ready, tmp_path) -> Path:
    """A copy of `ready` to spoil."""
    for path in ready.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, tmp_path / path.name)
    return tmp_path


def nothing(folder: Path) -> None:
    """Spoil nothing."""


def edit_json(name: str, **values: object) -> Callable[[Path], None]:
    """Set values in a JSON file; `a__b` goes one level down."""

    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in values.items():
            outer, _, inner = key.partition("__")
            if inner:
                content[outer][inner] = value
            else:
                content[outer] = value
        (folder / name).write_text(json.dumps(content))

    return edit


def remove(name: str) -> Callable[[Path], None]:
    """Delete a file or folder."""

    def delete(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return delete


def to_pickles(folder: Path) -> None:
    """The weights as torch.save would have them; unpickling runs code, so they must not be read."""
    weights = folder / "hf" / "model.safetensors"
    torch.save(load_file(weights), folder / "hf" / "pytorch_model.bin")
    weights.unlink()


def empty(name: str) -> Callable[[Path], None]:
    """Delete what is in a folder."""

    def clear(folder: Path) -> None:
        shutil.rmtree(folder / name)
        (folder / name).mkdir()

    return clear


def truncate(pattern: str) -> Callable[[Path], None]:
    """Cut files in half."""

    def cut(folder: Path) -> None:
        paths = list(folder.glob(pattern))
        assert paths
        for path in paths:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def write(name: str, text: str) -> Callable[[Path], None]:
    """Write a file."""

    def put(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return put


def edit_weights(change: Callable[[dict], None]) -> Callable[[Path], None]:
    """Change the tensors of the Hugging Face model."""

    def edit(folder: Path) -> None:
        path = folder / "hf" / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return edit


def flip_a_byte_of_every_sample(folder: Path) -> None:
    """In the last token id of each."""
    for shard in (folder / "data").glob("*.tar"):
        content = bytearray(shard.read_bytes())
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".ids.npy"):
                    content[member.offset_data + member.size - 1] ^= 1
        shard.write_bytes(content)


def newer(pattern: str) -> Callable[[Path], None]:
    """Some files of the data are of another preparation."""

    def put(folder: Path) -> None:
        write_data(folder / "newer", tiny_sequences((41,) * 20, seed=5))
        for path in (folder / "newer").glob(pattern):
            shutil.copyfile(path, folder / "data" / path.name)

    return put


def save_small_tokenizer(folder: Path) -> None:
    """A tokenizer with fewer tokens than the tiny model."""
    from transformers import PreTrainedTokenizerFast

    from tokenizers import Tokenizer, models

    vocabulary = {chr(97 + i): i for i in range(20)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="a").save_pretrained(folder)


def other_tokenizer(folder: Path) -> None:
    """Data that says it was made with a tokenizer which is not the checkpoint's."""
    save_small_tokenizer(folder / "start" / "tokenizer")
    shutil.rmtree(folder / "data")
    write_data(folder / "data", tiny_sequences((40, 50, 33)), tokenizer_fingerprint="other")


@dataclass(frozen=True)
class Mistake:
    """What is spoilt, what is typed, what the message must say."""

    says: tuple[str, ...]
    spoil: Callable[[Path], None] = nothing
    typed: tuple[str, ...] = ()


TRAIN = {
    "a misspelt key": Mistake(("train.stepz", "train.steps"), typed=("train.stepz=3",)),
    "an unknown section": Mistake(("trian",), typed=("trian.steps=3",)),
    "a wrong type": Mistake(("train.steps", "many"), typed=("train.steps=many",)),
    "an override without =": Mistake(("train.steps",), typed=("train.steps",)),
    "several problems at once": Mistake(
        ("3 problems", "optimizer.lr", "train.recompute", "there is no checkpoint folder"),
        typed=("optimizer.lr=-1", "train.recompute=some", "model.path=nowhere"),
    ),
    "more tensor parallelism than processes": Mistake(
        ("parallel.tp=2 needs at least 2 processes, and there is 1",), typed=("parallel.tp=2",)
    ),
    "more stages than layers": Mistake(
        ("parallel.pp=3 stages are more than the model's 1 layer",), typed=("parallel.pp=3",)
    ),
    "layers that do not add up": Mistake(
        ("parallel.layers_per_stage=[2] are 2 layers, and the model has 1",), typed=("parallel.layers_per_stage=[2]",)
    ),
    "layers for more stages than there are": Mistake(
        ("parallel.layers_per_stage=[1, 1] is for 2 stages, and parallel.pp=1 is 1 stage",),
        typed=("parallel.layers_per_stage=[1,1]",),
    ),
    "a stage without layers": Mistake(
        ("leaves a stage without a layer",), typed=("parallel.pp=2", "parallel.layers_per_stage=[1,0]")
    ),
    "a window below 1": Mistake(("train.bptt_chunks=0 must be all, or 1 or more",), typed=("train.bptt_chunks=0",)),
    "slack below 0": Mistake(("parallel.slack=-1 must be 0 or more",), typed=("parallel.slack=-1",)),
    "no time to wait": Mistake(("parallel.timeout_s=0.0 must be a number above 0",), typed=("parallel.timeout_s=0",)),
    "a profile after the last step": Mistake(
        ("profile.timeline_step=2 comes after the last of train.steps=1",),
        typed=("train.steps=1", "profile.timeline=true"),
    ),
    "tp that does not divide the heads": Mistake(("parallel.tp=3", "8"), typed=("parallel.tp=3",)),
    "sequence parallelism without tp": Mistake(("sequence_parallel",), typed=("parallel.sequence_parallel=true",)),
    "no model folder": Mistake(("there is no checkpoint folder",), remove("start")),
    "an empty model folder": Mistake(("is empty",), empty("start")),
    "a Hugging Face folder as the model": Mistake(("convert_from_hf.py",), typed=("model.path={0}/hf",)),
    "a checkpoint not written to the end": Mistake(("not written to the end",), remove("start/complete")),
    "a damaged model description": Mistake(("model.json",), truncate("start/model.json")),
    "a description of another version": Mistake(
        ("format version 99",), edit_json("start/model.json", format_version=99)
    ),
    "a description without a size": Mistake(("model.json", "damaged"), edit_json("start/model.json", memory={})),
    "weights of another hidden size": Mistake(
        ("of other sizes",), edit_json("start/model.json", architecture__hidden_size=128)
    ),
    "weights of fewer layers": Mistake(("of other sizes",), edit_json("start/model.json", architecture__num_layers=2)),
    "truncated weights": Mistake(("is damaged: weights/__0_0.distcp has",), truncate("start/weights/*.distcp")),
    "missing weights": Mistake(("weights",), remove("start/weights")),
    "heads that groups do not divide": Mistake(
        ("num_query_groups=3", "num_attention_heads=8"),
        edit_json("start/model.json", architecture__num_query_groups=3),
    ),
    "no data folder": Mistake(("data",), remove("data")),
    "an empty data folder": Mistake(("data",), empty("data")),
    "a truncated shard": Mistake(("shard",), truncate("data/*.tar")),
    "a shard of 0 bytes": Mistake(("shard-000000.tar has 0 bytes",), write("data/shard-000000.tar", "")),
    "an index older than its shards": Mistake(("shards are not as written", "shard-000000.tar has"), newer("*.tar")),
    "the index of other shards": Mistake(("the index is damaged or of other data", "index.npz"), newer("index.npz")),
    "an index of 0 bytes": Mistake(("the index is damaged", "index.npz"), write("data/index.npz", "")),
    "a manifest of 0 bytes": Mistake(("the manifest is damaged", "manifest.json"), write("data/manifest.json", "")),
    "a missing shard": Mistake(("missing",), lambda folder: next((folder / "data").glob("*.tar")).unlink()),
    "data of another tokenizer": Mistake(("another tokenizer of 200 ids",), other_tokenizer),
    "an output folder that is not empty": Mistake(("is not empty",), write("run/notes.txt", "mine")),
    "an output folder that holds a run": Mistake(("--resume",), typed=("train.output={0}/finished",)),
    "nothing to resume": Mistake(("nothing to resume",), typed=("--resume",)),
    "a run that is over": Mistake(
        ("done 2 steps already",), typed=("--resume", "train.output={0}/finished", "train.steps=2")
    ),
    "resume with a model of other memory": Mistake(
        ("another model", "global_beacon_ids"),
        typed=("--resume", "train.output={0}/finished", "model.path={0}/other"),
    ),
    "resume with another part trained": Mistake(
        ("train.trainable=all",), typed=("--resume", "train.output={0}/finished", "train.trainable=memory")
    ),
    "resume with another batch": Mistake(
        ("train.global_batch_size=2, not 4", "data.seed=1234, not 5"),
        typed=("--resume", "train.output={0}/finished", "train.global_batch_size=4", "data.seed=5"),
    ),
    "resume with another optimizer form": Mistake(
        ("parallel.zero1=True, not False",),
        typed=("--resume", "train.output={0}/finished", "train.steps=9", "parallel.zero1=false"),
    ),
    "resume with other data": Mistake(
        ("not the data the run was started with",),
        lambda folder: write_data(folder / "data2", tiny_sequences((30, 40), seed=5)),
        typed=("data.train={0}/data2", "--resume", "train.output={0}/finished", "train.steps=9"),
    ),
    "an output below a file": Mistake(("cannot be made",), typed=("train.output={0}/c.yaml/run",)),
    "a size that is text": Mistake(
        ("hidden_size='64' is no int",), edit_json("start/model.json", architecture__hidden_size="64")
    ),
    "evaluation without held-out data": Mistake(("data.eval",), typed=("train.eval_every=2",)),
}


@pytest.mark.parametrize("name", TRAIN)
def test_training_refuses(name, place, pool):
    mistake = TRAIN[name]
    mistake.spoil(place)
    config = write_config(place / "c.yaml", place)
    before = listing(place)
    typed = [t.format(place) for t in mistake.typed]
    assert_refused(pool(1).run(run_command, "--config", str(config), *typed)[0], mistake.says)
    assert listing(place) == before


def test_a_damaged_sample_stops_training_with_its_shard_and_number(place, pool):
    flip_a_byte_of_every_sample(place)
    result = pool(1).run(run_command, "--config", str(write_config(place / "c.yaml", place)))[0]
    assert_refused(result, ("the sample is damaged", "shard-000000.tar, sample", "data.on_bad_sample=skip"))


def test_all_problems_of_a_config_come_with_the_lines_they_stand_on(place, pool):
    config = write_config(place / "c.yaml", place, optimizer={"lr": -1.0, "warmup": 3}, parallel={"tp": 0})
    result = pool(1).run(run_command, "--config", str(config))[0]
    assert_refused(result, ("optimizer.warmup", "optimizer.warmup_steps"))
    del_config = yaml.safe_load(config.read_text())
    del del_config["optimizer"]["warmup"]
    config.write_text(yaml.safe_dump(del_config))
    number = next(i for i, line in enumerate(config.read_text().splitlines(), 1) if "lr:" in line)
    result = pool(1).run(run_command, "--config", str(config))[0]
    assert_refused(result, ("2 problems", f"c.yaml:{number}", "parallel.tp"))


def test_every_rank_stops_and_one_speaks(place, pool):
    config = write_config(place / "c.yaml", place)
    results = pool(2).run(run_command, "--config", str(config), "parallel.tp=4")
    assert [code for code, _, _ in results] == [2, 2]
    assert [bool(err) for _, _, err in results] == [True, False]


SIZES = ("--chunk-size", "32", "--global-slots", "4", "--stride", "8", "--budget", "12")
IMPORT = {
    "no model folder": Mistake(("there is no model folder",), remove("hf")),
    "an empty model folder": Mistake(("is empty",), empty("hf")),
    "no config": Mistake(("config.json",), remove("hf/config.json")),
    "a config that is not JSON": Mistake(("not JSON", "config.json"), write("hf/config.json", "{")),
    "another architecture": Mistake(
        ("'gpt2'", "known: qwen3, qwen2, llama, mistral"), edit_json("hf/config.json", model_type="gpt2")
    ),
    "tensors of another architecture": Mistake(
        ("q_norm.weight is unknown",), edit_json("hf/config.json", model_type="llama")
    ),
    "a config without sizes": Mistake(("num_hidden_layers",), edit_json("hf/config.json", num_hidden_layers=None)),
    "sizes of nothing": Mistake(("num_attention_heads",), edit_json("hf/config.json", num_attention_heads=0)),
    "rotary settings that are a list": Mistake(("rotary settings",), edit_json("hf/config.json", rope_parameters=[1])),
    "an output below a file": Mistake(("cannot be made",), typed=("--output", "{0}/hf/config.json/out")),
    "scaled rotary positions": Mistake(
        ("rope type 'yarn'",), edit_json("hf/config.json", rope_parameters={"rope_type": "yarn", "rope_theta": 1e6})
    ),
    "heads that groups do not divide": Mistake(
        ("num_query_groups=3", "num_attention_heads=4"), edit_json("hf/config.json", num_key_value_heads=3)
    ),
    "no weights": Mistake(("no *.safetensors",), remove("hf/model.safetensors")),
    "truncated safetensors": Mistake(("truncated", "model.safetensors"), truncate("hf/*.safetensors")),
    "a missing tensor": Mistake(
        ("model.layers.0.mlp.up_proj.weight is missing",),
        edit_weights(lambda t: t.pop("model.layers.0.mlp.up_proj.weight")),
    ),
    "an unknown tensor": Mistake(
        ("model.extra is unknown",), edit_weights(lambda t: t.update({"model.extra": torch.zeros(1)}))
    ),
    "a tensor of another shape": Mistake(
        ("model.norm.weight has shape (3,), not (32,)",),
        edit_weights(lambda t: t.update({"model.norm.weight": torch.zeros(3)})),
    ),
    "more layers in the config than weights": Mistake(
        ("model.layers.1.", "is missing"), edit_json("hf/config.json", num_hidden_layers=2)
    ),
    "an index that names a missing file": Mistake(
        ("gone.safetensors",), write("hf/model.safetensors.index.json", '{"weight_map": {"a": "gone.safetensors"}}')
    ),
    "an index that is damaged": Mistake(("damaged index",), write("hf/model.safetensors.index.json", '{"weight_map":')),
    "an index that names the folder above": Mistake(
        ("outside",), write("hf/model.safetensors.index.json", '{"weight_map": {"a": ".."}}')
    ),
    "pickles instead of safetensors": Mistake(("no *.safetensors", "pickles"), to_pickles),
    "a checkpoint of ours": Mistake(("convert_to_hf.py",), typed=("--hf", "{0}/start")),
    "an index of other tensors": Mistake(
        ("the index is of other files: ghost.weight is not in model.safetensors",),
        write("hf/model.safetensors.index.json", '{"weight_map": {"ghost.weight": "model.safetensors"}}'),
    ),
    "a tensor in two files": Mistake(
        ("lm_head.weight is in two files",),
        lambda folder: [
            (folder / "hf" / "model.safetensors").rename(folder / "hf" / "a.safetensors"),
            shutil.copyfile(folder / "hf" / "a.safetensors", folder / "hf" / "b.safetensors"),
        ],
    ),
    "a tokenizer of more ids than the model has rows": Mistake(
        ("ids up to 4095, and the model has 4000 rows",),
        lambda folder: [
            edit_json("hf/config.json", vocab_size=4000)(folder),
            edit_weights(lambda t: t.update({n: t[n][:4000] for n in ("model.embed_tokens.weight", "lm_head.weight")}))(
                folder
            ),
        ],
    ),
    "quantised weights": Mistake(
        ("dtype I8",), edit_weights(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].to(torch.int8)}))
    ),
    "an index that leaves the folder": Mistake(
        ("outside",), write("hf/model.safetensors.index.json", '{"weight_map": {"a": "../model.safetensors"}}')
    ),
    "no tokenizer": Mistake(("tokenizer",), lambda folder: [p.unlink() for p in (folder / "hf").glob("token*")]),
    "a damaged tokenizer": Mistake(("tokenizer",), truncate("hf/tokenizer.json")),
    "a stride that does not divide the chunk": Mistake(("stride=7", "chunk_size=32"), typed=("--stride", "7")),
    "a chunk of nothing": Mistake(("chunk_size=0",), typed=("--chunk-size", "0")),
    "a negative number of slots": Mistake(("global-slots",), typed=("--global-slots", "-1")),
    "more positions than the model has": Mistake(("256",), typed=("--chunk-size", "1024")),
    "an output folder that is not empty": Mistake(("not empty",), write("out/notes.txt", "mine")),
}


@pytest.mark.parametrize("name", IMPORT)
def test_import_refuses(name, place, pool):
    mistake = IMPORT[name]
    mistake.spoil(place)
    before = listing(place)
    more = [t.format(place) for t in mistake.typed]
    typed = ["--hf", str(place / "hf"), "--output", str(place / "out"), *SIZES, *more]
    assert_refused(pool(1).run(run_tool, "convert_from_hf", typed)[0], mistake.says)
    assert listing(place) == before


IMPORT_COMET = {
    "sizes that are not its own": Mistake(
        ("a memory of its own", "chunk_size 32, not 64"), typed=("--chunk-size", "64", "--stride", "4")
    ),
    "a tokenizer without the beacons": Mistake(
        ("lacks the beacon tokens", "302"), lambda folder: save_tokenizer(folder / "comet")
    ),
    "no stride": Mistake(("without temp_beacon_stride",), edit_json("comet/config.json", temp_beacon_stride=None)),
    "ids that are words": Mistake(("whole numbers",), edit_json("comet/config.json", global_beacon_ids=["a"])),
    "another number of global beacons": Mistake(
        ("g_proj.weight is unknown",), edit_json("comet/config.json", global_beacon_ids=[])
    ),
    "ids beyond the vocabulary": Mistake(("outside the vocabulary",), edit_json("comet/config.json", vocab_size=305)),
    "another rank of the adapters": Mistake(
        ("down_proj.weight has shape (8, 64), not (4, 64)",), edit_json("comet/config.json", memory_adapter_rank=4)
    ),
}


@pytest.mark.parametrize("name", IMPORT_COMET)
def test_import_of_a_comet_model_refuses(name, place, pool):
    mistake = IMPORT_COMET[name]
    mistake.spoil(place)
    before = listing(place)
    typed = ["--hf", str(place / "comet"), "--output", str(place / "out"), *mistake.typed]
    assert_refused(pool(1).run(run_tool, "convert_from_hf", typed)[0], mistake.says)
    assert listing(place) == before


INIT_FROM = {
    "no prefix": Mistake(("must be hf:DIR",), typed=("model.init_from={0}/hf",)),
    "nothing after it": Mistake(("model.init_from", "is not text"), typed=("model.init_from=hf:",)),
    "a folder that is not there": Mistake(("there is no model folder",), typed=("model.init_from=hf:{0}/gone",)),
    "a checkpoint of ours": Mistake(("not a Hugging Face folder",), typed=("model.init_from=hf:{0}/start",)),
    "a size below nothing": Mistake(
        ("memory.stride=0", "memory.global_slots=-1"),
        typed=("model.init_from=hf:{0}/hf", "memory.stride=0", "memory.global_slots=-1"),
    ),
    "sizes of another memory": Mistake(
        ("a memory of its own",), typed=("model.init_from=hf:{0}/comet", "memory.chunk_size=64")
    ),
    "more positions than the model has": Mistake(("256",), typed=("model.init_from=hf:{0}/hf",)),
    "data of another tokenizer": Mistake(("another tokenizer",), typed=("model.init_from=hf:{0}/comet",)),
    "two models to start from": Mistake(("two models",), typed=("model.init_from=hf:{0}/hf", "model.path={0}/start")),
    "memory sizes for a checkpoint": Mistake(
        ("memory.stride would change nothing",), typed=("model.path={0}/start", "memory.stride=4")
    ),
}


@pytest.mark.parametrize("name", INIT_FROM)
def test_training_from_a_hugging_face_folder_refuses(name, place, pool):
    mistake = INIT_FROM[name]
    config = write_config(place / "c.yaml", place)
    content = yaml.safe_load(config.read_text())
    del content["model"]
    config.write_text(yaml.safe_dump(content))
    mistake.spoil(place)
    before = listing(place)
    typed = [text.format(place) for text in mistake.typed]
    assert_refused(pool(1).run(run_command, "--config", str(config), *typed)[0], mistake.says)
    assert listing(place) == before


EXPORT = {
    "a form that cannot hold it": Mistake(
        ("cannot hold this model", "llama", "--format comet"),
        edit_json("start/model.json", architecture__family="llama"),
        typed=("--format", "official"),
    ),
    "no checkpoint": Mistake(("there is no checkpoint folder",), remove("start")),
    "an empty folder": Mistake(("is empty",), empty("start")),
    "a checkpoint not written to the end": Mistake(("not written to the end",), remove("start/complete")),
    "no tokenizer in the checkpoint": Mistake(("tokenizer",), nothing),  # the tiny start has an empty one
    "truncated weights": Mistake(("is damaged: weights/__0_0.distcp has",), truncate("start/weights/*.distcp")),
    "weights of another size": Mistake(
        ("of other sizes",), edit_json("start/model.json", architecture__ffn_hidden_size=64)
    ),
    "an output folder that is not empty": Mistake(("not empty",), write("out/notes.txt", "mine")),
    "a damaged tokenizer": Mistake(("tokenizer", "use another checkpoint"), truncate("start/tokenizer/tokenizer.json")),
}


@pytest.mark.parametrize("name", EXPORT)
def test_export_refuses(name, place, pool):
    mistake = EXPORT[name]
    if name != "no tokenizer in the checkpoint" and (place / "start").exists():
        save_small_tokenizer(place / "start" / "tokenizer")
    mistake.spoil(place)
    before = listing(place)
    typed = ["--checkpoint", str(place / "start"), "--output", str(place / "out"), *mistake.typed]
    assert_refused(pool(1).run(run_tool, "convert_to_hf", typed)[0], mistake.says)
    assert listing(place) == before


GENERATE = {
    "a folder without a model": Mistake(("no exported model", "convert_to_hf.py"), typed=("--model", "{0}")),
    "truncated weights": Mistake(("cannot be loaded",), truncate("hf/*.safetensors")),
    "no tokenizer": Mistake(("tokenizer",), lambda folder: [p.unlink() for p in (folder / "hf").glob("token*")]),
    "no tokens asked for": Mistake(("--max-new-tokens 0",), typed=("--max-new-tokens", "0")),
    "a negative temperature": Mistake(("--temperature -1.0",), typed=("--temperature", "-1")),
    "a share above one": Mistake(("--top-p 2.0",), typed=("--top-p", "2")),
    "an empty prompt": Mistake(("prompt is empty",), typed=("--prompt", "")),
}


@pytest.mark.parametrize("name", GENERATE)
def test_generate_refuses(name, place, pool):
    mistake = GENERATE[name]
    mistake.spoil(place)
    typed = ["--model", str(place / "hf"), "--prompt", "x", *(t.format(place) for t in mistake.typed)]
    assert_refused(pool(1).run(run_tool, "generate", typed)[0], mistake.says)


def cut_sample_of_one_rank(process, *arguments: str):
    """The command on each rank, when only rank 1 cannot read its samples."""
    from comet_megatron.data.dataset import ShardDataset
    from comet_megatron.errors import DataError

    read = ShardDataset.__getitem__

    def damaged(self, sample):
        if process.rank == 1:
            raise DataError("the sample is damaged", where="shard-000000.tar")
        return read(self, sample)

    ShardDataset.__getitem__ = damaged
    try:
        return run_command(process, *arguments)
    finally:
        ShardDataset.__getitem__ = read


def test_a_sample_that_only_one_rank_cannot_read_stops_all_with_its_message(place, pool):
    config = write_config(place / "c.yaml", place)
    results = pool(2).run(cut_sample_of_one_rank, "--config", str(config))
    assert [code for code, _, _ in results] == [2, 2]
    assert_refused(results[0], ("the sample is damaged", "shard-000000.tar"))
