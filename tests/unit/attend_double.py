"""The kernel of generation's attention, on the processor and in torch: Triton's interpreter knows no bf16.

It takes the kernel's own arguments, so that what the engine passes is checked; the kernel itself is held to
the same arithmetic by ``test_gpu_kernels.py``.
"""

from __future__ import annotations

import math
import types
from typing import Any

import torch


def attend_ones(
    grid: tuple[int, int, int], qkv: torch.Tensor, row_stride: int, out: torch.Tensor, keys: torch.Tensor,
    values: torch.Tensor, rotary: torch.Tensor, positions: torch.Tensor, pages: torch.Tensor,
    page_starts: torch.Tensor, partial: torch.Tensor, maxima: torch.Tensor, sums: torch.Tensor,
    counters: torch.Tensor, ahead: torch.Tensor, block_stride: int, token_stride: int, head_stride: int,
    scale: float, least: int, heads: int, kv_heads: int, dim: int, page: int, tile: int, parts: int,
    window: int, stages: int, turns: bool, overlaps: bool, asked: int,
) -> None:
    num_requests = grid[0]
    group = heads // kv_heads
    assert grid[1:] == (kv_heads, parts) and not asked, "nothing overlaps here"
    assert qkv.stride(0) == row_stride and qkv.stride(-1) == 1 and len(qkv) >= num_requests
    assert qkv.dim() == 2 or qkv.stride(1) == dim, "a row's heads lie together"
    qkv = qkv.flatten(1)
    assert qkv.shape[1] >= (heads + 2 * kv_heads * turns) * dim
    assert (block_stride, token_stride, head_stride, 1) == keys.stride() == values.stride()
    assert out.is_contiguous() and least % tile == 0 and stages > 0
    assert partial.numel() >= num_requests * kv_heads * parts * group * dim
    assert min(maxima.numel(), sums.numel()) >= num_requests * kv_heads * parts * group
    assert counters.numel() >= num_requests * kv_heads and not counters.any()
    for indices in (positions, pages, page_starts, counters):
        assert indices.dtype is torch.int32
    for request in range(num_requests):
        newest = int(positions[request])
        mine = pages[int(page_starts[request]) : int(page_starts[request + 1])].long()
        assert len(mine) > newest // page, "the tables must hold what is appended"
        query = qkv[request, : heads * dim].view(heads, dim).float()
        if turns:
            assert rotary.dtype is torch.float32
            cos, sin = rotary[newest].chunk(2)

            def turn(x: torch.Tensor, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> torch.Tensor:
                first, second = x.float().chunk(2, -1)
                return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(keys.dtype)

            key, value = (qkv[request, first * dim : (first + kv_heads) * dim].view(kv_heads, dim)
                          for first in (heads, heads + kv_heads))
            keys[mine[newest // page], newest % page] = turn(key)
            values[mine[newest // page], newest % page] = value
            query = turn(query).float()
        seen = slice(max(0, newest + 1 - window) if window else 0, newest + 1)
        k, v = (plane[mine].flatten(0, 1)[seen].float().repeat_interleave(group, 1)
                for plane in (keys, values))
        weights = torch.softmax(torch.einsum("hd,thd->ht", query, k) * scale * math.log(2), -1)
        attended = torch.einsum("ht,thd->hd", weights.to(keys.dtype).float(), v)
        out[request] = attended.to(out.dtype).view(out[request].shape)


class _Launched:
    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments, num_warps: attend_ones(grid, *arguments)


def module() -> types.ModuleType:
    """In the place of ``disagg_mpi.engine.gpu.kernels.attend``."""
    made = types.ModuleType("attend")
    made.attend_ones = _Launched()  # type: ignore[attr-defined]
    return made
