"""Who is who in the world: pure rank arithmetic, no MPI.

Rank 0 is the orchestrator. Instances with participant ids are on the ranks that these name; the others take
the free ranks in order: context instances, then generation instances (or aggregated ones alone). A
:class:`Topology` is made once from the configuration, identical on every rank, and never changes. Roles are
data here, not classes, so that a later job may change them. Every error about ranks shows all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import cached_property
from itertools import count, groupby, islice
from typing import get_args

import msgspec

from disagg_mpi.config import IdKind, Instance, JobConfig
from disagg_mpi.errors import LayoutError, WorldTooLargeError, WorldTooSmallError
from disagg_mpi.rank_map import rank_map
from disagg_mpi.shapes import format_ids, format_instances

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
    """One instance's participant group: its ranks, stage by stage, the leader first.

    A rank's *index* is its place in the group: ``pp_rank * tp + tp_rank``. Methods that take a rank raise
    :class:`ValueError` for one that is not in the group.
    """

    instance_id: int
    """Position among all instances of the job."""
    role: Role
    index: int
    """Position among the instances of the same role."""
    shape: Instance
    ranks: tuple[int, ...]
    device_ids: tuple[int, ...] | None = None
    """A device for each of ``ranks``, if the configuration names them."""

    @property
    def leader(self) -> int:
        return self.ranks[0]

    @property
    def name(self) -> str:
        return f"{self.role} {self.index}"

    def index_of(self, rank: int) -> int:
        return self.ranks.index(rank)

    def tp_rank(self, rank: int) -> int:
        """Place among the ranks of its stage, which share each layer."""
        return self.index_of(rank) % self.shape.tp

    def pp_rank(self, rank: int) -> int:
        """Its pipeline stage."""
        return self.index_of(rank) // self.shape.tp

    def stage_ranks(self, pp_rank: int) -> tuple[int, ...]:
        """The ranks of a stage, by ``tp_rank``."""
        return self.ranks[pp_rank * self.shape.tp:(pp_rank + 1) * self.shape.tp]

    def device_of(self, rank: int) -> int | None:
        """The device that the configuration names for ``rank``."""
        return None if self.device_ids is None else self.device_ids[self.index_of(rank)]


class Topology(msgspec.Struct, frozen=True, dict=True):
    """All instances of a job and the ranks that they take."""

    groups: tuple[Group, ...]

    @property
    def world_size(self) -> int:
        return 1 + sum(len(group.ranks) for group in self.groups)

    def group_of(self, rank: int) -> Group | None:
        """The group that ``rank`` belongs to; ``None`` for the orchestrator."""
        return self._group_of.get(rank)

    @cached_property
    def _group_of(self) -> dict[int, Group]:
        return {rank: group for group in self.groups for rank in group.ranks}

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

    def map_text(self, marks: Mapping[int, str] | None = None, num_ranks: int = 0) -> str:
        """All ranks, one a line, up to ``num_ranks`` if there are more; ``marks``: what is wrong with one."""
        return rank_map([(group.name, group.ranks) for group in self.groups],
                        max(num_ranks, self.world_size), marks)

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
            missing = f"not in this world of {ranks}"
            raise WorldTooSmallError(
                text + "\n" + self.map_text(dict.fromkeys(range(found, self.world_size), missing)))
        raise WorldTooLargeError(
            text + f", or give the other {found - self.world_size} something to do with "
            "--context, --generation or --aggregated\n" + self.map_text(num_ranks=found))


def build_topology(config: JobConfig) -> Topology:
    """Place the instances of ``config`` on ranks.

    Raises :class:`LayoutError` if ids are too many or too few for the instances, or if with them a rank
    would be in two groups, rank 0 in one, or a rank below the highest in none.
    """
    shapes = {role: config.instances(role) for role in Role}
    named = {rank for role in Role for shape in shapes[role] for rank in shape.participant_ids or ()}
    # Groups without an instance, an error below, keep their ranks too: the map then shows one fault, not two.
    named |= {rank for role in Role for ids in config.id_groups(role, "participant") or () for rank in ids}
    free = (rank for rank in count(ORCHESTRATOR_RANK + 1) if rank not in named)
    groups: list[Group] = []
    for role in Role:
        for index, shape in enumerate(shapes[role]):
            ranks = shape.participant_ids
            if ranks is None:
                ranks = tuple(islice(free, shape.num_ranks))
            groups.append(Group(instance_id=len(groups), role=role, index=index, shape=shape,
                                ranks=tuple(ranks), device_ids=shape.device_ids))
    for role in Role:
        for kind in get_args(IdKind):
            _check_counts(config, role, kind, groups)
    _check_places(groups)
    return Topology(groups=tuple(groups))


def check_model_fits(topology: Topology, num_layers: int, num_heads: int, num_kv_heads: int) -> None:
    """Raise :class:`LayoutError` unless a model of this shape can be divided as its instances are.

    ``tp`` ranks share the query heads evenly, and have the same number of KV heads each or one that some of
    them share; each of ``pp`` stages has a layer at least.
    """
    widths = [tp for tp in range(1, num_heads + 1)
              if not num_heads % tp and (not num_kv_heads % tp or not tp % num_kv_heads)]
    faults: list[str] = []
    marks: dict[int, str] = {}
    for group in topology.groups:
        tp, pp = group.shape.tp, group.shape.pp
        if tp not in widths:
            faults.append(f"{group.name} is {group.shape}: {num_heads} heads and {num_kv_heads} KV heads "
                          f"cannot be divided among {tp} ranks; tp can be {_one_of(widths)}")
        elif pp > num_layers:
            faults.append(f"{group.name} is {group.shape}: {num_layers} layers cannot be divided among {pp} "
                          f"stages; pp can be {num_layers} at most")
        else:
            continue
        marks |= dict.fromkeys(group.ranks, f"{group.shape} does not fit the model")
    if faults:
        raise LayoutError(faults[0] + "\n" + topology.map_text(marks))


def _check_counts(config: JobConfig, role: Role, kind: IdKind, groups: Sequence[Group]) -> None:
    """Raise :class:`LayoutError` unless there is a group of ids for each copy, an id for each rank."""
    named = config.id_groups(role, kind) or ()
    mine = [group for group in groups if group.role is role]
    copies = format_instances([group.shape for group in mine])
    option = f"--{role}-{kind}-ids"
    places = [(group.name, group.ranks) for group in groups]
    marks: dict[int, str] = {}
    headline = ""
    if named and len(named) != len(mine):
        headline = (f"{option} has {_number(len(named), 'group')} of ids, but there "
                    f"{'is' if len(mine) == 1 else 'are'} {_number(len(mine), f'{role} instance')}: {copies}")
        for group in mine[len(named):]:
            marks |= dict.fromkeys(group.ranks, f"no {kind} ids for {group.name}")
        if kind == "participant":
            for index, ranks in enumerate(named[len(mine):], len(mine)):
                places.append((f"{role} {index}", ranks))
                marks |= dict.fromkeys(ranks, f"there is no {role} {index}")
    for group in mine:
        ids = group.ranks if kind == "participant" else group.device_ids
        if ids is not None and len(ids) != group.shape.num_ranks:
            headline = headline or (
                f"{group.name} is {group.shape}, {_number(group.shape.num_ranks, 'rank')}, but has "
                f"{_number(len(ids), f'{kind} id')}: {format_ids([ids])}")
            marks |= dict.fromkeys(group.ranks, f"{_number(len(ids), f'{kind} id')} for {group.shape}")
    if headline:
        rule = "a group for each instance, an id for each of its ranks"
        raise LayoutError(f"{headline}\n{rank_map(places, 1 + _num_ranks(groups), marks)}\n"
                          f"needed: {rule}; type e.g. "
                          + _ids_that_fit(groups if kind == "participant" else mine, kind))


def _check_places(groups: Sequence[Group]) -> None:
    """Raise :class:`LayoutError` unless every rank after 0, up to the highest, is in one group."""
    owners: dict[int, list[Group]] = {}
    for group in groups:
        for rank in group.ranks:
            owners.setdefault(rank, []).append(group)
    num_ranks = _num_ranks(groups)
    highest = max(owners, default=0)
    twice = next((rank for rank in sorted(owners) if len(owners[rank]) > 1), None)
    if ORCHESTRATOR_RANK in owners:
        headline = f"rank 0 is named by {owners[ORCHESTRATOR_RANK][0].name}, but is the orchestrator's"
    elif twice is not None:
        first, second, *_ = owners[twice]
        headline = (f"rank {twice} is named twice by {first.name}" if first is second else
                    f"rank {twice} is named by {first.name} and by {second.name}")
    elif highest > num_ranks:
        gap = next(rank for rank in count(ORCHESTRATOR_RANK + 1) if rank not in owners)
        headline = f"rank {gap} is nobody's, but {owners[highest][0].name} names rank {highest}"
    else:
        return
    rule = f"every rank 1..{num_ranks} in exactly one group"
    places = [(group.name, group.ranks) for group in groups]
    raise LayoutError(f"{headline}\n{rank_map(places, 1 + num_ranks)}\n"
                      f"needed: {rule}; type e.g. {_ids_that_fit(groups, 'participant')}")


def _ids_that_fit(groups: Sequence[Group], kind: IdKind) -> str:
    """Options that give each rank of ``groups`` an id of its own."""
    ids = count(1 if kind == "participant" else 0)
    options = []
    for role, members in groupby(groups, key=lambda group: group.role):
        dealt = [list(islice(ids, group.shape.num_ranks)) for group in members]
        options.append(f'--{role}-{kind}-ids "{format_ids(dealt)}"')
    return " ".join(options)


def _num_ranks(groups: Sequence[Group]) -> int:
    """Ranks that the instances need."""
    return sum(group.shape.num_ranks for group in groups)


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _one_of(numbers: Sequence[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last
