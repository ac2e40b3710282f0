"""A chunk's plan as tensors on the device: ids, labels, and where rows are found on a tensor-parallel rank.

Everything is computed on the host from numbers: nothing is read back from the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core import tensor_parallel
from torch import Tensor

from comet_megatron.chunking import IGNORE_LABEL, ChunkPlan
from comet_megatron.config.schema import MemorySizes


@dataclass(frozen=True)
class SequenceShards:
    """How the rows of a chunk lie over the tensor-parallel ranks.

    Attributes:
        size: ranks the rows are split over; 1 without sequence parallelism.
        rank: this rank.
        group: process group of the ranks; None where size is 1.
        multiple: of which each rank's number of rows is one.
    """

    size: int = 1
    rank: int = 0
    group: torch.distributed.ProcessGroup | None = None
    multiple: int = 1

    def rows_per_rank(self, num_rows: int) -> int:
        """Rows of a chunk that each rank holds, padding at the end included."""
        return -(-num_rows // (self.size * self.multiple)) * self.multiple


@dataclass(frozen=True)
class RowSelection:
    """Some rows of a chunk.

    Attributes:
        count: how many.
        local: int64, the selected rows that this rank holds, counted from its first row.
        positions: int64, where those stand in the selection; None when this rank holds every row.
    """

    count: int
    local: Tensor
    positions: Tensor | None


def _rows_of_rank(rows: np.ndarray, rows_per_rank: int, shards: SequenceShards) -> np.ndarray:
    """Which of the rows this rank holds, as positions in `rows`."""
    return np.flatnonzero(rows // rows_per_rank == shards.rank)


def _on_device(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """int64 arrays as tensors on the device, in one transfer for which the host does not wait."""
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    packed = torch.from_numpy(np.concatenate([array.ravel() for array in arrays.values()]))
    packed = packed.pin_memory().to(device, non_blocking=True)
    parts = packed.split([array.size for array in arrays.values()])
    return {name: part.view(array.shape) for (name, array), part in zip(arrays.items(), parts, strict=True)}


def _find_rows(name: str, rows: np.ndarray, rows_per_rank: int, shards: SequenceShards) -> dict[str, np.ndarray]:
    """Where `rows` (counted in the whole chunk) are on this rank: arrays for `_selection`."""
    if shards.size == 1:
        return {f"{name} local": rows}
    positions = _rows_of_rank(rows, rows_per_rank, shards)
    return {f"{name} local": rows[positions] - shards.rank * rows_per_rank, f"{name} positions": positions}


def _selection(name: str, count: int, tensors: Mapping[str, Tensor]) -> RowSelection:
    return RowSelection(count, tensors[f"{name} local"], tensors.get(f"{name} positions"))


def take_rows(hidden: Tensor, rows: RowSelection, shards: SequenceShards) -> Tensor:
    """Selected rows [count, b, h], whole on every tensor-parallel rank.

    Under sequence parallelism: the sum of zero-filled local rows; its backward is the identity, so the gradient of the
    result must be whole on every rank as well. Communicates on the tensor-parallel axis (one all-reduce) then.
    """
    if rows.positions is None:
        return hidden.index_select(0, rows.local)
    mine = hidden.new_zeros(rows.count, *hidden.shape[1:])
    mine = mine.index_copy(0, rows.positions, hidden.index_select(0, rows.local))
    return tensor_parallel.reduce_from_tensor_model_parallel_region(mine, group=shards.group)


@dataclass(frozen=True)
class ChunkTensors:
    """One chunk of a microbatch of sequences of equal length.

    Attributes:
        plan: the layout it was built from.
        ids: int64 [b, rows], padded at the end to a multiple of the sequence shards. Padding is never attended to.
            None where they are not embedded.
        num_rows: rows with the padding.
        beacon_rows: global beacons, then the others; they write memory where plan.writes_memory.
        beacon_numbers: int64, of the beacons that this rank holds, in the order of beacon_rows.local: the number of
            their id among the ids that were added for CoMeT.
        labelled_rows: text rows with a label in any sequence of the batch; like `labels` empty where the head is not.
        labels: int64 [labelled, b].
        num_labels: labels that count.
    """

    plan: ChunkPlan
    ids: Tensor | None
    num_rows: int
    beacon_rows: RowSelection
    beacon_numbers: Tensor
    labelled_rows: RowSelection
    labels: Tensor
    num_labels: int


def build_chunk_tensors(
    plan: ChunkPlan,
    token_ids: np.ndarray,
    labels: np.ndarray,
    sizes: MemorySizes,
    *,
    shards: SequenceShards,
    device: torch.device,
    has_embedding: bool = True,
    has_head: bool = True,
) -> ChunkTensors:
    """Tensors of one chunk, as far as a stage needs them.

    Args:
        token_ids: text ids of the whole sequences, [b, tokens].
        labels: next-token labels of the whole sequences, [b, tokens], IGNORE_LABEL where there is none.
    """
    num_rows = shards.rows_per_rank(plan.num_rows) * shards.size
    ids = None
    if has_embedding:
        ids = np.full((len(token_ids), num_rows), sizes.beacon_id if sizes.stride > 0 else 0, dtype=np.int64)
        for row, sequence in zip(ids, token_ids, strict=True):
            row[: plan.num_rows] = plan.row_ids(sequence, sizes)
    chunk_labels = labels[:, plan.text_start : plan.text_end if has_head else plan.text_start].T
    labelled = np.flatnonzero((chunk_labels != IGNORE_LABEL).any(axis=1))
    kept_labels = np.ascontiguousarray(chunk_labels[labelled])
    rows_per_rank = num_rows // shards.size
    beacons = np.concatenate([plan.global_rows, plan.beacon_rows])
    beacon_ids = np.array([*sizes.global_beacon_ids[: plan.num_global_beacons], *[sizes.beacon_id] * plan.num_beacons])
    if shards.size > 1:
        beacon_ids = beacon_ids[_rows_of_rank(beacons, rows_per_rank, shards)]
    arrays = {
        **({} if ids is None else {"ids": ids}),
        **_find_rows("beacons", beacons, rows_per_rank, shards),
        "beacon numbers": beacon_ids.astype(np.int64) - sizes.first_new_id,
        **_find_rows("labelled", plan.text_rows[labelled], rows_per_rank, shards),
        "labels": kept_labels,
    }
    tensors = _on_device(arrays, device)
    return ChunkTensors(
        plan=plan,
        ids=tensors.get("ids"),
        num_rows=num_rows,
        beacon_rows=_selection("beacons", len(beacons), tensors),
        beacon_numbers=tensors["beacon numbers"],
        labelled_rows=_selection("labelled", len(labelled), tensors),
        labels=tensors["labels"],
        num_labels=int((kept_labels != IGNORE_LABEL).sum()),
    )
