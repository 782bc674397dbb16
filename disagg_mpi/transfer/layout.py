"""Where the bytes of a KV pool lie, and which of them a hand-over moves: pure arithmetic.

A pool is one array ``[num_layers, 2, num_blocks, tokens_per_block, num_kv_heads, head_dim]``: K and V
of one layer are *planes* in which the tokens of neighbouring blocks are neighbours, so that a request
whose blocks lie together is one matrix for attention, and one piece a plane for a transfer. A token's
place in a plane is its *slot*: block id times ``tokens_per_block`` plus its place in the block.

A rank has the whole array (a private pool of its shard) or some layers and heads of it (an exchange pool
of the whole model that all ranks of a host map); :class:`CacheView` says which. A :class:`Box` is what one
rank takes over from another. Its bytes have one order everywhere, *layer, K before V, token, head,
element*, whatever the block sizes, the order of the blocks and the distance between tokens on either side.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from disagg_mpi.transfer.partition import KvShard, Part

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
    def head_bytes(self) -> int:
        """Bytes of one head of one token in one plane."""
        return self.head_dim * ITEM_BYTES[self.dtype]

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one plane (K or V of one layer): the distance between tokens."""
        return self.num_kv_heads * self.head_bytes

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

    def token_runs(
        self, block_ids: Sequence[int], end_token: int, first_token: int = 0
    ) -> list[tuple[int, int]]:
        """(first slot, count) of the tokens at positions ``[first_token, end_token)`` of a request.

        Positions index the table ``block_ids``, which may be longer. Raises :class:`ValueError` if it is
        too short.
        """
        size = self.tokens_per_block
        first_block, end_block = first_token // size, self.blocks_for(end_token)
        if not 0 <= first_token <= end_token or end_block > len(block_ids):
            raise ValueError(f"tokens [{first_token}, {end_token}) of {len(block_ids)} blocks of {size}")
        runs, skip, left = [], first_token - first_block * size, end_token - first_token
        for first, count in runs_of(block_ids[first_block:end_block]):
            length = min(count * size - skip, left)
            if length > 0:
                runs.append((first * size + skip, length))
            skip, left = 0, left - length
        return runs


class Box(msgspec.Struct, frozen=True, array_like=True):
    """A part of one request's KV-cache: half-open ranges of layers, KV heads and token positions.

    Layers and heads in the model's own numbering.
    """

    first_layer: int
    end_layer: int
    first_head: int
    end_head: int
    first_token: int
    end_token: int

    @classmethod
    def of(cls, shard: KvShard | Part, first_token: int, end_token: int) -> Box:
        """The tokens ``[first_token, end_token)`` of a shard, or of what one rank sends to another."""
        return cls(shard.first_layer, shard.first_layer + shard.num_layers,
                   shard.first_head, shard.first_head + shard.num_heads, first_token, end_token)

    @property
    def num_layers(self) -> int:
        return self.end_layer - self.first_layer

    @property
    def num_heads(self) -> int:
        return self.end_head - self.first_head

    @property
    def num_tokens(self) -> int:
        return self.end_token - self.first_token


class CacheView(msgspec.Struct, frozen=True):
    """One rank's part of the KV-cache and where it lies: static, known to every rank from the start."""

    rank: int
    host: int
    memory: str
    """Name of the memory: on one host, equal names are the same bytes, mapped by all its ranks unless
    the memory is private."""
    offset: int
    """Bytes from the memory's start to the array."""
    layout: KvLayout
    """Of the array, which may hold more than this rank's part."""
    origin_layer: int
    """Of the array's first layer, in the model's numbering; 0 in an exchange pool."""
    origin_head: int
    """Of the array's first KV head."""
    shard: KvShard
    """What of the array is this rank's."""

    def byte_of(self, layer: int, plane: int, slot: int, head: int) -> int:
        """From the memory's start to one head of one token; ``plane`` is 0 for K and 1 for V."""
        layout = self.layout
        return (self.offset + (2 * (layer - self.origin_layer) + plane) * layout.plane_bytes
                + slot * layout.token_bytes + (head - self.origin_head) * layout.head_bytes)

    def row_bytes(self, box: Box) -> int:
        """Bytes of one token of ``box`` in one plane, which lie together; the next token's are
        ``layout.token_bytes`` further."""
        return box.num_heads * self.layout.head_bytes

    def num_bytes(self, box: Box) -> int:
        """Bytes of a message with ``box``."""
        return 2 * box.num_layers * box.num_tokens * self.row_bytes(box)

    def runs(self, block_ids: Sequence[int], box: Box) -> list[tuple[int, int]]:
        """(first slot, count) of the box's tokens, the same in each of its planes.

        Raises :class:`ValueError` if the box is not wholly in this rank's shard, or ``block_ids`` have not
        all of its tokens or are not blocks of the array.
        """
        self._check(box)
        layout = self.layout
        runs = layout.token_runs(block_ids, box.end_token, box.first_token)
        num_slots = layout.num_blocks * layout.tokens_per_block
        if any(slot < 0 or slot + count > num_slots for slot, count in runs):
            raise ValueError(f"blocks {list(block_ids)} of a pool of {layout.num_blocks}")
        return runs

    def slots(self, block_ids: Sequence[int], box: Box, step: int = 1) -> npt.NDArray[np.int64]:
        """Slot of every ``step``-th token of the box, without a loop over blocks: a hand-over waits for it.
        Where ``step`` divides the block size and ``box.first_token``, the tokens between lie together.

        Raises what :meth:`runs` raises.
        """
        self._check(box)
        layout = self.layout
        size, end_block = layout.tokens_per_block, layout.blocks_for(box.end_token)
        if not 0 <= box.first_token <= box.end_token or end_block > len(block_ids):
            raise ValueError(f"tokens [{box.first_token}, {box.end_token}) of {len(block_ids)} blocks of "
                             f"{size}")
        first_block, first = divmod(box.first_token, size)
        blocks = np.asarray(block_ids[first_block:end_block], dtype=np.int64)
        # One look for both ends: seen without a sign a negative number is a large one.
        if blocks.size and blocks.view(np.uint64).max() >= layout.num_blocks:
            raise ValueError(f"blocks {list(block_ids)} of a pool of {layout.num_blocks}")
        if step == size and not first:
            return blocks * size
        places = np.arange(first, first + box.num_tokens, step, dtype=np.int64)
        slots: npt.NDArray[np.int64] = blocks[places // size] * size + places % size
        return slots

    def _check(self, box: Box) -> None:
        shard = self.shard
        if not (shard.first_layer <= box.first_layer < box.end_layer <= shard.end_layer
                and shard.first_head <= box.first_head < box.end_head <= shard.end_head):
            raise ValueError(f"{box} is not in rank {self.rank}'s {shard}")

    def pieces(
        self, block_ids: Sequence[int], box: Box
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Byte offset of the first row, and number of rows, of each run in each plane, in the order of
        a message's bytes. Rows are ``row_bytes`` long and ``layout.token_bytes`` apart.

        Raises what :meth:`runs` raises.
        """
        runs = np.asarray(self.runs(block_ids, box), dtype=np.int64).reshape(-1, 2)
        start = self.byte_of(box.first_layer, 0, 0, box.first_head)
        planes = start + np.arange(2 * box.num_layers, dtype=np.int64) * self.layout.plane_bytes
        offsets = planes[:, None] + runs[None, :, 0] * self.layout.token_bytes
        counts = np.broadcast_to(runs[:, 1], offsets.shape)
        return offsets.ravel(), counts.ravel()
