"""Where the bytes of a KV pool lie: pure arithmetic.

A pool is one array ``[num_layers, 2, num_blocks, tokens_per_block, num_kv_heads, head_dim]``: K and V
of one layer are planes in which the tokens of neighbouring blocks are neighbours, so that a request
whose blocks lie together is one contiguous matrix for attention, and one piece a plane for a transfer.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

ITEM_BYTES = {"fp32": 4, "bf16": 2}


def runs_of(block_ids: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring blocks joined: ``[5, 6, 7, 2] -> [(5, 3), (2, 1)]`` (first block, count)."""
    runs: list[tuple[int, int]] = []
    for block in block_ids:
        if runs and runs[-1][0] + runs[-1][1] == block:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((block, 1))
    return runs


class KvLayout(msgspec.Struct, frozen=True):
    """Shape of a pool."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    tokens_per_block: int
    num_blocks: int
    dtype: str
    """``fp32`` or ``bf16``."""

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one plane (K or V of one layer)."""
        return self.num_kv_heads * self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def num_planes(self) -> int:
        return 2 * self.num_layers

    @property
    def plane_bytes(self) -> int:
        return self.num_blocks * self.tokens_per_block * self.token_bytes

    @property
    def pool_bytes(self) -> int:
        return self.num_planes * self.plane_bytes

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return self.num_planes * self.tokens_per_block * self.token_bytes

    def kv_bytes(self, num_tokens: int) -> int:
        """Bytes of the KV-cache of ``num_tokens`` tokens, all layers."""
        return num_tokens * self.num_planes * self.token_bytes

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.tokens_per_block)

    def token_runs(self, block_ids: Sequence[int], num_tokens: int) -> list[tuple[int, int]]:
        """(first slot, count) of the first ``num_tokens`` tokens; a slot is one token of a plane."""
        runs, left = [], num_tokens
        for first, count in runs_of(block_ids[: self.blocks_for(num_tokens)]):
            length = min(count * self.tokens_per_block, left)
            runs.append((first * self.tokens_per_block, length))
            left -= length
        return runs

    def pieces(
        self, block_ids: Sequence[int], num_tokens: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Byte offset and token count of each contiguous piece, planes outermost.

        The order of *bytes* is the same for any two tables of the same length, however they are cut
        into runs, so the two sides of a transfer may describe their own blocks each.
        """
        runs = np.asarray(self.token_runs(block_ids, num_tokens), dtype=np.int64).reshape(-1, 2)
        planes = np.arange(self.num_planes, dtype=np.int64) * self.plane_bytes
        offsets = planes[:, None] + runs[None, :, 0] * self.token_bytes
        counts = np.broadcast_to(runs[:, 1], offsets.shape)
        return offsets.ravel(), counts.ravel()

    def same_block(self, other: KvLayout) -> bool:
        """Whether a block of ``other`` holds the same bytes in the same order as one of this."""
        return msgspec.structs.replace(other, num_blocks=self.num_blocks) == self
