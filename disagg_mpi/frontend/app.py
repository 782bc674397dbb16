"""The ASGI applications of a server: who may come in, what is where, and what an error looks like.

Pure wiring: made once, without I/O, by :class:`~disagg_mpi.frontend.server.Server` or by a test.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, ExceptionHandler, Message, Receive, Scope, Send

from disagg_mpi.errors import DisaggError
from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.health import Health
from disagg_mpi.frontend.metrics import CONTENT_TYPE, Metrics
from disagg_mpi.frontend.openai.errors import ApiError, api_error_of, response_of
from disagg_mpi.frontend.openai.routes import routes as openai_routes
from disagg_mpi.frontend.page.routes import OPEN_PAGE_PATHS, page_routes
from disagg_mpi.frontend.served import Served
from disagg_mpi.frontend.stats import ServingStats

OPEN_PATHS = frozenset({"/health", "/metrics", "/v2/health/live", "/v2/health/ready"}) | OPEN_PAGE_PATHS
"""Paths that need no API key: they tell nothing that a client sent."""

_REASONS = {400: "invalid", 401: "unauthorized", 404: "not_found", 413: "too_large", 429: "overloaded"}


def make_app(
    gate: Gate, health: Health, metrics: Metrics, more: Sequence[BaseRoute] = ()
) -> ASGIApp:
    """The application of the HTTP port: OpenAI's API, the page, and ``more`` routes."""
    return Starlette(
        routes=[*_own_routes(health, metrics), *openai_routes(gate), *page_routes(gate, health), *more],
        middleware=[Middleware(Guard, gate.served, gate.stats)],
        exception_handlers=_handlers(gate.stats))


def make_metrics_app(gate: Gate, health: Health, metrics: Metrics) -> ASGIApp:
    """The application of the metrics port."""
    return Starlette(routes=_own_routes(health, metrics), exception_handlers=_handlers(gate.stats))


def _own_routes(health: Health, metrics: Metrics) -> list[BaseRoute]:
    async def tell_health(http: HttpRequest) -> Response:
        problem = health.problem()
        body = {"status": "ok"} if problem is None else {"status": "unhealthy", "reason": problem}
        return Response(msgspec.json.encode(body), 200 if problem is None else 503,
                        media_type="application/json")

    async def tell_metrics(http: HttpRequest) -> Response:
        return Response(metrics.render(), media_type=CONTENT_TYPE)

    return [Route("/health", tell_health), Route("/metrics", tell_metrics)]


class Guard:
    """Lets in who has the key and sends no more than is allowed. Plain ASGI, so it costs a stream nothing."""

    def __init__(self, app: ASGIApp, served: Served, stats: ServingStats) -> None:
        self._app = app
        self._key = None if served.api_key is None else served.api_key.encode()
        self._max_bytes = served.limits.max_body_bytes
        self._stats = stats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: dict[bytes, bytes] = dict(scope["headers"])
        error = None
        if not self._is_allowed(scope["path"], headers):
            error = ApiError(401, "this server needs its API key: authorization: Bearer KEY, or x-api-key",
                             code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        elif _length_of(headers) > self._max_bytes:
            error = self._too_large()
        if error is not None:
            await error_response(scope["path"], error, self._stats)(scope, receive, send)
            return
        num_bytes = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self._max_bytes:
                    raise self._too_large()
            return message

        await self._app(scope, receive_counted, send)

    def _is_allowed(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self._key is None or path in OPEN_PATHS:
            return True
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        given = token.strip() if scheme.lower() == b"bearer" else b""
        return (hmac.compare_digest(given, self._key)
                or hmac.compare_digest(headers.get(b"x-api-key", b""), self._key))

    def _too_large(self) -> ApiError:
        # The rest of the body is on its way, and nobody will read it.
        return ApiError(413, f"the body is larger than {self._max_bytes} bytes, the most this server takes",
                        headers={"connection": "close"})


def error_response(path: str, error: ApiError, stats: ServingStats) -> Response:
    """``error`` in the form that clients of ``path`` expect."""
    if error.status in _REASONS:
        stats.refused(_REASONS[error.status])
    if path.startswith("/v2"):  # KServe's
        return Response(msgspec.json.encode({"error": error.message}), error.status, error.headers,
                        "application/json")
    return response_of(error)


def _length_of(headers: dict[bytes, bytes]) -> int:
    try:
        return int(headers.get(b"content-length", b"0"))
    except ValueError:  # the HTTP parser has refused it already
        return 0


def _handlers(stats: ServingStats) -> dict[type[Exception], ExceptionHandler]:
    def of_api(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error_response(http.url.path, error, stats)

    def of_ours(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, DisaggError)
        return error_response(http.url.path, api_error_of(error), stats)

    def of_http(http: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return error_response(http.url.path, ApiError(
            error.status_code, f"{error.detail}: {http.method} {http.url.path}"[:500],
            headers=dict(error.headers or {})), stats)

    def of_any(http: HttpRequest, error: Exception) -> Response:
        return error_response(http.url.path, ApiError(
            500, "the server failed to answer this request; its log says more"), stats)

    def of_gone(http: HttpRequest, error: Exception) -> Response:
        return Response(status_code=499)  # before its body was here; nobody reads this

    return {ApiError: of_api, DisaggError: of_ours, HTTPException: of_http, ClientDisconnect: of_gone,
            Exception: of_any}
