"""A job of three ranks that fails in the way its arguments say, with the guards and nothing else.

    mpirun -n 3 python die.py HOW [RANK]

The ranks that do not fail wait inside MPI for the one that does, as a careless program would: the
guards must end the job all the same. ``launch`` is not used, so that its own care hides nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from disagg_mpi.comm import environment
from disagg_mpi.errors import WorldTooSmallError
from disagg_mpi.job import guards, segments

how = sys.argv[1]
victim = int(sys.argv[2]) if len(sys.argv) > 2 else 0

guards.before_mpi()
environment.apply()
if how == "before-mpi" and guards.launcher_rank() == victim:
    raise ValueError("raised on purpose")

from mpi4py import MPI  # noqa: E402  (the guards come first)

world = MPI.COMM_WORLD
rank, size = world.Get_rank(), world.Get_size()
guards.install(world, lambda: f"rank {rank} · test", is_root=rank == 0)
if how == "usage":
    raise WorldTooSmallError(f"{size} ranks, this layout needs 5")
if how == "usage-alone" and rank == victim:
    raise WorldTooSmallError("only this rank says so")

# What launch does: contact between all pairs, a shared window, and the names can go.
for other in range(size):
    if other != rank:
        world.Sendrecv(bytearray(65536), other, 0, bytearray(65536), other, 0)
window = MPI.Win.Allocate_shared(1 << 20, 1, comm=world.Split_type(MPI.COMM_TYPE_SHARED))
world.Barrier()
segments.unlink_shared_segments()
world.Barrier()
if how == "clean":
    # Everything still works without the names.
    buffer = bytearray(8 << 20)
    world.Sendrecv(buffer, (rank + 1) % size, 0, bytearray(8 << 20), (rank - 1) % size, 0)
    window.Free()
    guards.leave()
    time.sleep(0.5 * rank)
    sys.exit(0)
if how.startswith("late-"):
    # The job went well, and then one rank ends with a code of its own, or by an exception.
    window.Free()
    guards.leave()
    if rank == victim and how.startswith("late-raise"):
        raise ValueError("raised on purpose")
    if rank == victim:
        sys.exit(3)
    if not how.endswith("-together"):
        world.Recv(bytearray(1), source=victim)
    sys.exit(0)

print(f"pid {rank} {os.getpid()}\nready", flush=True)
if how == "thread" and rank == victim:
    threading.Thread(target=lambda: [][1], name="unlucky").start()
elif rank == victim:
    time.sleep(0.2)
    if how == "raise":
        raise ValueError("raised on purpose")
    if how == "exit":
        sys.exit(3)
    if how == "fatal":
        try:
            raise ValueError("raised on purpose")
        except ValueError as error:
            guards.fatal(f"rank {rank} · test", error)
    if how == "sleep":
        # Rank 0 as it is under launch: it runs Python code and sees signals at once.
        while True:
            time.sleep(0.01)
    # "none" does not fail at all: somebody else will see to that.
world.Recv(bytearray(1), source=MPI.ANY_SOURCE, tag=99)
