"""The safetensors of a Hugging Face model folder: opened and checked, read when and as far as they are asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from comet_megatron.errors import CheckpointError

INDEX = "model.safetensors.index.json"


MAX_NAMED = 20  # problems of weights in one message


def raise_problems(problems: Sequence[str], *, what: str, where: str) -> None:
    """One CheckpointError that names all problems of the weights; nothing if there are none."""
    if problems:
        more = f" and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
        raise CheckpointError(
            f"{what}: {'; '.join(problems[:MAX_NAMED])}{more}", where=where, way_out="copy the model again"
        )


class HfTensors(Mapping[str, Tensor]):
    """The tensors of a folder's safetensors by name, read when they are asked for. Close it after use.

    Raises:
        CheckpointError: no safetensors, an index that names a missing file or leaves the folder, a truncated file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open_files = ExitStack()
        self._file_of: dict[str, Any] = {}
        path_of: dict[str, str] = {}
        for path in _weight_files(folder):
            try:
                file = self._open_files.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                self.close()
                raise CheckpointError(
                    f"truncated or damaged safetensors: {error}", where=str(path), way_out="copy the file again"
                ) from error
            if twice := sorted(self._file_of.keys() & set(file.keys())):
                self.close()
                raise_problems([f"{name} is in two files" for name in twice], what="weights", where=str(folder))
            self._file_of |= dict.fromkeys(file.keys(), file)
            path_of |= dict.fromkeys(file.keys(), path.name)
        if wrong := [
            f"{name} is not in {file}" for name, file in _indexed(folder).items() if path_of.get(name) != file
        ]:
            self.close()
            raise_problems(wrong, what="the index is of other files", where=str(folder / INDEX))

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def part(self, name: str, axis: int | None, begin: int, end: int) -> Tensor:
        """Positions begin to end of an axis of a tensor; nothing else is read. None: the whole tensor."""
        if axis is None:
            return self[name]
        return self._file_of[name].get_slice(name)[(slice(None),) * axis + (slice(begin, end),)]

    def dtype(self, name: str) -> str:
        """Dtype of a tensor in safetensors' words (F32, BF16, F16, ...), without reading it."""
        return self._file_of[name].get_slice(name).get_dtype()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def close(self) -> None:
        """Close the files."""
        self._open_files.close()

    def __enter__(self) -> HfTensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _indexed(folder: Path) -> dict[str, str]:
    """File names by tensor, as the index has them; empty where there is none."""
    index = folder / INDEX
    if not index.exists():
        return {}
    try:
        return {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"damaged index: {error!r}", where=str(index), way_out="copy it again") from error


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if not index.exists():
        whole = folder / "model.safetensors"
        files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(
                f"{folder} has no *.safetensors", way_out="save the model with safe_serialization; pickles are not read"
            )
        return files
    names = sorted(set(_indexed(folder).values()))
    for name in names:
        if Path(name).name != name or name in ("", ".."):
            raise CheckpointError(
                f"the index names a path outside its folder: {name!r}", where=str(index), way_out="copy it again"
            )
        if not (folder / name).exists():
            raise CheckpointError(
                f"the index names {name}, which is missing", where=str(index), way_out="copy it again"
            )
    return [folder / name for name in names]
