"""Attention of requests that have one token in a step, by a kernel of our own: no plan, and all that lies
between two matrix products in one launch.

Made with the attention that uses it; owns the room in which parts of a request are joined. Its kernel is
Triton's, which comes with torch for CUDA and is imported here only when it is used.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from disagg_mpi.engine.gpu.attention.base import DevicePool, HeadShape
from disagg_mpi.engine.gpu.buffers import DeviceStep
from disagg_mpi.engine.gpu.device import Device

# Positions a round of a program, its warps and the rounds on their way: the best of eight on an H200, at
# batch 1, 32 and 128 alike.
_TILE = 32
_WARPS = 1
_STAGES = 3

# Programs that are wanted of a step: few requests are split into many parts, many into few.
_PROGRAMS = 2048
_FEWEST_PARTS, _MOST_PARTS = 4, 32

# Positions that a part has at least: where there are many pairs of request and KV head, there are programs
# enough, and another part costs more than it reads sooner. With 8 KV heads and 1,024 positions this makes 32,
# 4 and 1 parts for 1, 32 and 128 requests, the best numbers on an H200.
_LEAST_POSITIONS = _TILE

# Of what is read after the attention of one request, so much is asked for beside it: its few short programs
# leave the memory idle. More of it delays them, and with many requests there is no such time.
_AHEAD_BYTES = 4 * 2**20
_ASKED_BYTES = 64 * 2**10  # by one program


class OnesAttention:
    """One query a request, over its pages."""

    def __init__(self, device: Device, pool: DevicePool, shape: HeadShape, max_requests: int) -> None:
        """Raises :class:`ImportError` for a Triton that is too old."""
        from disagg_mpi.engine.gpu.kernels.attend import attend_ones

        self._kernel: Any = attend_ones
        self._device = device
        self._pool = pool
        self._shape = shape
        group = shape.num_heads // shape.num_kv_heads
        most_pairs = max_requests * shape.num_kv_heads
        rows = group * max(pairs * num_parts(pairs) for pairs in range(
            shape.num_kv_heads, most_pairs + 1, shape.num_kv_heads))
        self._partial = torch.empty(rows, shape.head_dim, device=device.place)
        self._maxima, self._sums = (torch.empty(rows, device=device.place) for _ in range(2))
        # Every launch leaves them at zero.
        self._counters = torch.zeros(most_pairs, dtype=torch.int32, device=device.place)

    def sizes(self, max_requests: int) -> list[int]:
        """Numbers of requests, up to so many, that all kernels between them are built for; descending."""
        heads = self._shape.num_kv_heads
        by_parts = {num_parts(count * heads): count for count in range(1, max_requests + 1)}
        return sorted(by_parts.values(), reverse=True)

    def try_it(self) -> None:
        """One query over the pool's first page; raises what Triton raises where it cannot build that."""
        shape, place = self._shape, self._device.place
        query = torch.zeros(1, shape.num_heads, shape.head_dim, dtype=self._pool.dtype, device=place)
        first = torch.zeros(1, dtype=torch.int32, device=place)
        page_starts = torch.tensor([0, 1], dtype=torch.int32, device=place)
        self._device.synchronize()  # the kernel does not wait for its tables
        for window in shape.windows:
            self._launch(0, query, self._partial, (first, first, page_starts), False, window,
                         torch.empty_like(query))
        self._device.synchronize()

    def attend(self, layer: int, qkv: torch.Tensor, step: DeviceStep, rotary: torch.Tensor, *, turns: bool,
               window: int | None, out: torch.Tensor, ahead: torch.Tensor | None = None) -> None:
        """Into ``out`` ``[requests, heads * head_dim]``, for the step's first chunks.

        ``turns``: queries and keys of ``qkv`` ``[requests, (heads + 2 kv_heads) * head_dim]`` are not rotated
        yet, and the keys and values not in the pool. Otherwise its rows may be of queries alone. ``ahead``
        will be read next.
        """
        self._launch(layer, qkv, rotary, (step.positions, step.pages, step.page_starts), turns, window, out,
                     ahead)

    def _launch(self, layer: int, qkv: torch.Tensor, rotary: torch.Tensor, tables: tuple[torch.Tensor, ...],
                turns: bool, window: int | None, out: torch.Tensor,
                ahead: torch.Tensor | None = None) -> None:
        shape, device = self._shape, self._device
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        num_requests = len(out)
        pairs = num_requests * shape.num_kv_heads
        parts = num_parts(pairs)
        least = max(_LEAST_POSITIONS, -(-pairs // _TILE) * _TILE)  # one for each pair
        asking = 0  # programs for each of the pairs
        if ahead is not None and num_requests == 1 and device.overlaps:
            asking = min(_AHEAD_BYTES, ahead.nbytes) // _ASKED_BYTES // pairs
        options: dict[str, Any] = {"num_warps": _WARPS} if device.is_cuda else {}
        if device.overlaps:
            options["launch_pdl"] = True
        self._kernel[num_requests, shape.num_kv_heads, parts + asking](
            qkv, qkv.stride(0), out, keys, values, rotary, *tables, self._partial, self._maxima, self._sums,
            self._counters, qkv if ahead is None else ahead, *keys.stride()[:3],
            shape.scaling * math.log2(math.e), least, shape.num_heads, shape.num_kv_heads, shape.head_dim,
            keys.shape[1], _TILE, parts, window or 0, _STAGES, turns, device.overlaps,
            _ASKED_BYTES if asking else 0, **options)


def num_parts(pairs: int) -> int:
    """Into how many parts so many pairs of request and KV head are split at most, a power of two."""
    wanted = -(-_PROGRAMS // pairs)
    return min(max(1 << (wanted - 1).bit_length(), _FEWEST_PARTS), _MOST_PARTS)
