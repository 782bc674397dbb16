"""KServe v2 over HTTP, with Triton's extensions: binary tensor data, ``generate`` and ``generate_stream``.

:func:`routes` gives starlette routes for the server that owns the socket, its limits on connections and its
key; bodies are bounded here too, while they are read and unpacked. Each inference watches its connection, and
a client that leaves cancels its request in whatever phase that is.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import zlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from disagg_mpi import __version__
from disagg_mpi.errors import DisaggError, RequestError, TooLargeError
from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.kserve import rpc, tensors
from disagg_mpi.frontend.kserve.ensemble import INPUT_OF
from disagg_mpi.frontend.kserve.models import Model, Models, as_json
from disagg_mpi.frontend.kserve.replies import Reply, stack
from disagg_mpi.frontend.kserve.service import Call, Service
from disagg_mpi.frontend.kserve.statistics import Statistics
from disagg_mpi.frontend.kserve.statuses import RETRY_AFTER_SECONDS, status_of

T = TypeVar("T")
Endpoint = Callable[[Request], Awaitable[ASGIApp]]

_HEADER_LENGTH = "Inference-Header-Content-Length"


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Body(msgspec.Struct):
    """``/infer``'s JSON. Fields beside these are not looked at."""

    inputs: list[_Tensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


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
            ("/v2/repository/models/{model}/{action}", rpc.NO_LOADING),
            ("/v2/systemsharedmemory/{rest:path}", rpc.NO_SHARED_MEMORY),
            ("/v2/cudasharedmemory/{rest:path}", rpc.NO_SHARED_MEMORY),
            ("/v2/trace/setting", rpc.NO_TRACING),
            ("/v2/models/{model}/trace/setting", rpc.NO_TRACING),
            ("/v2/logging", rpc.NO_LOG_SETTINGS)):
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
        return _json({"name": "disagg_mpi", "version": __version__, "extensions": rpc.EXTENSIONS})

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
        body, parts = await self._read(request)
        call, is_binary = _infer_call(model, body, parts)
        try:
            outputs = await _unless_gone(request.receive, self._stacked(call))
        except Exception as error:
            return _error(error)
        return _infer_response(model, call.id, outputs, is_binary)

    async def generate(self, request: Request) -> Response:
        model = self._model(request)
        call = _generate_call(model, await self._read_body(request), may_stream=False)
        try:
            outputs = await _unless_gone(request.receive, self._stacked(call))
        except Exception as error:
            return _error(error)
        return _json({**_generate_head(model, call.id),
                      **{model.theirs(output.name): _unwrapped(output.values()) for output in outputs}})

    async def generate_stream(self, request: Request) -> ASGIApp:
        model = self._model(request)
        call = _generate_call(model, await self._read_body(request), may_stream=True)
        return _EventStream(self._service, model, call)

    async def _stacked(self, call: Call) -> list[tensors.Outgoing]:
        async with self._service.infer(call) as replies:
            return stack([reply async for reply in replies])

    async def _read(self, request: Request) -> tuple[_Body, memoryview]:
        """JSON, and the binary data after it. Raises :class:`RequestError`."""
        data = await self._read_body(request)
        given = request.headers.get(_HEADER_LENGTH, str(len(data)))
        length = int(given) if re.fullmatch("[0-9]{1,18}", given) else -1
        if not 0 <= length <= len(data):
            raise RequestError(f"{_HEADER_LENGTH} is {given[:32]!r}; it is the length of the JSON that the "
                               f"body begins with, and the body has {len(data)} bytes")
        return _decode(data[:length], _Body), memoryview(data)[length:]

    async def _read_body(self, request: Request) -> bytes:
        """All of it, unpacked. Raises :class:`TooLargeError` as soon as it is."""
        most = self._service.served.limits.max_body_bytes
        chunks, size = [], 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise _too_large(most)
            chunks.append(chunk)
        return _unpacked(b"".join(chunks), request.headers.get("content-encoding", "identity"), most)


class _EventStream:
    """Server-sent events: one for each reply. The status waits for the first, so that what cannot be served
    has one of its own; later errors are events."""

    def __init__(self, service: Service, model: Model, call: Call) -> None:
        self._service = service
        self._model = model
        self._call = call
        head = msgspec.json.encode(_generate_head(model, call.id))
        self._start = b"data: " + head[:-1] + b","
        self._text_start = self._start + msgspec.json.encode(model.theirs("text_output")) + b":"

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
                    await send({"type": "http.response.body", "body": self._frame(reply), "more_body": True})
        except Exception as error:
            if not is_started:
                await _error(error)(scope, receive, send)
                return
            frame = b"data: " + msgspec.json.encode({"error": status_of(error).message}) + b"\n\n"
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _frame(self, reply: Reply) -> bytes:
        if reply.text is not None and not reply.others:
            return self._text_start + msgspec.json.encode(reply.text) + b"}\n\n"
        fields = msgspec.json.encode({self._model.theirs(output.name): _unwrapped(output.values())
                                      for output in reply.outputs()})
        return self._start + fields[1:] + b"\n\n"


_STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
                   (b"x-accel-buffering", b"no")]


# ---- requests ----


def _infer_call(model: Model, body: _Body, binary: memoryview) -> tuple[Call, Callable[[str], bool]]:
    """The call, and which outputs are to come as binary data. Raises :class:`RequestError`."""
    inputs, at = [], 0
    for given in body.inputs:
        _refuse_shared_memory("input", given)
        size = given.parameters.get("binary_data_size")
        if size is None:
            inputs.append(tensors.from_json(given.name, given.datatype, given.shape, given.data))
            continue
        if type(size) is not int or not 0 <= size <= len(binary) - at:
            raise RequestError(f"input '{given.name}' has binary_data_size {size!r}; {len(binary) - at} "
                               f"bytes are left after the JSON, whose length {_HEADER_LENGTH} gives")
        data = bytes(binary[at : at + size])
        inputs.append(tensors.from_raw(given.name, given.datatype, given.shape, data))
        at += size
    if at != len(binary):
        raise RequestError(f"{len(binary) - at} bytes after the JSON belong to no input")
    asked = {}
    everything = body.parameters.get("binary_data_output") is True
    for output in body.outputs:
        _refuse_shared_memory("output", output)
        if output.parameters.get("classification"):
            raise RequestError(f"output '{output.name}' is text or numbers, not classes")
        asked[output.name] = output.parameters.get("binary_data", everything) is True
    timeout = rpc.timeout_seconds(body.parameters.get("timeout", 0))
    call = Call(model.name, model.version, body.id, inputs, frozenset(asked) or None, timeout,
                may_stream=False)
    return call, lambda name: asked.get(name, everything)


def _refuse_shared_memory(what: str, tensor: _Tensor | _Output) -> None:
    if "shared_memory_region" in tensor.parameters:
        raise RequestError(f"{what} '{tensor.name}' lies in shared memory: {rpc.NO_SHARED_MEMORY}")


def _generate_call(model: Model, data: bytes, *, may_stream: bool) -> Call:
    """``{"text_input": "…", "max_tokens": 20}``: inputs are plain values or flat lists; unknown fields are
    not looked at. Raises :class:`RequestError`."""
    body = _decode(data, dict[str, Any])
    inputs = []
    for name, value in body.items():
        tensor = INPUT_OF.get(model.ours(name))
        if tensor is None or value is None:
            continue
        shape = [1] if model.max_batch_size else []
        # A list where one value belongs is taken as it is, and refused by its shape unless it holds one.
        shape += [len(value) if isinstance(value, list) else 1, *(1 for _ in tensor.dims[1:])]
        inputs.append(tensors.from_json(name, tensor.datatype, shape, value))
    return Call(model.name, model.version, str(body.get("id") or ""), inputs, None, may_stream=may_stream)


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not the JSON that is needed: {error}") from None


def _unpacked(data: bytes, encoding: str, most: int) -> bytes:
    """The body without its compression, and never more than ``most`` bytes of it."""
    window = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}.get(encoding)
    if window is None:
        if encoding in ("identity", ""):
            return data
        raise RequestError(f"Content-Encoding is {encoding!r}; known are gzip, deflate and identity")
    unpacker = zlib.decompressobj(window)
    try:
        unpacked = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise RequestError(f"the body is not valid {encoding}: {error}") from None
    if len(unpacked) > most:
        raise _too_large(most)
    if not unpacker.eof:
        raise RequestError(f"the body is not valid {encoding}: it ends too early")
    return unpacked


def _too_large(most: int) -> TooLargeError:
    return TooLargeError(f"the body is too large; at most {most} bytes are taken")


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


# ---- responses ----


def _json(data: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(data), status, headers, "application/json")


_RETRY = {"retry-after": str(RETRY_AFTER_SECONDS)}
_HEADERS = {429: _RETRY, 503: _RETRY, 413: {"connection": "close"}}  # 413: nobody reads the rest of the body


def _error(error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    status = status_of(error)
    return _json({"error": status.message}, status.http, _HEADERS.get(status.http))


def _infer_response(
    model: Model, identity: str, outputs: Sequence[tensors.Outgoing], is_binary: Callable[[str], bool]
) -> Response:
    described, parts = [], []
    for output in outputs:
        name = model.theirs(output.name)
        head: dict[str, Any] = {"name": name, "datatype": output.datatype, "shape": output.shape}
        if is_binary(name):
            parts.append(output.raw())
            head["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            head["data"] = output.values()
        described.append(head)
    header = msgspec.json.encode({
        **({"id": identity} if identity else {}), "model_name": model.name, "model_version": model.version,
        "outputs": described})
    if not parts:
        return Response(header, media_type="application/json")
    return Response(b"".join([header, *parts]), headers={_HEADER_LENGTH: str(len(header))},
                    media_type="application/octet-stream")


def _generate_head(model: Model, identity: str) -> dict[str, Any]:
    return {**({"id": identity} if identity else {}), "model_name": model.name,
            "model_version": model.version, "sequence_end": False, "sequence_id": 0, "sequence_start": False}


def _unwrapped(values: list[Any]) -> Any:
    """One element is shown as itself, as Triton's ``generate`` does."""
    return values[0] if len(values) == 1 else values
