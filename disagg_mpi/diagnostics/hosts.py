"""Where the ranks are: a *host* is a set of ranks that can share memory, as MPI says and as a job takes it.

One machine can be several hosts: containers of it that mpirun takes for machines of their own. Hostnames tell
neither, so the kernel is asked which one it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from mpi4py import MPI


class Place(msgspec.Struct, frozen=True):
    """Where one rank is."""

    host: int
    """Named by the lowest rank that MPI says can share memory with it."""
    hostname: str
    machine: str
    """The same for all ranks under one kernel."""


def gather_places(comm: MPI.Intracomm, hostname: str, boot_id: str | None) -> list[Place]:
    """Every rank's place, in order of rank; collective, the same on all."""
    from mpi4py import MPI

    shared = comm.Split_type(MPI.COMM_TYPE_SHARED)
    host = shared.bcast(comm.rank)
    shared.Free()
    return comm.allgather(Place(host, hostname, boot_id or hostname))


def name_hosts(places: Sequence[Place]) -> dict[str, list[int]]:
    """Each host's ranks, under its hostname; with a number where several hosts have the same."""
    ranks: dict[int, list[int]] = {}
    for rank, place in enumerate(places):
        ranks.setdefault(place.host, []).append(rank)
    named: dict[str, list[int]] = {}
    for host, those in ranks.items():
        name = hostname = places[host].hostname
        number = 1
        while name in named:
            number += 1
            name = f"{hostname} ({number})"
        named[name] = those
    return named


def divided_machines(places: Sequence[Place]) -> list[list[str]]:
    """The names of hosts that are one machine, for each machine that is more than one host."""
    machines: dict[str, list[str]] = {}
    for name, ranks in name_hosts(places).items():
        machines.setdefault(places[ranks[0]].machine, []).append(name)
    return [names for names in machines.values() if len(names) > 1]
