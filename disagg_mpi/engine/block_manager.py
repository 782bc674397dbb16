"""Which request owns which block of an instance's pool: pure, no tensors.

Every block of the instance is free or has one owner (a request id). The manager prefers to give a
request blocks that lie together, because attention reads such a run without gathering it, and the
lowest ones, because their pages have been touched already. ``exchange`` is what a hand-over in a shared
pool does: ids change hands one for one, so an instance always owns the same number of blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

_FREE = 1
_OTHER = 0  # in use, or another instance's


class BlockManager:
    """Allocates whole requests: no request ever holds a part of what it will need."""

    def __init__(self, block_ids: Iterable[int]) -> None:
        ids = list(block_ids)
        self.num_blocks = len(ids)
        self._num_free = len(ids)
        # One byte a block id of the pool: bytearray.find looks for a run at memchr speed.
        self._map = bytearray(max(ids, default=-1) + 1)
        for block in ids:
            self._map[block] = _FREE
        self._tables: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def owners(self) -> list[int]:
        return list(self._tables)

    @property
    def block_ids(self) -> list[int]:
        """All blocks of this manager, free or owned, in order."""
        free = [block for block, mark in enumerate(self._map) if mark == _FREE]
        return sorted(itertools.chain(free, *self._tables.values()))

    def can_allocate(self, count: int) -> bool:
        return count <= self._num_free

    def allocate(self, owner: int, count: int) -> list[int]:
        """``count`` blocks for ``owner``. Raises ``ValueError`` if it has some, or too few are free."""
        if owner in self._tables:
            raise ValueError(f"request {owner} already owns blocks")
        if count > self._num_free:
            raise ValueError(f"{count} blocks asked for, {self._num_free} free")
        first = self._map.find(b"\1" * count) if count else -1
        table = list(range(first, first + count)) if first >= 0 else self._scattered(count)
        for block in table:
            self._map[block] = _OTHER
        self._num_free -= count
        self._tables[owner] = table
        return table

    def table(self, owner: int) -> list[int]:
        return self._tables[owner]

    def owns(self, owner: int) -> bool:
        return owner in self._tables

    def free(self, owner: int) -> None:
        """Give all blocks of ``owner`` back."""
        self._add_free(self._tables.pop(owner))

    def exchange(self, owner: int, taken: Sequence[int]) -> None:
        """Generation's side: ``owner`` now has ``taken`` in place of its first blocks, given away."""
        table = self._tables[owner]
        table[: len(taken)] = taken

    def free_exchanged(self, owner: int, received: Sequence[int]) -> None:
        """Context's side: the blocks of ``owner`` were taken; ``received`` are ours and free."""
        table = self._tables.pop(owner)
        if len(received) != len(table):
            raise ValueError(f"{len(table)} blocks were taken, {len(received)} given in exchange")
        self._add_free(received)

    def check(self) -> list[str]:
        """What is wrong with the books; empty when every block has exactly one owner."""
        problems = []
        free = self._map.count(_FREE)
        if free != self._num_free:
            problems.append(f"{self._num_free} blocks counted as free, {free} marked so")
        owned: dict[int, int] = {}
        for owner, table in self._tables.items():
            for block in table:
                if block in owned:
                    problems.append(f"block {block} is owned by {owned[block]} and {owner}")
                if block < len(self._map) and self._map[block] == _FREE:
                    problems.append(f"block {block} of request {owner} is marked free")
                owned[block] = owner
        if free + len(owned) != self.num_blocks:
            problems.append(f"{self.num_blocks} blocks in all, but {free} free and {len(owned)} owned")
        return problems

    def _scattered(self, count: int) -> list[int]:
        """``count`` free blocks as few runs: halve the length looked for until all are found."""
        table: list[int] = []
        length = count
        marked = self._map
        while len(table) < count:
            length = min(length, count - len(table))
            first = marked.find(b"\1" * length)
            if first < 0:
                length = (length + 1) // 2
                continue
            run = range(first, first + length)
            table.extend(run)
            for block in run:
                marked[block] = _OTHER
        return table

    def _add_free(self, blocks: Sequence[int]) -> None:
        highest = max(blocks, default=-1)
        if highest >= len(self._map):  # an id that another instance owned until now
            self._map.extend(bytes(highest + 1 - len(self._map)))
        for block in blocks:
            if self._map[block] == _FREE:
                raise ValueError(f"block {block} is free already")
            self._map[block] = _FREE
        self._num_free += len(blocks)
