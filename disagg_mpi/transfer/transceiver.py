"""The hand-over's protocol between instances' leaders; each rank's :class:`~disagg_mpi.transfer.mover.Mover`
moves the bytes.

    context's leader                                 generation's leader
    offer(id, blocks) ── opaque_state ──(rank 0)──►  pull(id, state, reserved blocks)
      blocks kept                                      │ one pool for both? take the blocks, give the
                                                       │ reserved ones in exchange: no bytes move
                                                       │ else: every rank brings its part (mover)
         ◄───────────── Release(id, exchanged?) ───────┘ in place: generation may start
      blocks freed

    the same, with long prompts between hosts, while the context is still computed:

         ◄───────────── Watch(id) ─────────────────────  expect(id, instance, reserved blocks)
      computed(id, …)
         ────────────── Announce(piece) ──────────────►  every rank brings its part of the piece
         ────────────── Announce(last piece) ─────────►
    offer(id, blocks) ── opaque_state ──(rank 0)──►  proceed(id): goes on once all is in place
         ◄───────────── Release(id) ───────────────────

Generation pulls, so nothing arrives that has no place, and only what has been computed is asked for, so every
request for bytes can be answered at once. The transceiver never frees a block: it reports :class:`Pulled` and
:class:`Released`, and the engine, which owns the blocks, acts. What is offered or watched ends exactly
once: by a ``Release`` of whoever pulls, or by ``drop`` if nobody does. A pull that is abandoned while bytes
are on their way stays open until they have arrived: its blocks are no one else's till then. When a receive
is complete its bytes have left the sender, so the ``Release`` that follows is enough for the context's
leader to free its blocks on all ranks.

Followers have a transceiver too, for their mover; only leaders offer and pull.

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
from disagg_mpi.comm.messages import (
    Announce,
    Ended,
    PartDone,
    PullPart,
    PullRequest,
    Release,
    Watch,
)
from disagg_mpi.errors import IntegrityError, RequestError
from disagg_mpi.transfer.directory import SHARED, CacheDirectory
from disagg_mpi.transfer.layout import Box
from disagg_mpi.transfer.mover import Mover

# A watched context is announced in at most so many pieces of its prompt, and the last of them in so many
# groups of layers: the number of messages grows with pairs of ranks, never with tokens.
MAX_PIECES = 8
MAX_LAYER_GROUPS = 8
# A piece costs about 0.3 ms of messages on each side; below this many tokens it is not worth its own.
MIN_PIECE_TOKENS = 128


class TransferState(msgspec.Struct, frozen=True, array_like=True):
    """Where a finished context lies: the opaque state of ``context_phase_params``."""

    instance: int
    block_ids: list[int]
    num_tokens: int


class Pulled(msgspec.Struct, frozen=True):
    """A pull is over: the KV-cache is in place, or it was abandoned."""

    request_id: int
    taken: list[int] | None
    """Blocks taken over in a shared pool, in place of as many reserved ones, which were given away."""
    abandoned: bool
    seconds: float
    """From the first piece's pull to the last one in place."""
    exposed: float
    """The part of it that generation had to wait for."""
    bytes_moved: int
    kv_bytes: int
    way: str
    num_pieces: int = 1


class Released(msgspec.Struct, frozen=True):
    """An offer is over: free its blocks, or own ``exchanged`` in their place."""

    request_id: int
    exchanged: list[int] | None


class _Watched(msgspec.Struct):
    """A request whose KV-cache a generation instance takes over while it is computed."""

    watcher: int
    """World rank of that instance's leader."""
    end_token: int = 0
    """Announced in all layers up to here."""
    end_layer: int = 0
    """The last piece, beyond it, is announced in the layers below this."""


class _Offer(msgspec.Struct):
    block_ids: list[int]
    num_tokens: int


class _Pull(msgspec.Struct):
    """A pull in which bytes move."""

    source_id: int
    source_instance: int
    block_ids: list[int]
    num_tokens: int
    first_token: int
    """The positions before it are in place already."""
    way: str
    go_at: float | None
    """When generation could have gone on; ``None`` while the context is computed."""
    start: float = 0.0
    missing: int = 0
    """Layers times tokens that have not been asked for yet."""
    open_parts: int = 0
    num_pieces: int = 0
    in_place_at: float = 0.0
    abandoned: bool = False


class Transceiver:
    """Both ends of the hand-over for one rank; it owns the open pulls and offers, not the blocks."""

    def __init__(
        self, rank: int, instance: int, channel: Channel, directory: CacheDirectory, mover: Mover
    ) -> None:
        self._rank = rank
        self._instance = instance
        self._channel = channel
        self._directory = directory
        self._mover = mover
        self._group = directory.groups[instance]
        self._num_layers = max(directory.views[r].shard.end_layer for r in self._group)
        self._lock = threading.Lock()
        self.has_thread = False
        """Whether a progress thread advances this transceiver."""
        self.wake_thread: Callable[[], None] = lambda: None
        """Tells that thread that there is something to move."""
        self._offers: dict[int, _Offer] = {}
        self._watched: dict[int, _Watched] = {}
        # Given up, but a watcher may still read the blocks.
        self._ending: set[int] = set()
        self._pulls: dict[int, _Pull] = {}
        # Expected pulls: (leader of the context, its request) → request here.
        self._by_source: dict[tuple[int, int], int] = {}
        self._pieces: dict[int, int] = {}  # piece → request
        self._next_piece = 0
        self._done: list[Pulled | Released] = []

    def fetches(self, source: int | bytes) -> bool:
        """Whether taking over from an instance, or from the one that a state names, moves bytes."""
        if isinstance(source, bytes):
            try:
                source = self._decode(source).instance
            except RequestError:
                return False  # the pull will say so
        return not self._directory.is_exchange(source, self._instance)

    @property
    def pool(self) -> str:
        """Name of the memory that this rank's cache lies in, and of the array in it."""
        view = self._directory.views[self._rank]
        return f"{view.memory}+{view.offset}"

    # ---- context side ----

    def offer(self, request_id: int, block_ids: Sequence[int], num_tokens: int) -> bytes:
        """Keep ``block_ids`` for whoever pulls; returns the opaque state that it needs.

        ``block_ids`` may be longer than ``num_tokens`` needs: in a shared pool the room for the
        output goes along, so that the request stays contiguous.
        """
        with self._lock:
            self._offers[request_id] = _Offer(list(block_ids), num_tokens)
            watched = self._watched.get(request_id)
            if watched is not None:
                self._computed(request_id, watched, block_ids, num_tokens, num_tokens, self._num_layers)
        return msgspec.msgpack.encode(TransferState(self._instance, list(block_ids), num_tokens))

    def is_watched(self, request_id: int) -> bool:
        """Whether it is worth saying what has been :meth:`computed`."""
        return request_id in self._watched

    def computed(self, request_id: int, block_ids: Sequence[int], num_tokens: int, end_token: int,
                 end_layer: int | None = None) -> None:
        """All layers below ``end_layer`` (``None``: all) are in the pool up to ``end_token``."""
        with self._lock:
            watched = self._watched.get(request_id)
            if watched is not None:
                self._computed(request_id, watched, block_ids, num_tokens, end_token,
                               self._num_layers if end_layer is None else end_layer)
        if self._channel.num_pending:
            self.wake_thread()  # a long message moves only while MPI is called

    def has_offer(self, request_id: int) -> bool:
        return request_id in self._offers or request_id in self._ending

    def end(self, request_id: int) -> bool:
        """A context is given up. ``True``: somebody watches it and may still read its blocks, a
        :class:`Released` follows; ``False``: the blocks are the caller's at once."""
        with self._lock:
            watched = self._watched.get(request_id)
            if watched is None:
                return False
            self._ending.add(request_id)
            self._channel.send(watched.watcher, Ended(request_id))
        return True

    def drop(self, request_id: int) -> None:
        """End an offer that nobody has been told of, or that nobody will pull."""
        with self._lock:
            if request_id not in self._offers:
                return
            del self._offers[request_id]
            watched = self._watched.get(request_id)
            if watched is None:
                self._done.append(Released(request_id, None))
            else:
                self._ending.add(request_id)
                self._channel.send(watched.watcher, Ended(request_id))

    # ---- generation side ----

    def pull(
        self, request_id: int, source_id: int, state: bytes, block_ids: Sequence[int], num_tokens: int,
        first_token: int = 0,
    ) -> None:
        """Bring the KV-cache that ``state`` describes into ``block_ids``, which the caller reserved.

        ``num_tokens``: positions that it must hold, of which those before ``first_token`` are in place
        already. Raises :class:`RequestError` if it does not hold them, or there are too few blocks.
        """
        source = self._decode(state)
        if num_tokens != source.num_tokens:
            raise RequestError(f"the context phase computed {source.num_tokens} tokens, the prompt has "
                               f"{num_tokens}")
        view = self._directory.views[self._rank]
        needed = view.layout.blocks_for(num_tokens)
        if len(block_ids) < needed:
            raise RequestError(f"{needed} blocks to hand over, {len(block_ids)} reserved")
        now = time.monotonic()
        with self._lock:
            if self._directory.is_exchange(source.instance, self._instance):
                taken = self._exchange(source, source_id, block_ids)
                seconds = time.monotonic() - now
                self._done.append(Pulled(request_id, taken, False, seconds, seconds, 0,
                                         self._kv_bytes(num_tokens), SHARED))
                return
            pull = self._open(request_id, source_id, source.instance, block_ids, num_tokens, first_token)
            pull.go_at = now
            try:
                self._bring(request_id, pull, source.block_ids, first_token, num_tokens, 0, self._num_layers)
            except RequestError:
                self._forget(request_id, pull)
                raise
            self._finish_pulls()
        self.wake_thread()

    def expect(
        self, request_id: int, source_id: int, source_instance: int, block_ids: Sequence[int],
        num_tokens: int, first_token: int = 0,
    ) -> None:
        """The same for a context that is still computed: bring each piece as it is announced."""
        with self._lock:
            self._open(request_id, source_id, source_instance, block_ids, num_tokens, first_token)
            leader = self._directory.leader(source_instance)
            self._by_source[leader, source_id] = request_id
            self._channel.send(leader, Watch(source_id))
        self.wake_thread()

    def proceed(self, request_id: int) -> None:
        """The context of an expected pull is over: :class:`Pulled` follows when all is in place."""
        with self._lock:
            pull = self._pulls.get(request_id)
            if pull is not None:
                pull.go_at = time.monotonic()
                self._finish_pulls()

    def abandon(self, request_id: int) -> bool:
        """Give up a pull; ``True`` if it was open (a :class:`Pulled` with ``abandoned`` follows)."""
        with self._lock:
            pull = self._pulls.get(request_id)
            if pull is not None:
                pull.abandoned = True
                self._finish_pulls()
                return True
            for at, event in enumerate(self._done):
                if isinstance(event, Pulled) and event.request_id == request_id:
                    self._done[at] = msgspec.structs.replace(event, abandoned=True)
                    return True
            return False

    def refuse(self, source_id: int, state: bytes) -> None:
        """Tell the context side that its offer will not be pulled.

        An expected pull that was abandoned tells it by itself, when no byte is on its way any more.
        """
        leader = self._directory.leader(self._decode(state).instance)
        with self._lock:
            if (leader, source_id) not in self._by_source:
                self._channel.send(leader, Release(source_id, None))

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
        return self._mover.is_moving or self._channel.num_pending > 0

    @property
    def is_urgent(self) -> bool:
        """Whether they are moving right now, so that a sleep would hold them up."""
        with self._lock:
            return self._mover.is_urgent

    @property
    def num_open(self) -> int:
        return len(self._offers) + len(self._ending) + len(self._pulls) + len(self._done)

    def close(self) -> None:
        """The end; nothing may be open."""
        self._mover.close()

    # ---- inside; the lock is held ----

    def _advance(self) -> bool:
        num_over = len(self._done)
        for rank, message in self._channel.poll():
            self._take(rank, message)
        for piece in self._mover.advance():
            if piece in self._pieces:
                self._part_done(piece)
            else:
                self._channel.send(self._group[0], PartDone(piece))
        self._finish_pulls()
        return len(self._done) > num_over

    def _take(self, rank: int, message: object) -> None:
        if isinstance(message, PullRequest):
            self._mover.serve(rank, message)
        elif isinstance(message, PullPart):
            self._mover.start(message)
        elif isinstance(message, PartDone):
            self._part_done(message.piece)
        elif isinstance(message, Release):
            self._released(rank, message)
        elif isinstance(message, Watch):
            self._watch(rank, message.request_id)
        elif isinstance(message, Announce):
            request_id = self._by_source.get((rank, message.request_id))
            if request_id is not None and not self._pulls[request_id].abandoned:
                self._bring(request_id, self._pulls[request_id], message.block_ids, message.first_token,
                            message.end_token, message.first_layer, message.end_layer)
        elif isinstance(message, Ended):
            # A pull that is open ends with a release of its own: rank 0 gives it up too.
            if (rank, message.request_id) not in self._by_source:
                self._channel.send(rank, Release(message.request_id, None))
        else:
            raise TypeError(f"a hand-over takes no {type(message).__name__}")

    def _watch(self, rank: int, request_id: int) -> None:
        watched = self._watched[request_id] = _Watched(rank)
        offer = self._offers.get(request_id)
        if offer is not None:
            self._computed(request_id, watched, offer.block_ids, offer.num_tokens, offer.num_tokens,
                           self._num_layers)

    def _computed(self, request_id: int, watched: _Watched, block_ids: Sequence[int], num_tokens: int,
                  end_token: int, end_layer: int) -> None:
        """Announce what is worth a piece of its own; the last piece always is."""
        is_last = end_token == num_tokens
        if end_token <= watched.end_token:
            return
        if is_last:
            group = max(1, -(-self._num_layers // MAX_LAYER_GROUPS))
            if end_layer < self._num_layers and end_layer - watched.end_layer < group:
                return
        else:
            least = max(MIN_PIECE_TOKENS, -(-num_tokens // MAX_PIECES))
            if end_layer < self._num_layers or end_token - watched.end_token < least:
                return
        if end_layer > watched.end_layer:
            self._channel.send(watched.watcher, Announce(
                request_id, list(block_ids), watched.end_token, end_token, watched.end_layer, end_layer))
        watched.end_layer = end_layer
        if end_layer == self._num_layers:
            watched.end_token, watched.end_layer = end_token, 0

    def _released(self, rank: int, message: Release) -> None:
        request_id = message.request_id
        was_watched = self._watched.pop(request_id, None) is not None
        if request_id in self._ending:
            self._ending.discard(request_id)
        elif self._offers.pop(request_id, None) is None:
            if was_watched:
                return  # its watcher has given it up; the context goes on, or never began
            _check_unknown(rank, message)
            return
        self._done.append(Released(request_id, message.exchanged))

    def _open(self, request_id: int, source_id: int, instance: int, block_ids: Sequence[int],
              num_tokens: int, first_token: int) -> _Pull:
        pull = _Pull(source_id, instance, list(block_ids), num_tokens, first_token,
                     self._directory.way(instance, self._instance), None,
                     missing=self._num_layers * (num_tokens - first_token))
        self._pulls[request_id] = pull
        return pull

    def _bring(self, request_id: int, pull: _Pull, source_blocks: Sequence[int], first_token: int,
               end_token: int, first_layer: int, end_layer: int) -> None:
        """Have every rank of this instance bring its part of a piece."""
        first_token = max(first_token, pull.first_token)
        if first_token >= end_token or first_layer >= end_layer:
            return
        piece = self._next_piece
        self._next_piece += 1
        part = PullPart(piece, pull.source_instance, list(source_blocks), pull.block_ids, first_token,
                        end_token, first_layer, end_layer)
        pull.start = pull.start or time.monotonic()
        pull.num_pieces += 1
        pull.missing -= (end_token - first_token) * (end_layer - first_layer)
        taking = [index for index in range(len(self._group)) if self._mover.takes_part(part, index)]
        pull.open_parts += len(taking)
        self._pieces[piece] = request_id
        for index in taking:
            if self._group[index] == self._rank:
                self._mover.start(part)
            else:
                self._channel.send(self._group[index], part)

    def _part_done(self, piece: int) -> None:
        pull = self._pulls[self._pieces[piece]]
        pull.open_parts -= 1
        pull.in_place_at = time.monotonic()

    def _finish_pulls(self) -> None:
        """Report the pulls that are over."""
        for request_id, pull in list(self._pulls.items()):
            given_up = pull.abandoned
            whole = not pull.missing and pull.go_at is not None
            if pull.open_parts or not (given_up or whole):
                continue
            now = time.monotonic()
            self._forget(request_id, pull)
            self._channel.send(self._directory.leader(pull.source_instance),
                               Release(pull.source_id, None, was_read=pull.num_pieces > 0))
            moved = self._kv_bytes(pull.num_tokens - pull.first_token) if whole else 0
            start = pull.start or now
            go_at = pull.go_at if pull.go_at is not None else now
            self._done.append(Pulled(
                request_id, None, given_up, max(pull.in_place_at - start, 0.0),
                max(now - go_at, 0.0), moved, self._kv_bytes(pull.num_tokens), pull.way,
                pull.num_pieces))

    def _forget(self, request_id: int, pull: _Pull) -> None:
        del self._pulls[request_id]
        source = self._directory.leader(pull.source_instance), pull.source_id
        if self._by_source.get(source) == request_id:
            del self._by_source[source]
        for piece in [p for p, owner in self._pieces.items() if owner == request_id]:
            del self._pieces[piece]

    def _exchange(
        self, source: TransferState, source_id: int, block_ids: Sequence[int]
    ) -> list[int]:
        """Take the context's blocks, give reserved ones in return; the blocks taken."""
        count = min(len(source.block_ids), len(block_ids))
        # Whatever the context holds beyond our reservation goes back with the exchange.
        given = [*block_ids[:count], *source.block_ids[count:]]
        self._channel.send(self._directory.leader(source.instance), Release(source_id, given))
        return source.block_ids[:count]

    def _kv_bytes(self, num_tokens: int) -> int:
        """Bytes that this instance's ranks hold of so many tokens, duplicated heads counted each time."""
        views = (self._directory.views[rank] for rank in self._group)
        return sum(view.num_bytes(Box.of(view.shard, 0, num_tokens)) for view in views)

    def _decode(self, state: bytes) -> TransferState:
        try:
            source = msgspec.msgpack.decode(state, type=TransferState)
        except msgspec.MsgspecError as error:
            raise RequestError(f"the context_phase_params are not of this executor: {error}") from None
        if not 0 <= source.instance < len(self._directory.groups):
            raise RequestError(f"the context_phase_params name instance {source.instance}; this job has "
                               f"{len(self._directory.groups)}")
        return source


def _check_unknown(rank: int, message: Release) -> None:
    """A release of no open offer: harmless if it only lets go, else somebody's tokens would be wrong.

    It takes a second use of the same ``context_phase_params``, or a use after they were given up: rank 0
    never does either, a script that leads executors by hand may.
    """
    if message.exchanged is not None or message.was_read:
        raise IntegrityError(
            f"rank {rank} took over request {message.request_id}, whose context is no longer held here; "
            "context_phase_params are good for one generation request")
