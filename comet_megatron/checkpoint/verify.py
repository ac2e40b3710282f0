"""Does an export compute what the checkpoint computes? Both run the same text in fp32; every layer is compared.

Weights that were rounded for the export are rounded alike in the Megatron model, so that what is left is the noise of
fp32, or a mistake in the conversion.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from comet_megatron.checkpoint.hf_config import backbone_vocabulary, read_hf_config
from comet_megatron.checkpoint.hf_export import Export
from comet_megatron.checkpoint.hf_folder import HfTensors
from comet_megatron.checkpoint.sharded import load_weights
from comet_megatron.chunking import plan_chunks
from comet_megatron.errors import CheckpointError
from comet_megatron.hf.configuration_comet import CometConfig
from comet_megatron.hf.modeling_comet import CometForCausalLM
from comet_megatron.model.build import build_stage
from comet_megatron.model.chunk_tensors import build_chunk_tensors
from comet_megatron.model.memory import carry_memory
from comet_megatron.model.stage import CometStage
from comet_megatron.parallel.layout import Layout

TOLERANCE = 1e-4  # of the largest value of a layer's output; two implementations differ by 1e-6 or so
CHUNKS = 2.5  # of text: the temporary memory is read, the global memory is gated, and the last chunk is ragged
MAX_BACKBONE_TOKENS = 512


class ChunkOutputs(NamedTuple):
    """Of one chunk, at its text: each layer's output [S, hidden], then the logits [S, vocabulary]."""

    layers: list[Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Difference:
    """The largest difference somewhere, and the largest value there."""

    where: str
    error: float
    largest: float

    @property
    def relative(self) -> float:
        return self.error / self.largest if self.largest else self.error

    @property
    def is_noise(self) -> bool:
        return self.relative <= TOLERANCE  # False for nan

    def __str__(self) -> str:
        return f"{self.where:<10} {self.error:.1e} of values up to {self.largest:.1e}: {self.relative:.1e}"


@dataclass(frozen=True)
class Verdict:
    """Of an export: layer by layer, the logits last."""

    tokens: int
    differences: tuple[Difference, ...]

    @property
    def first_wrong(self) -> Difference | None:
        return next((d for d in self.differences if not d.is_noise), None)

    def lines(self) -> list[str]:
        """For the user."""
        wrong = self.first_wrong
        end = f"equal: nothing is above {TOLERANCE:.0e} of the largest value, the noise of fp32"
        if wrong is not None:
            end = f"DIFFERENT from {wrong.where} on: a mistake in the conversion"
        head = f"verify     {self.tokens} tokens in fp32; largest difference, largest value, their ratio"
        return [head, *(f"  {difference}" for difference in self.differences), f"verdict    {end}"]


@torch.no_grad()
def verify(checkpoint: Path, folder: Path, export: Export, layout: Layout, *, seed: int = 0) -> Verdict:
    """Compare an export with the checkpoint it was made from. One process holds both models in fp32.

    Raises:
        CheckpointError: the export does not load.
    """
    description, is_plain = export.description, export.form == "backbone"
    memory = description.memory
    tokens = round(memory.chunk_size * CHUNKS)
    if is_plain:
        tokens = min(tokens, MAX_BACKBONE_TOKENS, description.architecture.max_positions)
        memory = replace(memory, chunk_size=tokens, stride=-1, global_beacon_ids=())
    stage = build_stage(description.architecture, memory, layout.groups)
    load_weights(checkpoint, stage, layout)
    for param in stage.parameters():
        param.copy_(param.to(export.dtype))
    ids = np.random.default_rng(seed).integers(0, max(description.memory.first_new_id, 1), (1, tokens))
    model, rows = _load_export(folder, export.form), backbone_vocabulary(description) if is_plain else None
    theirs = _plain_chunks(model, ids) if is_plain else _comet_chunks(model, ids)
    found = [_compare(a, b, rows) for a, b in zip(_megatron_chunks(stage, ids), theirs, strict=True)]
    return Verdict(tokens, tuple(worst(at) for at in zip(*found, strict=True)))


def worst(differences: Iterable[Difference]) -> Difference:
    """The largest; a value that is no number is larger than all."""
    return max(differences, key=lambda d: math.inf if math.isnan(d.relative) else d.relative)


def require_equal(verdict: Verdict) -> None:
    """
    Raises:
        CheckpointError: the export computes something else.
    """
    if (wrong := verdict.first_wrong) is not None:
        raise CheckpointError(
            f"the export does not compute what the checkpoint does: {wrong}",
            way_out="nothing was written; please report it with the lines above",
        )


def _compare(ours: ChunkOutputs, theirs: ChunkOutputs, vocabulary: int | None) -> list[Difference]:
    pairs = [(f"layer {i}", a, b) for i, (a, b) in enumerate(zip(ours.layers, theirs.layers, strict=True))]
    pairs.append(("logits", ours.logits[:, : vocabulary or theirs.logits.shape[1]], theirs.logits))
    return [Difference(w, float((a.cpu() - b.cpu()).abs().max()), float(b.abs().max())) for w, a, b in pairs]


def _load_export(folder: Path, form: str) -> nn.Module:
    """In fp32, as a user loads it; an official folder through our own class, which has the same names."""
    try:
        if form != "official":
            from transformers import AutoModelForCausalLM

            trust = form == "comet"  # the code is ours, just copied
            options = {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": trust}
            return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        config = {k: v for k, v in read_hf_config(folder).items() if k not in ("architectures", "dtype", "torch_dtype")}
        model = CometForCausalLM(CometConfig(**config)).eval()
        with HfTensors(folder) as tensors:
            missing, unexpected = model.load_state_dict({n: t.float() for n, t in tensors.items()}, strict=False)
        tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
        if unexpected or set(missing) - tied:
            raise ValueError(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
        return model
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"the export does not load: {reason}", way_out="please report it") from error


@contextmanager
def _recorded(modules: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """A list that gathers each module's output."""
    outputs: list[Tensor] = []

    def record(module: nn.Module, inputs: object, output: object) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)  # type: ignore[arg-type]

    hooks = [module.register_forward_hook(record) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _megatron_chunks(stage: CometStage, ids: np.ndarray) -> Iterator[ChunkOutputs]:
    memory = stage.empty_memory()
    with _recorded(stage.decoder.layers) as outputs:
        for plan in plan_chunks(ids.shape[1], stage.memory_sizes):
            chunk = build_chunk_tensors(plan, ids, ids, stage.memory_sizes, shards=stage.shards, device=stage.device)
            hidden, written = stage(chunk, memory)
            carried = zip(memory, written, strict=True)
            memory = [carry_memory(m, w, budget=stage.memory_sizes.budget) for m, w in carried]
            text = torch.from_numpy(plan.text_rows).to(hidden.device)
            logits = stage.logits(stage.decoder.final_layernorm(hidden[text]))
            yield ChunkOutputs([out[text, 0] for out in outputs], logits[:, 0, : stage.architecture.vocab_size])
            outputs.clear()


def _comet_chunks(model: nn.Module, ids: np.ndarray) -> Iterator[ChunkOutputs]:
    stride = model.config.temp_beacon_stride
    with _recorded([layer.inner_layer for layer in model.model.layers]) as outputs:
        for text_BSD, _, _ in model.model.stream(torch.from_numpy(ids), model.model.open_chunk()):
            tokens = torch.arange(text_BSD.shape[1])
            text = tokens + tokens // stride if stride > 0 else tokens
            yield ChunkOutputs([out[0, text] for out in outputs], model.lm_head(text_BSD)[0])
            outputs.clear()


def _plain_chunks(model: nn.Module, ids: np.ndarray) -> Iterator[ChunkOutputs]:
    with _recorded(model.model.layers) as outputs:
        logits = model(torch.from_numpy(ids)).logits[0]
        yield ChunkOutputs([out[0] for out in outputs], logits)
