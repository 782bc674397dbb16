"""The one way in for requests of every front end: limits first, then the job, then the books.

A :class:`Gate` lives as long as its server and is used in the server's event loop alone. It refuses what
can never be served (:class:`RequestError`, the client's mistake) and what there is no room for now
(:class:`OverloadedError`) before anything is handed to the job; so an error that comes later is the job's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from disagg_mpi.errors import JobFailed, OverloadedError, RequestError
from disagg_mpi.executor.validate import problem_with
from disagg_mpi.frontend.served import Served
from disagg_mpi.frontend.stats import Ended, ServingStats, outcome_of
from disagg_mpi.orchestrator.handle import RequestHandle
from disagg_mpi.request import Choice, ExecutorRequest, Request, Result, SamplingParams

# Beyond so many characters a text is tokenised in a thread: 4 KiB take about 1 ms, in which no other
# stream of this loop moves.
_INLINE_CHARACTERS = 4096


class Gate:
    """Checks, submits and follows requests to their end."""

    def __init__(self, served: Served, stats: ServingStats) -> None:
        self.served = served
        self.stats = stats
        self.is_closed = False
        """Set when the server shuts down: nothing new comes in."""
        self._open: dict[int, RequestHandle] = {}

    async def encode(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """The token ids of prompts. Raises :class:`RequestError` for a text that has none."""
        def encode() -> list[list[int]]:
            return [self.served.tokenizer.encode(text, add_special_tokens) for text in texts]

        try:
            if sum(map(len, texts)) <= _INLINE_CHARACTERS:
                return encode()
            return await asyncio.to_thread(encode)
        except (UnicodeError, TypeError) as error:
            raise RequestError(f"the prompt cannot be turned into tokens: {error}") from error

    async def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids that are in the vocabulary, special tokens included."""
        decode = self.served.tokenizer.decode
        if len(token_ids) <= _INLINE_CHARACTERS:
            return decode(token_ids, False)
        return await asyncio.to_thread(decode, token_ids, False)

    def room(self, num_prompt_tokens: int) -> int:
        """Tokens that can be generated at most after a prompt of so many; at least 1."""
        limits = self.served.orchestrator.limits
        most = min(self.served.max_model_len, limits.num_blocks * limits.tokens_per_block)
        return max(1, most - num_prompt_tokens)

    def check(self, prompt_token_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Raise :class:`RequestError` for what can never be served here."""
        served = self.served
        if sampling.n > served.limits.max_n:
            raise RequestError(f"n is {sampling.n}; this server takes {served.limits.max_n} at most")
        length, most = len(prompt_token_ids), served.limits.max_prompt_tokens
        if most is not None and length > most:
            raise RequestError(f"the prompt has {length} tokens; this server takes {most} at most")
        if length >= served.max_model_len:  # before anything looks at each token
            raise RequestError(f"the prompt has {length} tokens, which leaves no room in the model's context "
                               f"length of {served.max_model_len}; the prompt must be shortened")
        problem = problem_with(
            ExecutorRequest(request_id=0, prompt_token_ids=list(prompt_token_ids), sampling=sampling),
            served.orchestrator.limits)
        if problem is not None:
            raise RequestError(problem)

    def submit(self, requests: Sequence[Request], api: str) -> list[RequestHandle]:
        """Start all of ``requests`` or none; a handle for each, for ``async for`` in this loop.

        Each has ``prompt_token_ids``. Raises :class:`RequestError` for the first that can never be served,
        :class:`OverloadedError` while there is no room, :class:`JobFailed` if the job has ended.
        """
        if self.is_closed:
            raise JobFailed("the server is shutting down")
        for request in requests:
            self.check(request.prompt_token_ids or (), request.sampling)
        wanted, most = sum(request.sampling.n for request in requests), self.served.limits.max_open_requests
        if wanted > most:
            raise RequestError(f"this asks for {wanted} sequences at once; this server takes {most} at most")
        if self.stats.num_open + wanted > most:
            raise OverloadedError(f"{self.stats.num_open} sequences are open and this asks for {wanted}; "
                                  f"this server takes {most} at once: try again later")
        loop = asyncio.get_running_loop()
        handles: list[RequestHandle] = []
        try:
            for request in requests:
                handle = self.served.orchestrator.submit(request, loop=loop)
                handles.append(handle)
                self._follow(handle, api, loop)
        except BaseException:
            for handle in handles:
                handle.cancel()
            raise
        return handles

    def cancel_all(self) -> None:
        """Give everything up that is open; each still gets its end."""
        for handle in list(self._open.values()):
            handle.cancel()

    @property
    def num_open(self) -> int:
        """Requests that are not over."""
        return len(self._open)

    def _follow(self, handle: RequestHandle, api: str, loop: asyncio.AbstractEventLoop) -> None:
        began, started_at = time.monotonic(), time.time()
        self._open[handle.request_id] = handle
        self.stats.began(handle.request.sampling.n)

        def over() -> None:
            del self._open[handle.request_id]
            result = _result_of(handle)
            self.stats.ended(Ended(result, outcome_of(result), api, started_at, time.monotonic() - began))

        def on_pump(_: RequestHandle) -> None:
            try:
                loop.call_soon_threadsafe(over)
            except RuntimeError:  # the loop is closed, and its books with it
                return

        handle.add_done_callback(on_pump)


def _result_of(handle: RequestHandle) -> Result:
    """A finished handle's result, also where the job failed and it has none."""
    try:
        return handle.result(0)
    except JobFailed as error:
        return Result(id=handle.request.id, request_id=handle.request_id,
                      prompt_token_ids=list(handle.request.prompt_token_ids or ()), error=str(error),
                      choices=[Choice(i, finish_reason="error") for i in range(handle.request.sampling.n)])
