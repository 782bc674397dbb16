"""The hand-over's protocol, one :class:`Transceiver` a rank.

    context                                          generation
    offer(id, blocks) ── opaque_state ──(rank 0)──►  pull(id, state, reserved blocks)
      blocks kept                                      │ one pool for both? take the blocks, give the
                                                       │ reserved ones in exchange: no bytes move
         ◄───────────── PullRequest(id, tag) ──────────┤ else: post the receive, then ask
      send ═══════════════ KV bytes ═══════════════►   │ wait
         ◄───────────── Release(id, exchanged?) ───────┘ in place: generation may start
      blocks freed

Generation pulls, so nothing arrives that has no place. The transceiver never frees a block: it reports
:class:`Pulled` and :class:`Released`, and the engine, which owns the blocks, acts. An offer ends exactly
once: by a ``Release`` of whoever pulled it, or by ``drop`` if nobody ever will. A pull that is abandoned
while bytes are on their way stays open until they have arrived: its blocks are no one else's till then.

Tags are chosen by the receiver and unique among its open receives, so two transfers cannot meet.

Two threads may use a transceiver: the engine's, which offers, pulls and takes what is over, and a
:class:`~disagg_mpi.transfer.progress.ProgressThread`, which calls :meth:`Transceiver.advance`. Without that
thread the engine's calls advance it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from disagg_mpi.comm.channel import Channel
from disagg_mpi.comm.messages import PullRequest, Release
from disagg_mpi.errors import IntegrityError, RequestError
from disagg_mpi.transfer.layout import KvLayout
from disagg_mpi.transfer.transports import Transfer, Transport

SHARED = "shared"
"""Name of the way in which the table moves and the bytes stay."""

# How long an open transfer is looked at without sleeping: what its bytes take at 1 GB/s, and a moment
# for the peer to answer. On one host both sides must call MPI for bytes to move, and sleeping 50 µs
# between the calls cuts 14 GB/s to 0.1; a peer that is later than this is busy with something else.
_SPIN_BYTES_PER_S = 1e9
_SPIN_SECONDS = 0.005
# Looks at such a transfer a round, about 1 ms: each moves some fragments of 32 KiB, and a round of this
# module's Python, with its turn for other threads, costs as much as many of them: 1 look a round gives
# 1.6 GB/s, 64 give 6.2, 1000 give 11 (135 MiB, openmpi, memcpy 14 to 18).
_SPIN_LOOKS = 1000


class TransferState(msgspec.Struct, frozen=True, array_like=True):
    """Where a finished context lies: the opaque state of ``context_phase_params``."""

    rank: int
    pool: str
    """Name of the memory that holds the blocks; equal names mean the same bytes."""
    layout: KvLayout
    block_ids: list[int]
    num_tokens: int


class Pulled(msgspec.Struct, frozen=True):
    """A pull is over: the KV-cache is in place, or it was abandoned."""

    request_id: int
    taken: list[int] | None
    """Blocks taken over in a shared pool, in place of as many reserved ones, which were given away."""
    abandoned: bool
    seconds: float
    bytes_moved: int
    kv_bytes: int
    transport: str


class Released(msgspec.Struct, frozen=True):
    """An offer is over: free its blocks, or own ``exchanged`` in their place."""

    request_id: int
    exchanged: list[int] | None


class _Offer(msgspec.Struct):
    block_ids: list[int]
    num_tokens: int
    transfer: Transfer | None = None
    release: Release | None = None
    spin_until: float = 0.0


class _Pull(msgspec.Struct):
    source: int
    source_id: int
    transfer: Transfer
    tag: int
    kv_bytes: int
    start: float
    spin_until: float
    abandoned: bool = False


class Transceiver:
    """Both ends of the hand-over for one rank; it owns the open transfers, not the blocks."""

    def __init__(
        self,
        rank: int,
        channel: Channel,
        transport: Transport,
        layout: KvLayout,
        *,
        pool: str,
        use_shared: bool,
        max_tag: int = 2**15 - 1,
    ) -> None:
        self._rank = rank
        self._channel = channel
        self._transport = transport
        self._layout = layout
        self.pool = pool
        self._use_shared = use_shared
        self._max_tag = max_tag
        self._next_tag = 0
        self._lock = threading.Lock()
        self.has_thread = False
        """Whether a progress thread advances this transceiver."""
        self.wake_thread: Callable[[], None] = lambda: None
        """Tells that thread that there is something to move."""
        self._offers: dict[int, _Offer] = {}
        self._pulls: dict[int, _Pull] = {}
        self._tags: set[int] = set()
        self._done: list[Pulled | Released] = []

    # ---- context side ----

    def offer(self, request_id: int, block_ids: Sequence[int], num_tokens: int) -> bytes:
        """Keep ``block_ids`` for whoever pulls; returns the opaque state that it needs.

        ``block_ids`` may be longer than ``num_tokens`` needs: in a shared pool the room for the
        output goes along, so that the request stays contiguous.
        """
        with self._lock:
            self._offers[request_id] = _Offer(list(block_ids), num_tokens)
        return msgspec.msgpack.encode(
            TransferState(self._rank, self.pool, self._layout, list(block_ids), num_tokens))

    def has_offer(self, request_id: int) -> bool:
        return request_id in self._offers

    def drop(self, request_id: int) -> None:
        """End an offer that nobody has been told of, or that nobody will pull."""
        with self._lock:
            offer = self._offers.get(request_id)
            if offer is not None and offer.transfer is None:
                del self._offers[request_id]
                self._done.append(Released(request_id, None))

    # ---- generation side ----

    def pull(
        self, request_id: int, source_id: int, state: bytes, block_ids: Sequence[int],
        num_tokens: int | None = None,
    ) -> None:
        """Bring the KV-cache that ``state`` describes into ``block_ids``, which the caller reserved.

        ``num_tokens``: positions that it must hold. Raises :class:`RequestError` if it does not, or the
        two pools cannot be matched.
        """
        source = _decode(state)
        layout = self._layout
        if not layout.same_block(source.layout):
            raise RequestError(f"the context's KV blocks ({source.layout}) and this instance's "
                               f"({layout}) differ")
        if num_tokens not in (None, source.num_tokens):
            raise RequestError(f"the context phase computed {source.num_tokens} tokens, the prompt has "
                               f"{num_tokens}")
        needed = layout.blocks_for(source.num_tokens)
        if len(block_ids) < needed:
            raise RequestError(f"{needed} blocks to hand over, {len(block_ids)} reserved")
        start = time.monotonic()
        kv_bytes = layout.kv_bytes(source.num_tokens)
        with self._lock:
            if self._use_shared and source.pool == self.pool:
                taken = self._exchange(source, source_id, block_ids)
                self._done.append(Pulled(request_id, taken, False, time.monotonic() - start, 0,
                                         kv_bytes, SHARED))
                return
            tag = self._take_tag()
            transfer = self._transport.receive(source.rank, tag, block_ids, source.num_tokens)
            self._pulls[request_id] = _Pull(source.rank, source_id, transfer, tag, kv_bytes, start,
                                            _spin_until(kv_bytes))
            self._channel.send(source.rank, PullRequest(source_id, tag))
        self.wake_thread()

    def abandon(self, request_id: int) -> bool:
        """Give up a pull; ``True`` if it was open (a :class:`Pulled` with ``abandoned`` follows)."""
        with self._lock:
            pull = self._pulls.get(request_id)
            if pull is not None:
                pull.abandoned = True
                return True
            for at, event in enumerate(self._done):
                if isinstance(event, Pulled) and event.request_id == request_id:
                    self._done[at] = msgspec.structs.replace(event, abandoned=True)
                    return True
            return False

    def refuse(self, source_id: int, state: bytes) -> None:
        """Tell the context side that its offer will not be pulled."""
        source = _decode(state)
        with self._lock:
            self._channel.send(source.rank, Release(source_id, None))

    # ---- both ----

    def progress(self) -> list[Pulled | Released]:
        """What is over since the last call."""
        with self._lock:
            if not self.has_thread:
                self._advance()
            done, self._done = self._done, []
            return done

    def advance(self) -> bool:
        """Take in messages and move transfers on; whether anything is over that was not before."""
        with self._lock:
            return self._advance()

    @property
    def is_moving(self) -> bool:
        """Whether bytes of this rank are on their way, so that :meth:`advance` is due often."""
        return bool(self._pulls) or any(offer.transfer for offer in list(self._offers.values()))

    @property
    def is_urgent(self) -> bool:
        """Whether they are moving right now, so that a sleep would hold them up."""
        now = time.monotonic()
        with self._lock:
            return (any(now < pull.spin_until for pull in self._pulls.values())
                    or any(offer.transfer is not None and now < offer.spin_until
                           for offer in self._offers.values()))

    @property
    def num_open(self) -> int:
        return len(self._offers) + len(self._pulls) + len(self._done)

    def close(self) -> None:
        """The end; nothing may be open."""
        self._transport.close()

    # ---- inside; the lock is held ----

    def _advance(self) -> bool:
        num_over = len(self._done)
        for rank, message in self._channel.poll():
            offer = self._offers.get(message.request_id)
            if offer is None:
                _check_unknown(rank, message)
                continue
            if isinstance(message, PullRequest):
                offer.transfer = self._transport.send(
                    rank, message.tag, offer.block_ids, offer.num_tokens)
                offer.spin_until = _spin_until(self._layout.kv_bytes(offer.num_tokens))
            else:
                offer.release = message
        now = time.monotonic()
        for request_id, offer in list(self._offers.items()):
            sent = offer.transfer is None or offer.transfer.done(_looks(now, offer.spin_until))
            if sent and offer.release is not None:
                del self._offers[request_id]
                self._done.append(Released(request_id, offer.release.exchanged))
        for request_id, pull in list(self._pulls.items()):
            if pull.transfer.done(_looks(now, pull.spin_until)):
                del self._pulls[request_id]
                self._tags.discard(pull.tag)
                self._channel.send(pull.source, Release(pull.source_id, None))
                self._done.append(Pulled(request_id, None, pull.abandoned,
                                         time.monotonic() - pull.start, pull.kv_bytes,
                                         pull.kv_bytes, self._transport.name))
        return len(self._done) > num_over

    def _exchange(
        self, source: TransferState, source_id: int, block_ids: Sequence[int]
    ) -> list[int]:
        """Take the context's blocks, give reserved ones in return; the blocks taken."""
        count = min(len(source.block_ids), len(block_ids))
        # Whatever the context holds beyond our reservation goes back with the exchange.
        given = [*block_ids[:count], *source.block_ids[count:]]
        self._channel.send(source.rank, Release(source_id, given))
        return source.block_ids[:count]

    def _take_tag(self) -> int:
        if len(self._tags) > self._max_tag:
            raise RequestError(f"{len(self._tags)} transfers are open, all tags are in use")
        while self._next_tag in self._tags:
            self._next_tag = (self._next_tag + 1) % (self._max_tag + 1)
        tag = self._next_tag
        self._tags.add(tag)
        self._next_tag = (tag + 1) % (self._max_tag + 1)
        return tag


def _check_unknown(rank: int, message: PullRequest | Release) -> None:
    """A message for no open offer: harmless if it only lets go, else somebody's tokens would be wrong.

    It takes a second use of the same ``context_phase_params``, or a use after they were given up: rank 0
    never does either, a script that leads executors by hand may.
    """
    if isinstance(message, PullRequest) or message.exchanged is not None:
        raise IntegrityError(
            f"rank {rank} pulls request {message.request_id}, whose context is no longer held here; "
            "context_phase_params are good for one generation request")


def _decode(state: bytes) -> TransferState:
    try:
        return msgspec.msgpack.decode(state, type=TransferState)
    except msgspec.MsgspecError as error:
        raise RequestError(f"the context_phase_params are not of this executor: {error}") from None


def _looks(now: float, spin_until: float) -> int:
    return _SPIN_LOOKS if now < spin_until else 1


def _spin_until(num_bytes: int) -> float:
    return time.monotonic() + _SPIN_SECONDS + num_bytes / _SPIN_BYTES_PER_S
