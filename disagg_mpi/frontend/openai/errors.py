"""Errors as OpenAI's clients expect them: a status, and ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import re

import msgspec
from starlette.responses import Response

from disagg_mpi.errors import (
    ConfigError,
    DisaggError,
    JobFailed,
    ModelError,
    OverloadedError,
    RequestError,
)
from disagg_mpi.request import Result

RETRY_AFTER_SECONDS = 1
"""What a client is told to wait when there is no room: some request ends about every second."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error",
          503: "service_unavailable_error"}


class ApiError(Exception):
    """What a client is told instead of an answer."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None,
                 headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers


class ErrorDetail(msgspec.Struct, frozen=True):
    """The inside of an error body."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """An error body; in a stream, one of its events."""

    error: ErrorDetail


def body_of(error: ApiError) -> ErrorBody:
    kind = _TYPES.get(error.status, "server_error" if error.status >= 500 else "invalid_request_error")
    return ErrorBody(ErrorDetail(error.message, kind, error.param, error.code))


def response_of(error: ApiError) -> Response:
    return Response(msgspec.json.encode(body_of(error)), error.status, error.headers, "application/json")


def invalid(message: str, param: str | None = None) -> ApiError:
    """The client's mistake; ``param`` is the field that holds it."""
    return ApiError(400, message, param=param)


def api_error_of(error: DisaggError) -> ApiError:
    """What an exception of ours means for the client whose request raised it."""
    if isinstance(error, OverloadedError):
        return ApiError(429, str(error), code="rate_limit_exceeded",
                        headers={"retry-after": str(RETRY_AFTER_SECONDS)})
    if isinstance(error, RequestError | ConfigError | ModelError):
        message = str(error)
        is_length = "context length" in message
        named = re.match(r"(\w+) is ", message)
        return ApiError(400, message, param=named[1] if named else None,
                        code="context_length_exceeded" if is_length else None)
    return ApiError(503 if isinstance(error, JobFailed) else 500, str(error))


def failure_of(result: Result) -> ApiError | None:
    """Why a finished request has no answer; ``None`` if it has one."""
    if result.error is None:
        return None
    if result.is_refused:  # by a leader: what the gate cannot see, such as a grammar that is none
        return api_error_of(RequestError(result.error))
    if any(choice.finish_reason == "cancelled" for choice in result.choices):
        return ApiError(503, f"the request was {result.error}")
    return ApiError(500, result.error)
