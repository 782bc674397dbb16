"""The orchestrator: what ``launch`` gives to rank 0.

Two threads. The *pump* owns the channel and the request table for the whole life of the job: it takes
callers' commands, leaders' steps and the clock, and feeds the handles; after start-up only it calls MPI.
Callers, synchronous or asyncio, only put commands into a deque and ring the pump's bell, so a slow reader
never delays a hand-over. The pump sleeps on that bell, so it holds the GIL only while it works.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import operator
import queue
import random
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import msgspec

from disagg_mpi.comm.channel import Channel
from disagg_mpi.comm.messages import IntegrityCheck, IntegrityReport, Shutdown, Step
from disagg_mpi.comm.waiting import RINGABLE_SLEEP, Doorbell, Waiter
from disagg_mpi.errors import DisaggError, IntegrityError, JobFailed, RequestError
from disagg_mpi.orchestrator.dispatcher import Dispatcher, Policy
from disagg_mpi.orchestrator.handle import LoopFeed, RequestHandle
from disagg_mpi.orchestrator.pace import Pace
from disagg_mpi.orchestrator.snapshot import JobSnapshot
from disagg_mpi.orchestrator.table import Entry, InstanceView, find_shared_blocks
from disagg_mpi.request import ExecutorLimits, ExecutorRequest, PoolBlocks, Request, Result, SamplingParams

Prompt = str | Sequence[int] | Request


class PromptEncoder(Protocol):
    """What is needed of :class:`disagg_mpi.model.tokenizer.Tokenizer`."""

    def encode(self, text: str) -> list[int]: ...

    def apply_chat_template(self, messages: Sequence[dict[str, Any]]) -> list[int]: ...


class Orchestrator:
    """Rank 0's API. Thread-safe. Closed by ``launch`` at the end of its ``with`` block."""

    def __init__(
        self,
        instances: Sequence[InstanceView],
        channel: Channel,
        doorbell: Doorbell,
        tokenizer: PromptEncoder | None,
        policy: Policy | None = None,
    ) -> None:
        self._channel = channel
        self._doorbell = doorbell
        self._tokenizer = tokenizer
        self._dispatcher = Dispatcher(instances, channel.send, policy)
        self._leaders = self._dispatcher.leaders
        self._commands: deque[Callable[[], None]] = deque()
        self._ids = itertools.count(1)
        self._handles: dict[int, RequestHandle] = {}
        self._feeds: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopFeed] = (
            weakref.WeakKeyDictionary())
        self._open_feeds: tuple[LoopFeed, ...] = ()
        """The same for the pump thread; replaced, never changed."""
        self._checks: dict[int, queue.SimpleQueue[IntegrityReport]] = {}
        self._failure: BaseException | None = None
        self._closing = False
        self._stopped = False
        self._ended = False
        self._pump = threading.Thread(target=self._run, name="disagg_mpi-pump", daemon=True)
        self._pump.start()

    # ---- requests ----

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> RequestHandle:
        """Start one request; returns at once.

        ``prompt``: text, token ids, or a whole :class:`Request` (then ``sampling`` must be ``None``).
        ``loop``: the event loop that will read the handle with ``async for``.
        Raises :class:`RequestError` for what cannot be turned into tokens; a request that cannot be
        served in any other way gives a result with an error.
        """
        if self._closing:
            raise JobFailed("the orchestrator is shut down; submit inside the with block")
        if self._failure is not None:
            raise JobFailed(str(self._failure)) from self._failure
        request = _as_request(prompt, sampling)
        tokens = self._tokens_of(request)
        params = request.sampling
        if params.temperature and params.seed is None:
            params = msgspec.structs.replace(params, seed=random.getrandbits(62))
        deadline = None if request.deadline is None else time.monotonic() + request.deadline
        ids = [next(self._ids) for _ in range(params.n)]
        handle = RequestHandle(
            request, ids[0], tokens, lambda: self._cancel(ids), self._feed_of(loop))
        entries = [
            Entry(ExecutorRequest(request_id=request_id, prompt_token_ids=tokens, sampling=params,
                                  sequence_index=index), handle, deadline)
            for index, request_id in enumerate(ids)]
        self._handles[handle.request_id] = handle
        handle.add_done_callback(self._forget)
        self._command(lambda: self._submit(entries))
        if self._ended:  # the pump may have ended since the look above
            self._fail_open()
        return handle

    def generate(
        self,
        prompts: Iterable[Prompt],
        sampling: SamplingParams | None = None,
        *,
        ordered: bool = True,
    ) -> Iterator[Result]:
        """A result for each prompt, in the prompts' order or, unordered, as they finish.

        ``prompts`` may be endless: they are taken as there is room (four times what the generation
        instances run at once). Leaving the iterator early cancels what is open.
        """
        source = enumerate(prompts)
        done: queue.SimpleQueue[tuple[int, RequestHandle]] = queue.SimpleQueue()
        open_handles: dict[int, RequestHandle] = {}
        early: dict[int, Result] = {}
        next_index = 0
        try:
            while True:
                for index, prompt in itertools.islice(
                        source, max(0, 4 * self.capacity - len(open_handles) - len(early))):
                    handle = self.submit(prompt, sampling)
                    open_handles[index] = handle
                    handle.add_done_callback(lambda h, index=index: done.put((index, h)))  # type: ignore[misc]
                if not open_handles:
                    return
                index, handle = done.get()
                del open_handles[index]
                early[index] = handle.result()
                while early:
                    if not ordered:
                        yield early.popitem()[1]
                    elif next_index in early:
                        yield early.pop(next_index)
                        next_index += 1
                    else:
                        break
        finally:
            for handle in open_handles.values():
                handle.cancel()

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> RequestHandle:
        """Start one request whose tokens are read as they come: ``for`` or, in asyncio, ``async for``."""
        try:
            loop: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            loop = None
        return self.submit(prompt, sampling, loop=loop)

    async def generate_async(
        self, prompt: Prompt, sampling: SamplingParams | None = None
    ) -> Result:
        """One result. Cancelling the task cancels the request."""
        handle = self.submit(prompt, sampling)
        try:
            return await handle
        except asyncio.CancelledError:
            handle.cancel()
            raise

    @property
    def capacity(self) -> int:
        """Requests that the generation instances can run at once."""
        return self._dispatcher.capacity

    @property
    def num_open(self) -> int:
        """Requests that are not over."""
        return self._dispatcher.num_open

    @property
    def pace(self) -> Pace:
        """How many tokens have come, and how far apart. To be read from any thread."""
        return self._dispatcher.pace

    @property
    def limits(self) -> ExecutorLimits:
        """What a request must fit into: see :func:`~disagg_mpi.executor.validate.problem_with`."""
        return self._dispatcher.limits

    @property
    def tokenizer(self) -> PromptEncoder | None:
        """The model's; ``None`` in a job without a model."""
        return self._tokenizer

    def snapshot(self) -> JobSnapshot:
        """What the job is doing. From any thread, and without waiting; cheap: it counts what is open."""
        instances, phases = self._dispatcher.snapshot()
        failure = None
        if self._failure is not None:
            failure = f"{type(self._failure).__name__}: {self._failure}"
        elif not self._pump.is_alive() and not self._stopped:
            failure = "the pump thread has ended"
        return JobSnapshot(instances=instances, phases=phases, failure=failure, is_closing=self._closing)

    def check_integrity(self, timeout: float = 10.0) -> None:
        """Ask every leader for its books; :class:`IntegrityError` names whatever is owned or open.

        Meant for a quiet moment: nothing may be running.
        """
        token = next(self._ids)
        reports: queue.SimpleQueue[IntegrityReport] = queue.SimpleQueue()
        ledger: queue.SimpleQueue[list[str]] = queue.SimpleQueue()

        def ask() -> None:
            self._checks[token] = reports
            ledger.put(self._dispatcher.check())
            for leader in self._leaders:
                self._channel.send(leader, IntegrityCheck(token))

        self._command(ask)
        end = time.monotonic() + timeout
        try:
            problems = [f"orchestrator: {problem}" for problem in ledger.get(timeout=timeout)]
        except queue.Empty:
            raise JobFailed(f"the orchestrator did not answer within {timeout:g} s; "
                            f"{self._failure or 'it has ended'}") from self._failure
        holdings: list[tuple[str, PoolBlocks]] = []
        for answered in range(len(self._leaders)):
            try:
                report = reports.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                missing = len(self._leaders) - answered
                problems.append(f"{missing} leaders did not answer within {timeout:g} s")
                break
            name = self._dispatcher.instance_name(report.instance_id)
            problems += [f"{name}: {problem}" for problem in report.problems]
            if report.pool is not None:
                holdings.append((name, report.pool))
        self._checks.pop(token, None)
        problems += find_shared_blocks(holdings)
        if problems:
            raise IntegrityError("; ".join(problems))

    def close(self, timeout: float = 10.0) -> None:
        """Cancel what is open, wait for its end, tell the leaders to leave, stop the pump."""
        self._closing = True
        if self._pump.is_alive():
            self._command(self._dispatcher.cancel_all)
            end = time.monotonic() + timeout
            while self._dispatcher.num_open and self._pump.is_alive() and time.monotonic() < end:
                time.sleep(0.002)
            self._command(self._stop)
            self._pump.join(max(0.1, end - time.monotonic()))
        if self._pump.is_alive():
            raise JobFailed(f"the job did not come to its end within {timeout:g} s")

    # ---- the pump thread ----

    def _run(self) -> None:
        waiter = Waiter(self._doorbell)
        try:
            while not self._stopped:
                worked = False
                with contextlib.suppress(IndexError):
                    while True:
                        self._commands.popleft()()
                        worked = True
                for _, message in self._channel.poll():
                    self._take(message)
                    worked = True
                wait = self._dispatcher.turn()
                if worked:
                    waiter.worked()
                else:
                    waiter.idle(transferring=self._channel.num_pending > 0,
                                at_most=RINGABLE_SLEEP if wait is None else wait)
            self._channel.flush(timeout=2.0)
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._ended = True
            self._fail_open()

    def _fail_open(self) -> None:
        """The pump has ended: nothing more will come for anyone."""
        error = self._failure
        text = ("the orchestrator was shut down" if error is None
                else f"{type(error).__name__}: {error}")
        for handle in list(self._handles.values()):
            handle.fail(JobFailed(text))

    def _take(self, message: object) -> None:
        if isinstance(message, Step):
            feeds = self._open_feeds
            for feed in feeds:
                feed.hold()
            try:
                self._dispatcher.on_step(message)
            finally:
                for feed in feeds:
                    feed.release()
        elif isinstance(message, IntegrityReport):
            reports = self._checks.get(message.token)
            if reports is not None:
                reports.put(message)
        else:
            raise TypeError(f"rank 0 takes no {type(message).__name__}")

    def _stop(self) -> None:
        for leader in self._leaders:
            self._channel.send(leader, Shutdown())
        self._stopped = True

    # ---- callers' threads ----

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        self._doorbell.ring_self()

    def _submit(self, entries: list[Entry]) -> None:
        for entry in entries:
            self._dispatcher.submit(entry)

    def _feed_of(self, loop: asyncio.AbstractEventLoop | None) -> LoopFeed | None:
        """One for each loop; its handles are made in the loop's own thread."""
        if loop is None:
            return None
        feed = self._feeds.get(loop)
        if feed is None:
            feed = self._feeds[loop] = LoopFeed(loop)
            self._open_feeds = (*(other for other in self._open_feeds if other.is_open), feed)
        return feed

    def _forget(self, handle: RequestHandle) -> None:
        self._handles.pop(handle.request_id, None)

    def _cancel(self, ids: Sequence[int]) -> None:
        def cancel() -> None:
            for request_id in ids:
                self._dispatcher.cancel(request_id)

        self._command(cancel)

    def _tokens_of(self, request: Request) -> list[int]:
        if request.prompt_token_ids is not None:
            try:  # arrays give integers of their own types, which cannot be sent
                return [operator.index(token) for token in request.prompt_token_ids]
            except TypeError as error:
                raise RequestError(f"prompt_token_ids must be whole numbers: {error}") from None
        if self._tokenizer is None:
            raise RequestError("this job has no tokenizer; give prompt_token_ids")
        try:
            if request.messages is not None:
                return self._tokenizer.apply_chat_template(request.messages)
            return self._tokenizer.encode(request.prompt or "")
        except (DisaggError, UnicodeError, TypeError) as error:
            raise RequestError(f"the prompt cannot be turned into tokens: {error}") from error


def _as_request(prompt: Prompt, sampling: SamplingParams | None) -> Request:
    if isinstance(prompt, Request):
        if sampling is not None:
            raise RequestError("give the sampling parameters in the Request or beside it, not both")
        return prompt
    params = sampling or SamplingParams()
    if isinstance(prompt, str):
        return Request(prompt=prompt, sampling=params)
    return Request(prompt_token_ids=prompt, sampling=params)
