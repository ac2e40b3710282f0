"""Errors that a user can cause: each says what is wrong, where, and the way out."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence

USER_ERROR_EXIT_CODE = 2


class CometError(Exception):
    """A problem that the user can solve: one message, no traceback, exit code 2.

    Args:
        what: what is wrong, with the value that was found.
        where: the file, key, line or shard it was found in.
        way_out: what to type or change.
    """

    kind = "error"
    exit_code = USER_ERROR_EXIT_CODE
    said_by_all = False  # every process knows it, so the main one speaks for all

    def __init__(self, what: str, *, where: str = "", way_out: str = "") -> None:
        self.what, self.where, self.way_out = what, where, way_out
        place = f" ({where})" if where else ""
        advice = f"\n  {way_out}" if way_out else ""
        super().__init__(f"{what}{place}{advice}")

    def __reduce__(self) -> tuple:
        """Errors travel between ranks."""
        return _rebuild, (type(self), self.what, self.where, self.way_out)


def _rebuild(kind: type[CometError], what: str, where: str, way_out: str) -> CometError:
    return kind(what, where=where, way_out=way_out)


class ConfigError(CometError):
    """The configuration, the command line or the layout is wrong. Holds all problems at once."""

    kind = "configuration error"

    @classmethod
    def collect(cls, problems: Sequence[CometError]) -> ConfigError:
        """One error out of several problems, each on its own lines."""
        if len(problems) == 1:
            only = problems[0]
            return cls(only.what, where=only.where, way_out=only.way_out)
        return cls(f"{len(problems)} problems:\n" + "\n".join(f"- {p}" for p in problems))


class DataError(CometError):
    """A data file, shard, index or tokenizer is missing, damaged or does not fit."""

    kind = "data error"


class DamagedSample(DataError):
    """A sample's bytes are there and are not those that were written: the same at every try, unlike a failing disk."""


class CheckpointError(CometError):
    """A checkpoint or Hugging Face folder is missing, damaged or does not fit."""

    kind = "checkpoint error"


class OutputError(CometError):
    """An output folder is not empty or cannot be written."""

    kind = "output error"


class TrainingError(CometError):
    """Training cannot go on, for example because a loss is not finite."""

    kind = "training stopped"


class DeviceError(ConfigError):
    """This machine lacks a device for one of its processes; other machines do not know."""

    said_by_all = True


class PeerError(CometError):
    """Another process of the run is gone or does not answer; not this process's fault, and known only to some."""

    kind = "run stopped"
    exit_code = 1
    said_by_all = True


def report_user_errors(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's main: a CometError becomes one message on stderr and the exit code 2."""

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except CometError as error:
            sys.stdout.flush()
            rank = int(os.environ.get("RANK", "0"))
            # One process speaks for its machine: folders may be there on one and missing on another.
            if rank == 0 or error.said_by_all or os.environ.get("LOCAL_RANK") == "0":
                speaker = f"rank {rank}: " if error.said_by_all or rank else ""
                print(f"{speaker}{error.kind}: {error}", file=sys.stderr, flush=True)
            return error.exit_code

    return wrapped
