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
request for bytes can be answered at once. When a receive is complete its bytes have left the sender, so the
``Release`` that follows is enough for the context's leader to free its blocks on all ranks. The transceiver
never frees a block: it reports :class:`Pulled` and :class:`Released`, and the engine, which owns the blocks,
acts. ``offers`` and ``pulls`` are the two ends; here is what they share: messages, a lock, what is over.

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
from disagg_mpi.errors import RequestError
from disagg_mpi.transfer.directory import CacheDirectory
from disagg_mpi.transfer.mover import Mover
from disagg_mpi.transfer.offers import Offers, Released, TransferState
from disagg_mpi.transfer.pulls import Pulled, Pulls


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
        self._leader = directory.leader(instance)
        self._lock = threading.Lock()
        self.has_thread = False
        """Whether a progress thread advances this transceiver."""
        self.wake_thread: Callable[[], None] = lambda: None
        """Tells that thread that there is something to move."""
        self._over: list[Pulled | Released] = []
        num_layers = max(directory.views[r].shard.end_layer for r in directory.groups[instance])
        self._offers = Offers(instance, num_layers, channel, self._report)
        self._pulls = Pulls(rank, instance, num_layers, channel, directory, mover, self._report)

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
            return self._offers.add(request_id, block_ids, num_tokens)

    def is_watched(self, request_id: int) -> bool:
        """Whether it is worth saying what has been :meth:`computed`."""
        return self._offers.is_watched(request_id)

    def computed(self, request_id: int, block_ids: Sequence[int], num_tokens: int, end_token: int,
                 end_layer: int | None = None) -> None:
        """All layers below ``end_layer`` (``None``: all) are in the pool up to ``end_token``."""
        with self._lock:
            self._offers.announce(request_id, block_ids, num_tokens, end_token, end_layer)
        if self._channel.num_pending:
            self.wake_thread()  # a long message moves only while MPI is called

    def has_offer(self, request_id: int) -> bool:
        return request_id in self._offers

    def end(self, request_id: int) -> bool:
        """A context is given up. ``True``: somebody watches it and may still read its blocks, a
        :class:`Released` follows; ``False``: the blocks are the caller's at once."""
        with self._lock:
            return self._offers.end(request_id)

    def drop(self, request_id: int) -> None:
        """End an offer that nobody has been told of, or that nobody will pull."""
        with self._lock:
            self._offers.drop(request_id)

    # ---- generation side ----

    def pull(
        self, request_id: int, source_id: int, state: bytes, block_ids: Sequence[int], num_tokens: int,
        first_token: int = 0,
    ) -> None:
        """Bring the KV-cache that ``state`` describes into ``block_ids``, which the caller reserved.

        ``num_tokens``: positions that it must hold, of which those before ``first_token`` are in place
        already. Raises :class:`RequestError` if it does not hold them, or there are too few blocks, or tags.
        """
        source = self._decode(state)
        now = time.monotonic()  # waiting for the lock counts
        with self._lock:
            is_open = self._pulls.start(
                request_id, source_id, source, block_ids, num_tokens, first_token, now)
        if is_open:
            self.wake_thread()

    def expect(
        self, request_id: int, source_id: int, source_instance: int, block_ids: Sequence[int],
        num_tokens: int, first_token: int = 0,
    ) -> None:
        """The same for a context that is still computed: bring each piece as it is announced."""
        with self._lock:
            self._pulls.expect(request_id, source_id, source_instance, block_ids, num_tokens, first_token)
        self.wake_thread()

    def proceed(self, request_id: int) -> None:
        """The context of an expected pull is over: :class:`Pulled` follows when all is in place."""
        with self._lock:
            self._pulls.proceed(request_id)

    def abandon(self, request_id: int) -> bool:
        """Give up a pull; ``True`` if it was open (a :class:`Pulled` with ``abandoned`` follows)."""
        with self._lock:
            if self._pulls.abandon(request_id):
                return True
            for at, event in enumerate(self._over):
                if isinstance(event, Pulled) and event.request_id == request_id:
                    self._over[at] = msgspec.structs.replace(event, abandoned=True)
                    return True
            return False

    def refuse(self, source_id: int, state: bytes) -> None:
        """Tell the context side that its offer will not be pulled.

        An expected pull that was abandoned tells it by itself, when no byte is on its way any more.
        """
        leader = self._directory.leader(self._decode(state).instance)
        with self._lock:
            self._pulls.refuse(leader, source_id)

    # ---- both ----

    def progress(self) -> list[Pulled | Released]:
        """What is over since the last call."""
        with self._lock:
            if not self.has_thread:
                self._advance()
            over, self._over = self._over, []
            return over

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
        return len(self._offers) + len(self._pulls) + len(self._over)

    @property
    def is_idle(self) -> bool:
        """Nothing is open, and nothing is kept in mind of what was: so it is once all messages are taken."""
        return not self._over and self._offers.is_idle and self._pulls.is_idle

    def close(self) -> None:
        """The end; nothing may be open."""
        self._mover.close()

    # ---- inside ----

    def _decode(self, state: bytes) -> TransferState:
        try:
            source = msgspec.msgpack.decode(state, type=TransferState)
        except msgspec.MsgspecError as error:
            raise RequestError(f"the context_phase_params are not of this executor: {error}") from None
        if not 0 <= source.instance < len(self._directory.groups):
            raise RequestError(f"the context_phase_params name instance {source.instance}; this job has "
                               f"{len(self._directory.groups)}")
        return source

    # The rest is called with the lock held.

    def _report(self, event: Pulled | Released) -> None:
        self._over.append(event)

    def _advance(self) -> bool:
        num_over = len(self._over)
        for rank, message in self._channel.poll():
            self._take(rank, message)
        for piece in self._mover.advance():
            if self._pulls.has_piece(piece):
                self._pulls.part_done(piece)
            else:
                self._channel.send(self._leader, PartDone(piece))
        self._pulls.finish()
        return len(self._over) > num_over

    def _take(self, rank: int, message: object) -> None:
        if isinstance(message, PullRequest):
            self._mover.serve(rank, message)
        elif isinstance(message, PullPart):
            self._mover.start(message)
        elif isinstance(message, PartDone):
            self._pulls.part_done(message.piece)
        elif isinstance(message, Release):
            self._offers.release(rank, message)
        elif isinstance(message, Watch):
            self._offers.watch(rank, message.request_id)
        elif isinstance(message, Announce):
            self._pulls.announced(rank, message)
        elif isinstance(message, Ended):
            # A pull that is open ends with a release of its own: rank 0 gives it up too.
            self._pulls.refuse(rank, message.request_id)
        else:
            raise TypeError(f"a hand-over takes no {type(message).__name__}")
