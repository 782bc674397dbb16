"""A box of KV-cache and two pools that have it, drawn at random, with its oracle in numpy."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from disagg_mpi.transfer.layout import Box, CacheView, KvLayout
from disagg_mpi.transfer.partition import KvShard

Bytes = npt.NDArray[np.uint8]


def array_of(memory: Bytes, view: CacheView) -> Any:
    layout = view.layout
    return memory[view.offset : view.offset + layout.pool_bytes].reshape(
        layout.num_layers, 2, layout.num_blocks, layout.tokens_per_block, layout.num_kv_heads, -1)


def rows_of(view: CacheView, table: list[int], box: Box, token: int) -> tuple[Any, ...]:
    """Where one token of ``box`` lies in the array, all its layers and heads."""
    size = view.layout.tokens_per_block
    return (slice(box.first_layer - view.origin_layer, box.end_layer - view.origin_layer), slice(None),
            table[token // size], token % size,
            slice(box.first_head - view.origin_head, box.end_head - view.origin_head))


def content(memory: Bytes, view: CacheView, table: list[int], box: Box) -> Bytes:
    """The oracle for a message's bytes: layer, K before V, token, head."""
    array = array_of(memory, view)
    tokens = [array[rows_of(view, table, box, token)] for token in range(box.first_token, box.end_token)]
    return np.stack(tokens, axis=2).ravel() if tokens else np.empty(0, np.uint8)


class Case:
    """A box and two ranks' pools that have it, with other block sizes, heads, layers and offsets."""

    def __init__(self, seed: int, most: int) -> None:
        """With at most about so many tokens."""
        draw = random.Random(seed)
        cuts = []
        for _ in range(2):  # layers, heads
            first = draw.randint(0, 2)
            cuts.append((first, draw.randint(first + 1, 3)))
        # Like a prefix that generation holds: often a whole number of blocks, not always.
        first_token = draw.choice([0, 0, 16, draw.randint(0, 20)])
        self.box = Box(*cuts[0], *cuts[1], first_token, first_token + draw.randint(seed % 9 != 0, most))
        dtype, head_dim = draw.choice(["fp32", "bf16"]), draw.choice([1, 3, 8, 24, 64])
        self.views, self.tables, self.memories = [], [], []
        for rank in range(2):
            shard: list[int] = []
            origins, extents = [], []
            for first, end in cuts:
                held = (draw.randint(0, first), draw.randint(end, 3))
                origins.append(draw.randint(0, held[0]))
                extents.append(draw.randint(held[1], 3) - origins[-1])
                shard += [held[0], held[1] - held[0]]
            size = draw.choice([1, 4, 6, 16, 16, 32])
            needed = -(-self.box.end_token // size)
            layout = KvLayout(*extents, head_dim, size, needed + draw.randint(1, 6), dtype)
            view = CacheView(rank, 0, f"rank {rank}", draw.choice([0, 3, 4096]), layout, *origins,
                             KvShard(*shard))
            blocks = list(range(layout.num_blocks))
            if draw.random() < 0.7:
                draw.shuffle(blocks)
            self.views.append(view)
            self.tables.append(blocks[: needed + draw.randint(0, 1)])
            self.memories.append(np.random.default_rng(2 * seed + rank).integers(
                0, 256, view.offset + layout.pool_bytes + 5, dtype=np.uint8))

    def tensor(self, rank: int, device: str = "cpu") -> torch.Tensor:
        return torch.from_numpy(self.memories[rank].copy()).to(device)

    def handed_over(self) -> Bytes:
        """What the second rank's memory should be afterwards."""
        wanted = self.memories[1].copy()
        here, there = array_of(wanted, self.views[1]), array_of(self.memories[0], self.views[0])
        for token in range(self.box.first_token, self.box.end_token):
            here[rows_of(self.views[1], self.tables[1], self.box, token)] = there[
                rows_of(self.views[0], self.tables[0], self.box, token)]
        return wanted
