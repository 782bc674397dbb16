"""Copies rows of KV-cache on a device: from pool to pool, from pool to message and back, in one launch.

A box of KV-cache, and a message with one, are the same thing here: *planes* of rows (:class:`Planes`), one
row a token. Tokens go in *cells*, so many that lie together on both sides; a launch copies cells times
planes, which the kernel in ``rows`` does on a GPU and torch's own indexing elsewhere, byte for byte alike.
Everything is put into the caller's current stream and nothing is waited for. Cells are made anew for each
transfer; the rest of a copy (:class:`Copy`) may be kept by whoever copies between the same places again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from disagg_mpi.transfer.layout import Box, CacheView

# One program's share. Reads at 1.5 TB/s that take 1 µs each need 11 KiB on their way at each of an H100's 132
# SMs: a tile of 32 KiB is 4 loads of 16 bytes by each of 512 threads, all started before the first store, and
# several programs share an SM. It is also what 16 tokens of 8 heads of 128 are in a plane, so that a block's
# piece there is one program, which reads its cell once.
# The best of VARIANTS on an H200 too, by `benchmarks/gpu_handover.py --variants`.
TILE_BYTES = 32 * 2**10
NUM_WARPS = 16
VARIANTS = ((8192, 4), (16384, 4), (16384, 8), (32768, 4), (32768, 8), (32768, 16), (65536, 16))
"""(bytes of a tile, warps) that a benchmark tries."""
_BYTES_A_WARP = 32 * 16 * 2  # at least two loads of 16 bytes by each thread: small cells take fewer warps

# Host memory of this size is copied by the call itself (CUDA's "API synchronization behavior").
_TAKEN_AT_ONCE = 64 * 2**10

_MOST_SLOTS = 2**31

# Copied by torch's indexing at once: it takes as much memory again.
_INDEXED_BYTES = 64 * 2**20

_ELEMENTS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class Planes(NamedTuple):
    """Equally spaced planes of equally spaced rows in a flat ``uint8`` tensor; all in bytes."""

    memory: torch.Tensor
    start: int
    plane_bytes: int
    token_bytes: int


def pool_planes(pool: torch.Tensor, view: CacheView, box: Box) -> Planes:
    """Where ``box`` lies in a pool: a row's place in a plane is its token's slot.

    Raises :class:`ValueError` for a pool whose slots are no 32-bit numbers.
    """
    layout = view.layout
    if layout.num_blocks * layout.tokens_per_block > _MOST_SLOTS:
        raise ValueError(f"a pool of {layout.num_blocks} blocks of {layout.tokens_per_block} tokens has more "
                         "than 2**31 tokens")
    return Planes(pool, view.byte_of(box.first_layer, 0, 0, box.first_head), layout.plane_bytes,
                  layout.token_bytes)


def message_planes(memory: torch.Tensor, start: int, num_tokens: int, row_bytes: int) -> Planes:
    """A message of ``num_tokens`` a plane from byte ``start``, in the order of ``transfer.layout``."""
    return Planes(memory, start, num_tokens * row_bytes, row_bytes)


class Cells:
    """Tokens in cells that lie together on both sides; slots are given a cell, its first token's.

    Used in one stream: it keeps what it has uploaded there, and must live until the copies are done.
    """

    def __init__(self, sources: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], tokens: int,
                 num_tokens: int) -> None:
        """``tokens`` a cell, of ``num_tokens`` in all: the last cell may have fewer."""
        self.tokens = tokens
        self.num_tokens = num_tokens
        self.table = np.empty((len(sources), 3), dtype=np.int32)
        """Source slot, target slot, tokens."""
        self.table[:, 0] = sources
        self.table[:, 1] = targets
        self.table[:, 2] = tokens
        if num_tokens:
            self.table[-1, 2] = num_tokens - (len(sources) - 1) * tokens
        self._uploaded: torch.Tensor | None = None
        self._smaller: dict[int, Cells] = {}

    def table_on(self, device: torch.device) -> torch.Tensor:
        """The table on ``device``, in the current stream; not waited for.

        CUDA takes small copies out of any memory at once; of larger ones torch keeps the pinned memory until
        they are there.
        """
        if self._uploaded is None:
            table = torch.from_numpy(self.table)
            if device.type == "cuda" and table.nbytes > _TAKEN_AT_ONCE:
                table = table.pin_memory()
            self._uploaded = table.to(device, non_blocking=True)
        return self._uploaded

    def at_most(self, most: int) -> Cells:
        """The same tokens in cells of at most ``most``."""
        tokens = next(size for size in range(min(most, self.tokens), 0, -1) if self.tokens % size == 0)
        if tokens == self.tokens:
            return self
        if tokens not in self._smaller:
            starts = np.arange(0, self.tokens, tokens)
            num_cells = -(-self.num_tokens // tokens)
            sources, targets = ((self.table[:, column, None].astype(np.int64) + starts).ravel()[:num_cells]
                                for column in (0, 1))
            self._smaller[tokens] = Cells(sources, targets, tokens, self.num_tokens)
        return self._smaller[tokens]

    def slots(self, column: int) -> npt.NDArray[np.int64]:
        """Each token's slot at the source (0) or the target (1)."""
        counts = self.table[:, 2]
        first = np.repeat(self.table[:, column].astype(np.int64), counts)
        within = np.arange(self.num_tokens) - np.repeat(np.cumsum(counts) - counts, counts)
        return first + within


def cell_tokens(first_token: int, *tokens_per_block: int) -> int:
    """The most tokens that lie together on all sides, wherever blocks are: 16 and 64, from 32 on: 16."""
    return math.gcd(first_token, *tokens_per_block)


def cells_between(
    source: CacheView, source_block_ids: Sequence[int], target: CacheView, block_ids: Sequence[int], box: Box
) -> Cells:
    """Of ``box``, from pool to pool. Raises what :meth:`CacheView.runs` raises."""
    tokens = cell_tokens(box.first_token, source.layout.tokens_per_block, target.layout.tokens_per_block)
    return Cells(source.slots(source_block_ids, box, tokens), target.slots(block_ids, box, tokens), tokens,
                 box.num_tokens)


class Copy:
    """A copy of ``row_bytes`` of each token in each of ``num_planes``, but for its cells.

    Valid while both memories are. ``variant`` as in :data:`VARIANTS`.
    """

    def __init__(self, source: Planes, target: Planes, tokens: int, num_planes: int, row_bytes: int,
                 variant: tuple[int, int] = (TILE_BYTES, NUM_WARPS)) -> None:
        """``tokens``: of its cells."""
        self._device = target.memory.device
        self._num_planes = num_planes
        size = _element_bytes(source, target, row_bytes)
        self._sides = _elements(source, size), _elements(target, size)
        row = row_bytes // size
        self._distances = (source.plane_bytes // size, target.plane_bytes // size, source.token_bytes // size,
                           target.token_bytes // size, row)
        # The tile is a power of two, so rows of another length leave some of it unused.
        tile = variant[0] // size
        is_joined = row_bytes == source.token_bytes == target.token_bytes
        longest = tokens * row if is_joined else row
        columns = min(tile, _power_of_two(longest))
        rows = 1 if is_joined else min(_power_of_two(tokens), tile // columns)
        self._most_tokens = tokens if is_joined else rows
        self._num_tiles = -(-longest // columns)
        self._shape = is_joined, rows, columns
        self._warps = max(1, min(variant[1], rows * columns * size // _BYTES_A_WARP))
        self._kernel = _kernel() if _has_kernel(self._device) else None

    def run(self, cells: Cells) -> None:
        """In the current stream; not waited for."""
        if not cells.num_tokens or not self._num_planes:
            return
        if self._kernel is None:
            self._run_indexed(cells)
            return
        cells = cells.at_most(self._most_tokens)
        self._kernel[len(cells.table), self._num_planes, self._num_tiles](
            *self._sides, cells.table_on(self._device), *self._distances, *self._shape, num_warps=self._warps)

    def _run_indexed(self, cells: Cells) -> None:
        """The same with torch's indexing."""
        *distances, row = self._distances
        slots = [torch.from_numpy(cells.slots(column)) for column in (0, 1)]
        here, there = (
            torch.as_strided(side, (self._num_planes, int(index.max()) + 1, row), (plane, token, 1))
            for side, index, plane, token in zip(
                self._sides, slots, distances[:2], distances[2:], strict=True))
        from_, to = (index.to(self._device) for index in slots)
        step = max(1, _INDEXED_BYTES // (cells.num_tokens * row * here.element_size()))
        for plane in range(0, self._num_planes, step):
            part = slice(plane, plane + step)
            there[part].index_copy_(1, to, here[part].index_select(1, from_))


def copy_blocks(pool: torch.Tensor, view: CacheView, sources: Sequence[int], targets: Sequence[int],
                stream: torch.cuda.Stream | None = None) -> None:
    """Copy whole blocks within a pool, all layers and heads of the view's shard, K and V.

    ``targets`` are none of ``sources``. In ``stream``, or else the current one; not waited for.
    """
    if len(sources) != len(targets):
        raise ValueError(f"{len(sources)} blocks to copy into {len(targets)}")
    box = Box.of(view.shard, 0, len(sources) * view.layout.tokens_per_block)
    cells = cells_between(view, sources, view, targets, box)
    planes = pool_planes(pool, view, box)
    with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
        Copy(planes, planes, cells.tokens, 2 * box.num_layers, view.row_bytes(box)).run(cells)


def best_variant(time_of: Callable[[tuple[int, int]], float]) -> Iterator[tuple[tuple[int, int], float]]:
    """Each variant with its time, the fastest first; ``time_of`` runs one."""
    times = {variant: time_of(variant) for variant in VARIANTS}
    yield from sorted(times.items(), key=lambda item: item[1])


# ---- which way -----------------------------------------------------------------------------------


@functools.cache
def _has_kernel(device: torch.device) -> bool:
    # Triton builds the call of a kernel with the machine's compiler; the interpreter needs none.
    compilers = (os.environ.get("CC", "gcc"), "gcc", "clang")
    can_run = os.environ.get("TRITON_INTERPRET") == "1" or (
        device.type == "cuda" and any(map(shutil.which, compilers)))
    return can_run and importlib.util.find_spec("triton") is not None


def _kernel() -> Any:
    from disagg_mpi.transfer.cuda.rows import copy_cells

    return copy_cells


def _element_bytes(source: Planes, target: Planes, row_bytes: int) -> int:
    """The widest element of which all rows consist on both sides. Two of 8 bytes make a load of 16, where
    the distances allow it: the compiler sees to that."""
    return math.gcd(
        8, row_bytes,
        *(number for side in (source, target) for number in (
            side.memory.data_ptr() + side.start, side.memory.storage_offset() + side.start, side.plane_bytes,
            side.token_bytes)))


def _elements(side: Planes, size: int) -> torch.Tensor:
    memory = side.memory[side.start :]
    if size == 1:
        return memory
    return memory[: memory.numel() // size * size].view(_ELEMENTS[size])


def _power_of_two(number: int) -> int:
    """Not below ``number``."""
    return 1 << max(0, number - 1).bit_length()
