"""What the engine gives, as a request's output tensors. Pure but for the clock that perf metrics count from.

One :class:`Row` a prompt of a request, for as long as the request is open. A streamed prompt has a reply for
each event of the engine: text and log-probs go out with their tokens, what is known only at the end (logits,
perf metrics) with the last reply of each sequence. Any other prompt has one reply for each sequence. The
answer to a unary request is these replies stacked along the first dimension (:func:`stack`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from disagg_mpi.frontend.kserve.ensemble import Prompt
from disagg_mpi.frontend.kserve.tensors import Outgoing
from disagg_mpi.request import Choice, Result, TokenEvent, TokenLogprobs


class Reply(msgspec.Struct):
    """One message to the client."""

    text: str | None
    """``None``: the client asked for other outputs only."""
    others: list[Outgoing]
    is_final: bool = False
    """Nothing follows, of any prompt of the request."""

    def outputs(self) -> list[Outgoing]:
        if self.text is None:
            return self.others
        # Shape [1], without the batch's dimension: as Triton's postprocessing gives it.
        return [Outgoing("text_output", "BYTES", (1,), [self.text.encode()]), *self.others]


class Row:
    """One prompt of a request: from the engine's events to replies."""

    def __init__(
        self, prompt: Prompt, *, batch_index: int | None, wanted: frozenset[str] | None, arrival_ns: int,
        tokens_per_block: int,
    ) -> None:
        """``batch_index`` is ``None`` in a batch of one. ``wanted``: the outputs asked for; ``None``: all."""
        self.prompt = prompt
        self._batch_index = batch_index
        self._wanted = wanted
        self._arrival_ns = arrival_ns
        self._tokens_per_block = tokens_per_block
        self._cum_log_probs = [0.0] * prompt.sampling.n
        self._kept: dict[int, TokenEvent] = {}

    def take_event(self, event: TokenEvent) -> Reply | None:
        """A streamed prompt's new tokens; ``None`` for an event that waits for the result."""
        returns = self.prompt.returns
        if event.finish_reason is not None and (
                returns.generation_logits or returns.context_logits or returns.perf_metrics):
            self._kept[event.index] = event
            return None
        return self._reply(event.text, event.index, event.logprobs)

    def take_result(self, result: Result) -> Iterator[Reply]:
        """What is left to say at the end: all of it, unless the prompt is streamed."""
        for choice in result.choices:
            if not self.prompt.is_streamed:
                start = self.prompt.text if self.prompt.has_input_in_output else ""
                reply = self._reply(start + choice.text, choice.index, choice.logprobs)
            elif choice.index in self._kept:
                event = self._kept[choice.index]
                reply = self._reply(event.text, event.index, event.logprobs)
            else:
                continue
            reply.others += self._only_wanted(self._at_the_end(result, choice))
            yield reply

    def _reply(self, text: str, index: int, logprobs: list[TokenLogprobs] | None) -> Reply:
        others = []
        if self._batch_index is not None:
            others.append(_scalar("batch_index", "INT32", self._batch_index))
        if self.prompt.sampling.n > 1:
            others.append(_scalar("sequence_index", "INT32", index))
        if self.prompt.returns.log_probs:
            own = [entry.logprob for entry in logprobs or ()]
            self._cum_log_probs[index] += sum(own)
            others.append(_scalar("cum_log_probs", "FP32", self._cum_log_probs[index]))
            others.append(_array("output_log_probs", "FP32", [[own]]))
        is_wanted = self._wanted is None or "text_output" in self._wanted
        return Reply(text if is_wanted else None, self._only_wanted(others) if others else others)

    def _only_wanted(self, outputs: list[Outgoing]) -> list[Outgoing]:
        return outputs if self._wanted is None else [out for out in outputs if out.name in self._wanted]

    def _at_the_end(self, result: Result, choice: Choice) -> list[Outgoing]:
        returns = self.prompt.returns
        outputs = []
        # Of a prompt's sequences the first alone has them: they are the same for all.
        if returns.context_logits and choice.index == 0 and result.context_logits is not None:
            logits = _matrix(result.context_logits)
            outputs.append(Outgoing("context_logits", "FP32", (1, *logits.shape), logits))
        if returns.generation_logits and choice.logits is not None:
            logits = _matrix(choice.logits)
            outputs.append(Outgoing("generation_logits", "FP32", (1, 1, *logits.shape), logits))
        if returns.perf_metrics:
            outputs += self._perf_metrics(result, choice)
        return outputs

    def _perf_metrics(self, result: Result, choice: Choice) -> list[Outgoing]:
        """Blocks of the KV-cache, and when things happened (monotonic clock of rank 0, nanoseconds)."""
        timing = choice.timing
        # The last token is never computed on, so it has no place in the cache.
        positions = len(result.prompt_token_ids) + max(0, len(choice.token_ids) - 1)
        total = -(-positions // self._tokens_per_block)
        reused = min(timing.cached_tokens // self._tokens_per_block, total)

        def after(seconds: float) -> int:
            return self._arrival_ns + int(seconds * 1e9)

        return [_scalar(name, datatype, value) for name, datatype, value in (
            ("kv_cache_alloc_new_blocks", "INT32", total - reused),
            ("kv_cache_reused_blocks", "INT32", reused),
            ("kv_cache_alloc_total_blocks", "INT32", total),
            ("arrival_time_ns", "INT64", self._arrival_ns),
            # The queue's time has the generation instance's too, where that came after the first token.
            ("first_scheduled_time_ns", "INT64", after(min(timing.queue, timing.ttft))),
            ("first_token_time_ns", "INT64", after(timing.ttft)),
            ("last_token_time_ns", "INT64", after(timing.total)),
            # No drafts are made here; clients that ask for the metrics read these names too.
            ("acceptance_rate", "FP32", 0.0),
            ("total_accepted_draft_tokens", "INT32", 0),
            ("total_draft_tokens", "INT32", 0))]


def stack(replies: Iterable[Reply]) -> list[Outgoing]:
    """The outputs of several replies as one of each name; rows of unequal length are filled with zeros."""
    parts: dict[str, list[Outgoing]] = {}
    for reply in replies:
        for output in reply.outputs():
            parts.setdefault(output.name, []).append(output)
    return [_stacked(same) for same in parts.values()]


def _stacked(parts: Sequence[Outgoing]) -> Outgoing:
    first = parts[0]
    if len(parts) == 1:
        return first
    if isinstance(first.data, list):
        items = [item for part in parts for item in part.data]
        return Outgoing(first.name, first.datatype, (len(items), *first.shape[1:]), items)
    arrays: list[Any] = [np.reshape(part.data, part.shape) for part in parts]
    shape = (len(arrays), *(max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True)))
    data = np.zeros(shape, arrays[0].dtype)
    for place, array in zip(data, arrays, strict=True):
        place[tuple(slice(size) for size in array.shape[1:])] = array[0]
    return Outgoing(first.name, first.datatype, shape, data)


def _scalar(name: str, datatype: str, value: float) -> Outgoing:
    return _array(name, datatype, [[value]])


def _array(name: str, datatype: str, values: Any) -> Outgoing:
    kind = {"FP32": np.float32, "INT32": np.int32, "INT64": np.int64}[datatype]
    data = np.array(values, kind)
    return Outgoing(name, datatype, data.shape, data)


def _matrix(rows: Sequence[bytes]) -> np.ndarray[Any, Any]:
    """Rows of fp32, little endian, as one array of shape (rows, vocabulary)."""
    data: np.ndarray[Any, Any] = np.frombuffer(b"".join(rows), "<f4")
    return data.reshape(len(rows), len(data) // max(len(rows), 1))
