"""The server of a job at rank 0: HTTP, metrics and gRPC in one event loop, in a thread of its own.

    sockets = bind(...)                  before the job starts: a port that is taken costs nothing
    with launch(...) as orchestrator:    …
        with Server(...) as server:      all ports accept, or none does and the error is raised here
            server.wait()                until KeyboardInterrupt
                                         leaving: no new requests, open ones get the grace time, then
                                         are cancelled; the loop ends when all have ended
    (launch closes the job)

The main thread only waits, since signals are its business (``job.guards``: SIGINT and SIGTERM become
KeyboardInterrupt, a second one ends the job at once): an event loop there would take them over, and the
watchdog's wake-up with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

import uvicorn
from starlette.types import ASGIApp

from disagg_mpi.errors import JobFailed
from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.ports import port_error, port_of
from disagg_mpi.frontend.protocol import connection_type
from disagg_mpi.frontend.served import ServerLimits

# What streams have after the grace time: a cancelled request ends within a step.
_CANCEL_SECONDS = 2

# A client's pool keeps its connections for some seconds; closing earlier than it does costs it an error.
_KEEP_ALIVE_SECONDS = 75

class GrpcServer(Protocol):
    """What is needed of a gRPC server."""

    port: int
    """The one that it is bound to, once it has started."""

    async def start(self) -> None: ...

    async def stop(self, grace: float) -> None: ...


class Server:
    """Serves ``app`` on ``http``, ``metrics_app`` on ``metrics``, and what ``make_grpc`` gives.

    Owns the sockets from now on. ``make_grpc`` is called in the server's loop.
    """

    def __init__(
        self, gate: Gate, app: ASGIApp, metrics_app: ASGIApp, http: socket.socket, metrics: socket.socket,
        *, make_grpc: Callable[[], GrpcServer] | None = None, grace: float = 10.0,
    ) -> None:
        self._gate = gate
        self._sockets = {"--http-port": http, "--metrics-port": metrics}
        limits = gate.served.limits
        self._servers = [_uvicorn(app, limits, grace), _uvicorn(metrics_app, limits, grace)]
        self._make_grpc = make_grpc
        self.grpc: GrpcServer | None = None
        self._grace = grace
        self._ready = threading.Event()
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="disagg_mpi-server", daemon=True)

    @property
    def num_open(self) -> int:
        """Requests that are not over."""
        return self._gate.num_open

    # ---- the main thread ----

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._ready.wait()
            self._raise()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.stop()

    def wait(self) -> None:
        """Return when the server has ended, raise what ended it; a signal interrupts the wait."""
        self._over.wait()
        self._raise()

    def stop(self) -> None:
        """Wind down as above; returns when the loop has ended. Again: no effect."""
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                self._loop.call_soon_threadsafe(self._stopping.set)
        self._over.wait()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    # ---- the server's thread ----

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=_loop_factory()) as runner:
                runner.run(self._main())
        except BaseException as error:
            self._error = self._error or error
        finally:
            for bound in self._sockets.values():
                bound.close()
            self._ready.set()
            self._over.set()

    async def _main(self) -> None:
        self._stopping = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        for option, bound in self._sockets.items():
            try:
                bound.listen(2048)
            except OSError as error:  # another took it while the model was loaded
                raise port_error(error, bound.getsockname()[0], port_of(bound), option) from None
        if self._make_grpc is not None:
            self.grpc = self._make_grpc()
            await self.grpc.start()
        tasks = [asyncio.ensure_future(server.serve([bound]))
                 for server, bound in zip(self._servers, self._sockets.values(), strict=True)]
        stopping = asyncio.ensure_future(self._stopping.wait())
        self._ready.set()
        await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
        has_failed = not stopping.done()
        stopping.cancel()
        await self._wind_down(tasks)
        if has_failed:
            raise JobFailed("an HTTP server has ended by itself")

    async def _wind_down(self, tasks: Sequence[asyncio.Future[None]]) -> None:
        self._gate.is_closed = True
        for server in self._servers:
            server.should_exit = True
        ending: list[asyncio.Future[Any]] = list(tasks)
        if self.grpc is not None:
            ending.append(asyncio.ensure_future(self.grpc.stop(self._grace)))
        _, late = await asyncio.wait(ending, timeout=self._grace)
        if late:
            self._gate.cancel_all()
            await asyncio.wait(late, timeout=2 * _CANCEL_SECONDS)
        for task in ending:
            if task.done() and not task.cancelled() and (error := task.exception()) is not None:
                raise error


def _uvicorn(app: ASGIApp, limits: ServerLimits, grace: float) -> uvicorn.Server:
    # Its own signal handling stays off: it looks for the main thread, and this is another.
    return uvicorn.Server(uvicorn.Config(
        app, http=connection_type(limits), ws="none", lifespan="off", log_config=None, log_level="error",
        access_log=False, server_header=False, proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS, timeout_graceful_shutdown=math.ceil(grace) + _CANCEL_SECONDS))


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
