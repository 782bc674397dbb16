"""The life of a request, as rank 0 leads it: admission, routing, hand-over, end. No I/O of its own.

Events go in (submit, cancel, a leader's step, the clock), messages come out, gathered so that a leader
gets one of each kind a turn however many requests move. Admission is first come, first served: the head
of the queue waits until a generation instance can hold all that it may ever need; only then does its
context start. Every entry gets exactly one final response, and what was promised for it is taken back
with that.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from disagg_mpi.comm.messages import Cancel, DropOffer, Enqueue, Message, Step
from disagg_mpi.executor.validate import blocks_needed, problem_with
from disagg_mpi.orchestrator.router import pick_context, pick_generation
from disagg_mpi.orchestrator.table import Entry, InstanceView, State
from disagg_mpi.request import GIVEN_UP, ExecutorRequest, FinishReason, RequestType, Response


class Dispatcher:
    """Owns the request table and the ledger. Used by one thread."""

    def __init__(
        self, instances: Iterable[InstanceView], send: Callable[[int, Message], None]
    ) -> None:
        self._instances = {instance.id: instance for instance in instances}
        self._context = [i for i in self._instances.values() if i.role.does_context]
        self._generation = [i for i in self._instances.values() if i.role.does_generation]
        self._is_aggregated = all(i.role.does_generation for i in self._context)
        self._send = send
        self._table: dict[int, Entry] = {}
        self._queue: deque[Entry] = deque()
        self._deadlines: list[tuple[float, int]] = []
        self._enqueues: dict[int, list[ExecutorRequest]] = {}
        self._cancels: dict[tuple[int, FinishReason], list[int]] = {}
        self._drops: dict[int, list[int]] = {}

    # ---- events ----

    def submit(self, entry: Entry) -> None:
        problem = problem_with(entry.request, self._generation[0].limits)
        self._table[entry.id] = entry
        if problem is not None:
            self._end(entry, Response(request_id=entry.id, error=problem, finish_reason="error"))
            return
        if entry.deadline is not None:
            heapq.heappush(self._deadlines, (entry.deadline, entry.id))
        self._queue.append(entry)

    def cancel(self, request_id: int, reason: FinishReason = "cancelled") -> None:
        """Give a request up in whatever phase it is; no effect on one that is over."""
        entry = self._table.get(request_id)
        if entry is None or entry.cancel_reason is not None:
            return
        entry.cancel_reason = reason
        if entry.state is State.QUEUED:
            self._queue.remove(entry)
            self._end(entry, Response(request_id=request_id, finish_reason=reason,
                                      error=GIVEN_UP[reason]))
            return
        # Whoever has it now answers with its one final response once its blocks are free.
        holder = entry.context if entry.state is State.CONTEXT else entry.generation
        assert holder is not None
        self._cancels.setdefault((holder.leader, reason), []).append(request_id)

    def cancel_all(self) -> None:
        for request_id in list(self._table):
            self.cancel(request_id)

    def on_step(self, step: Step) -> None:
        """A leader's report of one step."""
        instance = self._instances[step.instance_id]
        now = time.monotonic()
        for response in step.responses:
            entry = self._table.get(response.request_id)
            if entry is not None:
                self._on_response(entry, instance, response, now)

    def turn(self) -> float | None:
        """Let deadlines pass, admit, send what has gathered. Seconds to the next deadline, if any."""
        wait = self._pass_deadlines()
        self._admit()
        for leader, requests in self._enqueues.items():
            self._send(leader, Enqueue(requests))
        for (leader, reason), ids in self._cancels.items():
            self._send(leader, Cancel(ids, reason))
        for leader, ids in self._drops.items():
            self._send(leader, DropOffer(ids))
        self._enqueues, self._cancels, self._drops = {}, {}, {}
        return wait

    # ---- state ----

    @property
    def num_open(self) -> int:
        return len(self._table)

    @property
    def num_queued(self) -> int:
        return len(self._queue)

    @property
    def capacity(self) -> int:
        """Requests that can be past admission at once."""
        return sum(instance.limits.max_batch_size for instance in self._generation)

    @property
    def leaders(self) -> list[int]:
        return [instance.leader for instance in self._instances.values()]

    def instance_name(self, instance_id: int) -> str:
        return self._instances[instance_id].name

    def check(self) -> list[str]:
        """What is wrong with the ledger when nothing is open."""
        problems = [f"request {e.id} is still {e.state}" for e in self._table.values()]
        for instance in self._instances.values():
            promised = instance.limits.num_blocks - instance.free_blocks
            if promised or instance.num_requests or instance.pending_context_tokens:
                problems.append(
                    f"{instance.name}: {promised} blocks, {instance.num_requests} requests and "
                    f"{instance.pending_context_tokens} context tokens are still promised")
        return problems

    # ---- inside ----

    def _admit(self) -> None:
        while self._queue:
            entry = self._queue[0]
            request = entry.request
            length = len(request.prompt_token_ids)
            limits = self._generation[0].limits
            count = blocks_needed(limits, length, request.sampling.max_tokens)
            generation = pick_generation(self._generation, count)
            if generation is None:
                return
            self._queue.popleft()
            generation.free_blocks -= count
            generation.num_requests += 1
            context = generation if self._is_aggregated else pick_context(self._context)
            if context is not generation:
                context.num_requests += 1
            context.pending_context_tokens += length
            entry.generation, entry.context, entry.num_blocks = generation, context, count
            entry.state = State.CONTEXT
            entry.timing.queue = time.monotonic() - entry.submitted_at
            kind = (RequestType.CONTEXT_AND_GENERATION if self._is_aggregated
                    else RequestType.CONTEXT_ONLY)
            self._enqueues.setdefault(context.leader, []).append(
                msgspec.structs.replace(request, type=kind))

    def _on_response(
        self, entry: Entry, instance: InstanceView, response: Response, now: float
    ) -> None:
        if response.token_ids:
            entry.count_tokens(len(response.token_ids), now)
            if entry.context is not None:
                self._context_done(entry)
            if instance is entry.generation and entry.state is not State.GENERATION:
                entry.state = State.GENERATION
        if response.timing is not None:
            _add_timing(entry, response)
        if not response.is_final:
            entry.sink.on_response(entry, response)
            return
        if response.context_phase_params is None:
            self._end(entry, response)
        elif entry.cancel_reason is not None:
            # The cancel crossed the context's last step: the blocks wait there for nobody.
            self._drops.setdefault(instance.leader, []).append(entry.id)
            response.finish_reason = entry.cancel_reason
            response.error = GIVEN_UP[entry.cancel_reason]
            self._end(entry, response)
        else:
            self._hand_over(entry, response)

    def _hand_over(self, entry: Entry, response: Response) -> None:
        assert entry.generation is not None
        entry.state = State.HANDOVER
        self._enqueues.setdefault(entry.generation.leader, []).append(msgspec.structs.replace(
            entry.request, type=RequestType.GENERATION_ONLY,
            context_phase_params=response.context_phase_params))
        entry.sink.on_response(entry, response)

    def _context_done(self, entry: Entry) -> None:
        """The context instance has nothing more to compute for this entry."""
        context = entry.context
        assert context is not None
        context.pending_context_tokens -= len(entry.request.prompt_token_ids)
        if context is not entry.generation:
            context.num_requests -= 1
        entry.context = None

    def _end(self, entry: Entry, response: Response) -> None:
        if entry.context is not None:
            self._context_done(entry)
        if entry.generation is not None:
            entry.generation.free_blocks += entry.num_blocks
            entry.generation.num_requests -= 1
            entry.generation = None
        del self._table[entry.id]
        if response.finish_reason in ("cancelled", "deadline"):
            entry.state = State.CANCELLED
        elif response.error is not None:
            entry.state = State.FAILED
        else:
            entry.state = State.DONE
        entry.finish_timing(time.monotonic())
        entry.sink.on_response(entry, response)

    def _pass_deadlines(self) -> float | None:
        while self._deadlines:
            deadline, request_id = self._deadlines[0]
            left = deadline - time.monotonic()
            if request_id in self._table and left > 0:
                return left
            heapq.heappop(self._deadlines)
            self.cancel(request_id, "deadline")
        return None


def _add_timing(entry: Entry, response: Response) -> None:
    phase, timing = response.timing, entry.timing
    assert phase is not None
    timing.queue += phase.queue
    timing.context += phase.context
    timing.handover += phase.handover
    timing.handover_bytes += phase.handover_bytes
    timing.kv_bytes += phase.kv_bytes
    timing.transport = phase.transport or timing.transport
