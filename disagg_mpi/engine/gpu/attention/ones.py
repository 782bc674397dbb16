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


class OnesAttention:
    """One query a request, over its pages."""

    def __init__(self, device: Device, pool: DevicePool, shape: HeadShape) -> None:
        from disagg_mpi.engine.gpu.kernels.attend import attend_ones

        self._kernel: Any = attend_ones
        self._device = device
        self._pool = pool
        self._shape = shape
        # Counters begin at zero and every launch leaves them so. What a captured step uses stays.
        self._rooms: list[_Room] = []

    def begin(self, num_requests: int) -> None:
        """Have room for a step of so many; outside of what is captured."""
        if self._rooms and self._rooms[-1].num_requests >= num_requests:
            return
        shape = self._shape
        most = max(_PROGRAMS * 2, _FEWEST_PARTS * num_requests * shape.num_kv_heads)
        group = shape.num_heads // shape.num_kv_heads
        self._rooms.append(_Room(most * group, num_requests * shape.num_kv_heads, shape.head_dim,
                                 num_requests, self._device.place))

    def attend(self, layer: int, qkv: torch.Tensor, step: DeviceStep, rotary: torch.Tensor, *, turns: bool,
               scaling: float | None, window: int | None, out: torch.Tensor) -> None:
        """Into ``out`` ``[requests, heads * head_dim]``, for the step's first chunks.

        ``turns``: queries and keys of ``qkv`` ``[requests, (heads + 2 kv_heads) * head_dim]`` are not rotated
        yet, and the keys and values not in the pool. Otherwise its rows may be of queries alone.
        """
        shape, room = self._shape, self._rooms[-1]
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        num_requests = len(out)
        pairs = num_requests * shape.num_kv_heads
        parts = num_parts(pairs)
        scale = (shape.scaling if scaling is None else scaling) * math.log2(math.e)
        self._kernel[num_requests, shape.num_kv_heads, parts](
            qkv, qkv.stride(0), out, keys, values, rotary, step.positions, step.pages, step.page_starts,
            room.partial, room.maxima, room.sums, room.counters, *keys.stride()[:3], scale,
            max(2 * _TILE, -(-pairs // _TILE) * _TILE), shape.num_heads, shape.num_kv_heads, shape.head_dim,
            keys.shape[1], _TILE, parts, window or 0, _STAGES, turns, self._device.is_cuda,
            **({"num_warps": _WARPS, "launch_pdl": True} if self._device.is_cuda else {}))


class _Room:
    def __init__(self, num_rows: int, num_counters: int, head_dim: int, num_requests: int,
                 place: torch.device) -> None:
        self.num_requests = num_requests
        self.partial = torch.empty(num_rows, head_dim, device=place)
        self.maxima, self.sums = (torch.empty(num_rows, device=place) for _ in range(2))
        self.counters = torch.zeros(num_counters, dtype=torch.int32, device=place)


def num_parts(pairs: int) -> int:
    """Into how many parts so many pairs of request and KV head are split at most, a power of two."""
    wanted = -(-_PROGRAMS // pairs)
    return min(max(1 << (wanted - 1).bit_length(), _FEWEST_PARTS), _MOST_PARTS)
