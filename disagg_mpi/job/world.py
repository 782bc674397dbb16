"""The world of a running job: communicators, channels and the bell of this rank.

Made once by ``launch`` with collectives over the world, closed at the job's end. After it is made nothing
collective spans the world until then: instances talk point to point. Three duplicates of the world keep
three kinds of traffic apart: control (rank 0 with leaders, leaders with their followers), the hand-over's
control, and the hand-over's bytes; the ranks of an instance have a communicator of their own besides.
"""

from __future__ import annotations

import os
import socket
import uuid
from collections.abc import Mapping
from typing import TYPE_CHECKING

from disagg_mpi.comm.channel import MpiChannel
from disagg_mpi.comm.group import GroupLink
from disagg_mpi.comm.waiting import Doorbell
from disagg_mpi.config import JobConfig
from disagg_mpi.job.arrangement import moves_bytes
from disagg_mpi.job.devices import DevicePlace
from disagg_mpi.topology import ORCHESTRATOR_RANK, Group, Topology

if TYPE_CHECKING:
    from mpi4py import MPI


class Hosts:
    """Which ranks are where. Construction is collective over ``comm``; the world takes :attr:`comm` over."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        from mpi4py import MPI

        self.comm: MPI.Intracomm = comm.Split_type(MPI.COMM_TYPE_SHARED)  # type: ignore[assignment]
        """The ranks of this one."""
        self.ranks: list[int] = self.comm.allgather(comm.rank)
        self.names: list[str] = comm.allgather(socket.gethostname())
        """Each rank's host's own name."""
        self.of: list[int] = comm.allgather(self.ranks[0])
        """Each rank's host, named by the lowest rank on it."""


class World:
    """This rank's view. Construction and ``close`` are collective over ``comm``."""

    def __init__(self, comm: MPI.Intracomm, topology: Topology, config: JobConfig, hosts: Hosts,
                 places: Mapping[int, DevicePlace]) -> None:
        """``places``: each engine rank's GPU; empty where ranks compute on processors."""
        from mpi4py import MPI

        self.comm = comm
        self.topology = topology
        self.rank = comm.rank
        self.places = places
        self.gpu_of = {rank: f"GPU {place.gpu.uuid}" for rank, place in places.items()}
        """Each engine rank's GPU, named alike on all ranks of its host."""
        self.job_id: str = comm.bcast(uuid.uuid4().hex[:12] if comm.rank == 0 else None)
        self.host = hosts.comm
        self.host_ranks = hosts.ranks
        self.host_names = hosts.names
        self.host_of = hosts.of
        self.has_threads = moves_bytes(config, topology, self.host_of, self.gpu_of) or any(
            group.shape.pp > 1 for group in topology.groups)
        """Whether each engine rank has a thread that keeps bytes moving."""
        self.doorbell = self._make_bell("control")
        self.handover_bell = self._make_bell("hand-over") if self.has_threads else self.doorbell
        self._control_comm = comm.Dup()
        self._handover_comm = comm.Dup()
        self.data_comm = comm.Dup()
        self.control = MpiChannel(self._control_comm, self.doorbell)
        self.handover = MpiChannel(self._handover_comm, self.handover_bell)
        self._group_comm, self.link = self._make_link()
        self.max_tag = int(comm.Get_attr(MPI.TAG_UB) or 2**15 - 1)
        self.threads = self._threads()

    def devices_of(self, group: Group) -> tuple[int, ...] | None:
        """The GPU of each rank of ``group``; on processors, what its configuration names."""
        if not self.places:
            return group.device_ids
        return tuple(self.places[rank].gpu.index for rank in group.ranks)

    @property
    def is_one_host(self) -> bool:
        return len(set(self.host_of)) == 1

    @property
    def label(self) -> str:
        return self.topology.label(self.rank)

    def engine_ranks(self, host: int) -> list[int]:
        """Ranks of instances on ``host`` (named by its lowest rank)."""
        return [rank for rank, where in enumerate(self.host_of)
                if where == host and rank != ORCHESTRATOR_RANK]

    @property
    def host_engine_ranks(self) -> list[int]:
        return self.engine_ranks(self.host_ranks[0])

    def warm_up(self) -> None:
        """Connect every pair once, so that no request pays for it; collective."""
        from mpi4py import MPI

        token = bytearray(1)
        for step in range(1, self.comm.size):
            to, source = (self.rank + step) % self.comm.size, (self.rank - step) % self.comm.size
            for comm in (self._control_comm, self._handover_comm, self.data_comm):
                comm.Sendrecv([b"\0", MPI.BYTE], to, 0, [token, MPI.BYTE], source, 0)
        self.comm.Barrier()

    def close(self) -> None:
        self.doorbell.close()
        self.handover_bell.close()
        if self.link is not None:
            self.link.close()
        for comm in (self._control_comm, self._handover_comm, self.data_comm, self._group_comm, self.host):
            comm.Free()

    def _make_bell(self, purpose: str) -> Doorbell:
        return Doorbell(f"{self.job_id}/{purpose}", self.rank, self.host_ranks, self.is_one_host)

    def _make_link(self) -> tuple[MPI.Intracomm, GroupLink | None]:
        """The communicator of this rank's instance (rank 0 is alone), and what an instance of several does
        over it."""
        group = self.topology.group_of(self.rank)
        if group is None:
            color, key = len(self.topology.groups), 0
        else:
            color, key = group.instance_id, group.index_of(self.rank)
        comm: MPI.Intracomm = self.comm.Split(color, key)  # type: ignore[assignment]
        if group is None or comm.size == 1:
            return comm, None
        return comm, GroupLink(comm, group.shape.tp, group.shape.pp, self.doorbell, group.ranks)

    def _threads(self) -> int:
        """Compute threads of this rank: its cores, shared with the engine ranks that have them too.

        Rank 0 sleeps and is not counted. A rank that the launcher bound to cores of its own keeps
        those. Under Slurm what the user gave each task holds (``--cpus-per-task``).
        """
        from disagg_mpi.comm.cores import count_cores
        from disagg_mpi.comm.environment import launcher_context

        slurm = launcher_context().slurm
        if slurm is not None and slurm.cpus_per_task:
            return slurm.cpus_per_task
        cpus = frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()
        others: list[tuple[int, frozenset[int]]] = self.host.allgather((self.rank, cpus))
        sharing = sum(1 for rank, theirs in others
                      if rank != ORCHESTRATOR_RANK and (not cpus or cpus & theirs))
        return max(1, count_cores() // max(1, sharing))
