"""The life of a request, as rank 0 leads it: admission, routing, hand-over, end. No I/O of its own.

Events go in (submit, cancel, a leader's step, the clock), messages come out, gathered so that a leader
gets one of each kind a turn however many requests move. Admission is first come, first served: the head
of the queue waits until a generation instance and a context instance can hold it; only then
does its context start. The generation instance tells when a request takes more blocks or, preempted, has
none.

A context phase runs on a context instance, on the generation instance itself where that is cheaper, or, where
bytes travel between hosts and the prompt is long, *early*: both instances have the request, and the KV-cache
passes while it is computed. Every entry gets exactly one final response, after everyone who had it has said
that it is over, and what was promised for it is taken back with that.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Literal

import msgspec

from disagg_mpi.comm.messages import Cancel, DropOffer, Enqueue, Message, Proceed, Step
from disagg_mpi.config import DEFAULT_OVERLAP_TOKENS, RouterName
from disagg_mpi.executor.validate import blocks_reserved, problem_with
from disagg_mpi.orchestrator.pace import Pace
from disagg_mpi.orchestrator.prefix_index import PrefixIndex
from disagg_mpi.orchestrator.router import LocalContext, hit_tokens, pick_context, pick_generation
from disagg_mpi.orchestrator.snapshot import InstanceSnapshot, take_snapshot
from disagg_mpi.orchestrator.table import Entry, InstanceView, State
from disagg_mpi.prefix import BlockHasher
from disagg_mpi.request import (
    GIVEN_UP,
    ExecutorLimits,
    ExecutorRequest,
    FinishReason,
    PhaseTiming,
    RequestType,
    Response,
)


class Policy(msgspec.Struct, frozen=True, kw_only=True):
    """How requests are placed; see :class:`~disagg_mpi.config.JobConfig` for the fields."""

    hash_key: bytes = b"disagg_mpi"
    """The job's own, as its instances' block hashes have it."""
    overlap_tokens: int = DEFAULT_OVERLAP_TOKENS
    local_context: int | Literal["auto"] = 0
    router: RouterName = "prefix"


class Dispatcher:
    """Owns the request table and the ledger. Used by one thread."""

    def __init__(
        self, instances: Iterable[InstanceView], send: Callable[[int, Message], None],
        policy: Policy | None = None,
    ) -> None:
        self._policy = policy or Policy()
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
        self._proceeds: list[tuple[int, Proceed]] = []
        threshold = self._policy.local_context
        self._local = LocalContext(None if threshold == "auto" else threshold,
                                   self._generation[0].limits.max_num_tokens)
        self._hashers = self._make_indices()
        self.pace = Pace()

    # ---- events ----

    def submit(self, entry: Entry) -> None:
        problem = problem_with(entry.request, self.limits)
        self._table[entry.id] = entry
        if problem is not None:
            self._end(entry, Response(request_id=entry.id, error=problem, finish_reason="error",
                                      is_refused=True))
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
        for holder in entry.holders:
            self._cancels.setdefault((holder.leader, reason), []).append(request_id)

    def cancel_all(self) -> None:
        for request_id in list(self._table):
            self.cancel(request_id)

    def on_step(self, step: Step) -> None:
        """A leader's report of one step."""
        instance = self._instances[step.instance_id]
        now = instance.heard_at = time.monotonic()
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
        for leader, proceed in self._proceeds:
            self._send(leader, proceed)
        self._proceeds = []
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

    @property
    def limits(self) -> ExecutorLimits:
        """What a request must fit into: see :func:`~disagg_mpi.executor.validate.problem_with`."""
        return self._generation[0].limits

    def snapshot(self) -> tuple[list[InstanceSnapshot], dict[str, int]]:
        """The ledger as it is, and how many requests are in each phase. The one method for any thread.

        It reads without a lock: each figure was right at some moment of the call, not all at the same one.
        """
        return take_snapshot(list(self._instances.values()), list(self._table.values()), time.monotonic())

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

    def _make_indices(self) -> dict[int, BlockHasher]:
        """An index for each pool that reuses prefixes; a hasher for each block size among them."""
        indices: dict[str, PrefixIndex] = {}
        hashers: dict[int, BlockHasher] = {}
        for instance in self._instances.values():
            if not instance.pool or self._policy.router != "prefix":
                continue
            size = instance.limits.tokens_per_block
            hashers.setdefault(size, BlockHasher(self._policy.hash_key, size))
            capacity = sum(other.limits.num_blocks for other in self._instances.values()
                           if other.pool == instance.pool)
            instance.prefix = indices.setdefault(instance.pool, PrefixIndex(capacity))
        return hashers

    def _hashes(self, entry: Entry, instance: InstanceView) -> list[int]:
        """Of the prompt's full blocks, as ``instance`` cuts it; none if it reuses nothing."""
        size = instance.limits.tokens_per_block
        if instance.prefix is None:
            return []
        if size not in entry.hashes:
            entry.hashes[size] = self._hashers[size].of(entry.request.prompt_token_ids)
        return entry.hashes[size]

    def _admit(self) -> None:
        while self._queue and self._place(self._queue[0]):
            self._queue.popleft()

    def _place(self, entry: Entry) -> bool:
        """Choose the instances and start the context phase; ``False`` if no generation instance has room."""
        request = entry.request
        length = len(request.prompt_token_ids)
        limits = self.limits
        count = blocks_reserved(limits, length, request.sampling.max_tokens)
        if pick_generation(self._generation, count) is None:
            return False  # asked each turn while the head of the queue waits: before anything is hashed
        hashes = self._hashes(entry, self._generation[0])
        # What no context instance reuses, no prefix should draw there: a prompt that is scored is computed.
        is_scored = request.scores_prompt
        if self._is_aggregated:
            generation = pick_generation(self._generation, count, [] if is_scored else hashes)
            assert generation is not None  # there is room
            context = generation
        else:
            able = [view for view in self._context
                    if view.free_blocks >= _context_blocks(view, request)]
            if not able:
                return False
            size = able[0].limits.tokens_per_block
            reusable = [] if is_scored else self._hashes(entry, able[0])
            context, held = pick_context(able, length, reusable, size)
            generation = pick_generation(self._generation, count, hashes, context.pool or None)
            assert generation is not None  # there is room
            there = length - hit_tokens(generation, length, [] if is_scored else hashes,
                                        limits.tokens_per_block)
            if self._local.is_local(there, context.pending_context_tokens, generation.num_requests,
                                    length - held):
                context = generation
        generation.free_blocks -= count
        generation.num_requests += 1
        if context is not generation:
            context.num_requests += 1
            # Whatever is admitted can be computed: else contexts that wait for blocks of contexts that
            # wait for generation could wait for each other.
            held_blocks = _context_blocks(context, request)
            context.free_blocks -= held_blocks
            entry.context_holding = context, held_blocks
        context_hashes = self._hashes(entry, context)
        entry.context_tokens = length - hit_tokens(
            context, length, [] if is_scored else context_hashes, context.limits.tokens_per_block)
        context.pending_context_tokens += entry.context_tokens
        for instance, used in ((context, context_hashes), (generation, hashes)):
            if instance.prefix is not None:
                instance.prefix.insert(used)
        entry.generation, entry.context, entry.num_blocks = generation, context, count
        entry.state = State.CONTEXT
        entry.timing.queue = time.monotonic() - entry.submitted_at
        self._start(entry, context, generation)
        return True

    def _start(self, entry: Entry, context: InstanceView, generation: InstanceView) -> None:
        """Send it to those who have a part in it now."""
        entry.holders, entry.given_at = [context], time.monotonic()
        if context is generation:
            self._enqueue(entry, context, RequestType.CONTEXT_AND_GENERATION)
            return
        self._enqueue(entry, context, RequestType.CONTEXT_ONLY)
        request = entry.request
        if (generation.ways.get(context.id) == "mpi" and request.sampling.max_tokens > 1
                and len(request.prompt_token_ids) >= self._policy.overlap_tokens):
            entry.is_early = True
            entry.holders.append(generation)
            self._enqueue(entry, generation, RequestType.GENERATION_ONLY, early_source=context.id)

    def _enqueue(self, entry: Entry, instance: InstanceView, kind: RequestType, **more: Any) -> None:
        self._enqueues.setdefault(instance.leader, []).append(
            msgspec.structs.replace(entry.request, type=kind, **more))

    def _on_response(
        self, entry: Entry, instance: InstanceView, response: Response, now: float
    ) -> None:
        if response.num_blocks is not None and instance is entry.generation:
            instance.free_blocks += entry.num_blocks - response.num_blocks
            entry.num_blocks = response.num_blocks
        if response.token_ids and entry.verdict is None:
            self.pace.add(len(response.token_ids), now, entry.last_token_at)
            entry.count_tokens(len(response.token_ids), now)
            if entry.context is not None:
                self._context_done(entry)
            if instance is entry.generation and entry.state is not State.GENERATION:
                entry.state = State.GENERATION
                self._context_released(entry)
        if response.timing is not None:
            self._take_timing(entry, instance, response.timing)
        if not response.is_final:
            if response.token_ids and entry.verdict is None:
                entry.sink.on_response(entry, response)
            return
        if response.context_phase_params is not None:
            if entry.verdict is None and entry.cancel_reason is None:
                self._hand_over(entry, response)
                return
            # A cancel crossed the context's last step: the blocks wait there for nobody.
            self._drops.setdefault(instance.leader, []).append(entry.id)
            reason = entry.cancel_reason or "cancelled"
            response = msgspec.structs.replace(
                response, finish_reason=reason, error=GIVEN_UP[reason], context_phase_params=None)
        entry.holders.remove(instance)
        first_word = entry.verdict is None
        entry.verdict = entry.verdict or response
        if not entry.holders:
            self._end(entry, entry.verdict)
        elif first_word and entry.cancel_reason is None:
            for holder in entry.holders:
                self._cancels.setdefault((holder.leader, "cancelled"), []).append(entry.id)

    def _hand_over(self, entry: Entry, response: Response) -> None:
        generation = entry.generation
        assert generation is not None and response.context_phase_params is not None
        entry.state = State.HANDOVER
        entry.holders, entry.given_at = [generation], time.monotonic()
        if entry.is_early:
            self._proceeds.append((generation.leader, Proceed(entry.id, response.context_phase_params)))
        else:
            self._enqueue(entry, generation, RequestType.GENERATION_ONLY,
                          context_phase_params=response.context_phase_params)
        entry.sink.on_response(entry, response)

    def _take_timing(self, entry: Entry, instance: InstanceView, phase: PhaseTiming) -> None:
        timing = entry.timing
        if phase.context:
            computed = len(entry.request.prompt_token_ids) - phase.cached_tokens
            self._local.observe_context(max(1, computed), phase.context)
        if phase.kv_bytes:
            self._local.observe_handover(phase.handover)
        timing.queue += phase.queue
        timing.context += phase.context
        timing.handover += phase.handover
        timing.transfer += phase.transfer
        timing.handover_bytes += phase.handover_bytes
        timing.kv_bytes += phase.kv_bytes
        timing.transport = phase.transport or timing.transport
        timing.cached_tokens += phase.cached_tokens
        timing.held_tokens += phase.held_tokens
        timing.num_preempted += phase.num_preempted

    def _context_done(self, entry: Entry) -> None:
        """The context instance has nothing more to compute for this entry."""
        context = entry.context
        assert context is not None
        context.pending_context_tokens -= entry.context_tokens
        if context is not entry.generation:
            context.num_requests -= 1
        entry.context = None

    def _drop_unclaimed(self, entry: Entry) -> None:
        """Free a context that generation gave up, unless the two have a way of their own to say so."""
        if entry.context_holding is not None and entry.generation is not None:
            context = entry.context_holding[0]
            if context.id not in entry.generation.ways:
                self._drops.setdefault(context.leader, []).append(entry.id)

    def _context_released(self, entry: Entry) -> None:
        """Generation has taken over, or nobody will."""
        if entry.context_holding is not None:
            context, count = entry.context_holding
            context.free_blocks += count
            entry.context_holding = None

    def _end(self, entry: Entry, response: Response) -> None:
        if entry.state is State.HANDOVER and response.error is not None:
            self._drop_unclaimed(entry)
        self._context_released(entry)
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


def _context_blocks(context: InstanceView, request: ExecutorRequest) -> int:
    """Blocks that a context instance may hold for a request: its prompt, and the output's room where that
    goes along. One that is too large for it is refused by the instance itself."""
    count = blocks_reserved(context.limits, len(request.prompt_token_ids), request.sampling.max_tokens)
    return min(count, context.limits.num_blocks)
