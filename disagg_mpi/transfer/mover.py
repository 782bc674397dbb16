"""One rank's part in moving bytes: sends what is asked for, brings what its leader says.

    generation's leader          its ranks                              context's ranks
      PullPart(piece) ─────────►  post receives ── PullRequest(box) ───►  send
                                  or copy, on one host   ◄═══ KV bytes ══
      PartDone(piece) ◄─────────  all of it is in place

Every rank of an instance has one (the leader's transceiver calls its own directly). It knows no requests and
owns no blocks: what may be read and written is the leaders' affair. Tags are chosen by the receiver and
unique among its open receives, so two transfers cannot meet. Not thread-safe: called with the transceiver's
lock held.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec

from disagg_mpi.comm.channel import Channel
from disagg_mpi.comm.messages import PullPart, PullRequest
from disagg_mpi.errors import RequestError
from disagg_mpi.transfer.directory import COPY, CacheDirectory
from disagg_mpi.transfer.layout import Box
from disagg_mpi.transfer.partition import Part
from disagg_mpi.transfer.transports import Copies, Transfer, Transport

# How long an open transfer is looked at without sleeping: what its bytes take at 1 GB/s, and a moment
# for the peer to answer. On one host both sides must call MPI for bytes to move, and sleeping 50 µs
# between the calls cuts 14 GB/s to 0.1; a peer that is later than this is busy with something else.
_SPIN_BYTES_PER_S = 1e9
_SPIN_SECONDS = 0.005
# Looks at such a transfer a round, about 1 ms: each moves some fragments of 32 KiB, and a round of this
# module's Python, with its turn for other threads, costs as much as many of them: 1 look a round gives
# 1.6 GB/s, 64 give 6.2, 1000 give 11 (135 MiB, openmpi, memcpy 14 to 18).
_SPIN_LOOKS = 1000


class _Open(msgspec.Struct):
    """A transfer on its way."""

    transfer: Transfer
    spin_until: float
    piece: int | None = None
    """The piece that waits for it; ``None``: it is a send."""
    tag: int | None = None

    def looks(self, now: float) -> int:
        return _SPIN_LOOKS if now < self.spin_until else 1


class Mover:
    """Owns this rank's open transfers."""

    def __init__(
        self,
        directory: CacheDirectory,
        instance: int,
        rank: int,
        channel: Channel,
        messages: Transport,
        copies: Copies | None,
        *,
        max_tag: int = 2**15 - 1,
    ) -> None:
        self._directory = directory
        self._instance = instance
        self._index = list(directory.groups[instance]).index(rank)
        self._view = directory.views[rank]
        self._channel = channel
        self._messages = messages
        self._copies = copies
        self._max_tag = max_tag
        self._next_tag = 0
        self._tags: set[int] = set()
        self._open: list[_Open] = []
        self._left: dict[int, int] = {}  # piece → its transfers that are not over
        self.num_requests = 0
        """Pull requests sent so far, each answered by one message of bytes."""

    def start(self, part: PullPart) -> None:
        """Bring this rank's part of a piece; :meth:`advance` reports the piece when it is here.

        Raises :class:`RequestError`, before anything is begun, if there are too few tags.
        """
        group = self._directory.groups[part.source_instance]
        boxes = [(group[source], box) for source, box in self._boxes(part)]
        if len(self._tags) + len(boxes) > self._max_tag + 1:
            raise RequestError(f"{len(self._tags)} transfers are open, of {self._max_tag + 1} that there are "
                               f"tags for; {len(boxes)} more are needed")
        for rank, box in boxes:
            spin_until = _spin_until(self._view.num_bytes(box))
            if self._copies is not None and self._directory.pair_way(rank, self._view.rank) == COPY:
                transfer = self._copies.receive(
                    self._directory.views[rank], part.source_block_ids, part.block_ids, box)
                self._open.append(_Open(transfer, spin_until, part.piece))
                continue
            tag = self._take_tag()
            transfer = self._messages.receive(rank, tag, part.block_ids, box)
            self._open.append(_Open(transfer, spin_until, part.piece, tag))
            self._channel.send(rank, PullRequest(tag, part.source_block_ids, msgspec.structs.astuple(box)))
            self.num_requests += 1
        self._left[part.piece] = len(boxes)

    def takes_part(self, part: PullPart, index: int) -> bool:
        """Whether rank ``index`` of this instance has anything to bring of a piece."""
        return any(True for _ in self._boxes(part, index))

    def serve(self, rank: int, request: PullRequest) -> None:
        """Send what a generation rank asks for."""
        box = Box(*request.box)
        self._open.append(_Open(self._messages.send(rank, request.tag, request.block_ids, box),
                                _spin_until(self._view.num_bytes(box))))

    def advance(self) -> list[int]:
        """Move transfers on; the pieces of which this rank's part is now in place."""
        now = time.monotonic()
        still = []
        for one in self._open:
            if not one.transfer.done(one.looks(now)):
                still.append(one)
                continue
            if one.tag is not None:
                self._tags.discard(one.tag)
            if one.piece is not None:
                self._left[one.piece] -= 1
        self._open = still
        done = [piece for piece, left in self._left.items() if not left]
        for piece in done:
            del self._left[piece]
        return done

    @property
    def is_moving(self) -> bool:
        return bool(self._open)

    @property
    def is_urgent(self) -> bool:
        """Whether bytes are moving right now, so that a sleep would hold them up."""
        now = time.monotonic()
        return any(now < one.spin_until for one in self._open)

    def close(self) -> None:
        self._messages.close()

    def _boxes(self, part: PullPart, index: int | None = None) -> Iterator[tuple[int, Box]]:
        """(local index of the source, what to bring from it) for one rank of this instance."""
        mine = self._index if index is None else index
        for one in self._directory.parts(part.source_instance, self._instance):
            if one.target == mine:
                box = _cut(one, part)
                if box.num_layers > 0 and box.num_tokens > 0:
                    yield one.source, box

    def _take_tag(self) -> int:
        while self._next_tag in self._tags:
            self._next_tag = (self._next_tag + 1) % (self._max_tag + 1)
        tag = self._next_tag
        self._tags.add(tag)
        self._next_tag = (tag + 1) % (self._max_tag + 1)
        return tag


def _cut(one: Part, part: PullPart) -> Box:
    """The layers and tokens of the piece in what ``one`` sends."""
    whole = Box.of(one, part.first_token, part.end_token)
    first = max(whole.first_layer, part.first_layer)
    end = min(whole.end_layer, part.end_layer)
    return msgspec.structs.replace(whole, first_layer=first, end_layer=max(first, end))


def _spin_until(num_bytes: int) -> float:
    return time.monotonic() + _SPIN_SECONDS + num_bytes / _SPIN_BYTES_PER_S
