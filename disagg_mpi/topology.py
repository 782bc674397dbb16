"""Who is who in the world: pure rank arithmetic, no MPI.

Rank 0 is the orchestrator; context instances take the next ranks in order, then generation instances
(or aggregated ones alone). A :class:`Topology` is made once from the configuration, identical on every
rank, and never changes. Roles are data here, not classes, so that a later job may change them.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from disagg_mpi.config import Instance, JobConfig
from disagg_mpi.errors import WorldTooLargeError, WorldTooSmallError

ORCHESTRATOR_RANK = 0


class Role(StrEnum):
    """What an instance does."""

    CONTEXT = "context"
    GENERATION = "generation"
    AGGREGATED = "aggregated"

    @property
    def does_context(self) -> bool:
        return self is not Role.GENERATION

    @property
    def does_generation(self) -> bool:
        return self is not Role.CONTEXT


class Group(msgspec.Struct, frozen=True):
    """One instance's participant group."""

    instance_id: int
    """Position among all instances of the job."""
    role: Role
    index: int
    """Position among the instances of the same role."""
    shape: Instance
    ranks: tuple[int, ...]

    @property
    def leader(self) -> int:
        return self.ranks[0]

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"


class Topology(msgspec.Struct, frozen=True):
    """All instances of a job and the ranks that they take."""

    groups: tuple[Group, ...]

    @property
    def world_size(self) -> int:
        return 1 + sum(len(group.ranks) for group in self.groups)

    def group_of(self, rank: int) -> Group | None:
        """The group that ``rank`` belongs to; ``None`` for the orchestrator."""
        return next((group for group in self.groups if rank in group.ranks), None)

    def label(self, rank: int) -> str:
        """``rank 3 · generation 1 · follower``: how logs and tracebacks name a rank."""
        group = self.group_of(rank)
        if group is None:
            return f"rank {rank} · orchestrator"
        part = "leader" if rank == group.leader else "follower"
        return f"rank {rank} · {group.name} · {part}"

    def sum_text(self) -> str:
        """``5 = 1 orchestrator + 2 context + 2 generation``."""
        terms = ["1 orchestrator"]
        for role in Role:
            count = sum(len(group.ranks) for group in self.groups if group.role is role)
            if count:
                terms.append(f"{count} {role}")
        return f"{self.world_size} = " + " + ".join(terms)

    def check_world(self, found: int) -> None:
        """Raise unless the MPI world has the size that this layout needs."""
        if found == self.world_size:
            return
        ranks = "1 rank" if found == 1 else f"{found} ranks"
        text = (f"{ranks}, this layout needs {self.sum_text()}; "
                f"run mpirun -n {self.world_size} …")
        if found < self.world_size:
            if found == 1:
                text += (f" (or: python -m disagg_mpi launch -n {self.world_size} -- …). If this was"
                         " started by mpirun or srun, the launcher and the MPI library do not"
                         " belong together: see python -m disagg_mpi doctor")
            raise WorldTooSmallError(text)
        raise WorldTooLargeError(
            text + f", or give the other {found - self.world_size} something to do with "
            "--context, --generation or --aggregated")


def build_topology(config: JobConfig) -> Topology:
    """Lay the instances of ``config`` out over the ranks 1, 2, … in order."""
    groups: list[Group] = []
    next_rank = ORCHESTRATOR_RANK + 1
    for role in Role:
        for index, shape in enumerate(config.instances(role.value)):
            ranks = tuple(range(next_rank, next_rank + shape.num_ranks))
            groups.append(Group(instance_id=len(groups), role=role, index=index,
                                shape=shape, ranks=ranks))
            next_rank += shape.num_ranks
    return Topology(groups=tuple(groups))
