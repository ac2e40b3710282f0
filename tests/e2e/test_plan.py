"""tools/plan.py on a tiny checkpoint: what it prints is the plan, what it draws is a file, what it refuses is told."""

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest
import yaml

from comet_megatron.data.sampler import plan_positions, sample_index
from comet_megatron.testing.hf_models import save_family
from comet_megatron.testing.runs import write_data, write_start
from comet_megatron.testing.tiny import tiny_architecture, tiny_memory, tiny_sequences

REPOSITORY = Path(__file__).parents[2]
LENGTHS = (40, 50, 33, 120, 17, 80)


@pytest.fixture(scope="module")
def place(tmp_path_factory, pool) -> Path:
    """A start checkpoint of four layers, data, and a config with nothing but the model's path."""
    folder = tmp_path_factory.mktemp("plan")
    write_data(folder / "data", tiny_sequences(LENGTHS))
    pool(1).run(write_start, folder / "start", tiny_architecture(num_layers=4), tiny_memory())
    (folder / "c.yaml").write_text(yaml.safe_dump({"model": {"path": str(folder / "start")}}))
    return folder


def run_plan(place: Path, *arguments: str) -> tuple[int, str, str]:
    """The tool with the place's config."""
    return run_tool("--config", str(place / "c.yaml"), *arguments)


def run_tool(*arguments: str) -> tuple[int, str, str]:
    """The tool's main: exit code, stdout, stderr."""
    spec = importlib.util.spec_from_file_location("tool_plan", REPOSITORY / "tools" / "plan.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = tool.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


def planned(place: Path, *arguments: str) -> str:
    code, out, err = run_plan(place, *arguments)
    assert (code, err) == (0, "")
    return out


def test_a_config_with_a_model_alone_is_enough_to_plan(place):
    out = planned(place, "--tokens", "161", "33", "parallel.pp=2", "train.recompute=full", "train.global_batch_size=2")
    assert "layout   2 processes: TP 1, PP 2, DP 1, ZeRO-1; fp32, recompute full" in out
    assert "step     2 sequences, 194 tokens: 12 chunks (10 + 2)" in out
    assert re.search(r"schedule slack 1: bubble \d+\.\d%, .* as fast as the lower bound", out)
    assert re.search(r"links    1, each carries 12 messages, \d+\.\d\d kB in a step each way", out)


def test_the_table_has_a_line_for_each_stage_and_their_sums_are_the_model(place):
    out = planned(
        place, "--tokens", "161", "parallel.pp=3", "parallel.layers_per_stage=[2, 1, 1]", "train.recompute=full"
    )
    assert "PP 3: 2 + 1 + 1 layers (as given" in out
    head, *rows = [line.split() for line in out.split("\n\n")[1].splitlines()]
    assert [row[:3] for row in rows] == [["0", "2", "(0-1)"], ["1", "1", "(2-2)"], ["2", "1", "(3-3)"]]
    assert head[-2:] == ["all", "MB"]
    live, weights, gradients, optimizer, *rest, total = ([float(row[i]) for row in rows] for i in range(5, 13))
    assert gradients == weights and optimizer == pytest.approx([2 * w for w in weights], abs=0.011)
    assert live == [10, 10, 10]
    columns = zip(weights, gradients, optimizer, *rest, strict=True)
    assert total == pytest.approx([sum(row) for row in columns], abs=0.035)


def test_without_lengths_the_first_step_of_the_first_data_parallel_rank_is_planned(place):
    settings = ["parallel.pp=2", "train.global_batch_size=4", "data.seed=5", f"data.train={place / 'data'}"]
    out = planned(place, "--processes", "4", *settings)
    positions = plan_positions(0, global_batch_size=4, dp_rank=0, dp_size=2)
    samples = [sample_index(p, num_samples=len(LENGTHS), seed=5)[1] for p in positions]
    chunks = [-(-(LENGTHS[sample] - 1) // 16) for sample in samples]
    assert f"{sum(LENGTHS[sample] for sample in samples)} tokens: {sum(chunks)} chunks" in out
    assert f"({' + '.join(map(str, chunks))})" in out
    assert "PP 2, DP 2" in out


def test_without_recomputation_whole_graphs_are_counted(place):
    given = ["--tokens", "161", "parallel.pp=2", "train.global_batch_size=2"]
    out, recomputed = planned(place, *given), planned(place, *given, "train.recompute=full")
    assert "graphs MB" in out and "checkpoints MB" in recomputed
    assert re.search(r"train\.recompute=full would keep \d+\.\d\d kB of them at most", out)
    kept, kept_less = (float(text.split("\n\n")[1].splitlines()[1].split()[9]) for text in (out, recomputed))
    assert kept > 5 * kept_less


def test_drawn_cuts_are_planned_and_said(place):
    """161 tokens are 10 full chunks of 16; drawn ones are shorter and more."""
    out = planned(place, "--tokens", "161", "parallel.pp=2", "data.chunks=random", "train.recompute=full")
    (chunks,) = re.findall(r"161 tokens: (\d+) chunks", out)
    assert 10 < int(chunks) <= 20
    assert "Cuts are drawn (data.chunks=random" in out
    assert "Cuts are drawn" not in planned(place, "--tokens", "161", "parallel.pp=2")


def test_one_process_has_no_schedule_to_tell(place):
    out = planned(place, "--tokens", "161")
    assert "PP 1: 4 layers\n" in out and "schedule" not in out and "links" not in out


def test_the_step_is_drawn_and_traced(place, tmp_path):
    given = ["parallel.pp=2", "train.global_batch_size=2", "--tokens", "65"]
    out = planned(place, *given, "--timeline", str(tmp_path / "new" / "t.png"))
    assert f"timeline {tmp_path / 'new' / 't.png'}" in out
    assert (tmp_path / "new" / "t.png").read_bytes().startswith(b"\x89PNG")
    planned(place, *given, "--timeline", str(tmp_path / "t.json"))
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 2 * 2 * 4  # stages, forward and backward, chunks


def test_values_left_open_in_the_file_do_not_stop_a_plan(place, tmp_path):
    content = {
        "model": {"path": str(place / "start")},
        "data": {"train": "???", "eval": "???"},
        "train": {"output": "???", "steps": "???", "eval_every": 5},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(content))
    assert "1 sequence, 33 tokens: 2 chunks" in planned(tmp_path, "--tokens", "33")


def test_layouts_of_named_shapes_are_advised_without_a_config_or_a_checkpoint():
    given = ["--advise", "--model", "qwen3-8b", "--tokens", "131072", "--sequences", "8", "--gpu", "h200"]
    code, out, err = run_tool(*given)
    assert (code, err) == (0, "")
    assert "8 x h200" in out and "use      parallel.tp=" in out and "nothing of it was run" in out
    code, small, _ = run_tool(*given, "--memory-gib", "30")
    assert code == 0 and small != out and "32.2 GB each" in small
    code, none, _ = run_tool(*given, "--memory-gib", "1")
    assert code == 0 and "No layout of these GPUs fits." in none


def test_layouts_of_a_checkpoint_are_advised_with_the_settings_of_a_config(place):
    out = planned(place, "--advise", "--tokens", "161", "--gpus", "2", "train.global_batch_size=4", "parallel.slack=0")
    assert "4 layers, hidden 64" in out and "4 sequences of 161 tokens, fp32" in out
    named = run_tool("--advise", "--model", str(place / "start"), "--tokens", "161", "--sequences", "4", "--gpus", "2")
    assert named[0] == 0 and "bf16" in named[1]


def test_layouts_of_a_hugging_face_folder_are_advised_with_the_memory_that_the_settings_give(tmp_path):
    save_family(tmp_path / "hf", "qwen3")
    memory = ["memory.chunk_size=16", "memory.global_slots=6", "memory.stride=4", "memory.budget=12"]
    code, out, err = run_tool("--advise", "--model", str(tmp_path / "hf"), "--tokens", "161", "--gpus", "2", *memory)
    assert (code, err) == (0, "")
    assert "8 sequences of 161 tokens, bf16" in out and "chunks of 16, 6 global slots, stride 4" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "qwen3-8b"], "--advise plans sequences of one length, and --tokens gives none"),
        (["--model", "qwen3-8b", "--tokens", "9", "9"], "--tokens gives 2"),
        (["--tokens", "9"], "--advise needs a model"),
        (["--model", "qwen3-9b", "--tokens", "9"], "--model qwen3-9b is no folder"),
        (["--model", "qwen3-8b", "--tokens", "9", "--gpu", "v100"], "GPU 'v100' is not in the table"),
        (["--model", "qwen3-8b", "--tokens", "9", "--gpus", "0"], "--gpus 0 must be above 0"),
        (["--model", "qwen3-8b", "--tokens", "9", "--memory-gib", "nan"], "--memory-gib nan must be above 0"),
        (["--model", "qwen3-8b", "--tokens", "9", "--efficiency", "gemm=7"], "is no share of gemm"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_in_what_is_to_be_advised_is_one_clear_message(arguments, says):
    code, out, message = run_tool("--advise", *arguments)
    assert (code, out) == (2, "")
    assert says in message and "Traceback" not in message


@pytest.mark.slow
def test_the_tables_of_the_docs_are_what_the_tool_prints_today():
    code, out, _ = run_tool("--recipes")
    assert code == 0
    assert out in (REPOSITORY / "docs" / "scaling.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--tokens", "0"], "a sequence of 0 tokens"),
        (["--tokens", "100", "1"], "a sequence of 1 tokens"),
        (["--tokens", "many"], "--tokens many: a length is a whole number"),
        ([], "data.train has no value"),
        (["data.train=nowhere"], "--tokens"),
        (["--tokens", "40", "model.path=nowhere"], "there is no checkpoint folder"),
        (["--tokens", "40", "train.recompute=some", "optimizer.lr=-1"], "2 problems"),
        (["--tokens", "40", "parallel.tp=3"], "parallel.tp=3 does not divide"),
        (["--tokens", "40", "--processes", "0"], "--processes 0"),
        (["--tokens", "40", "--timeline", "t.svg"], "neither a .png nor a .json"),
        (["--tokens", "40", "train.stepz=3"], "train.stepz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_clear_message(place, arguments, says):
    code, out, message = run_plan(place, *arguments)
    assert (code, out) == (2, "")
    assert says in message and "Traceback" not in message


def test_a_file_in_the_way_of_the_picture_is_told(place, tmp_path):
    (tmp_path / "t.png").mkdir()
    code, _, message = run_plan(place, "--tokens", "40", "--timeline", str(tmp_path / "t.png"))
    assert code == 2 and "the timeline cannot be written" in message


def test_mixed_and_packed_data_are_planned_as_they_are_read_and_jsonl_must_be_prepared(place, tmp_path):
    write_data(tmp_path / "more", tiny_sequences((30, 31, 32)))
    mixture = f"data.train=[[{place / 'data'}, 1], [{tmp_path / 'more'}, 1]]"
    out = planned(place, "--processes", "1", "train.global_batch_size=40", "data.pack_tokens=130", mixture)
    assert int(re.search(r"([\d,]+) tokens: ", out)[1].replace(",", "")) > 40 * 60  # sequences of several documents
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    code, _, err = run_plan(place, f"data.train={tmp_path}/a.jsonl")
    assert code == 2 and "JSONL" in err and "--tokens" in err
