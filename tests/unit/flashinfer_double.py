"""flashinfer's calls that the engine makes, on the processor: the same signatures, checks and results.

Signatures and what an argument means are those of flashinfer 0.7.2's documentation. A call that the library
would refuse, or that would read what it was not told, raises here: wrong types of indices, indices on the
host where a copy would wait for the device. :func:`install` puts it in the place of the library.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import attend_double
import pytest
import torch
import torch.nn.functional as F

Planes = tuple[torch.Tensor, torch.Tensor]


class _Paged:
    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", *, backend: str) -> None:
        assert float_workspace_buffer.dtype is torch.uint8 and float_workspace_buffer.numel() >= 2**20
        assert not float_workspace_buffer.any(), "must be zero for its first use"
        assert kv_layout == "NHD"
        self.backend = backend
        self.plans = 0

    def _plan(self, token_starts: torch.Tensor, page_starts: torch.Tensor, pages: torch.Tensor,
              last: torch.Tensor, heads: tuple[int, int, int], page_size: int, window_left: int,
              sm_scale: float, types_: tuple[torch.dtype, torch.dtype]) -> None:
        for name, indices in (("indptr", page_starts), ("indices", pages), ("last_page_len", last),
                              ("qo_indptr", token_starts)):
            assert indices.dtype is torch.int32, f"{name} is {indices.dtype}"
        assert len(page_starts) == len(token_starts) == len(last) + 1
        assert int(page_starts[-1]) == len(pages)
        assert types_[0] is types_[1] is torch.bfloat16
        self.heads, self.page_size = heads, page_size
        self.window_left, self.sm_scale = window_left, sm_scale
        self.token_starts = token_starts.clone()
        self.page_starts, self.pages, self.last = page_starts, pages, last
        self.plans += 1

    def run(
        self, q: torch.Tensor, paged_kv_cache: Planes, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        num_heads, num_kv_heads, head_dim = self.heads
        assert q.shape == (int(self.token_starts[-1]), num_heads, head_dim), q.shape
        assert q.dtype is torch.bfloat16
        out = torch.empty_like(q) if out is None else out
        assert out.shape == q.shape and out.dtype is q.dtype and out.is_contiguous()
        for plane in paged_kv_cache:
            assert plane.shape[1:] == (self.page_size, num_kv_heads, head_dim)
        for at in range(len(self.last)):
            first, end = self.token_starts[at : at + 2].tolist()
            mine = self.pages[int(self.page_starts[at]) : int(self.page_starts[at + 1])].long()
            length = (len(mine) - 1) * self.page_size + int(self.last[at])
            key, value = (plane[mine].flatten(0, 1)[:length].transpose(0, 1)[None]
                          for plane in paged_kv_cache)
            rows = torch.arange(length - (end - first), length)[:, None]
            columns = torch.arange(length)[None, :]
            seen = columns <= rows
            if self.window_left >= 0:
                seen &= columns >= rows - self.window_left
            out[first:end] = F.scaled_dot_product_attention(
                q[first:end].transpose(0, 1)[None], key, value, attn_mask=seen, scale=self.sm_scale,
                enable_gqa=True)[0].transpose(0, 1)
        return out


class BatchPrefillWithPagedKVCacheWrapper(_Paged):
    def __init__(self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", *,
                 backend: str = "auto") -> None:
        super().__init__(float_workspace_buffer, kv_layout, backend=backend)

    def plan(self, qo_indptr: torch.Tensor, paged_kv_indptr: torch.Tensor, paged_kv_indices: torch.Tensor,
             paged_kv_last_page_len: torch.Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
             page_size: int, *, causal: bool = False, window_left: int = -1, sm_scale: float | None = None,
             q_data_type: Any = "float16", kv_data_type: Any = None) -> None:
        if self.backend in broken:
            raise RuntimeError("Ninja build failed\nfatal error: curand_kernel.h: No such file or directory")
        assert causal and sm_scale is not None
        self._plan(qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len,
                   (num_qo_heads, num_kv_heads, head_dim_qk), page_size, window_left, sm_scale,
                   (q_data_type, kv_data_type))


def append_paged_kv_cache(
    append_key: torch.Tensor, append_value: torch.Tensor, batch_indices: torch.Tensor,
    positions: torch.Tensor, paged_kv_cache: Planes, kv_indices: torch.Tensor, kv_indptr: torch.Tensor,
    kv_last_page_len: torch.Tensor,
    kv_layout: str = "NHD",
) -> None:
    assert kv_layout == "NHD"
    for indices in (batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len):
        assert indices.dtype is torch.int32
    page_size = paged_kv_cache[0].shape[1]
    for row, (chunk, position) in enumerate(zip(batch_indices.tolist(), positions.tolist(), strict=True)):
        first, end = kv_indptr[chunk : chunk + 2].tolist()
        length = (end - first - 1) * page_size + int(kv_last_page_len[chunk])
        assert position < length, "the tables must hold what is appended"
        page = int(kv_indices[first + position // page_size])
        for plane, rows in zip(paged_kv_cache, (append_key, append_value), strict=True):
            plane[page, position % page_size] = rows[row]


def rmsnorm(input: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    assert len(input), "a kernel without a block cannot be launched"
    return F.rms_norm(input, (input.shape[-1],), weight, eps)


def fused_add_rmsnorm(
    input: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6
) -> None:
    assert input.is_contiguous() and residual.is_contiguous()
    residual += input
    input.copy_(rmsnorm(residual, weight, eps))


def silu_and_mul(input: torch.Tensor) -> torch.Tensor:
    assert input.shape[-1] * input.element_size() % 16 == 0
    gate, up = input.chunk(2, dim=-1)
    return F.silu(gate) * up


def apply_rope_with_cos_sin_cache_inplace(
    positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, head_size: int,
    cos_sin_cache: torch.Tensor, is_neox: bool = True,
) -> None:
    assert is_neox and cos_sin_cache.dtype is torch.float32
    cos, sin = cos_sin_cache[positions.long()].chunk(2, dim=-1)
    for x in (query, key):
        heads = x.view(len(x), -1, head_size)
        first, second = (half.float() for half in heads.chunk(2, dim=-1))
        c, s = cos[:, None], sin[:, None]
        heads.copy_(torch.cat([first * c - second * s, second * c + first * s], dim=-1))


broken: set[str] = set()
"""Backends whose kernels cannot be built."""


def install(monkeypatch: pytest.MonkeyPatch, *, cannot_build: set[str] | None = None) -> None:
    """Until the test is over ``import flashinfer`` gives this, and generation's kernel is a double too."""
    monkeypatch.setitem(sys.modules, "disagg_mpi.engine.gpu.kernels.attend", attend_double.module())
    if importlib.util.find_spec("triton") is None:
        triton = types.ModuleType("triton")
        triton.__spec__ = types.SimpleNamespace(name="triton")  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, "triton", triton)
    module = types.ModuleType("flashinfer")
    here = globals()
    for name in ("BatchPrefillWithPagedKVCacheWrapper", "append_paged_kv_cache", "rmsnorm",
                 "fused_add_rmsnorm", "silu_and_mul", "apply_rope_with_cos_sin_cache_inplace"):
        setattr(module, name, here[name])
    module.__spec__ = types.SimpleNamespace(name="flashinfer")  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setitem(here, "broken", cannot_build or set())
