"""KServe v2 over HTTP, with Triton's extensions: binary tensor data, ``generate`` and ``generate_stream``.

:func:`routes` gives starlette routes for the server that owns the socket, its limits on connections and its
key; bodies are bounded here too, while they are read and unpacked. Each inference watches its connection, and
a client that leaves cancels its request in whatever phase that is.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from disagg_mpi import __version__
from disagg_mpi.errors import DisaggError, RequestError
from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.kserve import rules, tensors
from disagg_mpi.frontend.kserve.models import Model, Models, as_json
from disagg_mpi.frontend.kserve.replies import stack
from disagg_mpi.frontend.kserve.rest_messages import (
    HEADER_LENGTH,
    EventEncoder,
    generate_body,
    generate_call,
    infer_body,
    infer_call,
    too_large,
    unpack,
)
from disagg_mpi.frontend.kserve.service import Call, Service
from disagg_mpi.frontend.kserve.statistics import Statistics
from disagg_mpi.frontend.kserve.statuses import RETRY_AFTER_SECONDS, status_of

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[ASGIApp]]


def routes(
    gate: Gate, models: Models, stats: Statistics,
    why_not_ready: Callable[[], str | None] = lambda: None,
) -> list[BaseRoute]:
    """Everything below ``/v2``."""
    api = _Api(Service(gate, models, stats, why_not_ready, "kserve-http"))

    def get(path: str, endpoint: Endpoint) -> Route:
        return Route(path, _answered(endpoint), methods=["GET"])

    def post(path: str, endpoint: Endpoint) -> Route:
        return Route(path, _answered(endpoint), methods=["POST"])

    found = [
        get("/v2", api.server_metadata),
        get("/v2/health/live", api.live),
        get("/v2/health/ready", api.ready),
        get("/v2/models/stats", api.all_statistics),
        post("/v2/repository/index", api.repository_index),
    ]
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        found += [
            get(model, api.model_metadata),
            get(f"{model}/ready", api.model_ready),
            get(f"{model}/config", api.model_config),
            get(f"{model}/stats", api.model_statistics),
            post(f"{model}/infer", api.infer),
            post(f"{model}/generate", api.generate),
            post(f"{model}/generate_stream", api.generate_stream),
        ]
    for path, why in (
            ("/v2/repository/models/{model}/{action}", rules.NO_LOADING),
            ("/v2/systemsharedmemory/{rest:path}", rules.NO_SHARED_MEMORY),
            ("/v2/cudasharedmemory/{rest:path}", rules.NO_SHARED_MEMORY),
            ("/v2/trace/setting", rules.NO_TRACING),
            ("/v2/models/{model}/trace/setting", rules.NO_TRACING),
            ("/v2/logging", rules.NO_LOG_SETTINGS)):
        found.append(Route(path, _refused(why), methods=["GET", "POST"]))
    return list(found)


def _answered(endpoint: Endpoint) -> Endpoint:
    """``endpoint`` with our errors as answers."""

    async def run(request: Request) -> ASGIApp:
        try:
            return await endpoint(request)
        except (DisaggError, ClientDisconnect) as error:  # the server's own belong to the server
            return _error(error)

    return run


def _refused(why: str) -> Endpoint:
    async def refuse(request: Request) -> Response:
        return _error(RequestError(why))

    return refuse


class _Api:
    """The endpoints."""

    def __init__(self, service: Service) -> None:
        self._service = service

    # ---- the server and its models ----

    async def server_metadata(self, request: Request) -> Response:
        return _json({"name": "disagg_mpi", "version": __version__, "extensions": rules.EXTENSIONS})

    async def live(self, request: Request) -> Response:
        return Response()

    async def ready(self, request: Request) -> Response:
        why_not = self._service.why_not_ready()
        return Response() if why_not is None else _json({"error": why_not}, 503)

    async def model_ready(self, request: Request) -> Response:
        self._model(request)
        return await self.ready(request)

    async def model_metadata(self, request: Request) -> Response:
        return _json(as_json(self._model(request).metadata()))

    async def model_config(self, request: Request) -> Response:
        return _json(as_json(self._model(request).config))

    async def model_statistics(self, request: Request) -> Response:
        return _json(as_json(self._service.statistics.response([self._model(request)])))

    async def all_statistics(self, request: Request) -> Response:
        return _json(as_json(self._service.statistics.response(self._service.models)))

    async def repository_index(self, request: Request) -> Response:
        why_not = self._service.why_not_ready()
        state = "READY" if why_not is None else "UNAVAILABLE"
        return _json([{"name": model.name, "version": model.version, "state": state, "reason": why_not or ""}
                      for model in self._service.models])

    def _model(self, request: Request) -> Model:
        return self._service.models.get(request.path_params["model"], request.path_params.get("version", ""))

    # ---- inference ----

    async def infer(self, request: Request) -> Response:
        model = self._model(request)
        body = await self._read_body(request)
        call, is_binary = infer_call(model, body, request.headers.get(HEADER_LENGTH))
        try:
            outputs = await _unless_gone(request.receive, self._stacked(call))
        except Exception as error:
            return _error(error)
        answer, json_length = infer_body(model, call.id, outputs, is_binary)
        if json_length is None:
            return Response(answer, media_type="application/json")
        return Response(answer, headers={HEADER_LENGTH: str(json_length)},
                        media_type="application/octet-stream")

    async def generate(self, request: Request) -> Response:
        model = self._model(request)
        call = generate_call(model, await self._read_body(request), may_stream=False)
        try:
            outputs = await _unless_gone(request.receive, self._stacked(call))
        except Exception as error:
            return _error(error)
        return Response(generate_body(model, call.id, outputs), media_type="application/json")

    async def generate_stream(self, request: Request) -> ASGIApp:
        model = self._model(request)
        call = generate_call(model, await self._read_body(request), may_stream=True)
        return _EventStream(self._service, call, EventEncoder(call, model))

    async def _stacked(self, call: Call) -> list[tensors.Outgoing]:
        async with self._service.infer(call) as replies:
            return stack([reply async for reply in replies])

    async def _read_body(self, request: Request) -> bytes:
        """All of it, unpacked. Raises :class:`TooLargeError` as soon as it is, :class:`RequestError` for what
        cannot be unpacked."""
        most = self._service.served.limits.max_body_bytes
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise too_large(most)
            chunks.append(chunk)
        return unpack(b"".join(chunks), request.headers.get("content-encoding", "identity"), most)


class _EventStream:
    """Server-sent events: one for each reply. The status waits for the first, so that what cannot be served
    has one of its own; later errors are events."""

    def __init__(self, service: Service, call: Call, encoder: EventEncoder) -> None:
        self._service = service
        self._call = call
        self._encoder = encoder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(ClientDisconnect):
            await _unless_gone(receive, self._send(scope, receive, send))

    async def _send(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_started = False
        try:
            async with self._service.infer(self._call) as replies:
                async for reply in replies:
                    if not is_started:
                        is_started = True
                        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
                    frame = self._encoder.encode(reply)
                    await send({"type": "http.response.body", "body": frame, "more_body": True})
        except Exception as error:
            if not is_started:
                await _error(error)(scope, receive, send)
                return
            frame = self._encoder.error(status_of(error).message)
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """``work``'s result; it is cancelled when the client leaves. Raises :class:`ClientDisconnect` then.

    The body must have been read: what is received from then on is only that the connection is gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, "application/json")


_RETRY = {"retry-after": str(RETRY_AFTER_SECONDS)}
_HEADERS = {429: _RETRY, 503: _RETRY, 413: {"connection": "close"}}  # 413: nobody reads the rest of the body


def _error(error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    status = status_of(error)
    return _json({"error": status.message}, status.http, _HEADERS.get(status.http))
