"""Which rank's KV-cache lies where, and how it passes between two instances: pure, equal on every rank.

Made at the start from one :class:`CacheView` a rank, gathered from all of them; never changed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from disagg_mpi.transfer.layout import CacheView
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
        self, views: Mapping[int, CacheView], groups: Sequence[Sequence[int]], *, use_memory: bool = True
    ) -> None:
        """``use_memory``: whether ranks of one host use the memory that they share for a hand-over."""
        self.views = views
        self.groups = groups
        self._use_memory = use_memory
        self._parts = functools.cache(self._find_parts)

    def leader(self, instance: int) -> int:
        return self.groups[instance][0]

    def parts(self, source: int, target: int) -> list[Part]:
        """Who of instance ``source`` sends what to whom of ``target``: local indices."""
        return self._parts(source, target)

    def pair_way(self, source_rank: int, target_rank: int) -> str:
        """How bytes pass between two ranks."""
        same_host = self.views[source_rank].host == self.views[target_rank].host
        return COPY if self._use_memory and same_host else MPI

    def is_exchange(self, source: int, target: int) -> bool:
        """Whether both instances lie wholly in one pool, so that block ids can change hands."""
        ranks = (*self.groups[source], *self.groups[target])
        first = self.views[ranks[0]]
        return self._use_memory and all(
            (view.memory, view.offset, view.layout) == (first.memory, first.offset, first.layout)
            for view in map(self.views.__getitem__, ranks))

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
