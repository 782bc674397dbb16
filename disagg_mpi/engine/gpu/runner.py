"""The leader's view of an instance on GPUs: the next step is prepared and launched while one runs.

A step's tokens are chosen on the GPU and stay there for the step after, so the host is needed between two
steps only where it chooses itself (penalties, grammars, log-probabilities): such requests wait for their
token, all others start from it unseen. Made with the engine, used by its thread alone. It keeps nothing of a
request but its seat.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from disagg_mpi.comm.messages import CopyBlocks, Message, PagedStep
from disagg_mpi.engine.gpu.stage import DeviceStage, Queued
from disagg_mpi.engine.sampler import uniform
from disagg_mpi.engine.scheduler import Chunk
from disagg_mpi.engine.sequence import Sequence as Request
from disagg_mpi.engine.steps import OnLayer, StepOutput

# One step runs, one is queued behind it. A third would only make requests that arrive wait longer.
_DEPTH = 2


class _InFlight(NamedTuple):
    chunks: Sequence[Chunk]
    host_chunks: list[Chunk]
    drawn: list[int]
    """Ids of the requests whose tokens are chosen on the GPU."""
    queued: Queued


class _Seat(NamedTuple):
    number: int
    block_ids: list[int]
    """The request's own list, which grows in place."""
    num_known: int
    """Of these, known to the ranks."""


class GpuRunner:
    """Launch a step, ask for the oldest; for instances of one pipeline stage."""

    depth = _DEPTH
    is_done_at_launch = False
    promises = True

    def __init__(self, stage: DeviceStage, tell: Callable[[Message], None] = lambda _message: None) -> None:
        """``tell`` sends a message to every follower."""
        self._stage = stage
        self._tell = tell
        self._in_flight: deque[_InFlight] = deque()
        self._seats: dict[int, _Seat] = {}  # by request, least lately used first
        self._free = list(range(stage.num_seats))
        self._number = 0

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def launch(self, chunks: Sequence[Chunk], on_layer: OnLayer | None = None) -> None:
        """Queue a step on all ranks. Layers are not announced: the host does not know when they are done."""
        step, drawn, host_chunks = self._step(chunks)
        self._tell(step)
        self._in_flight.append(_InFlight(chunks, host_chunks, drawn, self._stage.queue(step)))

    def poll(self) -> StepOutput | None:
        """Waits for the oldest; another one may be queued behind it, so the GPU does not."""
        if not self._in_flight:
            return None
        chunks, host_chunks, drawn, queued = self._in_flight.popleft()
        queued.mark.wait()
        tokens = dict(zip(drawn, queued.tokens.tolist(), strict=True))
        return StepOutput(chunks, host_chunks, queued.rows, tokens)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks on all ranks, beside the steps that run."""
        self._tell(CopyBlocks(list(sources), list(targets)))
        self._stage.copy_blocks(sources, targets)

    def _step(self, chunks: Sequence[Chunk]) -> tuple[PagedStep, list[int], list[Chunk]]:
        """The step as a message, the requests that are drawn on the GPU, and the chunks whose rows come
        here."""
        self._number += 1
        step = PagedStep(self._number, [], [], [], [], [], [], [], [])
        drawn: list[int] = []
        host_chunks = []
        for place, chunk in enumerate(chunks):
            sequence = chunk.sequence
            step.seats.append(self._seat(sequence, step.tables))
            step.starts.append(chunk.start)
            step.lengths.append(chunk.length)
            known = sequence.token_ids[chunk.start : chunk.end]
            step.token_ids.extend(known or [-1])
            end = len(step.token_ids)
            if chunk.is_drawn_on_device:
                params = sequence.sampling
                if params.temperature:
                    assert params.seed is not None  # checked at enqueue
                    step.draws.append((len(drawn), params.temperature, params.top_k, params.top_p, uniform(
                        params.seed, sequence.request.sequence_index, chunk.end)))
                step.drawn.append(place)
                drawn.append(sequence.id)
            elif chunk.num_kept:
                host_chunks.append(chunk)
                step.keep.extend(range(end - chunk.num_kept, end))
        return step, drawn, host_chunks

    def _seat(self, sequence: Request, tables: list[tuple[int, int, list[int]]]) -> int:
        """The seat of a request; what its ranks must learn of its blocks goes into ``tables``."""
        seat = self._seats.pop(sequence.id, None)
        number = seat.number if seat is not None else self._free.pop() if self._free else self._vacate()
        blocks = sequence.block_ids
        num_known = seat.num_known if seat is not None and seat.block_ids is blocks else 0
        if num_known < len(blocks):
            tables.append((number, num_known, blocks[num_known:]))
        self._seats[sequence.id] = _Seat(number, blocks, len(blocks))
        return number

    def _vacate(self) -> int:
        """Take the seat that was used longest ago. There are twice as many as requests in a step, and a
        request that still needs its last token is in the step in flight."""
        oldest = next(iter(self._seats))
        return self._seats.pop(oldest).number
