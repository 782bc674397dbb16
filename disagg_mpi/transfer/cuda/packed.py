"""Blocks by messages of packed bytes, for ranks that do not open each other's pools.

    source                                                  target
      pool ─ kernel ─► staging ─ message ═══════════════► staging ─ kernel ─► pool        PackedTransport
      pool ─ kernel ─► staging ─► pinned ─ message ═► pinned ─► staging ─ kernel ─► pool  HostStagedTransport

A transfer goes in *chunks*, whole planes or parts of one, the same on both sides: consecutive messages under
the transfer's tag, which MPI keeps in order. A chunk is packed while the one before is under way and the one
before that is unpacked. Nothing here waits: each look at a :class:`Transfer` starts what can be started.

A transport owns its staging memory from the first transfer of each direction until ``close``, one
:class:`Arena` for sends and one for receives. A receive takes room only for a message that has begun to come,
so what holds room can always go on, whatever the other ranks wait for.

The first needs an MPI that takes device pointers. On CPU tensors both run as they are, with any MPI.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from disagg_mpi.errors import IntegrityError
from disagg_mpi.transfer.cuda import kernels
from disagg_mpi.transfer.cuda.lanes import Lane, Mark, enter_thread
from disagg_mpi.transfer.cuda.memory import allocate
from disagg_mpi.transfer.layout import Box, CacheView
from disagg_mpi.transfer.transports import Transfer, check_pool

if TYPE_CHECKING:
    from mpi4py import MPI

# A prototype's messages between two processes on one H100 took 160 µs, and their bytes went at 1.43 TB/s,
# at every size from 16 to 512 MiB. 512 MiB by n messages, packed and unpacked at that speed too, all three on
# one GPU, which shares its memory's speed among them: 3 * 0.37 ms, and 160 µs times 1 where a message's fixed
# part overlaps with the others, times n where it does not:
#     n                    1       2       4       8
#     overlapping       1.27    1.27    1.27    1.27  ms
#     one by one        1.27    1.43    1.75    2.39  ms
# So: two. Where the wire is the bottleneck (50 GB/s: 10.7 ms) only the first pack and the last unpack are not
# hidden, 0.18 ms each. Smaller prompts go as one message.
CHUNK_BYTES = 256 * 2**20
NUM_CHUNKS = 2
"""That there is room for, each way."""

# Through host memory a message's bytes go at 5 to 7 GB/s and device copies at 53: chunks of 16 MiB (2.7 ms a
# message, 0.3 ms a copy) leave 0.6 ms of copies that nothing hides, and messages of that size have no fixed
# cost to speak of. One is filled, one on its way, one emptied, and one is to spare.
HOST_CHUNK_BYTES = 16 * 2**20
NUM_HOST_CHUNKS = 4

# Longest that one look goes on, however many are asked for: a caller that holds a lock gets it back.
_LOOK_SECONDS = 0.001
# Chunks that are parts of a plane begin at multiples of so many tokens, so that cells stay whole blocks.
_WHOLE_TOKENS = 64
_ALIGNMENT = 512


class Chunk(NamedTuple):
    """What one message has of a box; its bytes are ``[start, end)`` of the whole."""

    first_plane: int
    num_planes: int
    first_token: int
    num_tokens: int
    """From the box's own first."""


def chunks_of(num_planes: int, num_tokens: int, row_bytes: int, chunk_bytes: int) -> list[Chunk]:
    """Whole planes, about equally many each; where a plane is larger than a chunk, parts of one.

    At least a row each, whatever ``chunk_bytes``.
    """
    if not num_tokens:
        return []
    plane_bytes = num_tokens * row_bytes
    if plane_bytes <= chunk_bytes:
        num_chunks = -(-num_planes // (chunk_bytes // plane_bytes))
        ends = [num_planes * (number + 1) // num_chunks for number in range(num_chunks)]
        starts = [0, *ends[:-1]]
        return [Chunk(first, end - first, 0, num_tokens) for first, end in zip(starts, ends, strict=True)]
    step = max(1, chunk_bytes // row_bytes)
    if step > _WHOLE_TOKENS:
        step -= step % _WHOLE_TOKENS
    return [Chunk(plane, 1, token, min(step, num_tokens - token))
            for plane in range(num_planes) for token in range(0, num_tokens, step)]


class Arena:
    """Room in staging memory: who asks first gets it first, so that nobody is passed over for ever."""

    def __init__(self, num_bytes: int, device: torch.device, *, has_host: bool) -> None:
        self.device = allocate(num_bytes, device)
        self.host: torch.Tensor | None = None
        """As much memory of the host, for transports whose messages do not take device pointers."""
        if has_host:
            self.host = (torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
                         if device.type == "cuda" else allocate(num_bytes, "cpu"))
        self._taken: dict[int, int] = {}  # start → end, in order of starts
        self._waiting: deque[object] = deque()

    @property
    def message_memory(self) -> torch.Tensor:
        return self.device if self.host is None else self.host

    def take(self, num_bytes: int, who: object) -> int | None:
        """Start of so many bytes, or ``None``: then ``who`` is in a queue, and must ask again."""
        start = self._find(num_bytes) if not self._waiting or self._waiting[0] is who else None
        if start is None:
            if who not in self._waiting:
                self._waiting.append(who)
            return None
        if self._waiting:
            self._waiting.popleft()
        self._taken[start] = start + num_bytes
        self._taken = dict(sorted(self._taken.items()))
        return start

    def give(self, start: int) -> None:
        del self._taken[start]

    @property
    def is_free(self) -> bool:
        return not self._taken and not self._waiting

    def _find(self, num_bytes: int) -> int | None:
        at = 0
        for start, end in self._taken.items():
            if start - at >= num_bytes:
                break
            at = -(-end // _ALIGNMENT) * _ALIGNMENT
        return at if at + num_bytes <= self.device.numel() else None


class PackedTransport:
    """Interface of :class:`~disagg_mpi.transfer.transports.Transport`, over a CUDA-aware MPI.

    ``comm`` is the transport's own. Both sides need equal ``chunk_bytes``, and may then be of either kind.
    What is sent must be complete on the device, and nothing on another stream may still use blocks that are
    received.
    """

    name = "packed"
    _has_host = False

    def __init__(self, comm: MPI.Comm, pool: torch.Tensor, view: CacheView, *,
                 chunk_bytes: int = CHUNK_BYTES, num_chunks: int = NUM_CHUNKS) -> None:
        check_pool(pool.nbytes, view)
        if not 0 < chunk_bytes < 2**31:
            raise ValueError(f"chunks of {chunk_bytes} bytes; MPI counts them, so from 1 to 2**31 - 1")
        self._comm = comm
        self._pool = pool
        self._view = view
        self._chunk_bytes = chunk_bytes
        self._num_chunks = num_chunks
        # One each way: unpacking should not wait for a chunk that is packed for somebody else.
        self._lanes = Lane(pool.device), Lane(pool.device)
        self._arenas: dict[type[_Moving], Arena] = {}

    def send(self, rank: int, tag: int, block_ids: Sequence[int], box: Box) -> Transfer:
        return _Send(self, rank, tag, block_ids, box)

    def receive(self, rank: int, tag: int, block_ids: Sequence[int], box: Box) -> Transfer:
        return _Receive(self, rank, tag, block_ids, box)

    def connect(self, sends: Sequence[tuple[int, Box]], receives: Sequence[tuple[int, Box]]) -> None:
        """At the start, when pools are empty: once what the first requests would wait for. Returns when done.

        Staging is made, kernels are compiled for each box's heads, and MPI meets each pair (a prototype's
        first message between two took 45 to 80 ms). Every rank names its pairs, source and target the same
        box, from token 0 on and a block or more; its bytes go from the first blocks to the first blocks.
        """
        moving = []
        for start, pairs in ((self.receive, receives), (self.send, sends)):
            for rank, box in pairs:
                blocks = range(self._view.layout.blocks_for(box.end_token))
                moving.append(start(rank, 0, blocks, box))
        while moving := [transfer for transfer in moving if not transfer.done()]:
            time.sleep(0)  # ranks may share a core

    def close(self) -> None:
        self._arenas.clear()

    def arena(self, kind: type[_Moving]) -> Arena:
        """Staging memory of a direction, made when it is first used: an instance may only send."""
        if kind not in self._arenas:
            view = self._view
            num_slots = view.layout.num_blocks * view.layout.tokens_per_block
            most = view.num_bytes(Box.of(view.shard, 0, num_slots))
            room = -(-max(min(self._chunk_bytes, most), view.layout.token_bytes) // _ALIGNMENT) * _ALIGNMENT
            self._arenas[kind] = Arena(
                room * self._num_chunks, self._pool.device, has_host=self._has_host)
        return self._arenas[kind]


class HostStagedTransport(PackedTransport):
    """The same through pinned memory of the host, for an MPI that does not take device pointers."""

    name = "host-staged"
    _has_host = True

    def __init__(self, comm: MPI.Comm, pool: torch.Tensor, view: CacheView, *,
                 chunk_bytes: int = HOST_CHUNK_BYTES, num_chunks: int = NUM_HOST_CHUNKS) -> None:
        super().__init__(comm, pool, view, chunk_bytes=chunk_bytes, num_chunks=num_chunks)


# ---- a transfer ----------------------------------------------------------------------------------


class _Moving(ABC):
    """What both sides of a transfer share: chunks, their room, and the copies between pool and room."""

    def __init__(self, transport: PackedTransport, rank: int, tag: int, block_ids: Sequence[int],
                 box: Box) -> None:
        from mpi4py import MPI

        enter_thread(transport._pool.device)
        view = transport._view
        self._mpi = MPI
        self._comm = transport._comm
        self._rank = rank
        self._tag = tag
        self._row_bytes = view.row_bytes(box)
        self._cell = kernels.cell_tokens(box.first_token, view.layout.tokens_per_block)
        self._slots = view.slots(block_ids, box, self._cell)
        self._box = box
        self._planes = kernels.pool_planes(transport._pool, view, box)
        self._arena = transport.arena(type(self))
        # Chunks that are not begun, in the order of their messages.
        self._next = deque(chunks_of(
            2 * box.num_layers, box.num_tokens, self._row_bytes, transport._chunk_bytes))
        # Those of chunks of whole planes, which are the same and uploaded once.
        self._whole: kernels.Cells | None = None

    def done(self, looks: int = 1) -> bool:
        enter_thread(self._planes.memory.device)
        end = time.monotonic() + _LOOK_SECONDS
        for _ in range(looks):
            if self._advance():
                return True
            if not self._is_moving() or time.monotonic() > end:
                break
        return False

    @abstractmethod
    def _advance(self) -> bool:
        """Start what can be started; whether all is over."""

    @abstractmethod
    def _is_moving(self) -> bool:
        """Whether looking again at once can help: not while others hold the room."""

    def _num_bytes(self, chunk: Chunk) -> int:
        return chunk.num_planes * chunk.num_tokens * self._row_bytes

    def _buffer(self, chunk: Chunk, start: int) -> list[object]:
        """The room of a chunk, as MPI takes it; it may be device memory, which only MPI looks into."""
        num_bytes = self._num_bytes(chunk)
        address = self._arena.message_memory.data_ptr() + start
        return [self._mpi.buffer.fromaddress(address, num_bytes), num_bytes, self._mpi.BYTE]

    def _copy(self, chunk: Chunk, start: int, *, into_pool: bool) -> kernels.Cells:
        """Between pool and room, in the current stream; returns what must live until it is done."""
        planes = self._planes
        pool = planes._replace(start=planes.start + chunk.first_plane * planes.plane_bytes)
        room = kernels.message_planes(self._arena.device, start, chunk.num_tokens, self._row_bytes)
        cells = self._cells(chunk, into_pool)
        source, target = (room, pool) if into_pool else (pool, room)
        kernels.Copy(source, target, cells.tokens, chunk.num_planes, self._row_bytes).run(cells)
        return cells

    def _cells(self, chunk: Chunk, into_pool: bool) -> kernels.Cells:
        is_whole = chunk.num_tokens == self._box.num_tokens
        if is_whole and self._whole is not None:
            return self._whole
        # A chunk that is part of a plane may begin within a cell.
        cell = kernels.cell_tokens(chunk.first_token, self._cell)
        within = np.arange(chunk.first_token, chunk.first_token + chunk.num_tokens, cell)
        in_pool = self._slots[within // self._cell] + within % self._cell
        in_room = within - chunk.first_token
        sides = (in_room, in_pool) if into_pool else (in_pool, in_room)
        cells = kernels.Cells(sides[0], sides[1], cell, chunk.num_tokens)
        if is_whole:
            self._whole = cells
        return cells

    def _move_host(self, chunk: Chunk, start: int, *, to_host: bool) -> None:
        if self._arena.host is not None:
            part = slice(start, start + self._num_bytes(chunk))
            host, device = self._arena.host[part], self._arena.device[part]
            (host if to_host else device).copy_(device if to_host else host, non_blocking=True)


class _Send(_Moving):
    """Pack, message, room free again."""

    def __init__(self, transport: PackedTransport, rank: int, tag: int, block_ids: Sequence[int],
                 box: Box) -> None:
        super().__init__(transport, rank, tag, block_ids, box)
        self._lane = transport._lanes[0]
        self._packing: deque[tuple[Chunk, int, Mark]] = deque()
        self._sent: list[tuple[MPI.Request, int]] = []
        self._advance()

    def _advance(self) -> bool:
        # In order: the messages of a tag are told apart by nothing else.
        while self._packing and self._packing[0][2].is_reached():
            chunk, start, _ = self._packing.popleft()
            self._sent.append(
                (self._comm.Isend(self._buffer(chunk, start), dest=self._rank, tag=self._tag), start))
        still = []
        for request, start in self._sent:
            if request.Test():
                self._arena.give(start)
            else:
                still.append((request, start))
        self._sent = still
        while self._next:
            start_of = self._arena.take(self._num_bytes(self._next[0]), self)
            if start_of is None:
                break
            chunk = self._next.popleft()
            with self._lane.use():
                used = self._copy(chunk, start_of, into_pool=False)
                self._move_host(chunk, start_of, to_host=True)
                self._packing.append((chunk, start_of, self._lane.mark(used)))
        return not (self._next or self._packing or self._sent)

    def _is_moving(self) -> bool:
        return bool(self._packing or self._sent)


class _Receive(_Moving):
    """Message, unpack, room free again."""

    def __init__(self, transport: PackedTransport, rank: int, tag: int, block_ids: Sequence[int],
                 box: Box) -> None:
        super().__init__(transport, rank, tag, block_ids, box)
        self._lane = transport._lanes[1]
        self._matched: deque[tuple[Chunk, MPI.Message]] = deque()
        self._coming: list[tuple[MPI.Request, Chunk, int]] = []
        self._unpacking: list[tuple[Mark, int]] = []

    def _advance(self) -> bool:
        still = []
        for mark, start in self._unpacking:
            if mark.is_reached():
                self._arena.give(start)
            else:
                still.append((mark, start))
        self._unpacking = still
        coming = []
        for request, chunk, start in self._coming:
            if request.Test():
                with self._lane.use():
                    self._move_host(chunk, start, to_host=False)
                    used = self._copy(chunk, start, into_pool=True)
                    self._unpacking.append((self._lane.mark(used), start))
            else:
                coming.append((request, chunk, start))
        self._coming = coming
        while self._next and (message := self._match(self._next[0])) is not None:
            self._matched.append((self._next.popleft(), message))
        while self._matched:
            chunk, message = self._matched[0]
            start_of = self._arena.take(self._num_bytes(chunk), self)
            if start_of is None:
                break
            self._matched.popleft()
            self._coming.append((message.Irecv(self._buffer(chunk, start_of)), chunk, start_of))
        return not (self._next or self._matched or self._coming or self._unpacking)

    def _match(self, chunk: Chunk) -> MPI.Message | None:
        """The chunk's message, if it has begun to come: from then on it is no other receive's."""
        status = self._mpi.Status()
        message = self._comm.Improbe(self._rank, self._tag, status)
        if message is not None and status.Get_count(self._mpi.BYTE) != self._num_bytes(chunk):
            raise IntegrityError(
                f"rank {self._rank} sent {status.Get_count(self._mpi.BYTE)} bytes, "
                f"{self._num_bytes(chunk)} expected: {self._box}, {chunk}")
        return message

    def _is_moving(self) -> bool:
        return bool(self._coming or self._unpacking or (self._next and not self._matched))
