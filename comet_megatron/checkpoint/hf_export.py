"""Export a checkpoint as a Hugging Face folder, file by file: no more than one file's weights are in memory.

Three forms: comet (ours: config, weights, tokenizer and the modeling code), official (loads into the authors' class),
backbone (the plain model without its memory).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

import comet_megatron.hf
from comet_megatron.checkpoint.checksums import check_weights
from comet_megatron.checkpoint.hf_config import backbone_vocabulary, hf_config_of
from comet_megatron.checkpoint.hf_folder import INDEX, raise_problems
from comet_megatron.checkpoint.hf_rules import Rule, Shape, Vocabulary, plan_rules
from comet_megatron.checkpoint.hf_tokenizer import write_text_tokenizer
from comet_megatron.checkpoint.model_folder import TOKENIZER, ModelDescription, read_description
from comet_megatron.checkpoint.sharded import load_whole, stored_precision, stored_shapes
from comet_megatron.data.tokenizer import load_tokenizer
from comet_megatron.errors import CheckpointError, DataError, OutputError
from comet_megatron.model.architectures import DTYPES
from comet_megatron.new_folder import copy_files, new_folder
from comet_megatron.parallel.layout import Layout

EXPORT_DTYPES = {**DTYPES, "fp16": torch.float16}
MAX_FILE_SIZE = "5GB"
PORTION_BYTES = 256 << 20  # of parameters that are loaded at once; many small loads would each read the metadata


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        dtype: of the weights.
        files: safetensors and their bytes.
    """

    description: ModelDescription
    form: str
    dtype: torch.dtype
    files: Mapping[str, int]


def export_hf(
    checkpoint: Path,
    output: Path,
    layout: Layout,
    *,
    form: str = "comet",
    dtype: str = "auto",
    max_file_size: int | str = MAX_FILE_SIZE,
    check: Any = None,
) -> Export:
    """Write a folder that transformers loads. One process.

    Args:
        checkpoint: folder of a starting checkpoint or of a training run's, saved on any layout.
        layout: of this one process; Megatron reads no checkpoint without.
        form: comet | official | backbone.
        dtype: fp32 | bf16 | fp16 | auto (as stored).
        check: called as check(folder, export) before the folder gets its name; what it raises leaves nothing behind.

    Raises:
        CheckpointError, DataError: the checkpoint is damaged, does not fit the form, or its tokenizer does not load.
        OutputError: `output` is not empty.
    """
    assert layout.world_size == 1
    description = read_description(checkpoint)
    check_weights(checkpoint)
    tokenizer_folder = checkpoint / TOKENIZER
    tokenizer = check_tokenizer_loads(tokenizer_folder, way_out="use another checkpoint, or copy its tokenizer/ again")
    if len(tokenizer) > description.architecture.vocab_size:
        raise CheckpointError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {description.architecture.vocab_size}",
            where=str(checkpoint),
            way_out="use a checkpoint whose tokenizer/ was not changed",
        )
    target = EXPORT_DTYPES[stored_precision(checkpoint) if dtype == "auto" else dtype]
    name = str(target).removeprefix("torch.")
    config = hf_config_of(description, tokenizer_eos=tokenizer.eos_token_id, dtype=name, form=form)
    with new_folder(output) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        files = write_weights(checkpoint, folder, rules_of(description, form), target, max_file_size=max_file_size)
        generation = generation_config_of(description, config)
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        if form == "comet":
            for file in Path(comet_megatron.hf.__file__).parent.glob("*_comet.py"):
                shutil.copyfile(file, folder / file.name)
        if form == "backbone":
            write_text_tokenizer(tokenizer_folder, folder, first_new_id=description.memory.first_new_id)
        else:
            copy_files(tokenizer_folder, folder)
        check_tokenizer_loads(folder, way_out="nothing was written; please report it")
        export = Export(description, form, target, files)
        if check is not None:
            check(folder, export)
    return export


def rules_of(description: ModelDescription, form: str) -> list[Rule]:
    """The tensors of an export: where they are in the checkpoint, their names and shapes in the folder."""
    if form != "backbone":
        return plan_rules(description.architecture, description.memory)
    return plan_rules(replace(description.architecture, vocab_size=backbone_vocabulary(description)), None)


def generation_config_of(description: ModelDescription, config: Mapping[str, Any]) -> dict[str, Any]:
    """The original model's way of sampling, with ids that end a text and that fill up."""
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    return {**ends, **{k: v for k, v in description.generation_config.items() if v is not None}}


def check_tokenizer_loads(folder: Path, *, way_out: str) -> Any:
    """The tokenizer.

    Raises:
        CheckpointError: AutoTokenizer cannot load it.
    """
    try:
        return load_tokenizer(folder)
    except DataError as error:
        raise CheckpointError(error.what, where=error.where, way_out=way_out) from error


def write_weights(
    checkpoint: Path, folder: Path, rules: Sequence[Rule], dtype: torch.dtype, *, max_file_size: int | str
) -> dict[str, int]:
    """Write safetensors files, and an index if there are several. Their bytes by file name."""
    check_stored(checkpoint, rules)
    shapes: dict[str, Shape] = {n: shape for rule in rules for n, shape in zip(rule.hf, rule.shapes, strict=True)}
    planned = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    split = split_torch_state_dict_into_shards(planned, max_shard_size=max_file_size)
    for file, names in split.filename_to_tensors.items():
        tensors = dict(_tensors(checkpoint, rules, set(names), dtype))
        try:
            save_file(tensors, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OutputError(
                f"the weights cannot be written: {error}", where=str(folder.parent), way_out="free space on the disk"
            ) from error
        del tensors
        (folder / file).chmod((folder / "config.json").stat().st_mode)  # safetensors lets only its owner read it
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return {file: (folder / file).stat().st_size for file in split.filename_to_tensors}


def check_stored(checkpoint: Path, rules: Sequence[Rule]) -> None:
    """
    Raises:
        CheckpointError: parameters are missing, or of other shapes than model.json says.
    """
    found, problems = stored_shapes(checkpoint, [rule.megatron for rule in rules]), []
    for rule in rules:
        want = tuple(rule.to_megatron([torch.empty(shape, device="meta") for shape in rule.shapes]).shape)
        have = found.get(rule.megatron)
        if have is not None and isinstance(rule, Vocabulary):
            have = (min(have[0], want[0]), *have[1:])  # it may be padded
        if have is None:
            problems.append(f"{rule.megatron} is missing")
        elif have != want:
            problems.append(f"{rule.megatron} has shape {have}, not {want}")
    raise_problems(problems, what="the weights are of other sizes than model.json says", where=str(checkpoint))


def _tensors(
    checkpoint: Path, rules: Sequence[Rule], names: set[str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of an export; a few parameters of the checkpoint are loaded at once.

    Raises:
        CheckpointError: a value is too large for the dtype.
    """
    for some in _in_portions([rule for rule in rules if names.intersection(rule.hf)]):
        loaded = load_whole(checkpoint, [rule.megatron for rule in some])
        for rule in some:
            for name, tensor in zip(rule.hf, rule.to_hf(loaded.pop(rule.megatron)), strict=True):
                if name in names:
                    rounded = tensor.to(dtype, copy=True).contiguous()
                    if bool((rounded.isinf() & tensor.isfinite()).any()):
                        raise CheckpointError(
                            f"{name} has values up to {float(tensor.abs().max()):.3g}, too large for {dtype}",
                            where=str(checkpoint),
                            way_out="export with --dtype bf16 or fp32",
                        )
                    yield name, rounded


def _in_portions(rules: Sequence[Rule]) -> Iterator[list[Rule]]:
    """Neighbouring rules of PORTION_BYTES together, or one that is larger."""
    portion: list[Rule] = []
    size = 0
    for rule in rules:
        rule_bytes = 4 * sum(math.prod(shape) for shape in rule.shapes)
        if portion and size + rule_bytes > PORTION_BYTES:
            yield portion
            portion, size = [], 0
        portion.append(rule)
        size += rule_bytes
    if portion:
        yield portion
