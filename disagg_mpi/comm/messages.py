"""Every message and tag, each with one definition.

Control messages are msgspec structs in one tagged union, encoded as msgpack and sent as bytes under one
tag; the reader dispatches on the type. Two kinds of traffic never share a communicator: control (this
module) and the bytes of the KV-cache (``transfer.transports``), so their tags cannot meet.
"""

from __future__ import annotations

from typing import Any

import msgspec

from disagg_mpi.request import ExecutorLimits, ExecutorRequest, FinishReason, PoolBlocks, Response

CONTROL_TAG = 1
"""The only tag on a control communicator."""


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all control messages; the class name travels as the tag."""


# ---- rank 0 → leader -------------------------------------------------------------------------------


class Enqueue(Message, frozen=True):
    """New requests for an instance."""

    requests: list[ExecutorRequest]


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
    transports: dict[str, str] = {}
    """Name of a peer instance → how its KV-cache comes here."""


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


# ---- instance ↔ instance: the hand-over ------------------------------------------------------------


class PullRequest(Message, frozen=True):
    """Generation → context: my blocks are reserved and my receive is posted, send now."""

    request_id: int
    tag: int
    """Chosen by the receiver, unique among its transfers in flight; used on the data communicator."""


class Release(Message, frozen=True):
    """Generation → context: the blocks of this request are no longer needed by me.

    ``exchanged`` holds, for a hand-over in a shared pool, the blocks given in return for those that
    were taken over; ``None``: nothing was taken, the context frees its own.
    """

    request_id: int
    exchanged: list[int] | None = None


AnyMessage = (
    Enqueue | Cancel | DropOffer | IntegrityCheck | Shutdown | Ready | Step | IntegrityReport
    | PullRequest | Release
)

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(AnyMessage)


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode(data: bytes | bytearray | memoryview) -> Any:
    """The message in ``data``; ``msgspec.ValidationError`` if it is none of ours."""
    return _decoder.decode(data)
