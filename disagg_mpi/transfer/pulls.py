"""Generation's end of the hand-over: each pull from its first piece to the last one in place.

Every rank of the instance brings its part of a piece (``mover``); the leader, whose :class:`Pulls` this is,
counts parts and tokens that are missing; a follower has one too, always empty. A pull that is abandoned while
bytes are on their way stays open until they have arrived: its blocks are no one else's till then. However a
pull ends, its context's leader is sent one ``Release``; one that cannot be started is the caller's to refuse.
Called with the transceiver's lock held, but for ``len`` and :attr:`Pulls.is_idle`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec

from disagg_mpi.comm.channel import Channel
from disagg_mpi.comm.messages import Announce, PullPart, Release, Watch
from disagg_mpi.errors import RequestError
from disagg_mpi.transfer.directory import SHARED, CacheDirectory
from disagg_mpi.transfer.layout import Box
from disagg_mpi.transfer.mover import Mover
from disagg_mpi.transfer.offers import TransferState


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


class Pulls:
    """The pulls of one instance; the reserved blocks are the engine's."""

    def __init__(self, rank: int, instance: int, num_layers: int, channel: Channel, directory: CacheDirectory,
                 mover: Mover, report: Callable[[Pulled], None]) -> None:
        """``report`` is told what is over."""
        self._rank = rank
        self._instance = instance
        self._num_layers = num_layers
        self._channel = channel
        self._directory = directory
        self._group = directory.groups[instance]
        self._mover = mover
        self._report = report
        self._pulls: dict[int, _Pull] = {}
        # Expected pulls: (leader of the context, its request) → request here.
        self._by_source: dict[tuple[int, int], int] = {}
        self._pieces: dict[int, int] = {}  # piece → request
        self._next_piece = 0

    def __len__(self) -> int:
        return len(self._pulls)

    @property
    def is_idle(self) -> bool:
        """No pull is open, and nothing of one is kept."""
        return not (self._pulls or self._by_source or self._pieces)

    # ---- the engine's ----

    def start(self, request_id: int, source_id: int, source: TransferState, block_ids: Sequence[int],
              num_tokens: int, first_token: int, go_at: float) -> bool:
        """Of a context that is over. ``False``: blocks changed hands, and all is in place. ``go_at``: when
        generation asked for it. Raises :class:`RequestError` if the context computed another number of
        tokens, or there are too few ``block_ids``, or tags."""
        if num_tokens != source.num_tokens:
            raise RequestError(f"the context phase computed {source.num_tokens} tokens, the prompt has "
                               f"{num_tokens}")
        needed = self._directory.views[self._rank].layout.blocks_for(num_tokens)
        if len(block_ids) < needed:
            raise RequestError(f"{needed} blocks to hand over, {len(block_ids)} reserved")
        if self._directory.is_exchange(source.instance, self._instance):
            taken = self._exchange(source, source_id, block_ids)
            seconds = time.monotonic() - go_at
            self._report(Pulled(request_id, taken, False, seconds, seconds, 0, self._kv_bytes(num_tokens),
                                SHARED))
            return False
        pull = self._open(request_id, source_id, source.instance, block_ids, num_tokens, first_token)
        pull.go_at = go_at
        try:
            self._bring(request_id, pull, source.block_ids, first_token, num_tokens, 0, self._num_layers)
        except RequestError:
            self._forget(request_id, pull)
            raise
        self.finish()
        return True

    def expect(self, request_id: int, source_id: int, source_instance: int, block_ids: Sequence[int],
               num_tokens: int, first_token: int) -> None:
        """Of a context that is still computed: each piece is brought as it is announced."""
        self._open(request_id, source_id, source_instance, block_ids, num_tokens, first_token)
        leader = self._directory.leader(source_instance)
        self._by_source[leader, source_id] = request_id
        self._channel.send(leader, Watch(source_id))

    def proceed(self, request_id: int) -> None:
        """The context of an expected pull is over."""
        pull = self._pulls.get(request_id)
        if pull is not None:
            pull.go_at = time.monotonic()
            self.finish()

    def abandon(self, request_id: int) -> bool:
        """Give up a pull; whether it was open."""
        pull = self._pulls.get(request_id)
        if pull is None:
            return False
        pull.abandoned = True
        self.finish()
        return True

    def refuse(self, leader: int, source_id: int) -> None:
        """Let go of what a context's ``leader`` keeps, unless a pull of it is open, which ends by itself."""
        if (leader, source_id) not in self._by_source:
            self._channel.send(leader, Release(source_id, None))

    # ---- what comes from others ----

    def announced(self, rank: int, message: Announce) -> None:
        """A context's leader has a piece ready."""
        request_id = self._by_source.get((rank, message.request_id))
        if request_id is not None and not self._pulls[request_id].abandoned:
            self._bring(request_id, self._pulls[request_id], message.block_ids, message.first_token,
                        message.end_token, message.first_layer, message.end_layer)

    def has_piece(self, piece: int) -> bool:
        """Whether this rank counts the parts of a piece; on a follower its leader does."""
        return piece in self._pieces

    def part_done(self, piece: int) -> None:
        """A rank of this instance has its part in place."""
        pull = self._pulls[self._pieces[piece]]
        pull.open_parts -= 1
        pull.in_place_at = time.monotonic()

    # ---- after each of them ----

    def finish(self) -> None:
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
            self._report(Pulled(
                request_id, None, given_up, max(pull.in_place_at - start, 0.0), max(now - go_at, 0.0), moved,
                self._kv_bytes(pull.num_tokens), pull.way, pull.num_pieces))

    # ---- inside ----

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
