"""Following requests to their end, or to their client's: what completions and chats have in common.

A request's task lives until the job has given its blocks back. When the client goes away its handles are
cancelled at once, in whatever phase they are, and their ends arrive as always; what is sent then is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from disagg_mpi.errors import DisaggError
from disagg_mpi.frontend.openai.errors import ApiError, api_error_of, failure_of
from disagg_mpi.frontend.openai.replies import DONE, error_event
from disagg_mpi.orchestrator.handle import RequestHandle
from disagg_mpi.request import Result, TokenEvent

_log = logging.getLogger(__name__)

_HEAD = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
         (b"x-accel-buffering", b"no")]

_GOOD_ENDS = (None, "stop", "length")


@contextlib.asynccontextmanager
async def cancelled_with_client(receive: Receive, handles: Sequence[RequestHandle]) -> AsyncIterator[None]:
    """Cancel what is open of ``handles`` when the client goes away, or when the block is left early.

    The request's body must have been read.
    """
    def cancel(_: object = None) -> None:
        for handle in handles:
            if not handle.done():
                handle.cancel()

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.ensure_future(gone())
    watch.add_done_callback(cancel)
    try:
        yield
    finally:
        watch.remove_done_callback(cancel)
        watch.cancel()
        cancel()


async def results_of(receive: Receive, handles: Sequence[RequestHandle]) -> list[Result]:
    """The results of all. Raises :class:`ApiError` for the first that has none; the others are cancelled."""
    results = []
    async with cancelled_with_client(receive, handles):
        for handle in handles:
            result = await handle
            failure = failure_of(result)
            if failure is not None:
                raise failure
            results.append(result)
    return results


async def steps_of(handles: Sequence[RequestHandle]) -> AsyncIterator[tuple[int, list[TokenEvent]]]:
    """What comes of several requests, as it comes: the request's position and its new events."""
    if len(handles) == 1:
        async for events in handles[0].steps():
            yield 0, events
        return
    inbox: asyncio.Queue[tuple[int, list[TokenEvent]] | None] = asyncio.Queue()

    async def read(position: int) -> None:
        try:
            async for events in handles[position].steps():
                inbox.put_nowait((position, events))
        finally:
            inbox.put_nowait(None)

    tasks = [asyncio.ensure_future(read(position)) for position in range(len(handles))]
    try:
        left = len(tasks)
        while left:
            step = await inbox.get()
            if step is None:
                left -= 1
            else:
                yield step
        for task in tasks:
            await task  # raises if the job failed
    finally:
        for task in tasks:
            task.cancel()


class StreamWriter(Protocol):
    """Turns events into server-sent ones."""

    def write(self, position: int, events: Sequence[TokenEvent]) -> bytes:
        """New events of the request at ``position``."""

    def finish(self, results: list[Result]) -> bytes:
        """What follows when all are done, before ``[DONE]``."""


class EventStream(Response):
    """Sends requests' tokens as they come: one write a step.

    The head waits for the first token, so that what fails before it has a status of its own.
    """

    def __init__(self, handles: Sequence[RequestHandle], writer: StreamWriter) -> None:
        self.background = None
        self._handles = handles
        self._writer = writer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False
        try:
            async with cancelled_with_client(receive, self._handles):
                async for position, events in steps_of(self._handles):
                    for event in events:
                        if event.finish_reason not in _GOOD_ENDS:
                            await self._fail(position)
                    body = self._writer.write(position, events)
                    if not has_begun:
                        has_begun = True
                        await send({"type": "http.response.start", "status": 200, "headers": _HEAD})
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                tail = self._writer.finish([handle.result(0) for handle in self._handles])
        except Exception as error:
            failure = _failure_of(error)
            if not has_begun:
                raise failure from error
            tail = error_event(failure)
        await send({"type": "http.response.body", "body": tail + DONE, "more_body": False})

    async def _fail(self, position: int) -> None:
        """Raise what became of the request at ``position``, one of whose choices has ended badly."""
        handle = self._handles[position]
        handle.cancel()
        failure = failure_of(await handle)
        raise failure if failure is not None else ApiError(500, "the request failed")


def _failure_of(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, DisaggError):
        return api_error_of(error)
    _log.error("a stream failed", exc_info=error)
    return ApiError(500, "the server failed to answer this request; its log says more")
