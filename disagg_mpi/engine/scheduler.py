"""Which requests are in the next step, and with how many tokens: pure.

First come, first served. A request is admitted when the pool can hold all that it will ever need, so
nothing that runs can run out of blocks, and then it is in every step until it is done: one token if it
generates, the next chunk of its prompt if it does not yet. Generating requests come first, so a long
prompt slows their next token by one chunk at most; chunks share what is left of the token budget.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import msgspec

from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.engine.sequence import Sequence, Status, positions_needed


class Chunk(msgspec.Struct, frozen=True):
    """``length`` tokens of one request, from position ``start``, in the step."""

    sequence: Sequence
    start: int
    length: int

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def samples(self) -> bool:
        """Whether the step gives this request a new token."""
        return self.end == len(self.sequence.token_ids)


class Scheduler:
    """Holds the waiting and the running; the engine moves a sequence on by what it is told."""

    def __init__(
        self,
        blocks: BlockManager,
        *,
        tokens_per_block: int,
        max_batch_size: int,
        max_num_tokens: int,
        reserve_output_in_context: bool = False,
    ) -> None:
        self._blocks = blocks
        self._tokens_per_block = tokens_per_block
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._reserve_output_in_context = reserve_output_in_context
        self._waiting: deque[Sequence] = deque()
        self._active: dict[int, Sequence] = {}
        self._by_id: dict[int, Sequence] = {}

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
        """Blocks that ``sequence`` needs here until it leaves.

        A context instance holds the prompt; where the hand-over exchanges blocks within one pool it
        takes the room for the output along, so that the request stays one run through generation.
        """
        if sequence.is_context_only and not self._reserve_output_in_context:
            positions = sequence.num_prompt_tokens
        else:
            positions = positions_needed(sequence.num_prompt_tokens, sequence.sampling.max_tokens)
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
        """Give blocks to those waiting, in order, as far as blocks and batch places go."""
        admitted = []
        while self._waiting and len(self._active) < self._max_batch_size:
            sequence = self._waiting[0]
            count = self.blocks_for(sequence)
            if not self._blocks.can_allocate(count):
                break
            self._waiting.popleft()
            sequence.block_ids = self._blocks.allocate(sequence.id, count)
            sequence.status = Status.HANDOVER if sequence.is_generation_only else Status.RUNNING
            self._active[sequence.id] = sequence
            admitted.append(sequence)
        return admitted

    def schedule(self) -> list[Chunk]:
        """The next step's chunks: generation first, then context within the token budget."""
        running = [s for s in self._active.values() if s.status is Status.RUNNING]
        chunks = [Chunk(s, s.num_computed, 1) for s in running if not s.in_context_phase]
        budget = self._max_num_tokens - len(chunks)
        for sequence in running:
            if sequence.in_context_phase and budget > 0:
                length = min(sequence.num_prompt_tokens - sequence.num_computed, budget)
                chunks.append(Chunk(sequence, sequence.num_computed, length))
                budget -= length
        return chunks
