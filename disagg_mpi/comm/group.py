"""One rank's links within its instance: sums over a stage, hidden states to the next, logits to the leader.

Made by ``launch`` with the world (a collective split), one a rank of an instance with several ranks; owned by
the world, used by the engine's thread alone, except :meth:`GroupLink.progress`. Arrays go in and out: torch
is not known here. Local index ``i`` of a group is tensor-parallel rank ``i % tp`` of stage ``i // tp``.

Sums block, because all ranks of a stage are in the same layer. Hidden states and logits do not: a stage
sends and goes on with the next micro-batch.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from disagg_mpi.comm.waiting import Doorbell, Waiter

if TYPE_CHECKING:
    from mpi4py import MPI

Array = npt.NDArray[Any]

# A sum is looked for so often, then the rank sleeps between looks: ranks of a stage that share cores would
# else take them from the one that still computes. 4 ranks on 2 cores that others use too: 1.1 ms a sum of
# 2.3 kB after 0.3 ms of work, 5.9 with the blocking call, which spins; 1.4 and 2.5 for 2 ranks.
_SUM_LOOKS = 20
_SUM_SLEEP = 0.00002

_HIDDEN_TAG = 1
_LOGITS_TAG = 2


class GroupLink:
    """Construction and ``close`` are collective over ``comm``, which it does not own."""

    def __init__(
        self, comm: MPI.Intracomm, tp: int, pp: int, doorbell: Doorbell, world_ranks: tuple[int, ...]
    ) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = comm
        self._doorbell = doorbell
        self._world_ranks = world_ranks
        self.index = comm.rank
        self.tp, self.pp = tp, pp
        self.tp_rank, self.pp_rank = comm.rank % tp, comm.rank // tp
        self._stage: MPI.Intracomm = comm.Split(self.pp_rank, self.tp_rank)  # type: ignore[assignment]
        # Sends whose bytes MPI may still read, with those bytes.
        self._sends: deque[tuple[MPI.Request, Array]] = deque()
        self._lock = threading.Lock()
        self.wake_thread: Callable[[], None] = lambda: None
        """Tells a progress thread that there is something to send."""

    # ---- within a stage ----

    def all_reduce(self, array: Array) -> None:
        """Sum over the ranks of this stage, in place; ``array`` is contiguous fp32."""
        request = self._stage.Iallreduce(self._mpi.IN_PLACE, [array, self._mpi.FLOAT])
        looks = 0
        while not request.Test():
            looks += 1
            if looks > _SUM_LOOKS:
                time.sleep(_SUM_SLEEP)

    def told(self, text: str) -> str:
        """What the first rank of this stage says, at all of them. Collective over it, for the start."""
        said: str = self._stage.bcast(text)
        return said

    # ---- from stage to stage ----

    def send_hidden(self, array: Array) -> None:
        """To the rank of the next stage with the same place in it; returns at once."""
        self._send(array, self.index + self.tp, _HIDDEN_TAG)

    def receive_hidden(self, array: Array) -> None:
        """From the previous stage, into ``array``; sleeps until it is there."""
        request = self._comm.Irecv([array, self._mpi.BYTE], source=self.index - self.tp, tag=_HIDDEN_TAG)
        waiter = Waiter(self._doorbell)
        while not request.Test():
            waiter.idle(transferring=True)

    # ---- to the leader ----

    def send_logits(self, array: Array) -> None:
        """A last-stage rank's slice of the logits, to the leader; returns at once."""
        self._send(array, 0, _LOGITS_TAG)

    def receive_logits(self, arrays: dict[int, Array]) -> LogitsReceipt:
        """Leader: local index of each sender → where its slice goes."""
        return LogitsReceipt([
            self._comm.Irecv([array, self._mpi.BYTE], source=index, tag=_LOGITS_TAG)
            for index, array in arrays.items()])

    # ---- all ----

    def barrier(self) -> None:
        """Wait until every rank of the instance is here."""
        request = self._comm.Ibarrier()
        waiter = Waiter(self._doorbell)
        while not request.Test():
            waiter.idle(transferring=True)

    @property
    def is_sending(self) -> bool:
        """Whether :meth:`progress` is due often: MPI moves large messages only while it is called."""
        return bool(self._sends)

    def progress(self) -> None:
        """Let go of what has been sent. Any thread may call it."""
        with self._lock:
            while self._sends and self._sends[0][0].Test():
                self._sends.popleft()

    def close(self) -> None:
        self._mpi.Request.Waitall([request for request, _ in self._sends])
        self._sends.clear()
        self._stage.Free()

    def _send(self, array: Array, index: int, tag: int) -> None:
        request = self._comm.Isend([array, self._mpi.BYTE], dest=index, tag=tag)
        self.progress()
        if not request.Test():
            with self._lock:
                self._sends.append((request, array))
            self.wake_thread()
        self._doorbell.ring(self._world_ranks[index])


class LogitsReceipt:
    """The logits of one batch on their way to the leader."""

    def __init__(self, requests: list[MPI.Request]) -> None:
        self._requests = requests

    def done(self) -> bool:
        """Whether all slices are there."""
        while self._requests and self._requests[-1].Test():
            self._requests.pop()
        return not self._requests


def as_bytes(array: Array) -> Array:
    """A contiguous array's bytes, without a copy: MPI knows no bf16."""
    return array.reshape(-1).view(np.uint8)
