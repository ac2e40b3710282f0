"""An import holds little more than a rank's share: shown on the real shapes of Qwen3-32B, 65 GB of sparse files."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch

from comet_megatron.checkpoint.hf_config import architecture_of
from comet_megatron.checkpoint.hf_import import plan_import
from comet_megatron.checkpoint.hf_rules import plan_rules
from comet_megatron.model.build import build_stage
from comet_megatron.testing.hf_models import save_tokenizer
from comet_megatron.testing.tiny import layout_of

# config.json of Qwen/Qwen3-32B, as far as it is read; its tokenizer has 151,669 ids.
QWEN3_32B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_hidden_layers": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "eos_token_id": 151645,
}
TOKENS = 151669
STAGES = 16
FILE_BYTES = 4 << 30


def write_sparse_model(folder: Path) -> int:
    """A folder whose safetensors have the real names and shapes, and holes where the numbers would be. Its bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_32B))
    save_tokenizer(folder, words=TOKENS)
    rules = plan_rules(architecture_of(QWEN3_32B, where="here"), None)
    files: list[dict[str, dict]] = [{}]
    used, total = 0, 0
    for name, shape in ((n, s) for rule in rules for n, s in zip(rule.hf, rule.shapes, strict=True)):
        size = 2 * torch.Size(shape).numel()
        if used + size > FILE_BYTES:
            files.append({})
            used = 0
        files[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [used, used + size]}
        used, total = used + size, total + size
    index = {}
    for number, header in enumerate(files):
        name = f"model-{number:05}.safetensors"
        text = json.dumps(header).encode()
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + max(t["data_offsets"][1] for t in header.values()))
        index |= dict.fromkeys(header, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


class AnonymousMemory:
    """The most memory of its own that this process had inside the block (Linux); pages of files do not count."""

    def __enter__(self):
        self.start = self.peak = self._now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._stop.set()
        self._thread.join()

    def _watch(self):
        while not self._stop.is_set():
            self.peak = max(self.peak, self._now())
            time.sleep(0.002)

    @staticmethod
    def _now() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])


def import_share(process, folder: Path, stage_number: int) -> tuple[int, int]:
    """Bytes of this rank's weights, and the most memory that it took to have them."""
    layout = layout_of(process, tp=process.world_size)
    plan = plan_import(folder)
    with AnonymousMemory() as memory:
        stage = build_stage(
            plan.description.architecture,
            plan.description.memory,
            layout.groups,
            stage=stage_number,
            layers_per_stage=[64 // STAGES] * STAGES,
            precision=plan.precision,
        )
        plan.load_weights(stage)
    share = sum(p.numel() * p.element_size() for p in stage.parameters())
    assert all(bool(p.isfinite().all()) for p in stage.parameters())
    return share, memory.peak - memory.start


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, STAGES - 1], ids=["with the embedding", "with the head"])
def test_a_rank_takes_at_most_1_3_times_its_share_of_qwen3_32b(stage, tmp_path, pool):
    total = write_sparse_model(tmp_path / "hf")
    assert total > 65e9
    for share, peak in pool(4).run(import_share, tmp_path / "hf", stage):
        print(f"share {share / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB: {peak / share:.2f} x")
        assert share > 1.2e9
        assert share <= peak <= 1.3 * share
    pool(4).close()
