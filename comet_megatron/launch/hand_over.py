"""The first process tells the others, once, what was decided and prepared; until then they wait.

It goes through torchrun's own store, which belongs to one launch: nothing of an earlier launch can be mistaken for it,
and when the first process or its machine is gone, the others learn it. No process group exists yet.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from comet_megatron.backend.quiet import quiet_libraries
from comet_megatron.errors import ConfigError, PeerError
from comet_megatron.parallel.process import store_generation

CONNECT_TIMEOUT_S = 600
LOOK_EVERY_S = 0.5
TELL_EVERY_S = 60


@dataclass(frozen=True)
class Order:
    """What every process does next: the train command.

    Attributes:
        config: its configuration file.
        arguments: what follows it on the command line.
        folders: with the configuration, what every machine must see.
        needs_gpu: each machine must have a GPU for each of its processes.
    """

    config: str
    arguments: tuple[str, ...]
    folders: tuple[str, ...]
    needs_gpu: bool


class HandOver:
    """Connects to the store of this launch. Made by every process, with several processes only.

    Raises:
        ConfigError: the environment does not say where the store is.
    """

    def __init__(self) -> None:
        quiet_libraries()
        import torch.distributed as dist

        timeout = timedelta(seconds=CONNECT_TIMEOUT_S)
        try:
            self._store: Any = next(iter(dist.rendezvous("env://", timeout=timeout)))[0]
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"the processes do not find each other: {reason}", way_out="use torchrun") from error
        # A restart by torchrun (--max-restarts) may find the same store.
        self._key = f"comet_megatron/launch/{store_generation()}"

    def tell(self, order: Order) -> None:
        """The first process: all is prepared."""
        self._store.set(self._key, json.dumps(asdict(order)))

    def give_up(self) -> None:
        """The first process: it will not start, and has said why."""
        self._store.set(self._key, json.dumps(None))

    def wait(self, say: Callable[[str], None], *, what_for: str) -> Order | None:
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
            answer = json.loads(self._store.get(self._key))
        except RuntimeError as error:
            raise PeerError("the process that prepares the run is gone", way_out="its own messages say why") from error
        if answer is None:
            return None
        return Order(**{key: tuple(v) if isinstance(v, list) else v for key, v in answer.items()})
