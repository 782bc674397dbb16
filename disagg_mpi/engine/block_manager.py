"""Which request owns which block of an instance's pool, and which free ones are worth keeping: pure.

Every block of the instance is free or has one owner (a request id). A free block is *blank*, or *cached*:
it has a tag (:mod:`disagg_mpi.prefix`), and its bytes are good until it is allocated again. Allocation takes
blanks first and then those that were used longest ago. The manager prefers to give a request
blocks that lie together, because attention reads such a run without gathering it, and the lowest ones,
because their pages have been touched already. ``exchange`` is what a hand-over in a shared pool does: ids
change hands one for one, so an instance always owns the same number of blocks.

The tags of a pool may be shared by several instances; each manager clears those of its own blocks only,
and while a block is free, nobody else changes its tag.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from disagg_mpi.prefix import PrefixTags

_BLANK = 0
_TAKEN = 2**63 - 1  # owned, or another instance's


class BlockManager:
    """The only allocator of an instance's blocks; a request's table is its blocks in order of position."""

    def __init__(self, block_ids: Iterable[int], tags: PrefixTags | None = None) -> None:
        """``block_ids`` are free: cached those that have a tag, blank the others."""
        ids = list(block_ids)
        self.num_blocks = len(ids)
        self._tags = tags
        # One number a block id of the pool: blank, taken, or (cached) the time of its last use.
        self._used: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._clock = _BLANK
        self._num_blank = 0
        self._num_cached = 0
        self._tables: dict[int, list[int]] = {}
        self._add_free(ids)

    @property
    def num_free(self) -> int:
        """Blocks without an owner, blank or cached."""
        return self._num_blank + self._num_cached

    @property
    def num_cached(self) -> int:
        return self._num_cached

    @property
    def owners(self) -> list[int]:
        return list(self._tables)

    @property
    def free_ids(self) -> list[int]:
        """Blocks without an owner, blank or cached, in order."""
        free: list[int] = np.flatnonzero(self._used != _TAKEN).tolist()
        return free

    @property
    def block_ids(self) -> list[int]:
        """All blocks of this manager, free or owned, in order."""
        return sorted(itertools.chain(self.free_ids, *self._tables.values()))

    def is_cached(self, block: int) -> bool:
        """Whether ``block`` is ours, free, and has good bytes."""
        return block < len(self._used) and bool(_BLANK < self._used[block] < _TAKEN)

    def can_allocate(self, count: int) -> bool:
        return count <= self.num_free

    def allocate(self, owner: int, count: int, keep: Iterable[int] = ()) -> list[int]:
        """``count`` blocks for ``owner``; their tags are cleared.

        The lowest run of blanks; without one, the run of blanks and cached blocks whose youngest is
        oldest; without that, blanks anywhere and as many of the oldest cached blocks as are missing.
        ``keep``, blocks about to be copied, go only when there is no other way.
        Raises ``ValueError`` if ``owner`` has some, or too few are free.
        """
        self._refuse_known(owner)
        if count > self.num_free:
            raise ValueError(f"{count} blocks asked for, {self.num_free} free")
        table = self._take(count, keep)
        self._tables[owner] = table
        return table

    def adopt(self, owner: int, count: int, run: Sequence[int]) -> list[int] | None:
        """Take a hit in place: ``run`` and the blocks next to it, ``count`` in all; ``run`` stays tagged.

        ``None`` unless ``run`` is cached blocks of ours, neighbours in order, and those after it are
        blank: a copy is cheaper than another prefix. Raises ``ValueError`` if ``owner`` has some.
        """
        self._refuse_known(owner)
        if not 1 <= len(run) <= count or list(run) != list(range(run[0], run[0] + len(run))):
            return None
        table = list(range(run[0], run[0] + count))
        if not self._are_free(table):
            return None
        held, behind = self._used[table[: len(run)]], self._used[table[len(run) :]]
        if (held == _BLANK).any() or (behind != _BLANK).any():
            return None
        self._own(table)
        self._clear(table[len(run) :])
        self._tables[owner] = table
        return table

    def extend(self, owner: int, count: int) -> list[int] | None:
        """Add ``count`` blocks to the table of ``owner``, in place, and give the new ones.

        Those after its last block if they are free, else as :meth:`allocate`; their tags are cleared.
        ``None``, and nothing changed, if too few are free.
        """
        table = self._tables[owner]
        if count > self.num_free:
            return None
        new = list(range(table[-1] + 1, table[-1] + 1 + count)) if table else []
        if new and self._are_free(new):
            self._own(new)
            self._clear(new)
        else:
            new = self._take(count)
        table += new
        return new

    def touch(self, blocks: Iterable[int]) -> None:
        """A hit: ``blocks``, in order of position, count as used last, as far as they are cached here."""
        self._stamp([block for block in blocks if self.is_cached(block)])

    def table(self, owner: int) -> list[int]:
        return self._tables[owner]

    def owns(self, owner: int) -> bool:
        return owner in self._tables

    def free(self, owner: int) -> None:
        """Give all blocks of ``owner`` back; those with a tag are cached now."""
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
        """What is wrong with the books; empty when every block is blank, cached, or has one owner."""
        problems = []
        free = self.free_ids
        cached = [block for block in free if self.is_cached(block)]
        for name, counted, marked in (("blank", self._num_blank, len(free) - len(cached)),
                                      ("cached", self._num_cached, len(cached))):
            if counted != marked:
                problems.append(f"{counted} blocks counted as {name}, {marked} marked so")
        stamps = self._used[cached]
        if len(np.unique(stamps)) != len(cached) or (stamps > self._clock).any():
            problems.append("the order in which the cached blocks were used is not one")
        for block, tagged in zip(free, self._tagged(free), strict=True):
            if tagged != self.is_cached(block):
                problems.append(f"block {block} is {'blank with' if tagged else 'cached without'} a tag")
        owned: dict[int, int] = {}
        for owner, table in self._tables.items():
            for block in table:
                if block in owned:
                    problems.append(f"block {block} is owned by {owned[block]} and {owner}")
                if self._are_free([block]):
                    problems.append(f"block {block} of request {owner} is marked free")
                owned[block] = owner
        if len(free) + len(owned) != self.num_blocks:
            problems.append(f"{self.num_blocks} blocks in all, but {len(free)} free and {len(owned)} owned")
        return problems

    def _refuse_known(self, owner: int) -> None:
        if owner in self._tables:
            raise ValueError(f"request {owner} already owns blocks")

    def _are_free(self, blocks: Sequence[int]) -> bool:
        """Whether all of ``blocks``, at least one and the last the highest, are ours and free."""
        return blocks[-1] < len(self._used) and bool((self._used[blocks] != _TAKEN).all())

    def _tagged(self, blocks: Sequence[int]) -> list[bool]:
        return self._tags.tagged(blocks) if self._tags is not None else [False] * len(blocks)

    def _clear(self, blocks: Sequence[int]) -> None:
        if self._tags is not None and blocks:
            self._tags.clear(blocks)

    def _take(self, count: int, keep: Iterable[int] = ()) -> list[int]:
        """``count`` blocks, so many are free: no longer free, and without tags."""
        kept = [block for block in keep if self.is_cached(block)]
        first = (self._used == _BLANK).tobytes().find(b"\1" * count) if count else -1  # at memchr speed
        if first < 0 and self._num_cached and count:
            first = self._oldest_run(count, kept)
        table = list(range(first, first + count)) if first >= 0 else self._scattered(count, kept)
        self._own(table)
        self._clear(table)
        return table

    def _own(self, blocks: Sequence[int]) -> None:
        """Blank or cached until now, ``blocks`` are no longer free."""
        num_blank = int(np.count_nonzero(self._used[blocks] == _BLANK))
        self._num_blank -= num_blank
        self._num_cached -= len(blocks) - num_blank
        self._used[blocks] = _TAKEN

    def _oldest_run(self, count: int, keep: Sequence[int]) -> int:
        """First block of the run of ``count`` free ones whose youngest is oldest; -1: there is no run.

        To allow only the older ones of the cached blocks would not do: what was scattered once is old at
        the same time and scattered again. Requests of 100 blocks on average, 32 at a time in 10,000, had 51
        runs each where only the ``2 * count`` oldest might go, 20 where the older half might, 1 so; and
        hits in traces of conversations were as many.
        """
        ages = self._used.copy()
        ages[keep] = _TAKEN
        width = 1  # ages[i] is the highest of so many blocks from i on
        while width < count:
            step = min(width, count - width)
            ages = np.maximum(ages[:-step], ages[step:])
            width += step
        first = int(ages.argmin())
        return first if ages[first] != _TAKEN else -1

    def _scattered(self, count: int, keep: Sequence[int]) -> list[int]:
        """``count`` blanks, and where they are too few the oldest cached blocks, as few runs: halve the
        length looked for until all are found."""
        usable = self._used == _BLANK
        if count > self._num_blank:
            ages = self._used.copy()
            ages[keep] += self._clock  # younger than all others, and in order still
            usable[np.argsort(ages)[:count]] = True
        marks = bytearray(usable.tobytes())
        table: list[int] = []
        length = count
        while len(table) < count:
            length = min(length, count - len(table))
            first = marks.find(b"\1" * length)
            if first < 0:
                length = (length + 1) // 2
                continue
            table.extend(range(first, first + length))
            marks[first : first + length] = bytes(length)
        return table

    def _add_free(self, blocks: Sequence[int]) -> None:
        """``blocks``, in order of position, are free."""
        missing = max(blocks, default=-1) + 1 - len(self._used)
        if missing > 0:  # ids that another instance owned until now
            self._used = np.concatenate([self._used, np.full(missing, _TAKEN, dtype=np.int64)])
        cached = []
        for block, tagged in zip(blocks, self._tagged(blocks), strict=True):
            if self._used[block] != _TAKEN:
                raise ValueError(f"block {block} is free already")
            self._used[block] = _BLANK
            if tagged:
                cached.append(block)
        self._num_blank += len(blocks) - len(cached)
        self._num_cached += len(cached)
        self._stamp(cached)

    def _stamp(self, cached: Sequence[int]) -> None:
        """``cached``, in order of position, are used now: of one request, the last blocks go first."""
        self._used[cached[::-1]] = np.arange(self._clock + 1, self._clock + 1 + len(cached))
        self._clock += len(cached)
