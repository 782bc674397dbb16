"""A step's forward on all ranks of an instance: what each computes, and the leader's view of the whole.

:class:`StageRunner` is one rank's part, made once by every rank of the instance after the thread settings and
before the first request; it owns the model's mapping and the tensors over the pool. :class:`Runner` is the
leader's: it sends each step to the followers, does its own part, and gathers the logits. With pipeline stages
several steps are in flight; they end in the order in which they were launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from disagg_mpi.comm.group import GroupLink, LogitsReceipt, as_bytes
from disagg_mpi.comm.messages import Batch, CopyBlocks, Message
from disagg_mpi.engine.attention import KvPool, StepLayout
from disagg_mpi.engine.model import StageModel
from disagg_mpi.engine.scheduler import Chunk
from disagg_mpi.engine.steps import OnLayer, StepOutput
from disagg_mpi.transfer.layout import CacheView, KvLayout


class StageRunner:
    """One rank's part of every step."""

    def __init__(self, model: StageModel, pool: KvPool, link: GroupLink | None) -> None:
        self.model = model
        self._pool = pool
        self._link = link
        self._hidden_type = model.dtype

    def run(self, batch: Batch, on_layer: OnLayer | None = None) -> torch.Tensor | None:
        """Compute ``batch``; the logits of this rank's slice of the vocabulary if it makes them.

        Takes the hidden states from the stage before and gives them to the one after. ``on_layer(i)`` is
        called when the KV-cache of this rank's layer ``i`` is in the pool.
        """
        positions: list[int] = []
        for start, length, _ in batch.chunks:
            positions += range(start, start + length)
        hidden = None if self.model.is_first else self._receive(len(positions))
        paged = StepLayout(self._pool, batch.chunks, on_layer)
        output = self.model(batch.token_ids, positions, batch.keep, paged, hidden)
        if self.model.is_last:
            return output
        assert self._link is not None
        self._link.send_hidden(as_bytes(output.contiguous().view(torch.uint8).numpy()))
        return None

    def serve(self, batch: Batch) -> None:
        """A follower's part: run, and send what the leader waits for."""
        logits = self.run(batch)
        # With stages, even no logits: the leader must know that the step is over.
        if logits is not None and (batch.keep or self._link_has_stages):
            assert self._link is not None
            self._link.send_logits(as_bytes(logits.contiguous().numpy()))

    @property
    def _link_has_stages(self) -> bool:
        return self._link is not None and self._link.pp > 1

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks of this rank's part; returns when every rank of the instance has."""
        self._pool.copy_blocks(list(sources), list(targets))
        if self._link is not None:
            self._link.barrier()

    def warm_up(self) -> None:
        """Pay for lazy initialisation (thread pools, oneDNN kernels) before the first request.

        Collective over the instance. Touches no block: the model runs on slot 0 of a pool of its own.
        """
        view = self._pool.view
        shard = view.shard
        layout = KvLayout(shard.num_layers, shard.num_heads, view.layout.head_dim,
                          view.layout.tokens_per_block, 1, view.layout.dtype)
        small = CacheView(view.rank, view.host, "warm-up", 0, layout, shard.first_layer, shard.first_head,
                          shard)
        pool, self._pool = self._pool, KvPool(bytearray(layout.pool_bytes), small)
        for length in (min(8, layout.tokens_per_block), 1):
            self.run(Batch(0, [0] * length, [(0, length, [(0, length)])], [length - 1]))
        self._pool = pool
        if self._link is not None:
            self._link.barrier()

    def _receive(self, num_tokens: int) -> torch.Tensor:
        assert self._link is not None
        hidden = torch.empty(num_tokens, self.model.hidden_size, dtype=self._hidden_type)
        self._link.receive_hidden(as_bytes(hidden.view(torch.uint8).numpy()))
        return hidden


class Part(Protocol):
    """A rank's part of an instance: :class:`StageRunner`, or the one of
    :mod:`disagg_mpi.engine.gpu.stage`."""

    @property
    def model(self) -> Any:
        """With the ``vocab_range`` of the logits that it makes."""
        ...

    def run(self, batch: Batch, on_layer: OnLayer | None = None) -> torch.Tensor | None: ...

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None: ...


class _InFlight:
    """A launched step."""

    def __init__(self, chunks: Sequence[Chunk], own: torch.Tensor | None, start: int,
                 slices: dict[int, tuple[int, torch.Tensor]], receipt: LogitsReceipt | None) -> None:
        self.chunks = chunks
        self.own = own
        self.own_start = start
        self.slices = slices
        self.receipt = receipt

    def logits(self) -> torch.Tensor:
        parts = [(start, tensor) for start, tensor in self.slices.values()]
        if self.own is not None:
            parts.append((self.own_start, self.own))
        parts.sort(key=lambda part: part[0])
        return parts[0][1] if len(parts) == 1 else torch.cat([tensor for _, tensor in parts], dim=1)


class Runner:
    """The leader's view: launch a step, ask for its logits."""

    def __init__(
        self,
        stage: Part,
        *,
        layout: KvLayout,
        link: GroupLink | None = None,
        tell: Callable[[Message], None] = lambda _message: None,
        vocab_ranges: dict[int, tuple[int, int]] | None = None,
    ) -> None:
        """``tell`` sends a message to every follower; ``vocab_ranges``: local index of each follower that
        makes logits → its slice of the vocabulary."""
        self._stage = stage
        self._layout = layout
        self._link = link
        self._tell = tell
        self._vocab_ranges = vocab_ranges or {}
        self._in_flight: deque[_InFlight] = deque()
        self._number = 0

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return 1 if self._link is None else self._link.pp

    @property
    def depth(self) -> int:
        """Steps that can usefully be in flight: one a stage."""
        return self.num_stages

    @property
    def is_done_at_launch(self) -> bool:
        return self.num_stages == 1

    @property
    def promises(self) -> bool:
        return False  # ids of tokens are known at the host alone

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def launch(self, chunks: Sequence[Chunk], on_layer: OnLayer | None = None) -> None:
        """Start a step on all ranks; computes this rank's part."""
        batch = self._batch(chunks)
        self._tell(batch)
        slices: dict[int, tuple[int, torch.Tensor]] = {}
        receipt = None
        if self._link is not None and (batch.keep or self._link.pp > 1):
            slices = {index: (start, torch.empty(len(batch.keep), end - start))
                      for index, (start, end) in self._vocab_ranges.items()}
            receipt = self._link.receive_logits(
                {index: as_bytes(tensor.numpy()) for index, (_, tensor) in slices.items()})
        own = self._stage.run(batch, on_layer)
        self._in_flight.append(_InFlight(chunks, own, self._stage.model.vocab_range[0], slices, receipt))

    def poll(self) -> StepOutput | None:
        """The oldest step that is over, with all its logits. ``None`` if there is none; without pipeline
        stages a launched step is waited for."""
        if not self._in_flight:
            return None
        oldest = self._in_flight[0]
        while oldest.receipt is not None and not oldest.receipt.done():
            if self.num_stages > 1:
                return None
        self._in_flight.popleft()
        has_logits = any(chunk.num_kept for chunk in oldest.chunks)
        return StepOutput(oldest.chunks, oldest.chunks, oldest.logits() if has_logits else None, {})

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks on all ranks."""
        self._tell(CopyBlocks(list(sources), list(targets)))
        self._stage.copy_blocks(sources, targets)

    def _batch(self, chunks: Sequence[Chunk]) -> Batch:
        tokens: list[int] = []
        keep: list[int] = []
        places = []
        for chunk in chunks:
            sequence = chunk.sequence
            tokens += sequence.token_ids[chunk.start : chunk.end]
            keep += range(len(tokens) - chunk.num_kept, len(tokens))
            places.append((chunk.start, chunk.length,
                           self._layout.token_runs(sequence.block_ids, chunk.end)))
        self._number += 1
        return Batch(self._number, tokens, places, keep)
