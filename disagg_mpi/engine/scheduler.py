"""Which requests are in the next step, and with how many tokens: pure.

First come, first served. A request is admitted when the pool can hold its prompt and ``reserved_output``
positions of output, and is then in every step until it is done: one token if it generates, the next chunk of
its prompt if it does not yet. Generating requests come first, so a long prompt slows their next token by one
chunk at most; chunks share what is left of the token budget.

A request that outgrows what it reserved takes more blocks; where there are none, the youngest one that runs
gives its own back and waits at the head of the queue, to be computed again. The oldest is never preempted
by a younger one and the pool can hold any request alone, so all of them come to their end.

With pipeline stages several steps are in flight. A request may be in more than one of them with chunks of its
prompt, but with one generated token only, and a step takes a fair share of the generating requests. On a GPU
the next step is launched while one runs, and starts from tokens that are only promised.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.engine.sequence import Sequence, Status, positions_needed

MAX_SCORED_TOKENS = 128
"""Positions of scored prompts in one step, of all requests together: it bounds the logits that a step keeps.
128 rows of a vocabulary of 131,072 are 64 MiB."""


class Chunk(msgspec.Struct, frozen=True):
    """``length`` tokens of one request, from position ``start``, in the step."""

    sequence: Sequence
    start: int
    length: int
    is_scored: bool = False
    """Whether the logits at all its positions are wanted: they are of a prompt that is scored."""

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """Whether the step gives this request a new token; it may start from one that is only promised."""
        return self.end >= len(self.sequence.token_ids)

    @property
    def is_drawn_on_device(self) -> bool:
        """Whether its new token can be chosen where the logits are made, which need not come to the host."""
        return self.samples and not self.is_scored and self.sequence.is_drawn_on_device

    @property
    def num_kept(self) -> int:
        """Positions whose logits the step gives: all, or the last for the new token, or none."""
        return self.length if self.is_scored else int(self.samples)


Place = Callable[[Sequence, int], list[int]]
"""Gives a sequence that many blocks; they can be had."""


class Scheduler:
    """Holds the waiting and the running; the engine moves a sequence on by what it is told."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        tokens_per_block: int,
        max_batch_size: int,
        max_num_tokens: int,
        reserved_output: int,
        reserve_output_in_context: bool = False,
        num_stages: int = 1,
        place: Place | None = None,
    ) -> None:
        self._blocks = blocks
        self._tokens_per_block = tokens_per_block
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._reserved_output = reserved_output
        self._reserve_output_in_context = reserve_output_in_context
        self._num_stages = num_stages
        self._place = place or (lambda sequence, count: blocks.allocate(sequence.id, count))
        self._waiting: deque[Sequence] = deque()
        self._active: dict[int, Sequence] = {}
        self._by_id: dict[int, Sequence] = {}
        # To be preempted once they are in no step.
        self._held: set[int] = set()

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._by_id

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def get(self, request_id: int) -> Sequence | None:
        return self._by_id.get(request_id)

    def blocks_for(self, sequence: Sequence) -> int:
        """Blocks that ``sequence`` is admitted with.

        A context instance holds the prompt; where the hand-over exchanges blocks within one pool it
        takes the room for the output along, so that the request stays one run through generation.
        """
        length = len(sequence.token_ids)
        if sequence.is_context_only and not self._reserve_output_in_context:
            positions = length
        else:
            left = sequence.sampling.max_tokens - sequence.num_output_tokens
            positions = positions_needed(length, min(left, self._reserved_output))
        return -(-positions // self._tokens_per_block)

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)
        self._by_id[sequence.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget ``sequence`` wherever it is; its blocks stay whose they are."""
        del self._by_id[sequence.id]
        if self._active.pop(sequence.id, None) is None:
            self._waiting.remove(sequence)

    def admit(self) -> list[Sequence]:
        """Give blocks to those waiting, in order, as far as blocks and batch places go.

        Contexts come in only as far as the next step's token budget goes: until then others may compute
        what they begin with, and it need not be computed twice. Those that take theirs over pass them.
        """
        admitted = []
        budget = self._max_num_tokens - sum(
            s.context_length - s.num_scheduled for s in self._active.values()
            if s.status is Status.RUNNING and s.in_context_phase)
        for sequence in list(self._waiting):
            if len(self._active) >= self._max_batch_size:
                break
            if budget <= 0 and not sequence.takes_over:
                if sequence.timing.num_preempted:
                    break  # nobody takes the blocks that it waits for
                continue
            count = self.blocks_for(sequence)
            if not self._blocks.can_allocate(count):
                break
            self._waiting.remove(sequence)
            sequence.block_ids = self._place(sequence, count)
            sequence.status = Status.HANDOVER if sequence.takes_over else Status.RUNNING
            if not sequence.takes_over:
                budget -= sequence.context_length - sequence.num_scheduled
            self._active[sequence.id] = sequence
            admitted.append(sequence)
        return admitted

    def grow(self) -> tuple[list[Sequence], list[Sequence]]:
        """Make room for the next token of those that generate.

        Returns the sequences that hold more blocks now, and those that were preempted: they hold
        none, and wait.
        """
        grown: list[Sequence] = []
        preempted: list[Sequence] = []
        self._held.clear()
        for sequence in list(self._active.values()):
            if (sequence.status is not Status.RUNNING or sequence.in_context_phase
                    or not sequence.can_schedule):  # what is in flight may be its last token
                continue
            while sequence.num_scheduled >= len(sequence.block_ids) * self._tokens_per_block:
                if self._extend(sequence):
                    grown.append(sequence)
                    continue
                victim = self._youngest()
                if victim.num_in_flight:
                    # It cannot be stopped now. Left out of the next step, it can be when this one is over.
                    self._held.add(victim.id)
                    break
                self._preempt(victim)
                preempted.append(victim)
                if victim is sequence:
                    break
        return [s for s in grown if s not in preempted], preempted

    def schedule(self) -> list[Chunk]:
        """The next step's chunks: generation first, then context within the token budget."""
        running = [s for s in self._active.values()
                   if s.status is Status.RUNNING and s.id not in self._held]
        generating = [s for s in running if not s.in_context_phase]
        share = -(-len(generating) // self._num_stages)
        ready = [s for s in generating if s.can_schedule and self._has_room(s)][:share]
        chunks = [Chunk(s, s.num_scheduled, 1) for s in ready]
        budget = self._max_num_tokens - len(chunks)
        scored = MAX_SCORED_TOKENS
        for sequence in running:
            if not sequence.in_context_phase:
                continue
            is_scored = sequence.prompt_scores is not None
            room = min(budget, scored) if is_scored else budget
            length = min(sequence.context_length - sequence.num_scheduled, room)
            if length > 0:
                chunks.append(Chunk(sequence, sequence.num_scheduled, length, is_scored))
                budget -= length
                scored -= length * is_scored
        return chunks

    # ---- inside ----

    def _has_room(self, sequence: Sequence) -> bool:
        return sequence.num_scheduled < len(sequence.block_ids) * self._tokens_per_block

    def _extend(self, sequence: Sequence) -> bool:
        left = sequence.sampling.max_tokens - sequence.num_output_tokens
        wanted = -(-min(left, self._reserved_output) // self._tokens_per_block)
        for count in {wanted: None, 1: None}:
            if self._blocks.extend(sequence.id, count) is not None:
                sequence.block_ids = self._blocks.table(sequence.id)
                return True
        return False

    def _youngest(self) -> Sequence:
        """Of those that run: the last to come."""
        order = [s for s in self._by_id.values() if s.status is Status.RUNNING]
        return order[-1]

    def _preempt(self, sequence: Sequence) -> None:
        self._blocks.free(sequence.id)
        del self._active[sequence.id]
        sequence.preempt()
        # In order of arrival among those that were preempted, and before all others.
        order = {request_id: at for at, request_id in enumerate(self._by_id)}
        place = sum(1 for other in self._waiting
                    if other.timing.num_preempted and order[other.id] < order[sequence.id])
        self._waiting.insert(place, sequence)
