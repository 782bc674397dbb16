"""What an exception is to a client: gRPC's code, HTTP's status, and the words. Pure but for the log."""

from __future__ import annotations

import logging
from typing import NamedTuple

import grpc

from disagg_mpi.errors import (
    DeadlineError,
    JobFailed,
    OverloadedError,
    RequestError,
    TooLargeError,
    UnknownModelError,
    UsageError,
)

_log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1

# The first that fits; what fits none is a fault of ours.
_TABLE: tuple[tuple[type[Exception], grpc.StatusCode, int], ...] = (
    (UnknownModelError, grpc.StatusCode.NOT_FOUND, 404),
    (OverloadedError, grpc.StatusCode.UNAVAILABLE, 429),
    (TooLargeError, grpc.StatusCode.RESOURCE_EXHAUSTED, 413),
    (DeadlineError, grpc.StatusCode.DEADLINE_EXCEEDED, 504),
    (JobFailed, grpc.StatusCode.UNAVAILABLE, 503),
    (RequestError, grpc.StatusCode.INVALID_ARGUMENT, 400),
    (UsageError, grpc.StatusCode.INVALID_ARGUMENT, 400),
)


class Status(NamedTuple):
    """What the client is told."""

    code: grpc.StatusCode
    http: int
    message: str


def status_of(error: Exception) -> Status:
    """The status of a request that ended with ``error``; one that nobody expected is logged too."""
    for kind, code, http in _TABLE:
        if isinstance(error, kind):
            return Status(code, http, str(error))
    _log.error("a request failed: %s", error, exc_info=error)
    return Status(grpc.StatusCode.INTERNAL, 500, f"{type(error).__name__}: {error}")
