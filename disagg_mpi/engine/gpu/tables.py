"""A step as arrays: which token goes where, and which pages its attention reads. Pure, numpy alone.

All are int32. A *page* is a block of the pool; a *slot* is a token's place in it, as in
:mod:`disagg_mpi.transfer.layout`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from disagg_mpi.comm.messages import Batch, PagedStep

Ints = npt.NDArray[np.int32]


class StepArrays(msgspec.Struct, frozen=True):
    """One packed step of ``B`` chunks with ``T`` tokens, whose positions take ``P`` pages, and ``R`` wanted
    rows."""

    token_ids: Ints
    """[T]; -1: the last token of the chunk's seat."""
    positions: Ints
    """[T]."""
    slots: Ints
    """[T] where K and V of each token go."""
    chunk_of: Ints
    """[T] the chunk that a token is of."""
    seats: Ints
    """[B]."""
    token_starts: Ints
    """[B + 1] first token of each chunk, and T."""
    page_starts: Ints
    """[B + 1] first page of each chunk, and P."""
    last_page_lengths: Ints
    """[B] tokens in its last page."""
    pages: Ints
    """[P] of each chunk in order of position, up to its last token."""
    rows: Ints
    """[R] tokens whose logits are wanted: of chunks that are drawn, then those to keep."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_chunks(self) -> int:
        return len(self.seats)

    @property
    def kv_lengths(self) -> Ints:
        """[B] positions that each chunk's last token sees."""
        starts = self.token_starts[:-1]
        return self.positions[starts] + np.diff(self.token_starts)

    @property
    def is_generation(self) -> bool:
        """Whether every chunk is one token whose logits are wanted once."""
        return self.num_tokens == self.num_chunks == len(self.rows)


class SeatTables:
    """The block tables of an instance's seats, as a rank keeps them."""

    def __init__(self, num_seats: int, blocks_per_seat: int, tokens_per_block: int, scratch: int) -> None:
        """``scratch``: the block of a seat that is nobody's, :attr:`nobody`."""
        self.nobody = num_seats
        self._size = tokens_per_block
        self._blocks = np.full((num_seats + 1, blocks_per_seat), scratch, dtype=np.int32)

    def arrays(self, step: PagedStep) -> StepArrays:
        """Takes the step's tables in and lays it out."""
        for seat, first, blocks in step.tables:
            self._blocks[seat, first : first + len(blocks)] = blocks
        seats = np.array(step.seats, dtype=np.int32)
        lengths = np.array(step.lengths, dtype=np.int32)
        starts = np.array(step.starts, dtype=np.int32)
        token_starts = _starts(lengths)
        chunk_of = np.repeat(np.arange(len(seats), dtype=np.int32), lengths)
        positions = np.arange(token_starts[-1], dtype=np.int32) + (starts - token_starts[:-1])[chunk_of]
        blocks, within = np.divmod(positions, np.int32(self._size))
        slots = self._blocks[seats[chunk_of], blocks] * np.int32(self._size) + within
        ends = starts + lengths
        counts = -(-ends // np.int32(self._size))
        mine = self._blocks[seats, : counts.max(initial=0)]
        pages = mine[np.arange(mine.shape[1], dtype=np.int32) < counts[:, None]]
        drawn = token_starts[1:][step.drawn] - 1
        return StepArrays(
            np.array(step.token_ids, dtype=np.int32), positions, slots, chunk_of, seats, token_starts,
            _starts(counts), ends - (counts - 1) * np.int32(self._size), pages,
            np.concatenate([drawn, np.array(step.keep, dtype=np.int32)]).astype(np.int32))

    def padded(self, arrays: StepArrays, size: int) -> StepArrays:
        """A generation step with so many chunks; those added are nobody's, and write the scratch block."""
        missing = size - arrays.num_chunks
        if missing == 0:
            return arrays
        zeros = np.zeros(missing, dtype=np.int32)
        scratch = self._blocks[self.nobody, 0]
        chunks = np.arange(arrays.num_chunks, size, dtype=np.int32)
        ends = arrays.page_starts[-1] + 1 + np.arange(missing, dtype=np.int32)
        return StepArrays(
            np.concatenate([arrays.token_ids, zeros]), np.concatenate([arrays.positions, zeros]),
            np.concatenate([arrays.slots, zeros + scratch * np.int32(self._size)]),
            np.arange(size, dtype=np.int32), np.concatenate([arrays.seats, zeros + np.int32(self.nobody)]),
            np.arange(size + 1, dtype=np.int32),
            np.concatenate([arrays.page_starts, ends]),
            np.concatenate([arrays.last_page_lengths, zeros + np.int32(1)]),
            np.concatenate([arrays.pages, zeros + scratch]), np.concatenate([arrays.rows, chunks]))


def arrays_of(batch: Batch, tokens_per_block: int) -> StepArrays:
    """A step that names its slots itself, as instances with pipeline stages send it; it has no seats."""
    size = np.int32(tokens_per_block)
    lengths = np.array([length for _, length, _ in batch.chunks], dtype=np.int32)
    starts = np.array([start for start, _, _ in batch.chunks], dtype=np.int32)
    slots, pages, counts = [], [], []
    for start, length, runs in batch.chunks:
        slots.append(_slots(runs)[start : start + length])
        mine = _pages(runs, tokens_per_block)
        pages.append(mine)
        counts.append(len(mine))
    token_starts = _starts(lengths)
    chunk_of = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    page_counts = np.array(counts, dtype=np.int32)
    return StepArrays(
        np.array(batch.token_ids, dtype=np.int32),
        np.arange(token_starts[-1], dtype=np.int32) + (starts - token_starts[:-1])[chunk_of],
        np.concatenate(slots), chunk_of, np.zeros(len(lengths), dtype=np.int32), token_starts,
        _starts(page_counts), starts + lengths - (page_counts - 1) * size, np.concatenate(pages),
        np.array(batch.keep, dtype=np.int32))


def _starts(counts: Ints) -> Ints:
    """``[2, 3] -> [0, 2, 5]``."""
    starts = np.zeros(len(counts) + 1, dtype=np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts


def _slots(runs: Sequence[tuple[int, int]]) -> Ints:
    return np.concatenate([np.arange(first, first + count, dtype=np.int32) for first, count in runs])


def _pages(runs: Sequence[tuple[int, int]], size: int) -> Ints:
    """Runs begin where blocks do."""
    return np.concatenate([np.arange(first // size, -(-(first + count) // size), dtype=np.int32)
                           for first, count in runs])
