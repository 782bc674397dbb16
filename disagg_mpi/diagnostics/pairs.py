"""Every pair of ranks, one after the other: latency, wake-up and bandwidth of plain Send and Recv.

The bench owns its buffers, touched once, page-aligned and reused for every pair. While a pair is measured
all other ranks sleep.
"""

from __future__ import annotations

import contextlib
import mmap
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from mpi4py import MPI

# A pair of one host that moves less than this share of a memcpy is badly set up: the worst sound
# figure was 0.4 (MPICH, and Open MPI through process_vm_readv); without shared memory it is 0.1.
SLOW_RATIO = 0.3
# A pair of two hosts below this talks over plain Ethernet or a wrong interface (raw TCP: 0.9-1.0).
SLOW_NETWORK_GBPS = 0.8

BANDWIDTH_BYTES = 64 * 2**20
# The best of five: one disturbed by another program says nothing about the connection.
_BANDWIDTH_REPEATS = 5
_PING_REPEATS = 100
_WAKE_REPEATS = 10
_IDLE_SECONDS = 0.02
# All pairs up to 10 ranks (45 pairs, about 0.1 s each), above it two pairs a rank.
_ALL_PAIRS_RANKS = 10
# A pair that takes longer than this does not work at all: name it and stop, rather than hang.
_PAIR_TIMEOUT = 60.0


class Pair(msgspec.Struct, frozen=True):
    """Two ranks, measured with plain Send and Recv while all others sleep."""

    a: int
    b: int
    same_host: bool
    latency_us: float
    """8 bytes there and back, halved; both ranks busy."""
    wake_us: float
    """8 bytes there and back, after the peer sat in its receive for 20 ms."""
    gbps: float
    ratio: float
    """Share of a memcpy of the same bytes on the host of ``a``."""

    @property
    def is_slow(self) -> bool:
        return self.ratio < SLOW_RATIO if self.same_host else self.gbps < SLOW_NETWORK_GBPS


def choose_pairs(size: int) -> list[tuple[int, int]]:
    """All pairs of a small world; of a large one each rank's neighbour and its opposite."""
    if size <= _ALL_PAIRS_RANKS:
        return [(a, b) for a in range(size) for b in range(a + 1, size)]
    near = [(a, a + 1) for a in range(size - 1)]
    far = [(a, a + size // 2) for a in range(size - size // 2)]
    return sorted({*near, *far})


class PairBench:
    """Measures one pair after another; owns the buffers."""

    def __init__(self, mpi: Any, comm: MPI.Comm, hosts: dict[str, list[int]]) -> None:
        self._mpi = mpi
        self._comm = comm
        self._host_of = {rank: host for host, ranks in hosts.items() for rank in ranks}
        # mmap is page-aligned: buffers that differ by a few bytes modulo 4096 are copied at a tenth
        # of the speed. Written once: a first touch costs more than the transfer.
        self._source = mmap.mmap(-1, BANDWIDTH_BYTES)
        self._target = mmap.mmap(-1, BANDWIDTH_BYTES)
        for buffer in (self._source, self._target):
            buffer.write(bytes(BANDWIDTH_BYTES))
        mine = hosts[self._host_of[comm.rank]]
        rate = self._memcpy() if mine[0] == comm.rank else 0.0
        self.memcpy_gbps = {self._host_of[rank]: found
                            for rank, found in enumerate(comm.allgather(rate)) if found}

    def _memcpy(self) -> float:
        source, target = memoryview(self._source), memoryview(self._target)
        best = float("inf")
        for _ in range(_BANDWIDTH_REPEATS):
            start = time.perf_counter()
            target[:] = source
            best = min(best, time.perf_counter() - start)
        return BANDWIDTH_BYTES / best / 1e9

    def measure(self, a: int, b: int) -> Pair | None:
        """Collective; the pair at rank 0, ``None`` elsewhere."""
        rank = self._comm.rank
        figures: tuple[float, float, float] | None = None
        if rank in (a, b):
            peer, leads = (b, True) if rank == a else (a, False)
            with _deadline(_PAIR_TIMEOUT, f"ranks {a} and {b}", self._comm):
                latency = self._ping(peer, leads, _PING_REPEATS, 0.0) / 2
                wake = self._ping(peer, leads, _WAKE_REPEATS, _IDLE_SECONDS)
                figures = latency, wake, self._bandwidth(peer, leads)
        quiet_barrier(self._comm)
        shared: tuple[float, float, float] | None = figures
        if a != 0:
            if rank == a:
                self._comm.send(figures, dest=0)
            elif rank == 0:
                shared = self._comm.recv(source=a)
        if rank != 0 or shared is None:
            return None
        latency, wake, gbps = shared
        host = self._host_of[a]
        return Pair(a=a, b=b, same_host=host == self._host_of[b], latency_us=latency * 1e6,
                    wake_us=wake * 1e6, gbps=gbps, ratio=gbps / self.memcpy_gbps[host])

    def _ping(self, peer: int, leads: bool, repeats: int, pause: float) -> float:
        """Median seconds of a round trip of 8 bytes."""
        data = bytearray(8)
        times = []
        for _ in range(repeats):
            if leads:
                if pause:
                    time.sleep(pause)
                start = time.perf_counter()
                self._comm.Send([data, self._mpi.BYTE], peer)
                self._comm.Recv([data, self._mpi.BYTE], peer)
                times.append(time.perf_counter() - start)
            else:
                self._comm.Recv([data, self._mpi.BYTE], peer)
                self._comm.Send([data, self._mpi.BYTE], peer)
        return sorted(times)[len(times) // 2] if times else 0.0

    def _bandwidth(self, peer: int, leads: bool) -> float:
        """GB/s of the best of a few; one more before them connects the pair."""
        best = float("inf")
        done = bytearray(1)
        for _ in range(_BANDWIDTH_REPEATS + 1):
            start = time.perf_counter()
            if leads:
                self._comm.Send([self._source, self._mpi.BYTE], peer)
                self._comm.Recv([done, self._mpi.BYTE], peer)
            else:
                self._comm.Recv([self._target, self._mpi.BYTE], peer)
                self._comm.Send([done, self._mpi.BYTE], peer)
            best = min(best, time.perf_counter() - start)
        return BANDWIDTH_BYTES / best / 1e9


def quiet_barrier(comm: MPI.Comm) -> None:
    """A barrier in which ranks sleep: on a laptop, those that poll take the cores of those measured."""
    request = comm.Ibarrier()
    while not request.Test():
        time.sleep(0.001)


@contextlib.contextmanager
def _deadline(seconds: float, who: str, comm: MPI.Comm) -> Iterator[None]:
    """End the job with a sentence when the body takes too long: a blocked Recv never ends."""

    def give_up() -> None:
        print(f"doctor: {who} have not exchanged {BANDWIDTH_BYTES // 2**20} MiB within "
              f"{seconds:.0f} s: no usable connection. Check firewalls, and the network interface "
              "that MPI chose (Open MPI: OMPI_MCA_btl_tcp_if_include=eth0; MPICH: mpirun -iface "
              "eth0)",
              file=sys.stderr, flush=True)
        comm.Abort(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
