"""An instance's engine, at its leader: admit → start pulls → launch steps → sample, and the blocks behind it.

Single-threaded and cooperative: nothing happens between two calls of :meth:`Engine.step`. The engine owns the
instance's blocks. A sequence leaves in one of these ways, each freeing its blocks exactly once: ``finish``
(done or given up; freed at once, or when the step is over that was launched ahead and still writes them),
``offer`` (handed over; freed when the transceiver reports it released), an abandoned pull (freed when its
last byte has arrived), or a cancel while a launched step still writes its blocks or a watcher reads them
(freed when that is over).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq

import msgspec

from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.engine.logprobs import take_scores
from disagg_mpi.engine.reuse import PrefixReuse
from disagg_mpi.engine.sampler import NoToken, Sampled, Sampler
from disagg_mpi.engine.scheduler import Chunk, Scheduler
from disagg_mpi.engine.sequence import PromptScores, Sequence, Status
from disagg_mpi.engine.steps import StepOutput, Steps
from disagg_mpi.errors import RequestError
from disagg_mpi.request import ContextPhaseParams, FinishReason, PoolBlocks
from disagg_mpi.transfer.layout import runs_of
from disagg_mpi.transfer.offers import Released
from disagg_mpi.transfer.pulls import Pulled
from disagg_mpi.transfer.transceiver import Transceiver


class NewToken(msgspec.Struct, frozen=True):
    """A sequence's next token; ``finish_reason`` if by token rules it is the last."""

    sequence: Sequence
    sampled: Sampled
    finish_reason: FinishReason | None
    prompt_scores: PromptScores | None = None
    """With the first token, where they were asked for."""


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
        runner: Steps,
        sampler: Sampler,
        scheduler: Scheduler,
        blocks: BlockManager,
        transceiver: Transceiver,
        eos_token_ids: Seq[int],
        reuse: PrefixReuse | None = None,
        announces_layers: bool = False,
    ) -> None:
        """``announces_layers``: every rank of the instance is in the same layer at the same time, so this
        rank's progress within a step is all ranks'."""
        self._runner = runner
        self._sampler = sampler
        self._scheduler = scheduler
        self._blocks = blocks
        self._transceiver = transceiver
        self._eos = frozenset(eos_token_ids)
        self._reuse = reuse
        self._announces_layers = announces_layers
        self._dropped: list[Dropped] = []
        # Given up while a step, a pull or a watcher still uses the blocks: id → what to report.
        self._leaving: dict[int, Dropped] = {}
        # Done, while a step that was launched ahead still writes their blocks.
        self._lingering: set[int] = set()
        self._resized: dict[int, int] = {}
        self.stats = StepStats()

    # ---- requests in and out ----

    def add(self, sequence: Sequence) -> None:
        self._scheduler.add(sequence)

    def __contains__(self, request_id: int) -> bool:
        return (request_id in self._scheduler or request_id in self._leaving or request_id in self._lingering
                or self._transceiver.has_offer(request_id))

    def finish(self, sequence: Sequence) -> None:
        """The sequence is over: forget it, free its blocks, or let their watcher have its last look."""
        self._scheduler.remove(sequence)
        self._resized.pop(sequence.id, None)
        if sequence.num_in_flight:
            self._lingering.add(sequence.id)
            return
        if not self._blocks.owns(sequence.id):
            return
        if not (sequence.is_context_only and self._transceiver.end(sequence.id)):
            self._blocks.free(sequence.id)

    def offer(self, sequence: Sequence) -> bytes:
        """Hand the sequence over: it leaves, its blocks stay for whoever pulls. Opaque state."""
        self._scheduler.remove(sequence)
        return self._transceiver.offer(sequence.id, sequence.block_ids, sequence.num_prompt_tokens)

    def proceed(self, request_id: int, params: ContextPhaseParams) -> None:
        """The context phase of a sequence that came early is over."""
        sequence = self._scheduler.get(request_id)
        if sequence is None or request_id in self._leaving:
            self.refuse(params)
            return
        sequence.context_params = params
        if sequence.status is Status.HANDOVER:
            self._transceiver.proceed(request_id)

    def cancel(self, request_id: int, reason: FinishReason, error: str) -> None:
        """Give a sequence up wherever it is; a :class:`Dropped` follows once its blocks are free."""
        sequence = self._scheduler.get(request_id)
        if sequence is None or request_id in self._leaving:
            return
        dropped = Dropped(sequence, reason, error)
        if sequence.status is Status.HANDOVER and self._transceiver.abandon(request_id):
            self._leaving[request_id] = dropped
            return
        if sequence.num_in_flight:
            sequence.status = Status.HANDOVER  # in no further step
            self._leaving[request_id] = dropped
            return
        if sequence.context_params is not None and sequence.status is Status.WAITING \
                and sequence.takes_over:
            self.refuse(sequence.context_params)
        self._leave(dropped)

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
        """One step. Returns its new tokens; :meth:`take_dropped` the sequences that left.

        With pipeline stages, or on a GPU: launches steps while there is something for them and a place free,
        and returns the tokens of the oldest that is over.
        """
        self.progress()
        for sequence in self._scheduler.admit():
            if sequence.takes_over:
                self._start_pull(sequence)
            elif sequence.timing.num_preempted:
                self._resized[sequence.id] = len(sequence.block_ids)
            else:
                sequence.timing.cached_tokens = sequence.num_computed
        self.progress()  # in a shared pool a pull is over at once
        start = time.monotonic()
        grown, preempted = self._scheduler.grow()
        for sequence in (*grown, *preempted):
            self._resized[sequence.id] = len(sequence.block_ids)
        launched: list[Chunk] = []
        while self._runner.num_in_flight < self._runner.depth:
            chunks = self._scheduler.schedule()
            if not chunks:
                break
            self._launch(chunks, start)
            launched += chunks
        over = self._runner.poll()
        tokens = self._finish_step(over) if over is not None else []
        self._update_stats(launched, start)
        return tokens

    def take_dropped(self) -> list[Dropped]:
        dropped, self._dropped = self._dropped, []
        return dropped

    def take_resized(self) -> dict[int, int]:
        """Sequences that hold another number of blocks than they were first admitted with, or than when
        last asked, and how many."""
        resized, self._resized = self._resized, {}
        return resized

    @property
    def has_work(self) -> bool:
        """Whether :meth:`step` would do something now, bytes on their way aside."""
        return (any(s.status is not Status.HANDOVER for s in self._scheduler) or bool(self._dropped)
                or self._runner.num_in_flight > 0)

    @property
    def is_moving(self) -> bool:
        """Whether something is on its way that moves only while :meth:`progress` or :meth:`step` is
        called."""
        return self._runner.num_in_flight > 0 or (
            not self._transceiver.has_thread and self._transceiver.is_moving)

    @property
    def num_free_blocks(self) -> int:
        return self._blocks.num_free

    @property
    def num_open(self) -> int:
        """Sequences, offers and pulls that are not over, and done ones whose blocks a step still writes."""
        return len(self._scheduler) + len(self._lingering) + self._transceiver.num_open

    @property
    def pool(self) -> str:
        """Name of the pool; instances with equal names share it, and what it holds of prefixes."""
        return self._transceiver.pool

    def check(self, idle: bool) -> list[str]:
        """What is wrong with the books; with ``idle``, anything still owned or open as well."""
        self.progress()  # what is over has no owner until its end has been taken
        problems = self._blocks.check()
        known = {s.id for s in self._scheduler} | set(self._leaving) | self._lingering
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

    # ---- inside: steps ----

    def _launch(self, chunks: Seq[Chunk], start: float) -> None:
        for chunk in chunks:
            sequence = chunk.sequence
            sequence.num_in_flight += 1
            sequence.num_scheduled = chunk.end
            if not sequence.started_at:
                sequence.started_at = start
                sequence.timing.queue += start - sequence.enqueued_at
        last = [c.sequence for c in chunks if c.sequence.is_context_only and c.samples]
        self._runner.launch(chunks, self._announcer(last))
        if self._runner.promises:
            for chunk in chunks:
                if chunk.is_drawn_on_device:
                    chunk.sequence.promise()
        if self._runner.is_done_at_launch:
            # Every rank has written its part: what is watched leaves before the logits are looked at.
            for chunk in chunks:
                self._announce(chunk.sequence, chunk.end)

    def _announcer(self, sequences: Seq[Sequence]) -> Callable[[int], None] | None:
        """Called by the forward for each layer: layers of a prompt's last chunk leave as they are
        computed."""
        watched = [s for s in sequences if self._transceiver.is_watched(s.id)]
        if not watched or not self._announces_layers:
            return None

        def on_layer(layer: int) -> None:
            # The layers before it: other ranks of the stage may not have written this one yet.
            for sequence in watched:
                self._transceiver.computed(sequence.id, sequence.block_ids, sequence.num_prompt_tokens,
                                           sequence.num_prompt_tokens, layer)

        return on_layer

    def _announce(self, sequence: Sequence, end: int) -> None:
        if sequence.is_context_only and self._transceiver.is_watched(sequence.id):
            self._transceiver.computed(
                sequence.id, sequence.block_ids, sequence.num_prompt_tokens, end)

    def _finish_step(self, over: StepOutput) -> list[NewToken]:
        chosen = self._choose(over)
        now = time.monotonic()
        for chunk in over.chunks:
            sequence = chunk.sequence
            sequence.num_in_flight -= 1
            if sequence.id in self._lingering:
                continue
            before, sequence.num_computed = sequence.num_computed, chunk.end
            if sequence.id in self._leaving:
                continue
            if self._reuse is not None:
                self._reuse.computed(sequence, before)
            if chunk.samples and not sequence.num_output_tokens:
                sequence.timing.context = now - sequence.started_at
            if not self._runner.is_done_at_launch:
                self._announce(sequence, chunk.end)
        tokens = []
        failed = []
        for sequence in (chunk.sequence for chunk in over.chunks if chunk.samples):
            one = chosen.get(sequence.id)
            if one is None or sequence.id in self._leaving or sequence.id in self._lingering:
                continue
            if isinstance(one, NoToken):
                failed.append(Dropped(sequence, "error", one.error))
                continue
            sequence.append(one.token)
            tokens.append(NewToken(sequence, one, self._finish_reason(sequence, one.token),
                                   sequence.take_prompt_scores()))
        self._let_go(chunk.sequence for chunk in over.chunks)
        for dropped in failed:
            self._leave(dropped)
        return tokens

    def _choose(self, over: StepOutput) -> dict[int, Sampled | NoToken]:
        """The token of each request that the step gives one."""
        chosen: dict[int, Sampled | NoToken] = {
            request: Sampled(token) for request, token in over.tokens.items()}
        if over.logits is not None:
            rows = take_scores(over.host_chunks, over.logits, self._leaving)
            sampling = [chunk.sequence for chunk in over.host_chunks if chunk.samples]
            chosen |= zip((s.id for s in sampling), self._sampler(rows, sampling), strict=True)
        return chosen

    def _let_go(self, sequences: Iterable[Sequence]) -> None:
        """Free the blocks of those that have left, or are done, and are in no step any more."""
        for sequence in sequences:
            if sequence.num_in_flight:
                continue
            left = self._leaving.get(sequence.id)
            if left is not None:
                del self._leaving[sequence.id]
                self._leave(left)
            elif sequence.id in self._lingering:
                self._lingering.remove(sequence.id)
                self._blocks.free(sequence.id)

    def _finish_reason(self, sequence: Sequence, token: int) -> FinishReason | None:
        params = sequence.sampling
        if (token in self._eos and not params.ignore_eos) or token in params.stop_token_ids:
            return "stop"
        if sequence.guide is not None and sequence.guide.is_over:
            return "stop"
        if sequence.num_output_tokens >= params.max_tokens:
            return "length"
        return None

    # ---- inside: hand-overs ----

    def _start_pull(self, sequence: Sequence) -> None:
        sequence.timing.queue = time.monotonic() - sequence.enqueued_at
        sequence.timing.held_tokens = sequence.num_computed
        params = sequence.context_params
        if params is None:
            source = sequence.request.early_source
            assert source is not None  # checked at enqueue
            self._transceiver.expect(sequence.id, sequence.id, source, sequence.block_ids,
                                     sequence.num_prompt_tokens, sequence.num_computed)
            return
        try:
            self._transceiver.pull(
                sequence.id, params.req_id, params.opaque_state, sequence.block_ids,
                sequence.num_prompt_tokens, sequence.num_computed)
        except RequestError as error:
            self.refuse(params)
            self._leave(Dropped(sequence, "error", f"the hand-over failed: {error}"))

    def _pulled(self, event: Pulled) -> None:
        sequence = self._scheduler.get(event.request_id)
        assert sequence is not None  # a pulled sequence stays in the scheduler until here
        if event.taken is not None:
            self._blocks.exchange(sequence.id, event.taken)
            sequence.block_ids = self._blocks.table(sequence.id)
        left = self._leaving.pop(sequence.id, None)
        if left is not None:  # given up on the way, or when the last byte had just arrived
            self._leave(left)
            return
        sequence.timing.handover = event.exposed
        sequence.timing.transfer = event.seconds
        sequence.timing.handover_bytes = event.bytes_moved
        sequence.timing.kv_bytes = event.kv_bytes
        sequence.timing.transport = event.way
        params = sequence.context_params
        assert params is not None
        held = sequence.num_computed
        sequence.adopt_context(params.first_gen_tokens)
        if self._reuse is not None and event.taken is None:
            self._reuse.computed(sequence, held)
        sequence.started_at = time.monotonic()
        sequence.status = Status.RUNNING

    def _released(self, event: Released) -> None:
        if event.exchanged is not None:
            self._blocks.free_exchanged(event.request_id, event.exchanged)
        elif self._blocks.owns(event.request_id):
            self._blocks.free(event.request_id)
        left = self._leaving.pop(event.request_id, None)
        if left is not None:  # cancelled while a watcher read its blocks
            self._scheduler.remove(left.sequence)
            self._dropped.append(left)

    def _leave(self, dropped: Dropped) -> None:
        """The sequence goes, now or when nobody reads its blocks any more."""
        sequence = dropped.sequence
        is_watched = sequence.is_context_only and self._transceiver.end(sequence.id)
        if is_watched and self._blocks.owns(sequence.id):
            sequence.status = Status.HANDOVER  # in no further step
            self._leaving[sequence.id] = dropped
            return
        self.finish(sequence)
        self._dropped.append(dropped)

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
