"""What a request need not compute, or take over, because the pool holds it already.

The leader's side of the prefix cache (:mod:`disagg_mpi.prefix`): finds the longest prefix that some block
of the pool still holds, gives the request blocks of its own, and has the bytes copied into them; where the
prefix lies in free blocks of this instance with room behind, they are taken as they are. A copy is not a
share: a block has one owner, and a request stays one run, which is what attention on a CPU wants (1,000
tokens of the default model: 3 ms to copy, once, against 2 ms a step to gather two runs; computing them
takes a second).

Made with the engine, owned by it. Without a prefix cache it only allocates.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq

from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.engine.sequence import Sequence
from disagg_mpi.prefix import BlockHasher, PrefixTags

CopyBlocks = Callable[[Seq[int], Seq[int]], None]


class PrefixReuse:
    """Places sequences in blocks and tags what has been computed."""

    def __init__(
        self,
        blocks: BlockManager,
        tags: PrefixTags,
        hasher: BlockHasher,
        copy_blocks: CopyBlocks,
        *,
        tokens_per_block: int,
        fetches: Callable[[int | bytes], bool],
    ) -> None:
        """``copy_blocks`` copies on all ranks of the instance; ``fetches(source)``: whether taking over from
        that instance, or from the one that a context's state names, moves bytes (else blocks change hands,
        and nothing is to be saved)."""
        self._blocks = blocks
        self._tags = tags
        self._hasher = hasher
        self._copy_blocks = copy_blocks
        self._tokens_per_block = tokens_per_block
        self._fetches = fetches

    def place(self, sequence: Sequence, count: int) -> list[int]:
        """``count`` blocks for ``sequence``; what they hold of it already is noted in it."""
        found = []
        # A prompt that is scored is computed: the cache holds no logits.
        if sequence.prompt_scores is None and (
                not sequence.takes_over or self._fetches(_source(sequence))):
            # Of a context that is computed here, one token must be, for its logits.
            last = len(sequence.token_ids) - (0 if sequence.takes_over else 1)
            hashes = self._hashes(sequence, last)
            found = self._tags.find(hashes, prefer=self._blocks.is_cached)
        if not found:
            return self._blocks.allocate(sequence.id, count)
        run = [block for block, _ in found]
        table = self._blocks.adopt(sequence.id, count, run)
        num_held = len(run)
        if table is None:
            self._blocks.touch(block for block in run if self._blocks.is_cached(block))
            table = self._blocks.allocate(sequence.id, count, keep=run)
            taken = set(table)  # a full pool may have had no others to give
            run = list(itertools.takewhile(lambda block: block not in taken, run))
            self._copy_blocks(run, table[: len(run)])
            num_held = self._tags.still(found[: len(run)], hashes)
            # What another instance holds, it alone can keep from being evicted: the copy is a second chance.
            for at in range(num_held):
                if not self._blocks.is_cached(run[at]):
                    self._tags.set(table[at], hashes[at])
        sequence.hold(num_held * self._tokens_per_block)
        return table

    def computed(self, sequence: Sequence, start: int) -> None:
        """The positions from ``start`` to ``num_computed`` are in the pool now: name their full blocks."""
        first, end = start // self._tokens_per_block, sequence.num_computed // self._tokens_per_block
        if first < end:
            hashes = self._hashes(sequence, sequence.num_computed)
            for index in range(first, end):
                self._tags.set(sequence.block_ids[index], hashes[index])

    def _hashes(self, sequence: Sequence, num_tokens: int) -> list[int]:
        """Of the full blocks of the first ``num_tokens``."""
        self._hasher.extend(sequence.block_hashes, sequence.token_ids)
        return sequence.block_hashes[: num_tokens // self._tokens_per_block]


def _source(sequence: Sequence) -> int | bytes:
    """Where its context is, or was, computed."""
    params, early = sequence.context_params, sequence.request.early_source
    if params is not None:
        return params.opaque_state
    assert early is not None  # checked at enqueue
    return early
