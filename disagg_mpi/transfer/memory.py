"""The memory that KV pools live in.

One MPI shared-memory window over the ranks of a host holds the pools of all of them (``job.arrangement`` says
where each lies); with the ``mpi`` transport each rank has private memory. Either is page-aligned (a copy
whose source and destination differ by a few bytes modulo 4096 is 4 to 20 times slower) and lives until the
job's end; pages are touched when blocks are first used, lowest ids first.
"""

from __future__ import annotations

import mmap
import shutil
import socket
from typing import TYPE_CHECKING

import numpy as np

from disagg_mpi.errors import ConfigError
from disagg_mpi.transfer.transports import Pool

if TYPE_CHECKING:
    from mpi4py import MPI

SHARED_MEMORY_FOLDER = "/dev/shm"


def private_memory(num_bytes: int) -> Pool:
    """Page-aligned memory of this process alone."""
    return np.frombuffer(mmap.mmap(-1, max(num_bytes, 1)), dtype=np.uint8)


class SharedMemory:
    """One window over a host's ranks, zeroed. Creation and ``close`` are collective over ``host_comm``."""

    def __init__(self, host_comm: MPI.Intracomm, num_bytes: int) -> None:
        from mpi4py import MPI

        # All bytes belong to the host's first rank; the others map them.
        own = num_bytes if host_comm.rank == 0 else 0
        self._window = MPI.Win.Allocate_shared(own, 1, comm=host_comm)
        # Loads and stores need no epoch, but MPICH refuses Win.Sync outside of one.
        self._window.Lock_all(MPI.MODE_NOCHECK)
        buffer, _ = self._window.Shared_query(0)
        whole: Pool = np.frombuffer(buffer, dtype=np.uint8)  # type: ignore[call-overload]
        self.memory = whole[:num_bytes]

    def sync(self) -> None:
        """A memory barrier: what other ranks have written is seen, and theirs see what this one has."""
        self._window.Sync()

    def close(self) -> None:
        self._window.Unlock_all()
        self._window.Free()


def check_shared_memory(num_bytes: int) -> None:
    """Raise :class:`ConfigError` if this host cannot hold a window of ``num_bytes``.

    Containers often have 64 MiB of it, and a page that does not fit kills the process.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY_FOLDER).free
    except OSError:
        return
    if free < num_bytes:
        raise ConfigError(
            f"host {socket.gethostname()}: the KV pools need {num_bytes / 2**20:.0f} MiB of shared memory "
            f"and {SHARED_MEMORY_FOLDER} has {free / 2**20:.0f} MiB free; give the container more "
            "(docker run --shm-size), lower --kv-tokens, or use --transport mpi")
