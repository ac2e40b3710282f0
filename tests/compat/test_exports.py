"""Exports load and give the same numbers on this version of transformers. Imports nothing of ours.

`make test-compat` runs it on transformers 4 and on the installed version, on the same folders (COMET_EXPORTS).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FAMILIES = ("qwen3", "qwen2", "llama", "mistral")
TOLERANCE = 1e-5


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """The folder of exports: given, or made here."""
    if given := os.environ.get("COMET_EXPORTS"):
        assert not [name for name in sys.modules if name.startswith("comet_megatron")], "this must run without our code"
        return Path(given)
    folder = tmp_path_factory.mktemp("exports") / "made"
    command = [sys.executable, str(Path(__file__).with_name("make_exports.py")), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    return model.eval(), load_file(folder.parent / "expected.safetensors")


def worst(found, want):
    assert found.shape == want.shape
    return (found - want).abs().max().item()


def test_the_version_is_the_one_that_was_asked_for():
    assert transformers.__version__.startswith(os.environ.get("COMET_TRANSFORMERS", ""))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_backbone_gives_the_logits_of_the_original(exports, family):
    model, expected = load(exports / family / "backbone")
    assert type(model).__module__.startswith(f"transformers.models.{family}")
    logits = model(expected["backbone/ids"]).logits
    assert worst(logits[..., : expected["backbone/logits"].shape[-1]], expected["backbone/logits"]) < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_comet_model_gives_the_logits_and_the_text_it_gave_elsewhere(exports, family):
    model, expected = load(exports / family / "comet")
    text = expected["comet/ids"]
    assert worst(model(text).logits, expected["comet/logits"]) < TOLERANCE
    options = {"max_new_tokens": 45, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(text, **options), expected["comet/generated"])
    found = model.generate(text, generation_layout="official", **options)
    assert torch.equal(found, expected["comet/official"])


@pytest.mark.parametrize("family", ("qwen3", "llama"))
@torch.no_grad()
def test_a_left_padded_batch_gives_what_each_row_gives_alone(exports, family):
    model, expected = load(exports / family / "comet")
    text = expected["comet/ids"][:1, -70:].repeat(2, 1)
    mask = torch.ones_like(text)
    mask[0, :33] = 0
    text[0, :33] = model.config.pad_token_id
    options = {"max_new_tokens": 45, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(text, attention_mask=mask, **options)[:, 70:], expected["comet/rows"])


@torch.no_grad()
def test_the_authors_checkpoint_gives_the_golden_logits_and_the_golden_text(exports):
    model, expected = load(exports / "golden" / "comet")
    assert worst(model(expected["golden/ids"]).logits, expected["golden/logits"]) < TOLERANCE
    prompt, want = expected["golden/prompt"], expected["golden/generated"]
    found = model.generate(
        prompt, max_new_tokens=want.shape[1], do_sample=False, eos_token_id=None, generation_layout="official"
    )
    assert torch.equal(found[:, prompt.shape[1] :], want)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_loads_and_knows_the_beacons_where_there_is_a_memory(exports, family):
    comet = AutoTokenizer.from_pretrained(exports / family / "comet", trust_remote_code=True)
    model, _ = load(exports / family / "comet")
    assert comet.convert_tokens_to_ids("<beacon>") == model.config.temp_beacon_id
    assert comet.convert_tokens_to_ids("<|memory|>") == model.config.placeholder_id
    backbone = AutoTokenizer.from_pretrained(exports / family / "backbone")
    assert "<beacon>" not in backbone.get_vocab() and len(backbone) == model.config.placeholder_id
    text = "t5 t17 t250"
    assert comet(text).input_ids == backbone(text).input_ids
    if family != "qwen2":  # for which transformers 5 insists on Qwen's own tokenizer, and this one is of words
        assert comet(text).input_ids == [5, 17, 250]


def test_a_model_that_was_saved_again_still_loads_and_computes_the_same(exports, tmp_path):
    model, expected = load(exports / "llama" / "comet")
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True).eval()
    with torch.no_grad():
        assert worst(again(expected["comet/ids"]).logits, expected["comet/logits"]) < TOLERANCE
