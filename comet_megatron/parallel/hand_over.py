"""The first process tells the others, once, what was decided and prepared; until then they wait.

It goes through torchrun's own store, which belongs to one launch: nothing of an earlier launch can be mistaken for it,
and when the first process or its machine is gone, the others learn it. No process group need exist yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.errors import ConfigError, PeerError
from comet_megatron.parallel.process import store_generation

CONNECT_TIMEOUT_S = 600
LOOK_EVERY_S = 0.5
TELL_EVERY_S = 60


class HandOver:
    """Connects to the store of this launch. Made by every process, with several processes only.

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
        self._store.set(self._key, json.dumps(value))

    def give_up(self) -> None:
        """The first process: it will not go on, and has said why."""
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

    def take_back(self, *, readers: int) -> None:
        """Every process, after `tell`, `give_up` or `wait`: clear the store when the last of `readers` is here."""
        if self._store.add(f"{self._key}/readers", 1) == readers:
            self._store.delete_key(self._key)
            self._store.delete_key(f"{self._key}/readers")


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
