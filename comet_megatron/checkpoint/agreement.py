"""What fails on one rank is known to all of them, so that none waits for ever."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from comet_megatron.checkpoint.checksums import check_weights
from comet_megatron.errors import CometError, OutputError
from comet_megatron.parallel.layout import Layout


@contextmanager
def failing_together(where: Path, *, what: str = "the checkpoint cannot be written") -> Iterator[None]:
    """Do inside what does not wait for other ranks. Communicates on the world at the end.

    Args:
        what: cannot be done if a rank fails.

    Raises:
        OutputError: on all ranks, with the reason of the first one that failed.
    """
    problem: Exception | None = None
    try:
        yield
    except Exception as error:
        problem = error
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, None if problem is None else reason_of(problem))
    if problem is not None and not isinstance(problem, OSError | RuntimeError | CheckpointException | CometError):
        raise problem  # a mistake of ours; the other ranks get the OutputError below
    for rank, reason in enumerate(reasons):
        if reason is not None:
            by = f" (rank {rank})" if rank else ""
            raise OutputError(
                f"{what}: {reason}{by}",
                where=str(where),
                way_out="free space on the disk, or make the folder writable; checkpoints that are there stay whole",
            ) from problem


def find_damage(checkpoint: Path, layout: Layout) -> CometError | None:
    """What is wrong with the weights of a checkpoint, the same on every rank; None: nothing.

    Each rank reads its share of the files, so that all together read each once; the load that follows finds them in
    memory. Communicates on the world.
    """
    own: CometError | None = None
    try:
        check_weights(checkpoint, share=layout.rank, shares=layout.world_size)
    except CometError as error:
        own = error
    problems: list[CometError | None] = [None] * layout.world_size
    dist.all_gather_object(problems, own)
    return next((problem for problem in problems if problem is not None), None)


def reason_of(error: BaseException) -> str:
    """One line of what went wrong; torch puts the tracebacks of all ranks into the text, and hides a full disk."""
    if isinstance(error, CometError):
        return error.what
    if isinstance(error, CheckpointException):
        inner = next(iter(error.failures.values()))[0]
        return f"{type(inner).__name__} {' '.join(str(inner).split())[:300]}".strip()
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
        cause = cause.__cause__ or cause.__context__
    return " ".join(str(error).split())[:300] or type(error).__name__
