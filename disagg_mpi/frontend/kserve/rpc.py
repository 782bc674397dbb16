"""KServe v2 over gRPC: ``inference.GRPCInferenceService``, with messages and stubs of tritonclient's wheel.

A :class:`GrpcServer` is made, started and stopped on one event loop. Each ``ModelStreamInfer`` is one task
that reads requests, and one more for each request that writes its replies; when the client half-closes, the
RPC ends after the last reply, and when it cancels, all of them are cancelled, and their requests with them.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from disagg_mpi import __version__
from disagg_mpi.errors import ConfigError, DisaggError
from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.kserve import rules
from disagg_mpi.frontend.kserve.models import Model, Models
from disagg_mpi.frontend.kserve.replies import stack
from disagg_mpi.frontend.kserve.rpc_messages import (
    Parsed,
    StreamEncoder,
    call_of,
    parse,
    response_of,
    stream_error,
)
from disagg_mpi.frontend.kserve.service import Service
from disagg_mpi.frontend.kserve.statistics import Statistics
from disagg_mpi.frontend.kserve.statuses import status_of

_log = logging.getLogger(__name__)

_SERVICE = "inference.GRPCInferenceService"

# Seen without a key: what asks whether the server lives has none.
_OPEN_METHODS = frozenset(f"/{_SERVICE}/{name}" for name in ("ServerLive", "ServerReady"))


def make_grpc_server(
    gate: Gate, models: Models, stats: Statistics, host: str, port: int,
    why_not_ready: Callable[[], str | None] = lambda: None,
) -> GrpcServer:
    """A server that is not started. ``port`` 0: any that is free."""
    return GrpcServer(Service(gate, models, stats, why_not_ready, "kserve-grpc"), host, port)


class GrpcServer:
    """One listening address. ``start`` and ``stop`` it on the event loop that serves."""

    def __init__(self, service: Service, host: str, port: int) -> None:
        self._service = service
        self._host = host
        self.port = port
        """The bound one once it is started."""
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen; ``port`` is the bound one then. Raises :class:`ConfigError` for a port that is taken."""
        limits = self._service.served.limits
        key = self._service.served.api_key
        server = grpc.aio.server(
            interceptors=[] if key is None else [_KeyInterceptor(key)],
            # Far beyond what is admitted, for the gate to tell requests that they are too many: gRPC's own
            # refusal ends a call while its client still sends, which grpc.aio reports as an internal error.
            maximum_concurrent_rpcs=limits.max_open_requests + limits.max_connections,
            options=[
                ("grpc.max_receive_message_length", limits.max_body_bytes),
                ("grpc.max_send_message_length", -1),  # logits; their own limit says how much
                ("grpc.so_reuseport", 0),  # else two jobs could share a port, each getting some requests
            ])
        server.add_generic_rpc_handlers((_handlers(_Servicer(self._service)),))
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            bound = server.add_insecure_port(f"{host}:{self.port}")
        except RuntimeError:
            bound = 0
        if not bound:
            raise ConfigError(f"cannot listen on {host}:{self.port} for gRPC: it is taken, or the host is no "
                              "address of this host; give --grpc-port another port, or 0 for any free one")
        await server.start()
        self._server, self.port = server, bound

    async def stop(self, grace: float | None = None) -> None:
        """Take no more requests, wait ``grace`` seconds for those that are open, cancel the rest."""
        if self._server is not None:
            await self._server.stop(grace)


class _KeyInterceptor(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets through only calls with the key: metadata ``authorization: Bearer …``."""

    def __init__(self, key: str) -> None:
        self._key = key.encode()

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler_call_details.method in _OPEN_METHODS:
            return handler
        given = dict(handler_call_details.invocation_metadata).get("authorization", "")
        scheme, _, key = str(given).partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode(), self._key):
            return handler

        async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED,
                                "this server needs a key: send metadata 'authorization: Bearer <key>'")

        make = (grpc.stream_stream_rpc_method_handler if handler.request_streaming
                else grpc.unary_unary_rpc_method_handler)
        return make(refuse)


class _Registry:
    """Stands for a server while the generated code registers, to get at its handlers."""

    def __init__(self) -> None:
        self.handlers: dict[str, Any] = {}

    def add_generic_rpc_handlers(self, handlers: Any) -> None: ...

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        self.handlers = dict(handlers)


def _handlers(servicer: _Servicer) -> grpc.GenericRpcHandler:
    """The generated handlers, but for two that take what came and send bytes as they are."""
    registry = _Registry()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, registry)
    handlers = registry.handlers
    handlers["ModelInfer"] = grpc.unary_unary_rpc_method_handler(
        servicer.ModelInfer, request_deserializer=parse,
        response_serializer=service_pb2.ModelInferResponse.SerializeToString)
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        servicer.ModelStreamInfer, request_deserializer=parse)
    return grpc.method_handlers_generic_handler(_SERVICE, handlers)


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """The service's methods. Their names are the protocol's."""

    def __init__(self, service: Service) -> None:
        self._service = service

    # ---- inference ----

    async def ModelInfer(
        self, request: Parsed, context: grpc.aio.ServicerContext
    ) -> service_pb2.ModelInferResponse | None:
        try:
            call = call_of(request, may_stream=False)
            async with self._service.infer(call) as replies:
                outputs = stack([reply async for reply in replies])
        except Exception as error:
            status = status_of(error)
            await context.abort(status.code, status.message)
            return None
        return response_of(call, self._service.models.get(call.model), outputs)

    async def ModelStreamInfer(
        self, requests: AsyncIterator[Parsed], context: grpc.aio.ServicerContext
    ) -> None:
        writer = _Writer(context)
        async with asyncio.TaskGroup() as tasks:
            async for request in requests:
                tasks.create_task(self._answer(request, writer))

    async def _answer(self, request: Parsed, writer: _Writer) -> None:
        """All replies to one request of a stream; an error is the last of them."""
        try:
            try:
                call = call_of(request, may_stream=True)
                async with self._service.infer(call) as replies:
                    encoder = StreamEncoder(call, self._service.models.get(call.model))
                    async for reply in replies:
                        await writer.write(encoder.encode(reply))
            except _ClientGoneError:
                raise
            except Exception as error:
                await writer.write(stream_error(request, status_of(error).message))
        except _ClientGoneError as error:
            _log.debug("a stream's client left: %s", error.__cause__)

    # ---- the server and its models ----

    async def ServerLive(self, request: Any, context: Any) -> service_pb2.ServerLiveResponse:
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Any) -> service_pb2.ServerReadyResponse:
        return service_pb2.ServerReadyResponse(ready=self._service.why_not_ready() is None)

    async def ServerMetadata(self, request: Any, context: Any) -> service_pb2.ServerMetadataResponse:
        return service_pb2.ServerMetadataResponse(
            name="disagg_mpi", version=__version__, extensions=rules.EXTENSIONS)

    async def ModelReady(self, request: Any, context: Any) -> service_pb2.ModelReadyResponse:
        is_known = self._service.models.has(request.name, request.version)
        return service_pb2.ModelReadyResponse(ready=is_known and self._service.why_not_ready() is None)

    async def ModelMetadata(self, request: Any, context: Any) -> service_pb2.ModelMetadataResponse:
        return (await self._model(request, context)).metadata()

    async def ModelConfig(self, request: Any, context: Any) -> service_pb2.ModelConfigResponse:
        return service_pb2.ModelConfigResponse(config=(await self._model(request, context)).config)

    async def ModelStatistics(self, request: Any, context: Any) -> service_pb2.ModelStatisticsResponse:
        models = [await self._model(request, context)] if request.name else self._service.models
        return self._service.statistics.response(models)

    async def RepositoryIndex(self, request: Any, context: Any) -> service_pb2.RepositoryIndexResponse:
        why_not = self._service.why_not_ready()
        index = service_pb2.RepositoryIndexResponse.ModelIndex
        return service_pb2.RepositoryIndexResponse(models=[
            index(name=model.name, version=model.version, state="READY" if why_not is None else "UNAVAILABLE",
                  reason=why_not or "")
            for model in self._service.models if why_not is None or not request.ready])

    async def _model(self, request: Any, context: grpc.aio.ServicerContext) -> Model:
        try:
            return self._service.models.get(request.name, request.version)
        except DisaggError as error:
            status = status_of(error)
            await context.abort(status.code, status.message)
            raise AssertionError("abort raises") from None

    # ---- what does not apply here ----

    async def RepositoryModelLoad(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, rules.NO_LOADING)

    async def RepositoryModelUnload(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, rules.NO_LOADING)

    async def SystemSharedMemoryStatus(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, rules.NO_SHARED_MEMORY)

    async def SystemSharedMemoryRegister(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, rules.NO_SHARED_MEMORY)

    async def SystemSharedMemoryUnregister(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, rules.NO_SHARED_MEMORY)

    async def CudaSharedMemoryStatus(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, rules.NO_SHARED_MEMORY)

    async def CudaSharedMemoryRegister(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, rules.NO_SHARED_MEMORY)

    async def CudaSharedMemoryUnregister(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, rules.NO_SHARED_MEMORY)

    async def TraceSetting(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, rules.NO_TRACING)

    async def LogSettings(self, request: Any, context: grpc.aio.ServicerContext) -> None:
        await _refuse(context, rules.NO_LOG_SETTINGS)


async def _refuse(context: grpc.aio.ServicerContext, why: str) -> None:
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, why)


class _ClientGoneError(Exception):
    """A reply could not be sent."""


class _Writer:
    """One stream's way out: gRPC takes one message at a time, and its requests answer when they can."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self._context = context
        self._lock = asyncio.Lock()

    async def write(self, message: bytes) -> None:
        """Raises :class:`_ClientGoneError`."""
        async with self._lock:
            try:
                await self._context.write(message)
            except Exception as error:
                raise _ClientGoneError from error
