"""Exports of every family and of a golden case, and what each must compute: for test_exports.py, which loads them with
nothing but torch and transformers.

python tests/compat/make_exports.py DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.checkpoint.hf_export import export_hf
from comet_megatron.checkpoint.hf_import import AskedMemory, import_hf
from comet_megatron.hf.modeling_comet import CometForCausalLM
from comet_megatron.new_folder import new_folder
from comet_megatron.parallel.alone import alone
from comet_megatron.testing.hf_models import FAMILY_SETTINGS, TEXT_TOKENS, save_family, save_official

GOLDEN = Path(__file__).parents[1] / "golden"
ASKED = AskedMemory(chunk_size=32, global_slots=4, stride=8, budget=12)
NEW_TOKENS = 45  # over a border of chunks


def random_text(tokens: int, *, batch: int = 1) -> torch.Tensor:
    return torch.randint(1, TEXT_TOKENS - 1, (batch, tokens), generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def make_family(folder: Path, family: str) -> None:
    """FOLDER/original, FOLDER/backbone, FOLDER/comet, and FOLDER/expected.safetensors."""
    original = save_family(folder / "original", family, tie=family == "qwen3")
    with alone() as layout:
        import_hf(folder / "original", folder / "start", ASKED, layout)
        for form in ("backbone", "comet"):
            export_hf(folder / "start", folder / form, layout, form=form)
    short, long = random_text(40, batch=2), random_text(100, batch=2)
    expected = {
        "backbone/ids": short,
        "backbone/logits": original(short).logits[..., :TEXT_TOKENS].contiguous(),
        **expect_comet(folder / "comet", long),
    }
    save_file(expected, folder / "expected.safetensors")


def expect_comet(folder: Path, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the oracle computes; a left-padded batch must give what each row gives alone."""
    model = CometForCausalLM.from_pretrained(folder).eval()
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}
    alone_ids = [model.generate(text[:1, -length:], **options)[:, length:] for length in (37, 70)]
    return {
        "comet/ids": text,
        "comet/logits": model(text).logits,
        "comet/generated": model.generate(text, **options),
        "comet/official": model.generate(text, generation_layout="official", **options),
        "comet/rows": torch.cat(alone_ids),
    }


@torch.no_grad()
def make_golden(folder: Path) -> None:
    """The authors' data, not ours."""
    case = json.loads((GOLDEN / "caseA" / "golden.json").read_text())
    outputs = load_file(GOLDEN / "caseA" / "outputs.safetensors")
    save_official(folder / "original", case, load_file(GOLDEN / "caseA" / "weights.safetensors"))
    with alone() as layout:
        import_hf(folder / "original", folder / "start", None, layout)
        export_hf(folder / "start", folder / "comet", layout)
    ids = torch.tensor([case["train"]["ragged"]["text_ids"]])
    chunks = [outputs[f"ragged/chunk{i}/logits"] for i in range(-(-ids.shape[1] // case["config"]["chunk_size"]))]
    generated = case["gen"]["160"]
    expected = {
        "golden/ids": ids,
        "golden/logits": torch.cat(chunks)[None].contiguous(),
        "golden/prompt": torch.tensor([generated["prompt_ids"]]),
        "golden/generated": torch.tensor([generated["output_without_beacons"]]),
    }
    save_file(expected, folder / "expected.safetensors")


def main(arguments: list[str]) -> int:
    """Run the command; its exit code."""
    quiet_libraries()
    with new_folder(arguments[0]) as folder:
        for family in FAMILY_SETTINGS:
            (folder / family).mkdir()
            make_family(folder / family, family)
        (folder / "golden").mkdir()
        make_golden(folder / "golden")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
