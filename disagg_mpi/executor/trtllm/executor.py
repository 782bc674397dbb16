"""The leader's side: our requests in TensorRT-LLM's executor, its answers as our responses.

The library numbers requests itself, when they are enqueued. A request is known by both numbers from then
until its final response, and afterwards by neither: what the library still says of it finds nobody. Only a
context that waits to be pulled keeps the library's number, so that it can be dropped.

Owns the library's executor: it is ended by :meth:`TrtllmExecutor.shutdown`, at the latest by ``close``. Not
thread-safe, as its base; the library's own threads do the work, and nothing here waits for them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from disagg_mpi.comm.waiting import Waiter
from disagg_mpi.errors import JobFailed, RequestError
from disagg_mpi.executor.base import Executor, IterationStats
from disagg_mpi.executor.output import IncrementalDecoder, TextOutput
from disagg_mpi.executor.prepare import Preparer
from disagg_mpi.executor.trtllm.engine_dir import EngineInfo
from disagg_mpi.executor.trtllm.translate import (
    library_type,
    params_from_library,
    problem_for_library,
    request_to_library,
)
from disagg_mpi.executor.validate import problem_with
from disagg_mpi.request import (
    GIVEN_UP,
    ExecutorLimits,
    ExecutorRequest,
    FinishReason,
    PhaseTiming,
    RequestType,
    Response,
)

_NOW = timedelta(0)

# How long the library may take to say that a request it was told to give up is over. Then the request ends
# here all the same: a client has waited for its deadline already. A step takes milliseconds.
_GIVE_UP_SECONDS = 10.0

# How often the library is asked for statistics while it has requests: new ones show that it makes progress,
# also while a long prompt gives no token.
_STATS_SECONDS = 0.25

# Contexts that can be dropped: the library does not say when one was pulled, so the newest are remembered.
# A context waits for milliseconds, and rank 0 drops one at once or never.
_MAX_OFFERS = 4096


def limits_of(engine: EngineInfo, kv_tokens: int) -> ExecutorLimits:
    """What an instance of ``engine`` can take, with a pool of ``kv_tokens`` positions."""
    return ExecutorLimits(
        num_blocks=-(-kv_tokens // engine.tokens_per_block), tokens_per_block=engine.tokens_per_block,
        max_batch_size=engine.max_batch_size, max_num_tokens=engine.max_num_tokens,
        max_model_len=engine.max_seq_len, vocab_size=engine.vocab_size,
        # All of it: the library does not say when a request grows.
        reserved_output=engine.max_seq_len)


class _Open:
    """A request that the library has."""

    __slots__ = ("ending", "enqueued_at", "first_token_at", "is_stopped", "kind", "library_id", "repeated",
                 "text", "tokens")

    def __init__(self, request: ExecutorRequest, library_id: int, text: TextOutput) -> None:
        self.library_id = library_id
        self.text = text
        self.kind = library_type(request)
        params = request.context_phase_params
        self.repeated = list(params.first_gen_tokens) if params is not None else []
        """What a generation instance says again before it goes on: the context's tokens."""
        self.tokens: list[int] = []
        """Of a context, until it is over."""
        self.ending: tuple[FinishReason, str | None] | None = None
        """Why it was given up, once it is."""
        self.is_stopped = False
        """Whether a stop text has cut its text off."""
        self.enqueued_at = time.monotonic()
        self.first_token_at = 0.0


class TrtllmExecutor(Executor):
    """One instance that TensorRT-LLM runs."""

    def __init__(
        self,
        library: Any,
        executor: Any,
        engine: EngineInfo,
        kv_tokens: int,
        waiter: Waiter,
        *,
        eos_token_ids: Sequence[int] = (),
        make_decoder: Callable[[], IncrementalDecoder] | None = None,
        preparer: Preparer | None = None,
    ) -> None:
        """``library``: the bindings' module; ``executor``: its executor on this rank, the group's leader."""
        super().__init__(waiter)
        self.limits = limits_of(engine, kv_tokens)
        self._library = library
        self._executor = executor
        self._engine = engine
        self._eos_token_ids = tuple(eos_token_ids)
        self._make_decoder = make_decoder
        self._preparer = preparer or Preparer(engine.vocab_size)
        reasons = library.FinishReason
        self._reasons: dict[Any, FinishReason] = {
            reasons.END_ID: "stop", reasons.STOP_WORDS: "stop", reasons.LENGTH: "length",
            reasons.TIMED_OUT: "deadline", reasons.CANCELLED: "cancelled"}
        self._open: dict[int, _Open] = {}
        self._ids: dict[int, int] = {}
        """The library's number → ours, for all of ``_open``."""
        self._give_up_at: dict[int, float] = {}
        self._offers: dict[int, int] = {}
        """Our number → the library's, of contexts that were handed over."""
        self._stats: deque[IterationStats] = deque(maxlen=1000)
        self._stats_at = 0.0
        self._num_free_blocks = self.limits.num_blocks
        self._is_shut = False

    # ---- the API ----

    def cancel_request(self, request_id: int, reason: FinishReason = "cancelled") -> None:
        one = self._open.get(request_id)
        if one is not None and one.ending is None:
            self._give_up(request_id, one, reason, GIVEN_UP.get(reason, reason))

    def drop_context(self, request_id: int) -> None:
        library_id = self._offers.pop(request_id, None)
        if library_id is not None:
            self._executor.cancel_request(library_id)

    def can_enqueue_requests(self) -> bool:
        return not self._is_shut and bool(self._executor.can_enqueue_requests())

    def get_latest_iteration_stats(self) -> list[IterationStats]:
        if not self._is_shut:
            self._take_stats()
        stats = list(self._stats)
        self._stats.clear()
        return stats

    def check_integrity(self, idle: bool = False) -> list[str]:
        problems = []
        theirs = {one.library_id: request_id for request_id, one in self._open.items()}
        if theirs != self._ids:
            problems.append(f"{len(self._ids)} of TensorRT-LLM's request numbers are kept for "
                            f"{len(self._open)} requests")
        if idle and self._open:
            problems.append(f"{len(self._open)} requests are still open in TensorRT-LLM")
        return problems

    def shutdown(self, timeout: float = 30.0) -> None:
        end = time.monotonic() + timeout
        while self._open and time.monotonic() < end:
            if self.advance():
                self._waiter.worked()
            else:
                self._waiter.idle(transferring=self.is_moving, at_most=0.001)
        self._end_library(end)

    def close(self) -> None:
        self._end_library(time.monotonic() + 5.0)

    # ---- for those who drive it ----

    def advance(self) -> bool:
        if self._is_shut:
            return False
        responses = self._executor.await_responses(timeout=_NOW)
        for response in responses:
            self._take(response)
        now = time.monotonic()
        for request_id in [one for one, at in self._give_up_at.items() if now >= at]:
            self._end(request_id, Response(request_id=request_id))
        is_ahead = False
        if self._open and now - self._stats_at >= _STATS_SECONDS:
            self._stats_at = now
            is_ahead = self._take_stats()
        return bool(responses) or is_ahead

    @property
    def is_moving(self) -> bool:
        """Whether an answer may come: the library's threads ring no bell, so it must be looked for often."""
        return bool(self._open)

    @property
    def num_free_blocks(self) -> int:
        """As the library said last; all of the pool before it has said anything."""
        return self._num_free_blocks

    # ---- requests into the library ----

    def _enqueue(self, request: ExecutorRequest) -> None:
        request_id = request.request_id
        try:
            library_id = self._executor.enqueue_request(self._translate(request))
        except RequestError as error:
            self._refuse(request_id, str(error), is_own=True)
            return
        except Exception as error:  # whatever the bindings throw: it is this request's, the others go on
            self._refuse(request_id, f"TensorRT-LLM does not take the request: {error}")
            return
        decoder = self._make_decoder() if self._make_decoder else None
        one = _Open(request, library_id, TextOutput(decoder, request.sampling.stop))
        one.text.push(one.repeated)
        self._open[request_id] = one
        self._ids[library_id] = request_id

    def _translate(self, request: ExecutorRequest) -> Any:
        """Raises :class:`RequestError` for a request that cannot be served."""
        if self._is_shut:
            raise RequestError("the instance has shut down")
        if request.request_id in self._open:
            raise RequestError(f"request id {request.request_id} is in use")
        problem = problem_with(request, self.limits) or problem_for_library(
            request, self._engine, self._eos_token_ids)
        if problem is not None:
            raise RequestError(problem)
        return request_to_library(self._library, request, self._eos_token_ids, self._preparer.spellings)

    def _refuse(self, request_id: int, problem: str, *, is_own: bool = False) -> None:
        self._respond(Response(request_id=request_id, is_final=True, finish_reason="error", error=problem,
                               is_refused=is_own))

    # ---- the library's answers ----

    def _take(self, answer: Any) -> None:
        request_id = self._ids.get(answer.request_id)
        if request_id is None:
            return  # the last words of a request that is over here
        one = self._open[request_id]
        if answer.has_error():
            self._end(request_id, Response(request_id=request_id, finish_reason="error",
                                           error=f"TensorRT-LLM: {answer.error_msg}"))
            return
        result = answer.result
        tokens = list(result.output_token_ids[0]) if result.output_token_ids else []
        reason = self._reasons.get(result.finish_reasons[0]) if result.finish_reasons else None
        if tokens and not one.first_token_at:
            one.first_token_at = time.monotonic()
        if one.kind is RequestType.CONTEXT_ONLY:
            one.tokens += tokens
            if result.is_final:
                self._end_context(request_id, one, result.context_phase_params, reason)
            return
        self._take_tokens(request_id, one, tokens, reason, bool(result.is_final))

    def _take_tokens(self, request_id: int, one: _Open, tokens: list[int], reason: FinishReason | None,
                     is_final: bool) -> None:
        count = min(len(one.repeated), len(tokens))
        if tokens[:count] != one.repeated[:count]:
            # Whoever reads has these tokens already; what follows would be of another text.
            self._fail(request_id, one, f"TensorRT-LLM's generation begins with {tokens[:count]}, and the "
                                        f"context's first tokens are {one.repeated}")
            return
        tokens, one.repeated = tokens[count:], one.repeated[count:]
        response = Response(request_id=request_id)
        if one.ending is None:
            is_stopped = self._read(one, tokens, response)
            if is_stopped and not is_final:
                self._give_up(request_id, one, "stop", None)
            elif is_stopped:
                reason = "stop"
        if not is_final:
            if response.token_ids:
                self._respond(response)
            return
        response.finish_reason = reason
        if reason in GIVEN_UP:
            response.error = GIVEN_UP[reason]
        elif reason is None:
            response.finish_reason = "error"
            response.error = "TensorRT-LLM ended the request without a reason"
        self._end(request_id, response)

    def _end_context(self, request_id: int, one: _Open, params: Any, reason: FinishReason | None) -> None:
        """The one answer to a context: its first tokens, and what a generation instance needs."""
        response = Response(request_id=request_id)
        # LENGTH is what a context always ends with: its one token.
        is_over = one.ending is not None or (reason is not None and reason != "length")
        if params is not None and not is_over:
            given = params_from_library(params, request_id)
            if not self._read(one, list(given.first_gen_tokens), response):
                response.context_phase_params = given
                self._offers[request_id] = one.library_id
                if len(self._offers) > _MAX_OFFERS:
                    del self._offers[next(iter(self._offers))]
            else:
                reason, is_over = "stop", True
        elif is_over and one.ending is None:
            self._read(one, one.tokens, response)
        elif not is_over:
            self._fail(request_id, one, "TensorRT-LLM's context phase gave no context_phase_params")
            return
        if is_over:
            response.finish_reason = reason
            if reason in GIVEN_UP:
                response.error = GIVEN_UP[reason]
            if params is not None:
                self._executor.cancel_request(one.library_id)  # nobody will pull it
        self._end(request_id, response)

    def _read(self, one: _Open, tokens: Sequence[int], response: Response) -> bool:
        """Put tokens and their text into ``response``, up to a stop text; whether there was one."""
        for token in tokens:
            text, one.is_stopped = one.text.push([token])
            response.token_ids.append(token)
            response.text += text
            if one.is_stopped:
                return True
        return False

    # ---- ends ----

    def _give_up(self, request_id: int, one: _Open, reason: FinishReason, error: str | None) -> None:
        """Tell the library; the final response follows its last word, when the blocks are free."""
        one.ending = reason, error
        self._give_up_at[request_id] = time.monotonic() + _GIVE_UP_SECONDS
        self._executor.cancel_request(one.library_id)

    def _fail(self, request_id: int, one: _Open, problem: str) -> None:
        self._executor.cancel_request(one.library_id)
        self._end(request_id, Response(request_id=request_id, finish_reason="error", error=problem))

    def _end(self, request_id: int, response: Response) -> None:
        """The final response; nothing of the request is kept."""
        one = self._open.pop(request_id)
        del self._ids[one.library_id]
        self._give_up_at.pop(request_id, None)
        if one.ending is not None:
            response.finish_reason, response.error = one.ending
        if response.finish_reason is not None and not one.is_stopped:
            response.text += one.text.finish()
        response.is_final = True
        response.timing = self._timing(one)
        self._respond(response)

    def _timing(self, one: _Open) -> PhaseTiming:
        """As seen from here: the library's queue is inside, and of the hand-over nothing is known."""
        if one.kind is RequestType.GENERATION_ONLY:
            return PhaseTiming()
        end = one.first_token_at or time.monotonic()
        return PhaseTiming(context=end - one.enqueued_at)

    def _end_library(self, end: float) -> None:
        """The library's own shutdown, which waits for contexts that are still to be pulled."""
        if self._is_shut:
            return
        self._is_shut = True
        errors: list[BaseException] = []

        def shut() -> None:
            try:
                self._executor.shutdown()
            except BaseException as error:
                errors.append(error)

        # A thread: it may wait for ever, for a context whose generation instance is gone.
        thread = threading.Thread(target=shut, name="tensorrt_llm-shutdown", daemon=True)
        thread.start()
        thread.join(max(0.1, end - time.monotonic()))
        if thread.is_alive():
            raise JobFailed(f"TensorRT-LLM does not shut down: {len(self._open)} requests are open, and of "
                            f"{len(self._offers)} contexts it does not say whether they were pulled")
        if errors:
            raise errors[0]
        self._offers.clear()

    # ---- statistics ----

    def _take_stats(self) -> bool:
        """Keep the library's new statistics; whether there were any.

        Fields that a release does not have count as 0: nothing depends on them.
        """
        stats = self._executor.get_latest_iteration_stats()
        for step in stats:
            cache = getattr(step, "kv_cache_stats", None)
            batch = getattr(step, "inflight_batching_stats", None)
            num_blocks = getattr(cache, "max_num_blocks", self.limits.num_blocks)
            self._num_free_blocks = getattr(cache, "free_num_blocks", num_blocks)
            self._stats.append(IterationStats(
                iteration=getattr(step, "iter", 0),
                num_context_tokens=getattr(batch, "num_ctx_tokens", 0),
                num_generation_tokens=getattr(batch, "num_gen_requests", 0),  # one each, without drafts
                num_active_requests=getattr(step, "num_active_requests", 0),
                num_queued_requests=getattr(step, "num_queued_requests", 0),
                num_free_blocks=self._num_free_blocks, num_blocks=num_blocks,
                seconds=getattr(step, "iter_latency_ms", 0.0) / 1e3))
        return bool(stats)
