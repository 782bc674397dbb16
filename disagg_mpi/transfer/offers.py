"""The context's end of the hand-over: what is kept for whoever pulls, and announced to whoever watches.

What is offered or watched ends exactly once: by a ``Release`` of whoever pulls, or by :meth:`Offers.drop` or
:meth:`Offers.end` if nobody does; what a watcher may still read waits for its ``Release`` even then. That is
a leader's; a follower has an :class:`Offers` too, always empty. Called with the transceiver's lock held, but
for ``len``, ``in``, :meth:`Offers.is_watched` and :attr:`Offers.is_idle`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from disagg_mpi.comm.channel import Channel
from disagg_mpi.comm.messages import Announce, Ended, Release
from disagg_mpi.errors import IntegrityError

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


class Offers:
    """The offers of one instance; the blocks are the engine's."""

    def __init__(self, instance: int, num_layers: int, channel: Channel,
                 report: Callable[[Released], None]) -> None:
        """``report`` is told what is over."""
        self._instance = instance
        self._num_layers = num_layers
        self._channel = channel
        self._report = report
        self._offers: dict[int, _Offer] = {}
        self._watched: dict[int, _Watched] = {}
        # Given up, but a watcher may still read the blocks.
        self._ending: set[int] = set()

    def __len__(self) -> int:
        """Offers that are not over."""
        return len(self._offers) + len(self._ending)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._offers or request_id in self._ending

    @property
    def is_idle(self) -> bool:
        """Nothing is kept, and nobody watches."""
        return not (self._offers or self._watched or self._ending)

    # ---- the engine's ----

    def add(self, request_id: int, block_ids: Sequence[int], num_tokens: int) -> bytes:
        """Keep ``block_ids``; the opaque state that whoever pulls needs."""
        self._offers[request_id] = _Offer(list(block_ids), num_tokens)
        self.announce(request_id, block_ids, num_tokens, num_tokens)
        return msgspec.msgpack.encode(TransferState(self._instance, list(block_ids), num_tokens))

    def is_watched(self, request_id: int) -> bool:
        return request_id in self._watched

    def announce(self, request_id: int, block_ids: Sequence[int], num_tokens: int, end_token: int,
                 end_layer: int | None = None) -> None:
        """All layers below ``end_layer`` (``None``: all) are computed up to ``end_token``: a watcher is told
        of what is worth a piece of its own; the last piece always is."""
        watched = self._watched.get(request_id)
        if watched is None or end_token <= watched.end_token:
            return
        if end_layer is None:
            end_layer = self._num_layers
        if end_token == num_tokens:
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

    def end(self, request_id: int) -> bool:
        """A context is given up; whether a watcher may still read its blocks."""
        watched = self._watched.get(request_id)
        if watched is None:
            return False
        self._ending.add(request_id)
        self._channel.send(watched.watcher, Ended(request_id))
        return True

    def drop(self, request_id: int) -> None:
        """End an offer that nobody has been told of, or that nobody will pull."""
        if self._offers.pop(request_id, None) is not None and not self.end(request_id):
            self._report(Released(request_id, None))

    # ---- a generation's leader has sent ----

    def watch(self, rank: int, request_id: int) -> None:
        self._watched[request_id] = _Watched(rank)
        offer = self._offers.get(request_id)
        if offer is not None:
            self.announce(request_id, offer.block_ids, offer.num_tokens, offer.num_tokens)

    def release(self, rank: int, message: Release) -> None:
        """Raises :class:`IntegrityError` where blocks were read or taken that had another owner by then."""
        request_id = message.request_id
        was_watched = self._watched.pop(request_id, None) is not None
        if request_id in self._ending:
            self._ending.discard(request_id)
        elif self._offers.pop(request_id, None) is None:
            if was_watched:
                return  # its watcher has given it up; the context goes on, or never began
            _check_unknown(rank, message)
            return
        self._report(Released(request_id, message.exchanged))


def _check_unknown(rank: int, message: Release) -> None:
    """A release of no open offer: harmless if it only lets go, else somebody's tokens would be wrong.

    It takes a second use of the same ``context_phase_params``, or a use after they were given up: rank 0
    never does either, a script that leads executors by hand may.
    """
    if message.exchanged is not None or message.was_read:
        raise IntegrityError(
            f"rank {rank} took over request {message.request_id}, whose context is no longer held here; "
            "context_phase_params are good for one generation request")
