"""One HTTP connection, with the limits that uvicorn does not have: how many, how long and how large a head.

uvicorn makes one of these a connection, in the server's loop.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from disagg_mpi.frontend.served import ServerLimits

_MAX_HEAD_BYTES = 64 * 1024
"""Of a request's line and headers; nginx takes 32 KiB."""


def connection_type(limits: ServerLimits) -> type[asyncio.Protocol]:
    """The protocol class for a server with these limits."""

    class Connection(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None
        _head_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                self._refuse(b"503 Service Unavailable", b"too many connections")
            else:
                self._expect_head()

        def data_received(self, data: bytes) -> None:
            if self._awaits_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if not self._awaits_head or self.transport.is_closing():
                return
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large", b"the headers are too large")
            else:
                self._expect_head()

        def on_headers_complete(self) -> None:
            self._stop_timer()
            self._head_bytes = 0
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            super().connection_lost(exc)

        @property
        def _awaits_head(self) -> bool:
            return self.cycle is None or self.cycle.response_complete

        def _expect_head(self) -> None:
            if self._timer is None:
                self._timer = self.loop.call_later(limits.header_seconds, self._too_slow)

        def _too_slow(self) -> None:
            self._refuse(b"408 Request Timeout", b"the request's head did not come in time")

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _refuse(self, status: bytes, text: bytes) -> None:
            if not self.transport.is_closing():
                self.transport.write(
                    b"HTTP/1.1 %b\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n"
                    b"connection: close\r\n\r\n%b" % (status, len(text), text))
                self.transport.close()

    return Connection
