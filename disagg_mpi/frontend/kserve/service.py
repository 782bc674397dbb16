"""One inference request, whatever the protocol: admission, prompts, replies, cancellation, statistics.

A :class:`Service` belongs to one protocol's server and is used on its event loop. :meth:`Service.infer` owns
a request from its tensors to its last reply: whoever leaves its ``async with`` block early, because a client
went away or a reply could not be sent, cancels all of the request in whatever phase it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from disagg_mpi.errors import DeadlineError, DisaggError, JobFailed, RequestError
from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.kserve.ensemble import (
    OUTPUT_NAMES,
    Defaults,
    Prompt,
    Vocabulary,
    read_prompt,
    read_rows,
)
from disagg_mpi.frontend.kserve.models import Model, Models
from disagg_mpi.frontend.kserve.replies import Reply, Row
from disagg_mpi.frontend.kserve.statistics import Statistics
from disagg_mpi.frontend.kserve.tensors import Incoming
from disagg_mpi.orchestrator.handle import RequestHandle
from disagg_mpi.request import Request, Result, Timing, TokenEvent

MAX_LOGITS_BYTES = 512 * 2**20
"""Of one request's logits, which rank 0 holds until its end."""


@dataclass(frozen=True, slots=True)
class Call:
    """One inference request as its protocol has understood it."""

    model: str
    version: str
    id: str
    inputs: Sequence[Incoming]
    outputs: frozenset[str] | None
    """Names that were asked for; ``None``: all that there are."""
    timeout: float | None = None
    """Seconds within which all of it must be done."""
    may_stream: bool = True
    """Whether the protocol can carry more than one reply."""


class Service:
    """What gRPC and HTTP share."""

    def __init__(
        self, gate: Gate, models: Models, statistics: Statistics,
        why_not_ready: Callable[[], str | None], api: str,
    ) -> None:
        """``why_not_ready``: what keeps the job from making progress; ``None`` if nothing does. ``api``: the
        protocol's name in the books."""
        self.served = gate.served
        self.models = models
        self.statistics = statistics
        self.why_not_ready = why_not_ready
        self._gate = gate
        self._api = api
        tokenizer = self.served.tokenizer
        self._vocabulary = Vocabulary(
            lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
        self._defaults = Defaults(
            self.served.limits.max_n, has_input_in_output=not models.exclude_input_in_output)

    @contextlib.asynccontextmanager
    async def infer(self, call: Call) -> AsyncIterator[AsyncIterator[Reply]]:
        """Start a request; gives its replies. Leaving the block cancels what is open of it.

        Raises :class:`RequestError` and its kin for what cannot be served, when it is entered or, if the job
        finds out, from the replies; after an error there are no more replies.
        """
        model = self.models.get(call.model, call.version)
        arrival = time.monotonic()
        handles: list[RequestHandle] = []
        timings: list[Timing] = []
        encode = 0.0
        is_done = False
        try:
            call = _in_our_names(call, model)
            prompts = self._read(model, call)
            tokens = await self._gate.encode([prompt.text for prompt in prompts])
            encode = time.monotonic() - arrival
            self._check_logits(prompts, tokens)
            handles += self._gate.submit(
                [Request(prompt_token_ids=ids, sampling=prompt.sampling, deadline=call.timeout,
                         id=call.id or None) for prompt, ids in zip(prompts, tokens, strict=True)], self._api)
            rows = [Row(prompt, batch_index=index if len(prompts) > 1 else None, wanted=call.outputs,
                        arrival_ns=time.monotonic_ns(), tokens_per_block=self.models.tokens_per_block)
                    for index, prompt in enumerate(prompts)]
            async with contextlib.aclosing(_replies(rows, handles, timings)) as replies:
                yield replies
            is_done = len(timings) == len(rows)
        finally:
            for handle in handles:
                if not handle.done():
                    handle.cancel()
            if is_done:
                self.statistics.succeeded(
                    model, len(handles), encode, max(timings, key=lambda timing: timing.total))
            else:
                self.statistics.failed(model, time.monotonic() - arrival)

    def _read(self, model: Model, call: Call) -> list[Prompt]:
        """The prompts of a request, none of them started. Raises :class:`RequestError` or ``ConfigError``."""
        if not model.takes_text:
            texts = ", ".join(each.name for each in self.models if each.takes_text)
            raise RequestError(f"model '{model.name}' is a part of a pipeline and takes no requests of its "
                               f"own; send text_input to: {texts}")
        unknown = sorted((call.outputs or frozenset()) - OUTPUT_NAMES)
        if unknown:
            raise RequestError(f"unexpected inference output '{unknown[0]}' for model '{model.name}'; known "
                               f"are {', '.join(sorted(OUTPUT_NAMES))}")
        prompts = [read_prompt(row, self._vocabulary, self._defaults)
                   for row in read_rows(call.inputs, model.max_batch_size)]
        if not call.may_stream and any(prompt.is_streamed for prompt in prompts):
            raise RequestError("stream is true, and this call has one reply; use ModelStreamInfer or "
                               "generate_stream, or leave stream out")
        return prompts

    def _check_logits(self, prompts: Sequence[Prompt], tokens: Sequence[Sequence[int]]) -> None:
        """Raise :class:`RequestError` for more logits than rank 0 holds."""
        rows = 0
        for prompt, ids in zip(prompts, tokens, strict=True):
            rows += len(ids) * prompt.returns.context_logits
            rows += prompt.sampling.n * prompt.sampling.max_tokens * prompt.returns.generation_logits
        num_bytes = 4 * rows * self.served.orchestrator.limits.vocab_size
        if num_bytes > MAX_LOGITS_BYTES:
            raise RequestError(f"the logits that are asked for have {num_bytes} bytes, at most "
                               f"{MAX_LOGITS_BYTES} can be given; lower max_tokens, shorten text_input or "
                               "ask for fewer sequences")


def _in_our_names(call: Call, model: Model) -> Call:
    """``call`` with tensors as the table names them, where ``model`` has names of its own."""
    if not model.inputs and not model.outputs:
        return call
    ours = {theirs: name for name, theirs in model.outputs.items()}
    return replace(
        call, inputs=[replace(given, name=model.ours(given.name)) for given in call.inputs],
        outputs=call.outputs and frozenset(ours.get(name, name) for name in call.outputs))


async def _replies(
    rows: Sequence[Row], handles: Sequence[RequestHandle], timings: list[Timing]
) -> AsyncGenerator[Reply, None]:
    """The replies of all rows as they come; each row's longest sequence's timing into ``timings``."""
    left = sum(row.prompt.sampling.n for row in rows)
    async with contextlib.aclosing(_merge(rows, handles)) as items:
        async for row, item in items:
            if isinstance(item, Result):
                _check(item)
                timings.append(max((choice.timing for choice in item.choices), key=lambda each: each.total))
                for reply in row.take_result(item):
                    left -= 1
                    reply.is_final = not left
                    yield reply
            elif item.finish_reason in (None, "stop", "length"):  # of any other end the result says why
                event_reply = row.take_event(item)
                if event_reply is not None:
                    left -= item.finish_reason is not None
                    event_reply.is_final = not left
                    yield event_reply


async def _merge(
    rows: Sequence[Row], handles: Sequence[RequestHandle]
) -> AsyncGenerator[tuple[Row, TokenEvent | Result], None]:
    """Every row's events, where it is streamed, and its result. Raises what a row raises."""
    if len(rows) == 1:
        async for item in _items(rows[0], handles[0]):
            yield rows[0], item
        return
    arrived: asyncio.Queue[tuple[Row, TokenEvent | Result | Exception | None]] = asyncio.Queue()

    async def read(row: Row, handle: RequestHandle) -> None:
        try:
            async for item in _items(row, handle):
                arrived.put_nowait((row, item))
            arrived.put_nowait((row, None))
        except Exception as error:
            arrived.put_nowait((row, error))

    tasks = [asyncio.create_task(read(row, handle)) for row, handle in zip(rows, handles, strict=True)]
    try:
        num_open = len(tasks)
        while num_open:
            row, found = await arrived.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                num_open -= 1
            else:
                yield row, found
    finally:
        for task in tasks:
            task.cancel()


async def _items(row: Row, handle: RequestHandle) -> AsyncGenerator[TokenEvent | Result, None]:
    if row.prompt.is_streamed:
        async for event in handle:
            yield event
    yield await handle


def _check(result: Result) -> None:
    """Raise what a result without an answer says."""
    if result.error is None:
        return
    if result.is_refused:
        raise RequestError(result.error)
    reasons = {choice.finish_reason for choice in result.choices}
    if "deadline" in reasons:
        raise DeadlineError(result.error)
    if "error" not in reasons:
        raise JobFailed(result.error)  # cancelled, and not by its client, who would not be reading
    raise DisaggError(result.error)
