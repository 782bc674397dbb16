"""What a caller holds of a request on its way: wait for it, stream it, cancel it.

A handle is made by ``Orchestrator.submit`` in the caller's thread and fed by the pump thread. Its events
can be read once, by a plain ``for`` or by an ``async for``; the result any number of times.

Events for asyncio go through one :class:`LoopFeed` a loop, which the orchestrator makes with the first such
handle and keeps: however many requests a step has tokens for, the loop is woken once.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import Any

from disagg_mpi.orchestrator.table import Entry
from disagg_mpi.request import Choice, FinishReason, Request, Response, Result, TokenEvent

_Event = TokenEvent | None  # None: no more


class LoopFeed:
    """Carries events from the pump thread to the handles' readers in one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._waiting: deque[tuple[asyncio.Queue[_Event], _Event]] = deque()
        self._is_called = False
        self._is_held = False

    @property
    def is_open(self) -> bool:
        """Whether anybody can read from it."""
        loop = self._loop()
        return loop is not None and not loop.is_closed()

    def hold(self) -> None:
        """Do not wake the loop before :meth:`release`: a step's events come at once. On the pump thread."""
        self._is_held = True

    def release(self) -> None:
        self._is_held = False
        if self._waiting:
            self._wake()

    def push(self, inbox: asyncio.Queue[_Event], event: _Event) -> None:
        """On the pump thread."""
        self._waiting.append((inbox, event))
        if not self._is_held:
            self._wake()

    def _wake(self) -> None:
        if self._is_called:  # it has not looked yet, or will look again: see _deliver
            return
        self._is_called = True
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._deliver)
                return
        except RuntimeError:  # the loop is closed
            pass
        self._waiting.clear()  # nobody reads

    def _deliver(self) -> None:
        """In the loop."""
        self._is_called = False  # before the look: what comes after it calls anew
        with contextlib.suppress(IndexError):
            while True:
                inbox, event = self._waiting.popleft()
                inbox.put_nowait(event)


class RequestHandle:
    """One request: ``result()``, ``for event in handle``, ``await handle``, ``async for``, ``cancel()``."""

    def __init__(
        self,
        request: Request,
        request_id: int,
        prompt_token_ids: list[int],
        cancel: Callable[[], None],
        feed: LoopFeed | None,
    ) -> None:
        self.request = request
        self.request_id = request_id
        self._result = Result(
            id=request.id, request_id=request_id, prompt_token_ids=prompt_token_ids,
            choices=[Choice(index) for index in range(request.sampling.n)])
        self._texts: list[list[str]] = [[] for _ in self._result.choices]
        self._open = request.sampling.n
        self._cancel = cancel
        self._future: Future[Result] = Future()
        # "Running" cannot be cancelled: a task that stops waiting leaves the result to the others.
        self._future.set_running_or_notify_cancel()
        self._feed = feed
        self._sync: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self._async: asyncio.Queue[_Event] = asyncio.Queue()

    # ---- the caller's side ----

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the end. ``TimeoutError`` after ``timeout`` seconds; ``JobFailed`` if the job did."""
        return self._future.result(timeout)

    def done(self) -> bool:
        return self._future.done()

    def cancel(self) -> None:
        """Give the request up in whatever phase it is; its result still comes, with an error."""
        self._cancel()

    def add_done_callback(self, function: Callable[[RequestHandle], None]) -> None:
        """Call ``function(handle)`` at the end, on the pump thread: keep it short."""
        self._future.add_done_callback(lambda _: function(self))

    def __iter__(self) -> Iterator[TokenEvent]:
        if self._feed is not None:
            raise RuntimeError("this handle was made for asyncio: read it with `async for`")
        while (event := self._sync.get()) is not None:
            yield event
        self._sync.put(None)  # for whoever reads again
        self.result()  # raises if the job failed

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        async for events in self.steps():
            for event in events:
                yield event

    async def steps(self) -> AsyncIterator[list[TokenEvent]]:
        """As ``async for``, but all that has come since the last look at once: at least one event."""
        if self._feed is None:
            raise RuntimeError("this handle was not made for asyncio: call stream() in the loop, "
                               "or give submit() its loop")
        inbox = self._async
        is_over = False
        while not is_over:
            event = await inbox.get()
            events: list[TokenEvent] = []
            while event is not None:
                events.append(event)
                if inbox.empty():
                    break
                event = inbox.get_nowait()
            is_over = event is None
            if events:
                yield events
        inbox.put_nowait(None)  # for whoever reads again
        self.result(0)

    def __await__(self) -> Generator[Any, None, Result]:
        return asyncio.wrap_future(self._future).__await__()

    # ---- the pump thread's side ----

    def on_response(self, entry: Entry, response: Response) -> None:
        index = entry.request.sequence_index
        choice = self._result.choices[index]
        choice.token_ids += response.token_ids
        if response.text:
            self._texts[index].append(response.text)
        if response.logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + response.logprobs
        if response.logits is not None:
            choice.logits = (choice.logits or []) + response.logits
        if response.prompt_logprobs is not None:
            self._result.prompt_logprobs = response.prompt_logprobs
        if response.context_logits is not None:
            self._result.context_logits = response.context_logits
        reason: FinishReason | None = None
        if entry.is_over:
            reason = choice.finish_reason = response.finish_reason or "error"
            choice.timing = entry.timing
            choice.text = "".join(self._texts[index])
            self._result.error = self._result.error or response.error
            self._result.is_refused = self._result.is_refused or response.is_refused
            self._open -= 1
        if response.token_ids or response.text or reason:
            self._push(TokenEvent(response.text, response.token_ids, index, response.logprobs,
                                  reason, response.prompt_logprobs))
        if not self._open:
            self._settle(lambda: self._future.set_result(self._result))

    def fail(self, error: BaseException) -> None:
        """The job failed: nothing more will come."""
        self._settle(lambda: self._future.set_exception(error))

    def _settle(self, settle: Callable[[], None]) -> None:
        try:
            settle()
        except InvalidStateError:
            return
        self._push(None)

    def _push(self, event: _Event) -> None:
        if self._feed is None:
            self._sync.put(event)
        else:
            self._feed.push(self._async, event)
