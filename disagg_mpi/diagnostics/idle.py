"""What waiting costs: one rank idles as the ranks of a job do, and rank 0 wakes it with messages.

Measured with the job's own means (``comm``'s channel, bell and waiter), not with plain MPI calls as in
``pairs``: these are the figures of a job with nothing to do. All other ranks sleep meanwhile.
"""

from __future__ import annotations

import time
import uuid
from statistics import median
from typing import TYPE_CHECKING

import msgspec

from disagg_mpi.comm.channel import MpiChannel
from disagg_mpi.comm.messages import IntegrityCheck, Shutdown
from disagg_mpi.comm.waiting import Doorbell, Waiter
from disagg_mpi.diagnostics.pairs import quiet_barrier

if TYPE_CHECKING:
    from mpi4py import MPI

# A rank of this host wakes after 0.2 to 0.6 ms, 3 ranks on 2 busy cores (one of another host: 0.4). Where
# the bell is not heard it sleeps on: 13 ms.
SLOW_WAKE_US = 5000.0

_IDLE_SECONDS = 1.0
_WAKE_REPEATS = 20
# Long enough for the waiter to reach its longer sleeps (0.2 ms, doubling).
_PAUSE_SECONDS = 0.03


class Idle(msgspec.Struct, frozen=True):
    """One rank that had nothing to do."""

    rank: int
    same_host: bool
    """Whether rank 0 can ring its bell; if not, it looks for messages every millisecond."""
    cpu_share: float
    """Of one core, while nothing came for a second."""
    wake_us: float
    """A control message there and its answer back, halved, after 30 ms without any; the median."""

    @property
    def is_slow(self) -> bool:
        return self.same_host and self.wake_us > SLOW_WAKE_US


def measure_idle(comm: MPI.Intracomm, hosts: dict[str, list[int]]) -> Idle | None:
    """Collective; the figures at rank 0, ``None`` elsewhere and in a world of one rank.

    Rank 0 wakes the first other rank of its host; where it is alone there, rank 1.
    """
    if comm.size == 1:
        return None
    host = next(ranks for ranks in hosts.values() if 0 in ranks)
    peer = host[1] if len(host) > 1 else 1
    job_id = comm.bcast(f"doctor/{uuid.uuid4().hex[:12]}" if comm.rank == 0 else None)
    talk = comm.Dup()
    found = None
    if comm.rank in (0, peer):
        own_host = next(ranks for ranks in hosts.values() if comm.rank in ranks)
        doorbell = Doorbell(job_id, comm.rank, own_host, all_local=len(hosts) == 1)
        channel, waiter = MpiChannel(talk, doorbell), Waiter(doorbell)
        if comm.rank == peer:
            comm.send(_idle(channel, waiter), dest=0)
            _answer(channel, waiter)
        else:
            time.sleep(_IDLE_SECONDS)
            cpu_share = comm.recv(source=peer)
            found = Idle(peer, peer in host, cpu_share, _wake(channel, waiter, peer) * 1e6)
        doorbell.close()
    quiet_barrier(comm)
    talk.Free()
    return found


def _idle(channel: MpiChannel, waiter: Waiter) -> float:
    """Wait for messages that do not come; the share of a core that this takes."""
    cpu, start = time.process_time(), time.monotonic()
    while (seconds := time.monotonic() - start) < _IDLE_SECONDS:
        channel.poll()
        waiter.idle()
    return (time.process_time() - cpu) / seconds


def _answer(channel: MpiChannel, waiter: Waiter) -> None:
    """Send every message back, as a leader's service loop would, until told to stop."""
    while True:
        messages = channel.poll()
        for source, message in messages:
            if isinstance(message, Shutdown):
                return
            channel.send(source, message)
        if messages:
            waiter.worked()
        else:
            waiter.idle(transferring=channel.num_pending > 0)


def _wake(channel: MpiChannel, waiter: Waiter, peer: int) -> float:
    """Median seconds from a message to the peer's having it."""
    times = []
    for token in range(_WAKE_REPEATS):
        time.sleep(_PAUSE_SECONDS)
        start = time.perf_counter()
        channel.send(peer, IntegrityCheck(token))
        waiter.worked()
        while not channel.poll():
            waiter.idle(transferring=channel.num_pending > 0)
        times.append((time.perf_counter() - start) / 2)
    channel.send(peer, Shutdown())
    channel.flush(timeout=5.0)
    return median(times)
