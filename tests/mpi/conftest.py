"""Starts MPI as a job does, and gives tests a world, channels and a way to fail together.

    mpirun -n 3 python -m pytest --with-mpi tests/mpi
    python tests/mpirun.py -n 3 --timeout 120 -- -m pytest --with-mpi tests/mpi       with a time limit

Ranks are expected on one host. An assertion that only one rank makes leaves the others waiting, so tests
collect what is wrong and assert it on all ranks, with ``agree``.
"""

from __future__ import annotations

import faulthandler
import signal
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

from disagg_mpi.comm import environment
from disagg_mpi.comm.channel import MpiChannel
from disagg_mpi.comm.waiting import Doorbell, Waiter
from disagg_mpi.diagnostics.pairs import quiet_barrier

if TYPE_CHECKING:
    from mpi4py import MPI

# Before mpi4py.MPI is imported, by a test or by pytest-mpi. Without it Open MPI does not yield, and the
# tests of three ranks on two cores take three times as long.
environment.apply()
# tests/mpirun.py sends it to ranks that do not end in time.
faulthandler.register(signal.SIGUSR1, all_threads=True)

DEADLINE = 30.0


class Post:
    """A channel of this rank over a duplicate of the world, with its bell. Making one is collective."""

    def __init__(self, world: MPI.Intracomm) -> None:
        job_id = world.bcast(uuid.uuid4().hex if world.rank == 0 else None)
        self.comm = world.Dup()
        self.rank, self.size = world.rank, world.size
        self.doorbell = Doorbell(job_id, world.rank, range(world.size), all_local=True)
        self.channel = MpiChannel(self.comm, self.doorbell)
        world.Barrier()  # all bells hang

    def receive(self, count: int) -> list[tuple[int, Any]]:
        """The next ``count`` messages and their senders, as a service loop takes them in."""
        waiter = Waiter(self.doorbell)
        received: list[tuple[int, Any]] = []
        end = time.monotonic() + DEADLINE
        while len(received) < count:
            assert time.monotonic() < end, f"{len(received)} of {count} messages came"
            found = self.channel.poll()
            received += found
            if found:
                waiter.worked()
            else:
                waiter.idle(transferring=self.channel.num_pending > 0)
        return received

    def close(self) -> None:
        self.doorbell.close()
        self.comm.Free()


@pytest.fixture(scope="session")
def world() -> MPI.Intracomm:
    from mpi4py import MPI

    return MPI.COMM_WORLD


@pytest.fixture
def post(world: MPI.Intracomm) -> Iterator[Post]:
    made = Post(world)
    yield made
    world.Barrier()
    made.close()


@pytest.fixture
def agree(world: MPI.Intracomm) -> Callable[[list[str]], None]:
    """Assert on every rank that no rank has anything to complain about; collective.

    Ranks that are done sleep until all are.
    """

    def check(problems: list[str]) -> None:
        quiet_barrier(world)
        found = {rank: theirs for rank, theirs in enumerate(world.allgather(problems)) if theirs}
        assert not found

    return check
