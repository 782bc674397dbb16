"""Every message and tag, each with one definition.

Control messages are msgspec structs in one tagged union, encoded as msgpack and sent as bytes under one
tag; the reader dispatches on the type. Two kinds of traffic never share a communicator: control (this
module) and the bytes of the KV-cache (``transfer.transports``), so their tags cannot meet.
"""

from __future__ import annotations

from typing import Any

import msgspec

from disagg_mpi.request import (
    ContextPhaseParams,
    ExecutorLimits,
    ExecutorRequest,
    FinishReason,
    PoolBlocks,
    Response,
)

CONTROL_TAG = 1
"""The only tag on a control communicator."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all control messages; the class name travels as the tag."""


# ---- rank 0 → leader -------------------------------------------------------------------------------


class Enqueue(Message, frozen=True):
    """New requests for an instance."""

    requests: list[ExecutorRequest]


class Proceed(Message, frozen=True):
    """The context phase of a request that was enqueued early is over: go on with these."""

    request_id: int
    params: ContextPhaseParams


class Cancel(Message, frozen=True):
    """Give these requests up; each still gets its one final response."""

    request_ids: list[int]
    reason: FinishReason = "cancelled"


class DropOffer(Message, frozen=True):
    """Free the blocks of contexts that no generation instance will ever pull."""

    request_ids: list[int]


class IntegrityCheck(Message, frozen=True):
    """Say what you own; nothing should be, for nothing is running."""

    token: int


class Shutdown(Message, frozen=True):
    """Leave the service loop."""


# ---- leader → rank 0 -------------------------------------------------------------------------------


class Ready(Message, frozen=True):
    """An instance can take requests."""

    instance_id: int
    limits: ExecutorLimits
    ways: dict[int, str] = {}
    """Id of a context instance → how its KV-cache comes here."""
    pool: str = ""
    """Name of the memory whose prefix cache this instance reads; instances with equal names share it."""


class Step(Message, frozen=True):
    """What one step of an instance made."""

    instance_id: int
    responses: list[Response]


class IntegrityReport(Message, frozen=True):
    """Answer to :class:`IntegrityCheck`: empty ``problems`` is good."""

    token: int
    instance_id: int
    problems: list[str]
    pool: PoolBlocks | None = None


# ---- leader → its followers, in the order in which they are to be done -----------------------------------


class Batch(Message, frozen=True):
    """One step's work for every rank of an instance: packed tokens, and where their KV-cache lies.

    ``chunks`` are ``(first position, number of tokens, runs)``, the runs as ``(first slot, count)`` over all
    positions up to the chunk's end. ``keep`` are indices of the packed tokens whose logits are wanted.
    """

    number: int
    token_ids: list[int]
    chunks: list[tuple[int, int, list[tuple[int, int]]]]
    keep: list[int]


class PagedStep(Message, frozen=True):
    """One step's work for every rank of an instance on GPUs, where block tables and last tokens stay.

    A request has a *seat* as long as it runs: the row of its block table, and the place of its last token. A
    step has one entry of ``seats``, ``starts`` and ``lengths`` for each of its chunks.
    """

    number: int
    seats: list[int]
    starts: list[int]
    lengths: list[int]
    token_ids: list[int]
    """Packed; -1: the token that an earlier step chose for the seat."""
    tables: list[tuple[int, int, list[int]]]
    """(seat, place in its table, blocks from there on), where they are others than in the step before."""
    drawn: list[int]
    """Places of the chunks whose token is chosen on the GPU."""
    draws: list[tuple[int, float, int, float, float]]
    """Of these, the ones that are not greedy: (place in ``drawn``, temperature, top-k, top-p, random
    number)."""
    keep: list[int]
    """Places of the packed tokens whose logits the leader wants."""


class CopyBlocks(Message, frozen=True):
    """Copy whole blocks within the pool; every rank of the instance meets in a barrier afterwards."""

    sources: list[int]
    targets: list[int]


# ---- instance ↔ instance: the hand-over ------------------------------------------------------------


class PullPart(Message, frozen=True):
    """Generation's leader → its follower: bring your part of this piece into your memory."""

    piece: int
    """Unique among the leader's pieces; :class:`PartDone` gives it back."""
    source_instance: int
    source_block_ids: list[int]
    block_ids: list[int]
    first_token: int
    end_token: int
    first_layer: int
    end_layer: int


class PartDone(Message, frozen=True):
    """Generation's follower → its leader: my part of this piece is in place."""

    piece: int


class PullRequest(Message, frozen=True):
    """Generation rank → context rank: my receive is posted, send this part of these blocks now.

    It says all that the sender must know; the blocks stay as they are until the leader's ``Release``.
    """

    tag: int
    """Chosen by the receiver, unique among its transfers in flight; used on the data communicator."""
    block_ids: list[int]
    box: tuple[int, int, int, int, int, int]
    """Of layers, KV heads and tokens, a half-open range each: the fields of ``transfer.layout.Box``."""


class Watch(Message, frozen=True):
    """Generation's leader → context's leader: announce this request's KV-cache as it is computed.

    From then on its blocks are mine to read until I say :class:`Release`, whatever becomes of the request.
    """

    request_id: int


class Announce(Message, frozen=True):
    """Context's leader → generation's leader: this piece can be pulled."""

    request_id: int
    block_ids: list[int]
    first_token: int
    end_token: int
    first_layer: int
    end_layer: int


class Ended(Message, frozen=True):
    """Context's leader → generation's leader: a watched request was given up, nothing more will come."""

    request_id: int


class Release(Message, frozen=True):
    """Generation's leader → context's leader: the blocks of this request are no longer needed by me.

    ``exchanged`` holds, for a hand-over in a shared pool, the blocks given in return for those that
    were taken over; ``None``: nothing was taken, the context frees its own.
    """

    request_id: int
    exchanged: list[int] | None = None
    was_read: bool = False
    """Whether its bytes were copied: then they must have been held here all the time."""


AnyMessage = (
    Enqueue | Proceed | Cancel | DropOffer | IntegrityCheck | Shutdown | Ready | Step | IntegrityReport
    | Batch | PagedStep | CopyBlocks | PullPart | PartDone | PullRequest | Watch | Announce | Ended | Release
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | bytearray | memoryview) -> Any:
    """The message in ``data``; ``msgspec.ValidationError`` if it is none of ours."""
    return _decoder.decode(data)
