"""Hugging Face -> Megatron -> Hugging Face: bit-equal for every family, at every layout; the authors' format too."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from comet_megatron.checkpoint.hf_export import Export, export_hf
from comet_megatron.checkpoint.hf_import import AskedMemory, import_hf
from comet_megatron.checkpoint.model_folder import read_description
from comet_megatron.checkpoint.verify import require_equal, verify
from comet_megatron.data.tokenizer import tokenizer_fingerprint
from comet_megatron.errors import CheckpointError
from comet_megatron.hf.modeling_comet import CometForCausalLM
from comet_megatron.parallel.alone import alone
from comet_megatron.testing.hf_models import (
    FAMILY_SETTINGS,
    TEXT_TOKENS,
    read_tensors,
    save_family,
    save_official,
)
from comet_megatron.testing.runs import run_command, write_data
from comet_megatron.testing.tiny import layout_of, tiny_sequences

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUTS = {"TP2": (2, 2, 1), "PP2": (2, 1, 2), "TP2xPP2": (4, 2, 2)}  # processes, TP, PP
ASKED = AskedMemory(chunk_size=32, global_slots=4, stride=8, budget=12)


def import_at(process, source: Path, start: Path, asked: AskedMemory | None, tp: int, pp: int) -> None:
    import_hf(source, start, asked, layout_of(process, tp=tp, pp=pp))


def export_alone(process, start: Path, target: Path, form: str, options: dict) -> list[str]:
    """Also what --verify says."""
    found = []
    with alone() as layout:

        def check(folder, export):
            found.extend(verify(start, folder, export, layout).differences)

        export_hf(start, target, layout, form=form, check=check, **options)
    assert all(d.is_noise for d in found), found
    return [str(d) for d in found]


def there_and_back(pool, tmp_path, layout, *, form, asked=ASKED, **options) -> Path:
    """The export of tmp_path/hf, imported at a layout."""
    processes, tp, pp = LAYOUTS[layout]
    start, target = tmp_path / f"start_{layout}", tmp_path / f"{form}_{layout}"
    if not start.exists():
        pool(processes).run(import_at, tmp_path / "hf", start, asked, tp, pp)
    told = pool(1).run(export_alone, start, target, form, options)[0]
    assert told and told[-1].startswith("logits")
    return target


def round_trips() -> Iterator[object]:
    """All; of two families only the whole layout is not slow."""
    for family, tie, layout in itertools.product(FAMILY_SETTINGS, (False, True), LAYOUTS):
        is_slow = family in ("qwen2", "mistral") and layout != "TP2xPP2"
        name = f"{family}-{'tied' if tie else 'untied'}-{layout}"
        yield pytest.param(family, tie, layout, id=name, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.parametrize(("family", "tie", "layout"), round_trips())
def test_a_model_comes_back_bit_equal(family, tie, layout, tmp_path, pool):
    model = save_family(tmp_path / "hf", family, tie=tie)
    back = there_and_back(pool, tmp_path, layout, form="backbone")
    before, after = read_tensors(tmp_path / "hf"), read_tensors(back)
    assert before.keys() == after.keys() and ("lm_head.weight" in after) != tie
    for name, old in before.items():
        # Rows from the first new id on are CoMeT's: the old matrix had room there, never trained.
        rows = TEXT_TOKENS if name in ("model.embed_tokens.weight", "lm_head.weight") else len(old)
        assert after[name].shape == old.shape and torch.equal(after[name][:rows], old[:rows]), name
    # ... and transformers computes the same with it, so config.json says the same.
    again = type(model).from_pretrained(back)
    ids = torch.randint(0, TEXT_TOKENS, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(again(ids).logits[..., :TEXT_TOKENS], model(ids).logits[..., :TEXT_TOKENS])
    assert json.loads((back / "config.json").read_text())["architectures"] == [type(model).__name__]


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_every_layout_starts_from_the_same_weights(family, tmp_path, pool):
    """New rows and memory nets too: they depend on the seed and their name alone."""
    save_family(tmp_path / "hf", family, tie=True)
    found = [read_tensors(there_and_back(pool, tmp_path, layout, form="comet")) for layout in LAYOUTS]
    for name, tensor in found[0].items():
        assert all(torch.equal(other[name], tensor) for other in found[1:]), name
    drawn = found[0]["model.layers.0.global_memory_net.o_proj.up_proj.weight"]
    assert not torch.equal(drawn, found[0]["model.layers.1.global_memory_net.o_proj.up_proj.weight"])


def test_files_of_bounded_size_have_an_index_and_load_as_one(tmp_path, pool):
    save_family(tmp_path / "hf", "qwen3")
    one = there_and_back(pool, tmp_path, "TP2", form="comet")
    (tmp_path / "one").mkdir()
    one.rename(tmp_path / "one" / "comet")
    many = there_and_back(pool, tmp_path, "TP2", form="comet", max_file_size=140_000)
    files = sorted(many.glob("*.safetensors"))
    assert len(files) > 5 and all(f.stat().st_size < 145_000 for f in files)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {f.name for f in files}
    whole, parts = read_tensors(tmp_path / "one" / "comet"), read_tensors(many)
    assert whole.keys() == parts.keys() == index["weight_map"].keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    CometForCausalLM.from_pretrained(many)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_dtype_option_rounds_once(dtype, tmp_path, pool):
    save_family(tmp_path / "hf", "qwen3")
    export = there_and_back(pool, tmp_path, "TP2", form="backbone", dtype=dtype)
    target = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    before = read_tensors(tmp_path / "hf")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(read_tensors(export)["model.layers.0.mlp.up_proj.weight"], before.to(target))


LOAD_ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True, dtype=torch.float32)
assert not [m for m in sys.modules if m.startswith("comet_megatron")]
texts = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save({name: model(ids).logits[0] for name, ids in texts.items()}, sys.argv[3])
"""


def golden_logits(tensors, name) -> torch.Tensor:
    chunks = sorted(
        (int(key.split("/")[1].removeprefix("chunk")), tensor)
        for key, tensor in tensors.items()
        if key.startswith(f"{name}/chunk") and key.endswith("/logits")
    )
    return torch.cat([tensor for _, tensor in chunks])


@pytest.mark.parametrize("case", ["caseA", "caseC", "caseG"])
def test_the_authors_checkpoint_goes_in_and_out_and_gives_the_golden_logits(case, tmp_path, pool):
    golden = json.loads((GOLDEN / case / "golden.json").read_text())
    weights = load_file(GOLDEN / case / "weights.safetensors")
    save_official(tmp_path / "hf", golden, weights)
    export = there_and_back(pool, tmp_path, "TP2xPP2", form="comet", asked=None)
    texts = {name: torch.tensor([sequence["text_ids"]]) for name, sequence in golden["train"].items()}
    torch.save(texts, tmp_path / "texts.pt")
    command = [sys.executable, "-c", LOAD_ELSEWHERE, str(export), str(tmp_path / "texts.pt"), str(tmp_path / "out.pt")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    outputs = load_file(GOLDEN / case / "outputs.safetensors")
    for name, found in torch.load(tmp_path / "out.pt").items():
        want = golden_logits(outputs, name)
        assert found.shape == want.shape and (found - want).abs().max() < 1e-5, name

    # Back in the authors' format: their names, their shapes, the same bits, their keys.
    official = there_and_back(pool, tmp_path, "TP2xPP2", form="official", asked=None)
    back = read_tensors(official)
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)
    config = json.loads((official / "config.json").read_text())
    assert config["architectures"] == ["MemQwen3ForCausalLM"] and config["model_type"] == "qwen3"
    for key in (*golden["config"], "rms_norm_eps", "max_position_embeddings"):
        if key in golden["hf_config"]:
            assert config[key] == golden["hf_config"][key], key


def test_an_export_of_ours_can_be_imported_again_and_comes_back_bit_equal(tmp_path, pool):
    save_family(tmp_path / "hf", "llama")
    first = there_and_back(pool, tmp_path, "PP2", form="comet")
    again = tmp_path / "again"
    again.mkdir()
    first.rename(again / "hf")
    second = there_and_back(pool, again, "TP2", form="comet", asked=None)
    before, after = read_tensors(again / "hf"), read_tensors(second)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (again / "hf", second))
    assert before == after


def verify_again(process, start: Path, folder: Path, export: Export) -> str:
    with alone() as layout:
        verdict = verify(start, folder, export, layout)
    try:
        require_equal(verdict)
    except CheckpointError as error:
        return str(error)
    return "equal"


@pytest.mark.parametrize("form", ["comet", "official", "backbone"])
def test_control_verify_names_the_first_layer_of_a_mistake(form, tmp_path, pool):
    save_family(tmp_path / "hf", "qwen3")
    folder = there_and_back(pool, tmp_path, "TP2", form=form)
    start = tmp_path / "start_TP2"
    export = Export(read_description(start), form, torch.float32, {})
    assert pool(1).run(verify_again, start, folder, export) == ["equal"]
    inner = "" if form == "backbone" else "inner_layer."
    first, second = (f"model.layers.1.{inner}self_attn.{x}_proj.weight" for x in "kv")
    tensors = read_tensors(folder)
    tensors[first], tensors[second] = tensors[second], tensors[first]  # of the same shape: nothing else would notice
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert "layer 1 " in pool(1).run(verify_again, start, folder, export)[0]


RUN = {
    "optimizer": {"lr": 1e-3, "warmup_steps": 0},
    "train": {"steps": 3, "global_batch_size": 2, "seed": 1234},
    "logging": {"tensorboard": False},
}


def test_training_from_the_folder_equals_training_from_its_checkpoint(tmp_path, pool):
    """model.init_from reads each rank's part, with the tool's numbers; the run's checkpoint stands alone."""
    save_family(tmp_path / "hf", "qwen2", tie=True)
    pool(1).run(import_at, tmp_path / "hf", tmp_path / "start", ASKED, 1, 1)
    fingerprint = tokenizer_fingerprint(tmp_path / "hf")
    write_data(tmp_path / "data", tiny_sequences((70, 40, 33, 90)), tokenizer_fingerprint=fingerprint)
    memory = {"chunk_size": 32, "global_slots": 4, "stride": 8, "budget": 12}
    found = {}
    for name, sections in {
        "path": {"model": {"path": str(tmp_path / "start")}},
        "folder": {"model": {"init_from": f"hf:{tmp_path / 'hf'}"}, "memory": memory},
    }.items():
        train = {**RUN["train"], "output": str(tmp_path / name)}
        sections = {**RUN, **sections, "train": train, "data": {"train": str(tmp_path / "data")}}
        config = tmp_path / f"{name}.yaml"
        config.write_text(yaml.safe_dump({**sections, "parallel": {"tp": 2, "pp": 2, "sequence_parallel": True}}))
        for code, _, err in pool(4).run(run_command, "--config", str(config)):
            assert code == 0, err
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert len(found["path"]) == 3 and found["path"] == found["folder"]
    # --resume asks nothing of the folder but that it is the same model, if it is still there.
    code, out, err = pool(4).run(run_command, "--config", str(config), "--resume", "train.steps=4")[0]
    assert code == 0 and "resume   after step 3" in out, err
    last = tmp_path / "folder" / "checkpoints" / "step_0000004"
    pool(1).run(export_alone, last, tmp_path / "out", "comet", {})
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)
    beacon = json.loads((tmp_path / "out" / "config.json").read_text())["temp_beacon_id"]
    assert tokenizer.convert_tokens_to_ids("<beacon>") == beacon


def export_large(process, start: Path, target: Path, dtype: str) -> str:
    with alone() as layout:
        try:
            export_hf(start, target, layout, dtype=dtype)
        except CheckpointError as error:
            return str(error)
    return "written"


def test_a_value_too_large_for_the_dtype_is_refused_by_name(tmp_path, pool):
    save_family(tmp_path / "hf", "qwen3")
    tensors = read_tensors(tmp_path / "hf")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e5
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    pool(1).run(import_at, tmp_path / "hf", tmp_path / "start", ASKED, 1, 1)
    told = pool(1).run(export_large, tmp_path / "start", tmp_path / "out", "fp16")[0]
    assert "layers.1.inner_layer.mlp.up_proj.weight has values up to 1e+05" in told and "bf16" in told
    assert not (tmp_path / "out").exists()
    assert pool(1).run(export_large, tmp_path / "start", tmp_path / "out", "bf16") == ["written"]


def test_weights_of_several_dtypes_are_kept_in_the_widest(tmp_path, pool):
    save_family(tmp_path / "hf", "qwen3")
    tensors = read_tensors(tmp_path / "hf")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].bfloat16()
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    back = read_tensors(there_and_back(pool, tmp_path, "TP2", form="backbone"))
    for name, tensor in tensors.items():
        rows = TEXT_TOKENS if name in ("model.embed_tokens.weight", "lm_head.weight") else len(tensor)
        assert torch.equal(back[name][:rows], tensor[:rows].float()), name


def import_from_two_places(process, folders: list[Path], start: Path) -> str:
    try:
        import_hf(folders[process.rank], start, ASKED, layout_of(process, pp=2))
    except CheckpointError as error:
        return str(error)
    return "written"


def test_a_folder_that_is_missing_on_one_rank_stops_all(tmp_path, pool):
    save_family(tmp_path / "hf", "qwen3")
    folders = [tmp_path / "hf", tmp_path / "gone"]
    told = pool(2).run(import_from_two_places, folders, tmp_path / "start")
    assert all("there is no model folder" in text for text in told) and not (tmp_path / "start").exists()
