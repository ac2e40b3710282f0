"""What MODEL and DATA are, found without changing anything: what is missing is told, with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from comet_megatron.checkpoint.families import is_comet
from comet_megatron.checkpoint.model_folder import read_description
from comet_megatron.config.rules import check_architecture, require
from comet_megatron.config.schema import Architecture, MemorySizes
from comet_megatron.data.documents import (
    PYTHON_STDLIB,
    Document,
    DocumentSource,
    find_documents,
    python_stdlib_files,
)
from comet_megatron.data.shards import has_shards
from comet_megatron.data.sources import EVAL, TRAIN, find_source
from comet_megatron.data.storage import is_pattern, is_url, join
from comet_megatron.errors import CheckpointError, DataError
from comet_megatron.launch.recipe import Recipe
from comet_megatron.launch.settings import shown
from comet_megatron.launch.small_model import SmallModel

CHARACTERS_PER_TOKEN = 6  # more than tokenizers make of source code on average


@dataclass(frozen=True)
class ModelSource:
    """MODEL as it was found.

    Attributes:
        kind: checkpoint (of this project) | hugging_face | small (to be made).
        path: its folder; of a small model the tokenizer's.
        memory: of a checkpoint its own, else the recipe's with the ids the new tokens will about get.
    """

    kind: str
    path: Path
    architecture: Architecture
    memory: MemorySizes


@dataclass(frozen=True)
class DataSource:
    """DATA as it was found: shards to train on, or texts to make them of.

    Attributes:
        train: as the train command takes it: a place, or a list of places with weights.
        folders: of shards, that every machine must see.
    """

    train: str | None = None
    eval: str | None = None
    folders: tuple[str, ...] = ()
    texts: DocumentSource | None = None
    is_joined: bool = False  # all texts make one document

    @property
    def may_be_held_out(self) -> bool:
        """Whether there is more than one document; a .jsonl file counts as many."""
        files = self.texts.files if self.texts is not None else ()
        return not self.is_joined and (len(files) > 1 or any(file.path.suffix == ".jsonl" for file in files))


def find_model(path: Path, recipe: Recipe) -> ModelSource:
    """What lies at `path`.

    Raises:
        CheckpointError, ConfigError: nothing, no model, a damaged one, or one of an architecture that is not known.
    """
    if not path.exists():
        advice = "set MODEL to a Hugging Face folder, or to a checkpoint of tools/convert_from_hf.py"
        if recipe.hub_model:
            advice = f"hf download {recipe.hub_model} --local-dir {shown(path)}\n  or {advice}"
        raise CheckpointError(f"there is no model: MODEL={shown(path)} does not exist", way_out=advice)
    if (path / "model.json").exists():
        description = read_description(path)
        return ModelSource("checkpoint", path, description.architecture, description.memory)
    if not (path / "config.json").exists():
        raise CheckpointError(
            f"MODEL={shown(path)} holds no model: neither config.json (Hugging Face) nor model.json (a checkpoint)",
            way_out="name the folder that holds one of them, with its weights and tokenizer",
        )
    from comet_megatron.checkpoint.hf_config import architecture_of, memory_of, read_hf_config
    from comet_megatron.checkpoint.hf_folder import HfTensors  # loads torch

    where, config = str(path / "config.json"), read_hf_config(path)
    architecture = architecture_of(config, where=where)
    require(check_architecture(architecture, where=where))
    with HfTensors(path):
        pass  # opening them finds what is missing or cut off
    if is_comet(config):
        return ModelSource("comet", path, architecture, memory_of(config, where=where))
    return _with_memory("hugging_face", path, architecture, recipe)


def plan_small_model(small: SmallModel, tokenizer: Path, recipe: Recipe) -> ModelSource:
    """The model that will be made. Its vocabulary is not known before the tokenizer is loaded, and no rule needs it.

    Raises:
        DataError: there is no such tokenizer.
    """
    if not tokenizer.is_dir():
        raise DataError(
            f"recipe.small_model.tokenizer={shown(tokenizer)} does not exist",
            way_out="name a folder that AutoTokenizer loads, such as tokenizers/python_stdlib_4k",
        )
    architecture = Architecture(
        family="qwen3",
        num_layers=small.layers,
        hidden_size=small.hidden_size,
        ffn_hidden_size=small.ffn_hidden_size,
        num_attention_heads=small.heads,
        num_query_groups=small.key_value_heads,
        head_dim=small.hidden_size // small.heads,
        vocab_size=1,
        norm_eps=1e-6,
        rope_theta=1e4,
        tie_embeddings=small.tied,
        max_positions=small.max_positions,
    )
    return _with_memory("small", tokenizer, architecture, recipe)


def _with_memory(kind: str, path: Path, architecture: Architecture, recipe: Recipe) -> ModelSource:
    """A model that has no memory yet: it will get the recipe's, with new ids after its own."""
    first, slots = architecture.vocab_size, recipe.global_slots
    memory = MemorySizes(
        chunk_size=recipe.chunk_size,
        stride=recipe.stride,
        budget=recipe.budget,
        memory_token_id=first,
        beacon_id=first + 1 + slots,
        global_beacon_ids=tuple(range(first + 1, first + 1 + slots)),
        first_new_id=first,
    )
    return ModelSource(kind, path, replace(architecture, vocab_size=first + 2 + slots), memory)


def is_list(data: str) -> bool:
    """Whether DATA gives several places, as in [[A, 0.7], [B, 0.3]]."""
    return data.startswith("[")


def find_data(data: str, path: Path, recipe: Recipe) -> DataSource:
    """What DATA is: the word python-stdlib, shards, a URL of such, a list as data.train takes it, or texts.

    Args:
        data: as it was given; path: the same as a path.

    Raises:
        DataError: there is nothing, or nothing that can be read.
    """
    if data == PYTHON_STDLIB:
        return DataSource(texts=python_stdlib_files(), is_joined=True)
    if is_list(data):
        found = [find_source(place, part=TRAIN, key="DATA") for place in _places_in(data)]
        folders = [folder for source in found for folder in source.shards if not is_url(folder)]
        return DataSource(train=data, folders=tuple(folders))
    if (shards := _find_shards(data if is_url(data) else str(path))) is not None:
        return shards
    try:
        return DataSource(texts=find_documents([str(path)]))
    except DataError as error:
        what = f"DATA={shown(path)} cannot be read: {error.what}"
        if not path.exists():
            what = f"there is no data: DATA={shown(path)} does not exist"
        elif path.is_dir():
            what = f"DATA={shown(path)} holds no files"
        raise DataError(
            what,
            way_out='set DATA to a text file, a .jsonl file with a "text" on each line, a folder of such files, or\n'
            "  to shards that tools/prepare_data.py made; a document fills a sequence if it has "
            f"{recipe.sequence_length:,} tokens or more,\n  shorter ones are not joined",
        ) from error


def _places_in(data: str) -> list[str]:
    """Of a list; weights are the train command's."""
    try:
        items = yaml.safe_load(data)
        return [item if isinstance(item, str) else str(item[0]) for item in items]
    except (yaml.YAMLError, TypeError, IndexError, KeyError) as error:
        what = f"DATA={data} is no list of places with weights"
        raise DataError(what, way_out="write it as [[A, 0.7], [B, 0.3]]") from error


def _find_shards(place: str) -> DataSource | None:
    """A folder of shards, an output of prepare_data, a pattern or a URL of such; None: it is something else.

    Raises:
        DataError: a URL without shards.
    """
    if not is_url(place) and not is_pattern(place) and not has_shards(place) and not has_shards(join(place, TRAIN)):
        return None
    try:
        shards = find_source(place, part=TRAIN, key="DATA").shards
    except DataError:
        if is_url(place):
            raise
        return None  # a pattern that matches texts
    if not shards:
        return None
    folders = tuple(folder for folder in shards if not is_url(folder))
    if shards != (join(place, TRAIN),):
        return DataSource(train=place, folders=folders)
    held_out = join(place, EVAL)
    return DataSource(train=shards[0], eval=held_out if has_shards(held_out) else None, folders=folders)


class JoinedDocuments:
    """All texts as one long document, so that its pieces have the full length.

    Args:
        num_tokens: enough of the texts for so many tokens; 0: all of them.
    """

    def __init__(self, texts: DocumentSource, *, num_tokens: int) -> None:
        self.texts, self.num_tokens = texts, num_tokens

    def __iter__(self) -> Iterator[Document]:
        parts, characters = [], 0
        for document in self.texts:
            parts.append(document.text)
            characters += len(document.text)
            if self.num_tokens and characters >= CHARACTERS_PER_TOKEN * self.num_tokens:
                break
        yield Document(f"{PYTHON_STDLIB} joined", "\n".join(parts))
