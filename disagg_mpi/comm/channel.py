"""Typed messages over one communicator: send without waiting, receive what has come.

A :class:`Channel` is the only way control messages travel. :class:`MpiChannel` owns a duplicate of the
world for its whole life, plus the buffers of its sends until MPI is done with them. Not thread-safe:
one thread a channel. :class:`MemoryChannel` is the double that tests use in one process.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from disagg_mpi.comm.messages import CONTROL_TAG, Message, decode, encode

if TYPE_CHECKING:
    from mpi4py import MPI

    from disagg_mpi.comm.waiting import Doorbell


class Channel(Protocol):
    """Send to a rank, and take in what other ranks have sent."""

    def send(self, rank: int, message: Message) -> None: ...

    def poll(self) -> list[tuple[int, Any]]:
        """All messages that have arrived, with their sender, in order for each sender."""
        ...

    @property
    def num_pending(self) -> int:
        """Messages that are not all sent, or not all here."""
        ...

    def flush(self, timeout: float) -> bool:
        """Wait until every send is complete; ``False`` if that took longer than ``timeout``."""
        ...


class MpiChannel:
    """A channel over MPI point-to-point messages."""

    def __init__(self, comm: MPI.Comm, doorbell: Doorbell) -> None:
        # Import here: by now launch has started MPI with the environment that it needs.
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = comm
        self._doorbell = doorbell
        self._status = MPI.Status()
        self._sends: deque[tuple[MPI.Request, bytes]] = deque()
        # Large messages whose bytes are still coming: never waited for, or one slow sender would hold
        # up what all the others have sent.
        self._arriving: deque[tuple[int, MPI.Request, bytearray]] = deque()

    def send(self, rank: int, message: Message) -> None:
        data = encode(message)
        request = self._comm.Isend([data, self._mpi.BYTE], dest=rank, tag=CONTROL_TAG)
        if not request.Test():
            self._sends.append((request, data))
        self._doorbell.ring(rank)

    def poll(self) -> list[tuple[int, Any]]:
        self._reap()
        # Twice: Improbe looks first and takes in afterwards, so the second finds what came during a sleep.
        # With one, a rank that nobody can ring slept once more: 1.7 ms to wake instead of 0.4.
        return self._take() or self._take()

    def _take(self) -> list[tuple[int, Any]]:
        while message := self._comm.Improbe(self._mpi.ANY_SOURCE, CONTROL_TAG, self._status):
            buffer = bytearray(self._status.Get_count(self._mpi.BYTE))
            request = message.Irecv([buffer, self._mpi.BYTE])
            self._arriving.append((self._status.Get_source(), request, buffer))
        received: list[tuple[int, Any]] = []
        held_up: set[int] = set()
        for _ in range(len(self._arriving)):
            source, request, buffer = item = self._arriving.popleft()
            # In order for each sender: behind one that is still coming, its later ones wait.
            if source not in held_up and request.Test():
                received.append((source, decode(buffer)))
            else:
                held_up.add(source)
                self._arriving.append(item)
        return received

    @property
    def num_pending(self) -> int:
        return len(self._sends) + len(self._arriving)

    def flush(self, timeout: float) -> bool:
        end = time.monotonic() + timeout
        while self._sends and time.monotonic() < end:
            self._reap()
            time.sleep(0.0002)
        return not self._sends

    def _reap(self) -> None:
        for _ in range(len(self._sends)):
            request, data = self._sends.popleft()
            if not request.Test():
                self._sends.append((request, data))


class MemoryNetwork:
    """Channels between the ranks of a pretended world, in one process; ranks may be threads."""

    def __init__(self) -> None:
        self._boxes: dict[int, deque[tuple[int, bytes]]] = {}
        self.on_send: Callable[[int, int, Message], None] | None = None
        """Called with source, destination and message: tests count and delay with it."""

    def channel(self, rank: int) -> MemoryChannel:
        self._boxes.setdefault(rank, deque())
        return MemoryChannel(self, rank)

    def deliver(self, source: int, rank: int, message: Message) -> None:
        if self.on_send is not None:
            self.on_send(source, rank, message)
        self._boxes.setdefault(rank, deque()).append((source, encode(message)))

    def take(self, rank: int) -> list[tuple[int, Any]]:
        box = self._boxes[rank]
        taken = []
        while box:
            source, data = box.popleft()
            taken.append((source, decode(data)))
        return taken


class MemoryChannel:
    """The end of a :class:`MemoryNetwork` that one rank holds."""

    num_pending = 0

    def __init__(self, network: MemoryNetwork, rank: int) -> None:
        self._network = network
        self._rank = rank

    def send(self, rank: int, message: Message) -> None:
        self._network.deliver(self._rank, rank, message)

    def poll(self) -> list[tuple[int, Any]]:
        return self._network.take(self._rank)

    def flush(self, timeout: float) -> bool:
        return True
