"""How hidden states and their gradients go from stage to stage: between processes, or within one that holds all.

A boundary lies between stage i and stage i + 1 and has its number i. Its two directions are independent of each other,
each first in, first out: the order of forwards, and of backwards, is the same on both sides. Shapes are known from the
plan on both sides and never sent.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from comet_megatron.errors import PeerError


class Message(NamedTuple):
    """What crosses a boundary.

    Attributes:
        is_gradient: a hidden gradient, to the stage before; otherwise hidden states, to the stage behind.
    """

    is_gradient: bool
    boundary: int
    sequence: int
    chunk: int

    @property
    def sender(self) -> int:
        """The stage it comes from."""
        return self.boundary + self.is_gradient

    def __str__(self) -> str:
        what = "hidden gradient" if self.is_gradient else "hidden states"
        return f"the {what} of sequence {self.sequence} chunk {self.chunk} from stage {self.sender}"


class Room(NamedTuple):
    """What a sender waits for while too many messages are on their way; in words only if somebody asks."""

    message: Message

    def __str__(self) -> str:
        return f"room to send {self.message}"


class Expected(NamedTuple):
    """A message to come."""

    message: Message
    shape: tuple[int, ...]
    dtype: torch.dtype


class Transport(Protocol):
    """Carries messages between stages."""

    def start(self, expected: Sequence[Expected], *, max_in_flight: int) -> None:
        """Before the first op.

        Args:
            expected: all messages to come, in the order in which they will be asked for.
            max_in_flight: messages of one direction that may be on their way (schedule.max_in_flight_of).
        """

    def send(self, message: Message, tensor: Tensor) -> None:
        """Hand on a tensor, which must not be changed any more; waits only while too many others are on their way."""

    def receive(self, message: Message) -> Tensor:
        """Wait for a message; the tensor must not be changed: it may be the sender's."""

    def finish(self) -> None:
        """After the last op: wait until all has been sent."""


class LocalTransport:
    """All stages are in this process: a message is kept until it is asked for."""

    def __init__(self) -> None:
        self._held: dict[Message, Tensor] = {}

    def start(self, expected: Sequence[Expected], *, max_in_flight: int) -> None:
        self._held.clear()

    def send(self, message: Message, tensor: Tensor) -> None:
        self._held[message] = tensor

    def receive(self, message: Message) -> Tensor:
        return self._held.pop(message)

    def finish(self) -> None:
        assert not self._held, f"nobody asked for {next(iter(self._held))}"


@dataclass(frozen=True)
class Link:
    """A boundary between this process and another.

    Attributes:
        peer: rank of the other process in the world.
        forward, backward: process groups, one per direction: never both on one NCCL communicator.
    """

    peer: int
    forward: dist.ProcessGroup
    backward: dist.ProcessGroup

    def group(self, message: Message) -> dist.ProcessGroup:
        """Of the direction that a message takes."""
        return self.backward if message.is_gradient else self.forward


def build_links(stage_ranks: Sequence[int], stage: int, *, timeout_s: float) -> dict[int, Link]:
    """The links of one process of a pipeline. Communicates on the world: every process calls it.

    Two groups, of all processes, one for each direction. NCCL makes a communicator for each pair of processes that
    exchange messages in a group, so each direction of each link has one of its own; a group for each link would take
    minutes to make on a thousand processes.

    Args:
        stage_ranks: rank in the world of each stage of this pipeline.
        stage: of this process.
    """
    if len(stage_ranks) == 1:
        return {}
    timeout = timedelta(seconds=timeout_s)
    forward, backward = (
        dist.new_group(timeout=timeout, group_desc=f"pipeline {direction}") for direction in ("forward", "backward")
    )
    neighbours = {stage - 1: stage - 1, stage: stage + 1}  # boundary -> stage beyond it
    return {
        boundary: Link(stage_ranks[other], forward, backward)
        for boundary, other in neighbours.items()
        if 0 <= other < len(stage_ranks)
    }


class DistributedTransport:
    """torch.distributed, gloo or NCCL: one receive is posted ahead per direction of each link.

    Args:
        links: by boundary (`build_links`).
        device: of tensors.

    Raises (send, receive, finish):
        PeerError: the other process is gone.
    """

    def __init__(self, links: Mapping[int, Link], device: torch.device) -> None:
        self.links, self.device = links, device
        self._to_post: dict[tuple[bool, int], deque[Expected]] = {}
        self._posted: dict[tuple[bool, int], tuple[Message, Tensor, dist.Work]] = {}
        self._max_in_flight = 1
        self._on_gloo = {dist.get_backend(link.forward) for link in links.values()} == {"gloo"}
        self._sent: dict[tuple[bool, int], _Sends] = defaultdict(_ThreadSends if self._on_gloo else _StreamSends)

    def warm_up(self) -> None:
        """One small message each way over every link, in a fixed order: connections stand before the first step.

        Both processes of a link call it; boundaries are warmed up in their order along the pipeline.
        """
        for _, link in sorted(self.links.items()):
            is_upper = link.peer < dist.get_rank()
            for group, sends in ((link.forward, not is_upper), (link.backward, is_upper)):
                token = torch.zeros(1, device=self.device)
                if sends:
                    dist.send(token, link.peer, group=group)
                else:
                    dist.recv(token, link.peer, group=group)

    def start(self, expected: Sequence[Expected], *, max_in_flight: int) -> None:
        assert not self._posted, "the step before was not done to its end"
        self._max_in_flight = max_in_flight
        self._to_post = {}
        for one in expected:
            self._to_post.setdefault((one.message.is_gradient, one.message.boundary), deque()).append(one)
        for direction in self._to_post:
            # NCCL's receives spin on the device: one for a gradient that depends on this stage's own forwards could
            # meet a call that waits for the whole device.
            if self._on_gloo or not direction[0]:
                self._post(direction)

    def _post(self, direction: tuple[bool, int]) -> None:
        if self._to_post[direction]:
            message, shape, dtype = self._to_post[direction].popleft()
            link = self.links[message.boundary]
            buffer = torch.empty(shape, dtype=dtype, device=self.device)
            try:
                work = dist.irecv(buffer, link.peer, group=link.group(message))
            except RuntimeError as error:
                raise self._gone(message, error) from None
            self._posted[direction] = (message, buffer, work)

    def receive(self, message: Message) -> Tensor:
        direction = (message.is_gradient, message.boundary)
        if direction not in self._posted:
            self._post(direction)
        posted, buffer, work = self._posted.pop(direction)
        assert posted == message, f"{posted} comes before {message}"
        try:
            work.wait()
        except RuntimeError as error:
            raise self._gone(message, error) from None
        self._post(direction)
        return buffer

    def send(self, message: Message, tensor: Tensor) -> None:
        link = self.links[message.boundary]
        tensor = tensor.contiguous()
        try:
            work = dist.isend(tensor, link.peer, group=link.group(message))
            self._sent[message.is_gradient, message.boundary].add(work, tensor, max_in_flight=self._max_in_flight)
        except RuntimeError as error:
            raise self._gone(message, error, sending=True) from None

    def finish(self) -> None:
        for (is_gradient, boundary), sent in self._sent.items():
            try:
                sent.finish()
            except RuntimeError as error:
                if not sign_of_a_lost_process(error):
                    raise
                other = boundary if is_gradient else boundary + 1
                what = f"stage {other} is gone before it had read all messages"
                raise PeerError(f"{what}: {_first_line(error)}") from None

    def _gone(self, message: Message, error: RuntimeError, *, sending: bool = False) -> RuntimeError | PeerError:
        """What to raise: an error that does not speak of a lost process is another one's business."""
        if not sign_of_a_lost_process(error):
            return error
        link = self.links[message.boundary]
        is_upper = link.peer < dist.get_rank()
        own, other = message.boundary + is_upper, message.boundary + (not is_upper)
        did = "sent" if sending else "waited for"
        what = f"stage {other} (rank {link.peer}) is gone: stage {own} {did} {message}"
        return PeerError(f"{what}: {_first_line(error)}")


class _Sends(Protocol):
    """Messages of one direction that are on their way."""

    def add(self, work: dist.Work, tensor: Tensor, *, max_in_flight: int) -> None:
        """Keep a message until it is sent; wait for the oldest while there are more than `max_in_flight`."""

    def finish(self) -> None:
        """Wait for all."""


class _StreamSends:
    """NCCL: waiting for a work holds up the stream that computes, not this process."""

    def __init__(self) -> None:
        self._pending: deque[tuple[dist.Work, Tensor]] = deque()

    def add(self, work: dist.Work, tensor: Tensor, *, max_in_flight: int) -> None:
        self._pending.append((work, tensor))
        while len(self._pending) > max_in_flight:
            self._pending.popleft()[0].wait()

    def finish(self) -> None:
        while self._pending:
            self._pending.popleft()[0].wait()


class _ThreadSends:
    """gloo: its works never say that they are done, so a thread waits for them."""

    def __init__(self) -> None:
        self._pending: deque[tuple[dist.Work, Tensor]] = deque()
        self._changed = threading.Condition()
        self._error: RuntimeError | None = None
        self._thread: threading.Thread | None = None

    def _wait(self) -> None:
        while True:
            with self._changed:
                if not self._pending:
                    self._thread = None
                    return
                work = self._pending[0][0]
            try:
                work.wait()
            except RuntimeError as error:
                self._error = error
            del work
            with self._changed:
                self._pending.popleft()
                self._changed.notify_all()

    def add(self, work: dist.Work, tensor: Tensor, *, max_in_flight: int) -> None:
        with self._changed:
            self._pending.append((work, tensor))
            if self._thread is None:
                self._thread = threading.Thread(target=self._wait, name="sent messages", daemon=True)
                self._thread.start()
            self._changed.wait_for(lambda: len(self._pending) <= max_in_flight or self._error)
        self._raise()

    def finish(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._pending or self._error)
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Socket closed")


def sign_of_a_lost_process(error: RuntimeError) -> str:
    """The words of torch.distributed that say that another process is gone or silent; "" for other errors."""
    text = str(error)
    is_nccl = isinstance(error, dist.DistBackendError)
    return next((sign for sign in _SIGNS if sign in text), text.splitlines()[0] if is_nccl else "")


def _first_line(error: RuntimeError) -> str:
    """What went wrong, without the place in the library's sources."""
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return line.split("] ", 1)[-1].split(". ", 1)[0][:200]
