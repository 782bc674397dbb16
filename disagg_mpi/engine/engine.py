"""One rank's engine: admit → start pulls → forward → sample, and the blocks behind it.

Single-threaded and cooperative: nothing happens between two calls of :meth:`Engine.step`. The engine owns
the instance's blocks. A sequence leaves in one of three ways, each freeing its blocks exactly once:
``finish`` (done or given up), ``offer`` (handed over; freed when the transceiver reports it released), or
an abandoned pull (freed when its last byte has arrived).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence as Seq
from typing import Protocol

import msgspec
import torch

from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.engine.sampler import Sampled, Sampler
from disagg_mpi.engine.scheduler import Chunk, Scheduler
from disagg_mpi.engine.sequence import Sequence, Status
from disagg_mpi.errors import RequestError
from disagg_mpi.request import ContextPhaseParams, FinishReason, PoolBlocks
from disagg_mpi.transfer.layout import runs_of
from disagg_mpi.transfer.transceiver import Pulled, Released, Transceiver


class Forward(Protocol):
    """What the engine needs of a model."""

    def forward(self, chunks: Seq[Chunk]) -> torch.Tensor: ...


class NewToken(msgspec.Struct, frozen=True):
    """A sequence's next token; ``finish_reason`` if by token rules it is the last."""

    sequence: Sequence
    sampled: Sampled
    finish_reason: FinishReason | None


class Dropped(msgspec.Struct, frozen=True):
    """A sequence that left without being done, and why."""

    sequence: Sequence
    finish_reason: FinishReason
    error: str


class StepStats(msgspec.Struct):
    """One step in numbers."""

    num_context_tokens: int = 0
    num_generation_tokens: int = 0
    num_active: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    seconds: float = 0.0


class Engine:
    """The step loop's body; :mod:`disagg_mpi.executor.builtin` drives it."""

    def __init__(
        self,
        *,
        runner: Forward,
        sampler: Sampler,
        scheduler: Scheduler,
        blocks: BlockManager,
        transceiver: Transceiver,
        eos_token_ids: Seq[int],
    ) -> None:
        self._runner = runner
        self._sampler = sampler
        self._scheduler = scheduler
        self._blocks = blocks
        self._transceiver = transceiver
        self._eos = frozenset(eos_token_ids)
        self._dropped: list[Dropped] = []
        # Sequences whose pull was given up while bytes were on their way: id → what to report.
        self._leaving: dict[int, Dropped] = {}
        self.stats = StepStats()

    # ---- requests in and out ----

    def add(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)

    def __contains__(self, request_id: int) -> bool:
        return (request_id in self._scheduler or request_id in self._leaving
                or self._transceiver.has_offer(request_id))

    def finish(self, sequence: Sequence) -> None:
        """The sequence is over: forget it, free its blocks."""
        self._scheduler.remove(sequence)
        if self._blocks.owns(sequence.id):
            self._blocks.free(sequence.id)

    def offer(self, sequence: Sequence) -> bytes:
        """Hand the sequence over: it leaves, its blocks stay for whoever pulls. Opaque state."""
        self._scheduler.remove(sequence)
        return self._transceiver.offer(sequence.id, sequence.block_ids, sequence.num_prompt_tokens)

    def cancel(self, request_id: int, reason: FinishReason, error: str) -> None:
        """Give a sequence up wherever it is; a :class:`Dropped` follows once its blocks are free."""
        sequence = self._scheduler.get(request_id)
        if sequence is None:
            return
        dropped = Dropped(sequence, reason, error)
        if sequence.status is Status.HANDOVER and self._transceiver.abandon(request_id):
            self._leaving[request_id] = dropped
            return
        params = sequence.request.context_phase_params
        if params is not None and sequence.status is Status.WAITING:
            self.refuse(params)
        self.finish(sequence)
        self._dropped.append(dropped)

    def drop_offer(self, request_id: int) -> None:
        """Free the blocks of a context that nobody will pull."""
        self._transceiver.drop(request_id)

    def refuse(self, params: ContextPhaseParams) -> None:
        """Tell the context's instance that nothing will be pulled, so that it frees the blocks."""
        with contextlib.suppress(RequestError):  # a state that names no instance
            self._transceiver.refuse(params.req_id, params.opaque_state)

    # ---- the step ----

    def progress(self) -> bool:
        """Move transfers on, without a forward; whether anything happened."""
        events = self._transceiver.progress()
        for event in events:
            if isinstance(event, Released):
                self._released(event)
            else:
                self._pulled(event)
        return bool(events)

    def step(self) -> list[NewToken]:
        """One step. Returns its new tokens; :meth:`take_dropped` the sequences that left."""
        self.progress()
        for sequence in self._scheduler.admit():
            if sequence.is_generation_only:
                self._start_pull(sequence)
        self.progress()  # in a shared pool a pull is over at once
        chunks = self._scheduler.schedule()
        start = time.monotonic()
        tokens = self._run(chunks, start) if chunks else []
        self._update_stats(chunks, start)
        return tokens

    def take_dropped(self) -> list[Dropped]:
        dropped, self._dropped = self._dropped, []
        return dropped

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` would do something now, bytes on their way aside."""
        return any(s.status is not Status.HANDOVER for s in self._scheduler) or bool(self._dropped)

    @property
    def is_moving(self) -> bool:
        """Whether bytes are on their way that move only while :meth:`progress` is called."""
        return not self._transceiver.has_thread and self._transceiver.is_moving

    @property
    def num_free_blocks(self) -> int:
        return self._blocks.num_free

    @property
    def num_open(self) -> int:
        """Sequences, offers and pulls that are not over."""
        return len(self._scheduler) + self._transceiver.num_open

    def check(self, idle: bool) -> list[str]:
        """What is wrong with the books; with ``idle``, anything still owned or open as well."""
        self.progress()  # what is over has no owner until its end has been taken
        problems = self._blocks.check()
        known = {s.id for s in self._scheduler} | set(self._leaving)
        problems += [f"blocks of request {owner} are owned by nobody who is here"
                     for owner in self._blocks.owners
                     if owner not in known and not self._transceiver.has_offer(owner)]
        if idle:
            problems += [f"request {s.id} is still {s.status.name.lower()}" for s in self._scheduler]
            if self._transceiver.num_open:
                problems.append(f"{self._transceiver.num_open} hand-overs are still open")
            if self._blocks.num_free != self._blocks.num_blocks:
                problems.append(f"{self._blocks.num_blocks - self._blocks.num_free} blocks are owned")
        return problems

    def pool_blocks(self) -> PoolBlocks:
        """All blocks that are this instance's now."""
        return PoolBlocks(self._transceiver.pool, runs_of(self._blocks.block_ids))

    def close(self) -> None:
        """The end: give back what the hand-over holds."""
        self._transceiver.close()

    # ---- inside ----

    def _run(self, chunks: Seq[Chunk], start: float) -> list[NewToken]:
        for chunk in chunks:
            if not chunk.sequence.started_at:
                chunk.sequence.started_at = start
                chunk.sequence.timing.queue += start - chunk.sequence.enqueued_at
        logits = self._runner.forward(chunks)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        sampled = self._sampler(logits, sampling) if sampling else []
        for chunk in chunks:
            was_context = chunk.sequence.in_context_phase
            chunk.sequence.num_computed = chunk.end
            if was_context and chunk.samples:
                chunk.sequence.timing.context = time.monotonic() - chunk.sequence.started_at
        tokens = []
        for sequence, one in zip(sampling, sampled, strict=True):
            sequence.token_ids.append(one.token)
            tokens.append(NewToken(sequence, one, self._finish_reason(sequence, one.token)))
        return tokens

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.sampling
        if (token in self._eos and not params.ignore_eos) or token in params.stop_token_ids:
            return "stop"
        if sequence.num_output_tokens >= params.max_tokens:
            return "length"
        return None

    def _start_pull(self, sequence: Sequence) -> None:
        params = sequence.request.context_phase_params
        assert params is not None  # checked at enqueue
        sequence.timing.queue = time.monotonic() - sequence.enqueued_at
        try:
            self._transceiver.pull(
                sequence.id, params.req_id, params.opaque_state, sequence.block_ids,
                sequence.num_prompt_tokens)
        except RequestError as error:
            self.refuse(params)
            self.finish(sequence)
            self._dropped.append(Dropped(sequence, "error", f"the hand-over failed: {error}"))

    def _pulled(self, event: Pulled) -> None:
        sequence = self._scheduler.get(event.request_id)
        assert sequence is not None  # a pulled sequence stays in the scheduler until here
        if event.taken is not None:
            self._blocks.exchange(sequence.id, event.taken)
            sequence.block_ids = self._blocks.table(sequence.id)
        left = self._leaving.pop(sequence.id, None)
        if left is not None:  # given up on the way, or when the last byte had just arrived
            self.finish(sequence)
            self._dropped.append(left)
            return
        sequence.timing.handover = event.seconds
        sequence.timing.handover_bytes = event.bytes_moved
        sequence.timing.kv_bytes = event.kv_bytes
        sequence.timing.transport = event.transport
        params = sequence.request.context_phase_params
        assert params is not None
        sequence.adopt_context(params.first_gen_tokens)
        sequence.started_at = time.monotonic()
        sequence.status = Status.RUNNING

    def _released(self, event: Released) -> None:
        if event.exchanged is None:
            self._blocks.free(event.request_id)
        else:
            self._blocks.free_exchanged(event.request_id, event.exchanged)

    def _update_stats(self, chunks: Seq[Chunk], start: float) -> None:
        context = sum(c.length for c in chunks if c.start < c.sequence.num_prompt_tokens)
        self.stats = StepStats(
            num_context_tokens=context,
            num_generation_tokens=sum(c.length for c in chunks) - context,
            num_active=len(chunks),
            num_waiting=self._scheduler.num_waiting,
            num_free_blocks=self._blocks.num_free,
            seconds=time.monotonic() - start if chunks else 0.0,
        )
