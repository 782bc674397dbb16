"""Which rank's KV-cache lies where, and how it passes between two instances: pure, equal on every rank.

Made at the start from one :class:`CacheView` a rank, gathered from all of them; never changed.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence

from disagg_mpi.transfer.layout import CacheView, KvLayout
from disagg_mpi.transfer.partition import Part, partition

SHARED = "shared"
"""The table moves within one pool and the bytes stay."""
COPY = "copy"
"""The bytes are copied within the memory that a host's ranks share."""
MPI = "mpi"
"""The bytes go in MPI messages."""


class CacheDirectory:
    """All views, and the groups (instance id → world ranks, the leader first)."""

    def __init__(
        self, views: Mapping[int, CacheView], groups: Sequence[Sequence[int]], *, use_memory: bool = True,
        unreachable: Collection[tuple[int, int]] = ()
    ) -> None:
        """``use_memory``: whether ranks of one host use the memory that they share for a hand-over;
        ``unreachable``: pairs (source, target) of them that cannot, such as GPUs without a path to each
        other."""
        self.views = views
        self.groups = groups
        self._use_memory = use_memory
        self._unreachable = frozenset(unreachable)
        self._parts = functools.cache(self._find_parts)

    def leader(self, instance: int) -> int:
        return self.groups[instance][0]

    def parts(self, source: int, target: int) -> list[Part]:
        """Who of instance ``source`` sends what to whom of ``target``: local indices."""
        return self._parts(source, target)

    def pair_way(self, source_rank: int, target_rank: int) -> str:
        """How bytes pass between two ranks."""
        same_host = self.views[source_rank].host == self.views[target_rank].host
        can_reach = (source_rank, target_rank) not in self._unreachable
        return COPY if self._use_memory and same_host and can_reach else MPI

    def is_exchange(self, source: int, target: int) -> bool:
        """Whether both instances lie wholly in one pool, so that block ids can change hands.

        The pool is one array that all of their ranks use, or one for each place of two instances of one
        shape.
        """
        theirs, ours = ([_array(self.views[rank]) for rank in self.groups[each]] for each in (source, target))
        return self._use_memory and (theirs == ours or len({*theirs, *ours}) == 1)

    def way(self, source: int, target: int) -> str:
        """How the KV-cache passes between two instances: the dearest of its pairs of ranks."""
        if self.is_exchange(source, target):
            return SHARED
        pairs = {self.pair_way(self.groups[source][part.source], self.groups[target][part.target])
                 for part in self.parts(source, target)}
        return MPI if MPI in pairs else COPY

    def _find_parts(self, source: int, target: int) -> list[Part]:
        return partition([self.views[rank].shard for rank in self.groups[source]],
                         [self.views[rank].shard for rank in self.groups[target]])


def _array(view: CacheView) -> tuple[str, int, KvLayout]:
    """The array that a rank's part lies in."""
    return view.memory, view.offset, view.layout
