"""What a place in data.train or data.eval holds: shards, or JSONL of which they are made on first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comet_megatron.data.documents import DocumentSource, find_documents, is_jsonl
from comet_megatron.data.shards import has_shards, load_manifest
from comet_megatron.data.storage import find_places, is_url, join
from comet_megatron.errors import DataError

_GLOB_CHARACTERS = frozenset("*?[")
TRAIN, EVAL = "train", "eval"  # folders that prepare_data makes in its output


@dataclass(frozen=True)
class Source:
    """One place, as it was found.

    Attributes:
        place: a path, a pattern or a URL, as the user wrote it.
        key: the setting that names it.
        weight: of its samples beside other places'.
        shards: folders of shards; empty where they have to be made.
        texts: JSONL to make them of.
    """

    place: str
    key: str
    weight: float = 1.0
    shards: tuple[str, ...] = ()
    texts: DocumentSource | None = None

    @property
    def is_remote(self) -> bool:
        """Every read asks another machine."""
        return any(is_url(folder) for folder in self.shards)


def find_source(place: str, *, part: str, key: str, weight: float = 1.0) -> Source:
    """What lies there.

    Args:
        part: TRAIN or EVAL: which folder counts of an output of prepare_data that is named as a whole.

    Raises:
        DataError: nothing, something else, or shards beside texts.
    """
    found = [place]
    if _GLOB_CHARACTERS & set(place) and (is_url(place) or not Path(place).exists()):
        found = find_places(place)
        if not found:
            raise DataError(f"{key}: no file or folder matches {place}", way_out="check the pattern")
    texts = [one for one in found if _holds_texts(one)]
    folders = tuple(_folder_of_shards(one, part) for one in found if one not in texts)
    if texts and folders:
        raise DataError(
            f"{key}: {place} matches both JSONL ({texts[0]}) and shards ({folders[0]})",
            way_out="name them apart, each with its weight",
        )
    return Source(place, key, weight, folders, _documents(texts) if texts else None)


def _holds_texts(place: str) -> bool:
    if is_url(place):
        if is_jsonl(Path(place)):
            raise DataError(
                "JSONL behind a URL is not read directly",
                where=place,
                way_out="prepare it with tools/prepare_data.py where the file is, and give the URL of the shards",
            )
        return False
    path = Path(place)
    if path.is_dir():
        return not has_shards(place) and any(is_jsonl(file) for file in path.iterdir())
    return is_jsonl(path)


def _documents(texts: Sequence[str]) -> DocumentSource:
    files = [str(file) for place in texts for file in _files_of(Path(place))]
    return find_documents(files)


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if is_jsonl(file)) if path.is_dir() else [path]


def _folder_of_shards(place: str, part: str) -> str:
    if not has_shards(place) and has_shards(inside := join(place, part)):
        return inside
    load_manifest(place)  # says what is wrong
    return place
