"""The forward pass of one step: packs the chunks, runs the model, returns logits.

Made once by the rank that computes, after the thread settings and before the first request; it owns the
model's mapping and the tensors over the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from disagg_mpi.engine.attention import KvPool, StepLayout
from disagg_mpi.engine.scheduler import Chunk
from disagg_mpi.engine.weights import load_model
from disagg_mpi.transfer.layout import KvLayout


class ModelRunner:
    """One rank's model over one rank's pool."""

    def __init__(
        self, path: Path, *, dtype: str, layout: KvLayout, memory: Any, num_threads: int
    ) -> None:
        torch.set_num_threads(num_threads)
        torch.set_grad_enabled(False)
        self._model = load_model(path, dtype)
        self._pool = KvPool(memory, layout)

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits ``[number of chunks that sample, vocabulary]`` in fp32; KV goes to the pool."""
        tokens: list[int] = []
        positions: list[int] = []
        last: list[int] = []
        for chunk in chunks:
            tokens += chunk.sequence.token_ids[chunk.start : chunk.end]
            positions += range(chunk.start, chunk.end)
            if chunk.samples:
                last.append(len(tokens) - 1)
        paged = StepLayout(
            self._pool, [(c.sequence.block_ids, c.start, c.length) for c in chunks])
        output = self._model(
            input_ids=torch.tensor([tokens]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            logits_to_keep=torch.tensor(last, dtype=torch.long),
            paged=paged,
        )
        return output.logits[0].float()  # type: ignore[no-any-return]

    def warm_up(self) -> None:
        """Pay for lazy initialisation (thread pools, oneDNN kernels) before the first request.

        Touches no block: the model runs on slot 0 of a pool of its own.
        """
        layout = self._pool.layout
        small = KvLayout(layout.num_layers, layout.num_kv_heads, layout.head_dim,
                         layout.tokens_per_block, 1, layout.dtype)
        pool = KvPool(bytearray(small.pool_bytes), small)
        for length in (min(8, small.tokens_per_block), 1):
            self._model(
                input_ids=torch.zeros(1, length, dtype=torch.long),
                position_ids=torch.arange(length)[None],
                use_cache=False,
                logits_to_keep=1,
                paged=StepLayout(pool, [([0], 0, length)]),
            )
