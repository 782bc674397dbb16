"""Rank 0's guess of which prompt prefixes a pool holds. Pure.

The truth is the pool's tags, in the memory of its host; rank 0 may be elsewhere and must not ask before each
request. So it remembers what it has sent there and forgets as the pool does: least recently used first, and
of one prompt its end before its beginning. A wrong guess costs time and nothing else: the instance looks
again and computes what is not there.

One index for each pool: instances that share a pool reuse each other's blocks, and share its index. Made with
the launch, used by the dispatcher's thread.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixIndex:
    """The chained block hashes (:mod:`disagg_mpi.prefix`) that a pool of ``capacity_blocks`` blocks holds.

    Equal hash is equal whole prefix, so a hash stands for its block and all blocks before it.
    """

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks
        self._held: OrderedDict[int, None] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        """Blocks held."""
        return len(self._held)

    def match(self, hashes: Sequence[int]) -> int:
        """Leading blocks that are held. Looking is no use: the order of eviction stays."""
        held = self._held
        for count, block in enumerate(hashes):
            if block not in held:
                return count
        return len(hashes)

    def insert(self, hashes: Sequence[int]) -> None:
        """These blocks, from a prompt's first one on, have been used: held from now on, evicted last.

        Of more than the capacity, the leading ones are held.
        """
        held = self._held
        # From the end to the beginning, so that no block outlives one that it builds on.
        for block in reversed(hashes[:self._capacity]):
            held[block] = None
            held.move_to_end(block)
        while len(held) > self._capacity:
            held.popitem(last=False)
