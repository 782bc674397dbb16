"""An executor that computes nothing: every step gives every request one token.

It has the API, the books and the limits of a real one, so what is measured with it is everything else:
rank 0, the messages, the waiting. It hands nothing over.
"""

from __future__ import annotations

from disagg_mpi.comm.waiting import Waiter
from disagg_mpi.executor.base import Executor, IterationStats
from disagg_mpi.executor.validate import blocks_reserved, problem_with
from disagg_mpi.request import (
    ContextPhaseParams,
    ExecutorLimits,
    ExecutorRequest,
    FinishReason,
    PhaseTiming,
    RequestType,
    Response,
)


class _Active:
    __slots__ = ("left", "num_blocks", "request")

    def __init__(self, request: ExecutorRequest, left: int, num_blocks: int) -> None:
        self.request = request
        self.left = left
        self.num_blocks = num_blocks


class NullExecutor(Executor):
    """Token ``i`` of a request is ``i`` modulo the vocabulary."""

    def __init__(self, limits: ExecutorLimits, waiter: Waiter) -> None:
        super().__init__(waiter)
        self.limits = limits
        self._active: dict[int, _Active] = {}
        self._free = limits.num_blocks

    def cancel_request(self, request_id: int, reason: FinishReason = "cancelled") -> None:
        active = self._active.pop(request_id, None)
        if active is not None:
            self._free += active.num_blocks
            self._respond(Response(request_id=request_id, is_final=True, finish_reason=reason,
                                   error=reason))

    def drop_context(self, request_id: int) -> None:
        """Nothing is kept for anyone."""

    def get_latest_iteration_stats(self) -> list[IterationStats]:
        return []

    def check_integrity(self, idle: bool = False) -> list[str]:
        if idle and self._active:
            return [f"{len(self._active)} requests are still running"]
        return []

    def shutdown(self, timeout: float = 30.0) -> None:
        self._active.clear()

    @property
    def num_free_blocks(self) -> int:
        return self._free

    def advance(self) -> bool:
        if not self._active:
            return False
        for request_id, active in list(self._active.items()):
            request = active.request
            total = request.sampling.max_tokens
            token = (total - active.left) % self.limits.vocab_size
            active.left -= 1
            response = Response(request_id=request_id, token_ids=[token])
            if active.left == 0:
                response.finish_reason = "length"
            elif request.type is RequestType.CONTEXT_ONLY:
                response.context_phase_params = ContextPhaseParams((token,), request_id, b"")
            else:
                self._respond(response)
                continue
            response.is_final = True
            response.timing = PhaseTiming()
            self._free += active.num_blocks
            del self._active[request_id]
            self._respond(response)
        return True

    def _enqueue(self, request: ExecutorRequest) -> None:
        problem = problem_with(request, self.limits)
        if request.request_id in self._active:
            problem = f"request id {request.request_id} is in use"
        if problem is not None:
            self._respond(Response(request_id=request.request_id, is_final=True,
                                   finish_reason="error", error=problem, is_refused=True))
            return
        done = len(request.context_phase_params.first_gen_tokens) \
            if request.context_phase_params else 0
        max_tokens = request.sampling.max_tokens
        num_blocks = blocks_reserved(self.limits, len(request.prompt_token_ids), max_tokens)
        self._active[request.request_id] = _Active(request, max_tokens - done, num_blocks)
        self._free -= num_blocks
