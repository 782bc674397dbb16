"""The executor API: one instance seen from its leader.

Names follow TensorRT-LLM's ``executor.Executor``. Only the leader enqueues and awaits. Progress is
cooperative, as MPI's own: requests move on, and blocks that were handed over are given up to whoever
pulls them, inside :meth:`Executor.await_responses` (or :meth:`Executor.advance`), not in between.
``shutdown`` waits for what is still to be pulled.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable

import msgspec

from disagg_mpi.comm.waiting import Waiter
from disagg_mpi.errors import RequestError
from disagg_mpi.request import (
    ContextPhaseParams,
    ExecutorLimits,
    ExecutorRequest,
    FinishReason,
    PoolBlocks,
    Response,
)


class IterationStats(msgspec.Struct, frozen=True):
    """One step of an instance in numbers."""

    iteration: int
    num_context_tokens: int
    num_generation_tokens: int
    num_active_requests: int
    num_queued_requests: int
    num_free_blocks: int
    num_blocks: int
    seconds: float


class Executor(ABC):
    """An instance's leader API. Not thread-safe."""

    limits: ExecutorLimits

    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter
        self._ready: list[Response] = []

    # ---- the API ----

    def enqueue_request(self, request: ExecutorRequest) -> int:
        """Take a request; returns its id. One that cannot be served gets a response with an error."""
        return self.enqueue_requests([request])[0]

    def enqueue_requests(self, requests: Iterable[ExecutorRequest]) -> list[int]:
        ids = []
        for request in requests:
            self._enqueue(request)
            ids.append(request.request_id)
        return ids

    def await_responses(
        self, ids: Collection[int] | None = None, timeout: float | None = None
    ) -> list[Response]:
        """Run steps until there is a response (to one of ``ids``), or ``timeout`` seconds are over.

        ``timeout=0`` runs one step at most. Returns all that are there, in order; those to other ids
        stay for a later call.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            worked = self.advance()
            taken = self.take_ready(ids)
            if taken or (end is not None and time.monotonic() >= end):
                return taken
            if worked:
                self._waiter.worked()
            else:
                self._waiter.idle(
                    transferring=self.is_moving,
                    at_most=1.0 if end is None else end - time.monotonic())

    def get_num_responses_ready(self, request_id: int | None = None) -> int:
        return sum(request_id in (None, response.request_id) for response in self._ready)

    @abstractmethod
    def cancel_request(self, request_id: int, reason: FinishReason = "cancelled") -> None:
        """Give a request up; its final response follows once its blocks are free."""

    @abstractmethod
    def drop_context(self, request_id: int) -> None:
        """Free a finished context that will not be pulled by anyone."""

    def proceed(self, request_id: int, params: ContextPhaseParams) -> None:
        """Go on with a request that was enqueued with ``early_source``: its context phase is over."""
        raise RequestError(f"{type(self).__name__} takes no requests whose context phase still runs")

    def can_enqueue_requests(self) -> bool:
        """Whether this rank leads an instance that still takes requests."""
        return True

    @abstractmethod
    def get_latest_iteration_stats(self) -> list[IterationStats]:
        """Steps since the last call (the newest thousand)."""

    @abstractmethod
    def check_integrity(self, idle: bool = False) -> list[str]:
        """What is wrong with the ownership of blocks and transfers; empty is good.

        ``idle``: also name whatever is still owned or open.
        """

    def pool_blocks(self) -> PoolBlocks | None:
        """Which blocks of which pool are this instance's; ``None`` without a pool."""
        return None

    @property
    def pool(self) -> str:
        """Name of the memory whose prefix cache this instance reads; empty without one."""
        return ""

    @abstractmethod
    def shutdown(self, timeout: float = 30.0) -> None:
        """Wait until no context is left to be pulled, ``timeout`` seconds at most."""

    def start(self) -> None:  # noqa: B027 - most have nothing to start
        """Every rank of the job is ready."""

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Give threads and the like back; nothing of the executor may be used afterwards."""

    # ---- for those who drive it ----

    @abstractmethod
    def advance(self) -> bool:
        """One step, without waiting; whether there was anything to do."""

    def take_ready(self, ids: Collection[int] | None = None) -> list[Response]:
        """The responses that are there already, without a step."""
        if ids is None:
            taken, self._ready = self._ready, []
            return taken
        taken = [response for response in self._ready if response.request_id in ids]
        if taken:
            self._ready = [r for r in self._ready if r.request_id not in ids]
        return taken

    @property
    def is_moving(self) -> bool:
        """Whether bytes are on their way to or from here."""
        return False

    @property
    @abstractmethod
    def num_free_blocks(self) -> int: ...

    # ---- for those who implement it ----

    @abstractmethod
    def _enqueue(self, request: ExecutorRequest) -> None: ...

    def _respond(self, response: Response) -> None:
        self._ready.append(response)

