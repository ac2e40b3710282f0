"""The first process tells the others, once, what was decided and prepared; until then they wait.

It goes through torchrun's own store, which belongs to one launch: nothing of an earlier launch can be mistaken for it,
and when the first process or its machine is gone, the others learn it. No process group need exist yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.errors import ConfigError, OutputError, PeerError
from comet_megatron.parallel.process import store_generation

CONNECT_TIMEOUT_S = 600
LOOK_EVERY_S = 0.5
TELL_EVERY_S = 60
FILE_SYSTEM_DELAY_S = 90


class HandOver:
    """Connects to the store of this launch. Made by every process, with several processes only.

    To be kept until the run's process group is there: without torchrun's own store the first process may hold it.

    Args:
        subject: what is handed over; another one for each hand-over of a launch.

    Raises:
        ConfigError: the environment does not say where the store is.
    """

    def __init__(self, subject: str) -> None:
        self._store = _store_of_this_launch()
        # A restart by torchrun (--max-restarts) may find the same store.
        self._key = f"comet_megatron/{subject}/{store_generation()}"

    def tell(self, value: Any) -> None:
        """The first process: all is prepared; `value` is what JSON can say, and not None."""
        try:
            self._store.set(self._key, json.dumps(value))
        except RuntimeError as error:
            raise PeerError("torchrun's store is gone", way_out="the other machines' messages say why") from error

    def give_up(self) -> None:
        """The first process: it will not go on, and has said why."""
        with suppress(RuntimeError):  # the store is gone: its own error would hide the one that is on its way
            self._store.set(self._key, json.dumps(None))

    def wait(self, say: Callable[[str], None], *, what_for: str) -> Any:
        """The other processes: what the first one told; None if it gave up.

        Args:
            say: called every minute with what is waited for.

        Raises:
            PeerError: the first process is gone.
        """
        began = told = time.monotonic()
        try:
            while not self._store.check([self._key]):
                time.sleep(LOOK_EVERY_S)
                if time.monotonic() - told >= TELL_EVERY_S:
                    told = time.monotonic()
                    say(f"waiting for {what_for}, for {(told - began) / 60:.0f} min")
            return json.loads(self._store.get(self._key))
        except RuntimeError as error:
            raise PeerError("the process that prepares the run is gone", way_out="its own messages say why") from error

    def take_back(self, *, readers: int, wait_s: float = 0.0) -> None:
        """Every process, after `tell`, `give_up` or `wait`: clear the store when the last of `readers` is here.

        Args:
            wait_s: for the others, before this process ends and the store with it.
        """
        with suppress(RuntimeError):  # the process that holds the store is gone, and nobody needs it any more
            count = self._store.add(f"{self._key}/readers", 1)
            end = time.monotonic() + wait_s
            while 0 < count < readers and time.monotonic() < end:  # 0: the last one has cleared it
                time.sleep(LOOK_EVERY_S)
                count = self._store.add(f"{self._key}/readers", 0)
            if count == readers:
                self._store.delete_key(self._key)
                self._store.delete_key(f"{self._key}/readers")


def await_folders(folders: Sequence[str], *, settings: str) -> None:
    """Return when this machine sees them: a shared file system may show a new folder a while after it was made.

    Args:
        settings: what lies on that file system, for the message.

    Raises:
        OutputError: it does not see one of them.
    """
    end = time.monotonic() + FILE_SYSTEM_DELAY_S
    while missing := [folder for folder in folders if not Path(folder).exists()]:
        if time.monotonic() > end:
            raise OutputError(
                f"this machine does not see {missing[0]}, which process 0 uses",
                way_out=f"{settings} must be on a file system that all machines share",
            )
        time.sleep(1)


def _store_of_this_launch() -> Any:
    quiet_libraries()
    import torch.distributed as dist

    if dist.is_initialized():
        return dist.distributed_c10d._get_default_store()
    timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
    try:
        return next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"the processes do not find each other: {reason}", way_out="use torchrun") from error
