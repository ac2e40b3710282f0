"""What a place in data.train or data.eval holds: shards, or JSONL of which they are made on first use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from comet_megatron.data.documents import DocumentSource, find_documents, is_jsonl
from comet_megatron.data.shards import has_shards, load_manifest
from comet_megatron.data.storage import CHECK_PLACE, find_places, is_pattern, is_url, join
from comet_megatron.errors import DataError

TRAIN, EVAL = "train", "eval"  # folders that prepare_data makes in its output
WHAT_MAY_BE = "give a folder of shards (tools/prepare_data.py writes it), its URL, or .jsonl, .jsonl.gz or .jsonl.zst"


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
        """Every read asks another machine; what lies in this process's memory is not behind a network."""
        return any(is_url(folder) and not folder.startswith("memory://") for folder in self.shards)


def find_source(place: str, *, part: str, key: str, weight: float = 1.0) -> Source:
    """What lies there.

    Args:
        part: TRAIN or EVAL: which folder counts of an output of prepare_data that is named as a whole.

    Raises:
        DataError: nothing, something else, or shards beside texts.
    """
    try:
        return _find_source(place, part, key, weight)
    except OSError as error:  # a folder on the way may not be read, a name may be too long
        what = f"{key}: it cannot be read: {error.strerror}"
        raise DataError(what, where=place, way_out=CHECK_PLACE) from error


def _find_source(place: str, part: str, key: str, weight: float) -> Source:
    found = [place]
    if is_pattern(place) and (is_url(place) or not Path(place).exists()):
        found = find_places(place)
        if not found:
            raise DataError(f"{key}: no file or folder matches {place}", way_out="check the pattern")
    texts = [one for one in found if _holds_texts(one, part)]
    folders = tuple(_folder_of_shards(one, part, key) for one in found if one not in texts)
    if texts and folders:
        raise DataError(
            f"{key}: {place} matches both JSONL ({texts[0]}) and shards ({folders[0]})",
            way_out="name them apart, each with its weight",
        )
    return Source(place, key, weight, folders, _documents(texts) if texts else None)


def _holds_texts(place: str, part: str) -> bool:
    if is_url(place):
        if is_jsonl(Path(place)):
            raise DataError(
                "JSONL behind a URL is not read directly",
                where=place,
                way_out="prepare it with tools/prepare_data.py where the file is, and give the URL of the shards",
            )
        return False
    path = Path(place)
    if not path.is_dir():
        return is_jsonl(path) and path.exists()
    files = [] if has_shards(place) else _files_of(path)
    if files and has_shards(join(place, part)):
        what = f"the folder holds both JSONL ({files[0].name}) and shards ({part}/)"
        raise DataError(what, where=place, way_out=f"name one of them: {join(place, part)}, or the files")
    return bool(files)


def _documents(texts: Sequence[str]) -> DocumentSource:
    """By absolute names: however they are spelt, the same files are the same documents."""
    return find_documents([str(file.absolute()) for place in texts for file in _files_of(Path(place))])


def _files_of(path: Path) -> list[Path]:
    return sorted(file for file in path.iterdir() if is_jsonl(file)) if path.is_dir() else [path]


def _folder_of_shards(place: str, part: str, key: str) -> str:
    if has_shards(place):
        return place
    if has_shards(inside := join(place, part)):
        return inside
    if not is_url(place) and Path(place).is_file():
        raise DataError(f"{key}: a file that is neither shards nor JSONL", where=place, way_out=WHAT_MAY_BE)
    if part == EVAL and has_shards(join(place, TRAIN)):
        what = f"{key}: no documents were held out there: it has no folder {EVAL}"
        raise DataError(what, where=place, way_out="prepare it with --eval-fraction above 0, or name other data")
    load_manifest(place)  # says what is wrong
    return place
