"""The built-in executor: the engine behind the executor API."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from disagg_mpi.comm.waiting import Waiter
from disagg_mpi.engine.engine import Dropped, Engine, NewToken
from disagg_mpi.engine.sequence import Sequence
from disagg_mpi.errors import RequestError
from disagg_mpi.executor.base import Executor, IterationStats
from disagg_mpi.executor.output import IncrementalDecoder, TextOutput
from disagg_mpi.executor.prepare import Preparer
from disagg_mpi.executor.validate import problem_with
from disagg_mpi.request import (
    GIVEN_UP,
    ContextPhaseParams,
    ExecutorLimits,
    ExecutorRequest,
    FinishReason,
    PoolBlocks,
    Response,
)
from disagg_mpi.transfer.progress import ProgressThread


class BuiltinExecutor(Executor):
    """One instance of the built-in engine. Owns the engine and the text of what it generates."""

    def __init__(
        self,
        engine: Engine,
        limits: ExecutorLimits,
        waiter: Waiter,
        make_decoder: Callable[[], IncrementalDecoder] | None = None,
        progress: ProgressThread | None = None,
        preparer: Preparer | None = None,
    ) -> None:
        super().__init__(waiter)
        self.limits = limits
        self._engine = engine
        self._make_decoder = make_decoder
        self._progress = progress
        self._preparer = preparer or Preparer(limits.vocab_size)
        self._texts: dict[int, TextOutput] = {}
        self._stats: deque[IterationStats] = deque(maxlen=1000)
        self._iteration = 0

    def cancel_request(self, request_id: int, reason: FinishReason = "cancelled") -> None:
        self._engine.cancel(request_id, reason, GIVEN_UP.get(reason, reason))

    def drop_context(self, request_id: int) -> None:
        self._engine.drop_offer(request_id)

    def proceed(self, request_id: int, params: ContextPhaseParams) -> None:
        text = self._texts.get(request_id)
        if text is not None:
            text.push(params.first_gen_tokens)
        self._engine.proceed(request_id, params)

    def get_latest_iteration_stats(self) -> list[IterationStats]:
        stats = list(self._stats)
        self._stats.clear()
        return stats

    def check_integrity(self, idle: bool = False) -> list[str]:
        problems = self._engine.check(idle)
        if idle and self._texts:
            problems.append(f"the text of {len(self._texts)} requests is still kept")
        return problems

    def pool_blocks(self) -> PoolBlocks | None:
        return self._engine.pool_blocks()

    @property
    def pool(self) -> str:
        return self._engine.pool

    def shutdown(self, timeout: float = 30.0) -> None:
        end = time.monotonic() + timeout
        while self._engine.num_open and time.monotonic() < end:
            if self.advance():
                self._waiter.worked()
            else:
                self._waiter.idle(transferring=self.is_moving, at_most=0.001)

    def start(self) -> None:
        if self._progress is not None:
            self._progress.start()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._engine.close()

    @property
    def is_moving(self) -> bool:
        return self._engine.is_moving

    @property
    def num_free_blocks(self) -> int:
        return self._engine.num_free_blocks

    def advance(self) -> bool:
        moved = self._engine.progress()
        if not self._engine.has_work:
            return moved
        for token in self._engine.step():
            self._respond(self._take_token(token))
        for dropped in self._engine.take_dropped():
            self._respond(self._take_dropped(dropped))
        self._report_sizes()
        self._iteration += 1
        stats = self._engine.stats
        if stats.num_active:
            self._stats.append(IterationStats(
                self._iteration, stats.num_context_tokens, stats.num_generation_tokens,
                stats.num_active, stats.num_waiting, stats.num_free_blocks,
                self.limits.num_blocks, stats.seconds))
        # Only pulls in flight and nothing to run: not work, the caller may sleep.
        return moved or stats.num_active > 0

    def _enqueue(self, request: ExecutorRequest) -> None:
        params = request.context_phase_params
        if request.request_id in self._engine:
            self._refuse(request, f"request id {request.request_id} is in use")
            return
        try:
            sequence = self._sequence_of(request)
        except RequestError as error:
            if params is not None:
                self._engine.refuse(params)
            self._refuse(request, str(error))
            return
        text = TextOutput(self._make_decoder() if self._make_decoder else None,
                          request.sampling.stop)
        if params is not None:
            text.push(params.first_gen_tokens)
        self._texts[request.request_id] = text
        self._engine.add(sequence)

    def _refuse(self, request: ExecutorRequest, problem: str) -> None:
        self._respond(Response(request_id=request.request_id, is_final=True,
                               finish_reason="error", error=problem, is_refused=True))

    def _sequence_of(self, request: ExecutorRequest) -> Sequence:
        """Raises :class:`RequestError` for a request that cannot be served."""
        problem = problem_with(request, self.limits)
        if problem is not None:
            raise RequestError(problem)
        return self._preparer.prepare(request)

    def _report_sizes(self) -> None:
        """Tell how many blocks requests hold, with the step's response to them where there is one."""
        resized = self._engine.take_resized()
        if not resized:
            return
        for response in self._ready:
            count = resized.pop(response.request_id, None)
            if count is not None and not response.is_final:
                response.num_blocks = count
        for request_id, count in resized.items():
            if request_id in self._texts:
                self._respond(Response(request_id=request_id, num_blocks=count))

    def _take_token(self, new: NewToken) -> Response:
        sequence, reason = new.sequence, new.finish_reason
        output = self._texts[sequence.id]
        text, stopped = output.push([new.sampled.token])
        if stopped:
            reason = "stop"
        elif reason is not None:
            text += output.finish()
        response = Response(
            request_id=sequence.id,
            token_ids=[new.sampled.token],
            text=text,
            logprobs=None if new.sampled.logprobs is None else [new.sampled.logprobs],
            logits=None if new.sampled.logits is None else [new.sampled.logits],
        )
        if new.prompt_scores is not None:
            response.prompt_logprobs = new.prompt_scores.logprobs
            response.context_logits = new.prompt_scores.logits
        if reason is not None:
            response.finish_reason = reason
            self._close(response, sequence)
            self._engine.finish(sequence)
        elif sequence.is_context_only:
            self._close(response, sequence)
            response.context_phase_params = ContextPhaseParams(
                first_gen_tokens=(new.sampled.token,), req_id=sequence.id,
                opaque_state=self._engine.offer(sequence))
        return response

    def _take_dropped(self, dropped: Dropped) -> Response:
        response = Response(request_id=dropped.sequence.id, error=dropped.error,
                            finish_reason=dropped.finish_reason,
                            text=self._texts[dropped.sequence.id].finish())
        self._close(response, dropped.sequence)
        return response

    def _close(self, response: Response, sequence: Sequence) -> None:
        del self._texts[sequence.id]
        response.is_final = True
        response.timing = sequence.timing
