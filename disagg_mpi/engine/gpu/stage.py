"""One rank's part of every step on its device, queued and not waited for.

Made once by every rank of the instance with its weights and pool in place, and warmed up before the first
request. It owns the step's buffers, the seats' tables and last tokens, and the captured steps. Everything
that it queues goes to one stream, in the order of the calls, so a step may read what the one before will
write; what leaves it is copied to host memory behind a mark.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from disagg_mpi.comm.group import GroupLink, as_bytes
from disagg_mpi.comm.messages import Batch, PagedStep
from disagg_mpi.engine.gpu.attention import DeviceAttention, DevicePool
from disagg_mpi.engine.gpu.buffers import DeviceStep, StepBuffers, blank_step
from disagg_mpi.engine.gpu.device import Device, Mark, Work
from disagg_mpi.engine.gpu.graphs import StepGraphs, graph_sizes
from disagg_mpi.engine.gpu.model import DeviceModel
from disagg_mpi.engine.gpu.sampler import draw_some, likeliest
from disagg_mpi.engine.gpu.tables import Ints, SeatTables, StepArrays, arrays_of
from disagg_mpi.engine.scheduler import MAX_SCORED_TOKENS
from disagg_mpi.engine.steps import OnLayer

CopyBlocks = Callable[[Sequence[int], Sequence[int]], None]


@dataclass(frozen=True)
class Queued:
    """What a queued step will have left in host memory when its mark is past."""

    tokens: torch.Tensor
    """[drawn chunks] int32."""
    rows: torch.Tensor | None
    """[kept tokens, vocabulary] fp32."""
    mark: Mark


class DeviceStage:
    """One rank's part. ``num_seats`` requests may have a seat at a time."""

    def __init__(
        self,
        device: Device,
        model: DeviceModel,
        pool: DevicePool,
        attention: DeviceAttention,
        link: GroupLink | None,
        copy_blocks: CopyBlocks,
        *,
        scratch: int,
        max_batch_size: int,
        max_num_tokens: int,
        max_model_len: int,
        captures: bool,
    ) -> None:
        """``scratch``: a block that is nobody's; ``copy_blocks`` copies whole blocks of the pool at once;
        ``captures``: whether generation steps are to be recorded, where everything in them can be."""
        layout = pool.view.layout
        self.model = model
        self.num_seats = 2 * max_batch_size  # of the step in flight, and of the one that is launched
        self._device = device
        self._pool = pool
        self._attention = attention
        self._link = link
        self._copy_blocks = copy_blocks
        self._scratch = scratch
        self._page_size = layout.tokens_per_block
        self._max_batch_size, self._max_num_tokens = max_batch_size, max_num_tokens
        blocks_per_seat = min(layout.num_blocks, -(-max_model_len // self._page_size))
        self._tables = SeatTables(self.num_seats, blocks_per_seat, self._page_size, scratch)
        self._buffers = StepBuffers(
            device, num_tokens=max(max_num_tokens, max_batch_size), num_chunks=max_batch_size,
            num_rows=max_batch_size + MAX_SCORED_TOKENS, num_pages=layout.num_blocks + max_batch_size)
        self._last_tokens = torch.zeros(self.num_seats + 1, dtype=torch.int32, device=device.place)
        is_whole = model.is_first and model.is_last
        self._graphs: StepGraphs | None = None
        if captures and is_whole and attention.can_capture:
            self._graphs = StepGraphs(device, graph_sizes(max_batch_size))
            # Of all sizes: their own would stay apart, half a gigabyte for a large vocabulary.
            self._captured = torch.empty(max_batch_size, model.vocab_size, dtype=model.dtype,
                                         device=device.place)

    def in_words(self) -> str:
        """How it computes, for the start of a job."""
        graphs = "generation steps are captured" if self._graphs is not None else "no step is captured"
        return f"attention: {self._attention.name}; {graphs}"

    # ---- steps with seats: instances of one pipeline stage ----

    def queue(self, step: PagedStep) -> Queued:
        """Queue the step, and what the host will want of it."""
        tokens, kept = self._queue(step)
        host_tokens = self._to_host(tokens)
        rows = self._to_host(kept.float()) if step.keep else None
        return Queued(host_tokens, rows, self._device.mark())

    def serve(self, step: PagedStep | Batch) -> None:
        """A follower's part."""
        if isinstance(step, PagedStep):
            self._queue(step)  # its buffers keep it from running away from the device
            return
        logits = self.run(step)
        if logits is not None:
            assert self._link is not None  # a follower has one
            self._link.send_logits(as_bytes(logits.contiguous().numpy()))

    # ---- steps of instances with several: tokens are chosen at the leader ----

    def run(self, batch: Batch, on_layer: OnLayer | None = None) -> torch.Tensor | None:
        """Compute ``batch`` and wait for it; this rank's logits, on the host, if it makes them.

        Hidden states come from the stage before and go to the one after by way of the host.
        """
        arrays = arrays_of(batch, self._page_size)
        hidden = None if self.model.is_first else self._receive(arrays.num_tokens)
        step = self._buffers.upload(arrays)
        self._attention.begin(step)
        output = self.model(step.token_ids, step.positions, step.rows, self._attention, hidden)
        if self.model.is_last:
            return output.float().cpu()
        assert self._link is not None  # or this stage would be the last
        self._link.send_hidden(as_bytes(output.contiguous().cpu().view(torch.uint8).numpy()))
        return None

    # ---- both ----

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks of this rank's part; returns when every rank of the instance has."""
        with self._device.aside():
            self._copy_blocks(sources, targets)
        if self._link is not None:
            self._link.barrier()

    def warm_up(self) -> None:
        """Load kernels and capture generation steps, on the scratch block; collective over the instance."""
        slot = self._scratch * self._page_size
        if self.model.is_first and self.model.is_last:
            for num_ones, num_tokens in self._mixtures():
                self._logits(_blank_mixture(
                    num_ones, num_tokens, self._tables.nobody, self._scratch, self._page_size))
            if self._graphs is not None:
                self._graphs.capture(lambda size: self._work(
                    blank_step(size, self._tables.nobody, slot, self._scratch)))
        else:
            for num_ones, num_tokens in self._mixtures():
                lengths = [1] * num_ones + [num_tokens] * (num_tokens > 0)
                self.run(Batch(0, [0] * sum(lengths), [(0, length, [(slot, length)]) for length in lengths],
                               [sum(lengths) - 1]))
        self._device.synchronize()
        if self._link is not None:
            self._link.barrier()

    # ---- inside ----

    def _mixtures(self) -> list[tuple[int, int]]:
        """Requests with one token, and tokens of a prompt beside them, of steps that need all kernels."""
        prompt = min(8, self._page_size)
        alone = sorted({*self._attention.sizes(self._max_batch_size),
                        *(size for size in self.model.sizes if size <= self._max_batch_size)}, reverse=True)
        beside = self._attention.sizes(min(self._max_batch_size - 1, self._max_num_tokens - prompt))
        return [*((size, 0) for size in alone), *((size, prompt) for size in beside), (0, prompt)]

    def _queue(self, step: PagedStep) -> tuple[torch.Tensor, torch.Tensor]:
        """The tokens that are drawn, and the logits to keep, on the device."""
        arrays = self._tables.arrays(step)
        logits, chosen = self._logits(arrays)
        num_drawn = len(step.drawn)
        if arrays.is_generation:  # rows of all chunks, in their order
            drawn, kept = (self._pick(logits, rows)
                           for rows in (arrays.rows[:num_drawn], arrays.rows[num_drawn:]))
        else:
            drawn, kept = logits[:num_drawn], logits[num_drawn:]
        tokens = likeliest(drawn) if chosen is None else self._pick(chosen, arrays.rows[:num_drawn])
        draw_some(tokens, drawn, step.draws, self._device)
        if num_drawn and (chosen is None or step.draws):
            seats = torch.from_numpy(arrays.seats[step.drawn].astype(np.int64))
            self._seat(self._to_device(seats), tokens)
        return tokens, kept

    def _seat(self, seats: torch.Tensor, tokens: torch.Tensor) -> None:
        """Keep tokens for the next step of their requests."""
        self._last_tokens.index_copy_(0, seats, tokens)

    def _logits(self, arrays: StepArrays) -> tuple[torch.Tensor, torch.Tensor | None]:
        """All ranks' logits: of every chunk of a generation step in order, else of the wanted rows. Of a
        captured step also the likeliest token of each, which its seat has by then."""
        size = self._graphs.size_for(arrays.num_chunks) if self._graphs and arrays.is_generation else None
        if self._graphs is None or size is None:
            step = self._buffers.upload(arrays)
            self._attention.begin(step)
            return self._forward(step), None
        step = self._buffers.upload(self._tables.padded(arrays, size))
        self._attention.begin(step)
        logits, tokens = self._graphs.replay(size)
        return logits[: arrays.num_chunks], tokens[: arrays.num_chunks]

    def _work(self, arrays: StepArrays) -> Work:
        """A step to capture, ready to run: its logits, and the likeliest tokens.

        Those are seated at once, whether or not they will be drawn: of a request whose token is chosen
        otherwise the next step knows it, or has it from :meth:`_queue`.
        """
        step = self._buffers.upload(arrays)
        self._attention.begin(step)
        logits = self._captured[: arrays.num_chunks]

        def work() -> tuple[torch.Tensor, torch.Tensor]:
            made = self._forward(step, logits)
            if made is not logits:
                logits.copy_(made)
            tokens = likeliest(logits)
            self._seat(step.seats.long(), tokens)
            return logits, tokens

        return work

    def _forward(self, step: DeviceStep, out: torch.Tensor | None = None) -> torch.Tensor:
        """The logits of :meth:`_logits`; where it can be, in ``out``."""
        # A chunk of one token is that token: one kernel less.
        seats = step.seats if step.host.is_generation else step.seats[step.chunk_of]
        last = self._last_tokens.index_select(0, seats)
        token_ids = torch.where(step.token_ids < 0, last, step.token_ids)
        rows = None if step.host.is_generation else step.rows
        return self.model.whole(self.model(token_ids, step.positions, rows, self._attention, out=out))

    def _receive(self, num_tokens: int) -> torch.Tensor:
        assert self._link is not None  # or this stage would be the first
        hidden = self._device.host_empty(num_tokens, self.model.hidden_size, dtype=self.model.dtype)
        self._link.receive_hidden(as_bytes(hidden.view(torch.uint8).numpy()))
        return hidden.to(self._device.place)

    def _pick(self, logits: torch.Tensor, rows: Ints) -> torch.Tensor:
        """``logits[rows]``, without a kernel where that is a slice."""
        first = int(rows[0]) if len(rows) else 0
        if (rows == np.arange(first, first + len(rows))).all():
            return logits[first : first + len(rows)]
        return logits[self._to_device(torch.from_numpy(rows).long())]

    def _to_device(self, values: torch.Tensor) -> torch.Tensor:
        host = self._device.host_empty(*values.shape, dtype=values.dtype)
        host.copy_(values)
        return host.to(self._device.place, non_blocking=True)

    def _to_host(self, values: torch.Tensor) -> torch.Tensor:
        host = self._device.host_empty(*values.shape, dtype=values.dtype)
        host.copy_(values, non_blocking=True)
        return host


def _blank_mixture(num_ones: int, num_tokens: int, seat: int, block: int, page_size: int) -> StepArrays:
    """A step of nobody's: so many of one token each, then a prompt of ``num_tokens``, if any, all on one
    block."""
    lengths = np.array([1] * num_ones + [num_tokens] * (num_tokens > 0), dtype=np.int32)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    order = np.arange(len(lengths) + 1, dtype=np.int32)
    positions = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    return StepArrays(
        0 * positions, positions, positions + np.int32(block * page_size), np.repeat(order[:-1], lengths),
        0 * lengths + np.int32(seat), starts, order, lengths, 0 * lengths + np.int32(block), starts[1:] - 1)
