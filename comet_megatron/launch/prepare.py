"""What training starts from, made once for an OUTPUT: the checkpoint OUTPUT/start, the shards OUTPUT/data.

A later launch uses them again. In each lies made_from.json, which says what it was made from: a folder that was made
from something else is refused, never used and never replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.checkpoint.model_folder import TOKENIZER
from comet_megatron.data.prepare import NO_LIMIT, PrepareSettings, prepare_data
from comet_megatron.data.shards import MANIFEST_NAME, load_manifest
from comet_megatron.data.sources import EVAL, TRAIN
from comet_megatron.errors import OutputError
from comet_megatron.launch.recipe import Recipe
from comet_megatron.launch.settings import shown
from comet_megatron.launch.small_model import make_small_model
from comet_megatron.launch.sources import DataSource, JoinedDocuments, ModelSource, is_list
from comet_megatron.new_folder import new_folder

MADE_FROM = "made_from.json"
HELD_OUT_FRACTION = 0.05


def start_folder(output: Path) -> Path:
    """Of the starting checkpoint."""
    return output / "start"


def data_folder(output: Path) -> Path:
    """Of the shards."""
    return output / "data"


def origin_of_start(model: ModelSource, recipe: Recipe) -> dict[str, Any]:
    """What made_from.json says of the starting checkpoint."""
    memory = {name: getattr(recipe, name) for name in ("chunk_size", "global_slots", "stride", "budget")}
    small = asdict(recipe.small_model) if model.kind == "small" and recipe.small_model else {}
    small.pop("tokenizer", None)  # it may be another path to the same files
    return {**memory, **small, "the model's files": _digest(p for p in model.path.iterdir() if p.is_file())}


def origin_of_data(data: DataSource, recipe: Recipe) -> dict[str, Any]:
    """What made_from.json says of the shards."""
    assert data.texts is not None
    return {
        "sequence_length": recipe.sequence_length,
        "max_sequences": recipe.max_sequences,
        "the texts": _digest(file.path for file in data.texts.files),
    }


def _digest(files: Iterable[Path]) -> str:
    """Of names and sizes; the contents may be hundreds of gigabytes, and a copy has other times."""
    known = sorted((path.name, path.stat().st_size) for path in files)
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def is_made(folder: Path, origin: Mapping[str, Any]) -> bool:
    """Whether an earlier launch made this folder, from the same.

    Raises:
        OutputError: the folder holds something else.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    way_out = f"give OUTPUT another folder, or delete {shown(folder)} to have it made again"
    try:
        found = json.loads((folder / MADE_FROM).read_text())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise OutputError(f"{shown(folder)} exists, and this launcher did not make it", way_out=way_out)
    if found == origin:
        return True
    names = [name for name in {**found, **origin} if found.get(name) != origin.get(name)]
    others = [
        f"{name} changed" if name.startswith("the ") else f"{name} {found.get(name)}, now {origin.get(name)}"
        for name in names
    ]
    raise OutputError(f"{shown(folder)} is of an earlier launch with others: {'; '.join(others)}", way_out=way_out)


def make_start(model: ModelSource, recipe: Recipe, output: Path) -> Path:
    """The starting checkpoint: MODEL itself, one of an earlier launch, or a new one."""
    if model.kind == "checkpoint":
        return model.path
    folder, origin = start_folder(output), origin_of_start(model, recipe)
    if is_made(folder, origin):
        print(f"start      {shown(folder)}, made by an earlier launch", flush=True)
        return folder
    what = "a small model with random weights" if model.kind == "small" else shown(model.path)
    print(f"start      making {shown(folder)} from {what} ...", flush=True)
    quiet_libraries()
    from comet_megatron.checkpoint.hf_import import AskedMemory, import_hf  # loads torch and Megatron
    from comet_megatron.parallel.alone import alone

    asked = AskedMemory(recipe.chunk_size, recipe.global_slots, recipe.stride, recipe.budget)
    if model.kind == "comet":
        asked = AskedMemory()  # it has a memory, with sizes of its own
    with new_folder(folder) as new, tempfile.TemporaryDirectory(prefix="comet_") as temporary:
        source = model.path
        if model.kind == "small":
            assert recipe.small_model is not None
            source = Path(temporary) / "small_model"
            make_small_model(recipe.small_model_at(model.path), source)
        with _no_other_process(), alone() as layout:
            import_hf(source, new, asked, layout)
        (new / MADE_FROM).write_text(json.dumps(origin, indent=2) + "\n")
    return folder


def make_data(data: DataSource, recipe: Recipe, output: Path, *, tokenizer: Path) -> tuple[str, str | None]:
    """Shards to train on and, if documents are held out, shards to evaluate on: DATA itself, an earlier launch's, new.

    Args:
        tokenizer: folder of the text's tokenizer.
    """
    if data.train is not None:
        return data.train, data.eval
    assert data.texts is not None
    folder, origin = data_folder(output), origin_of_data(data, recipe)
    if is_made(folder, origin):
        print(f"data       {shown(folder)}, made by an earlier launch", flush=True)
    else:
        size = data.texts.num_bytes / 1e6
        print(f"data       making {shown(folder)} from {len(data.texts.files)} files, {size:.1f} MB ...", flush=True)
        quiet_libraries()
        from comet_megatron.data.tokenizer import load_tokenizer

        num_tokens = recipe.max_sequences * recipe.sequence_length
        settings = PrepareSettings(
            sequence_length=recipe.sequence_length,
            eval_fraction=HELD_OUT_FRACTION if data.may_be_held_out else 0,
            max_tokens=num_tokens or NO_LIMIT,
        )
        documents = JoinedDocuments(data.texts, num_tokens=num_tokens) if data.is_joined else data.texts
        with new_folder(folder) as new:
            prepare_data(documents, tokenizer=load_tokenizer(tokenizer), output_dir=new, settings=settings)
            (new / MADE_FROM).write_text(json.dumps(origin, indent=2) + "\n")
    held_out = folder / EVAL
    return str(folder / TRAIN), str(held_out) if (held_out / MANIFEST_NAME).exists() else None


def describe_data(train: str, held_out: str | None) -> str:
    """The number of sequences, one line."""
    if is_list(train):
        return train
    parts = []
    for name, folder in (("to train on", train), ("held out", held_out)):
        if folder is not None:
            manifest = load_manifest(folder)
            longest = manifest.settings.get("sequence_length")
            most = f" of at most {longest:,}" if isinstance(longest, int) else ""
            parts.append(f"{manifest.num_samples:,} sequences{most}, {manifest.num_tokens:,} tokens {name}")
    return "; ".join(parts)


def tokenizer_of(model: ModelSource) -> Path:
    """The folder of the tokenizer that makes MODEL's text ids."""
    return model.path / TOKENIZER if model.kind == "checkpoint" else model.path


@contextmanager
def _no_other_process() -> Iterator[None]:
    """Hide torchrun's address, so that this process makes a group of its own while the others wait."""
    address = os.environ.pop("MASTER_ADDR", None)
    try:
        yield
    finally:
        if address is not None:
            os.environ["MASTER_ADDR"] = address
