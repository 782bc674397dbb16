"""torch's scaled dot product over pages that are gathered first: a copy of all of them, and nothing to
capture."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from disagg_mpi.engine.gpu.attention.base import DevicePool
from disagg_mpi.engine.gpu.buffers import DeviceStep


class SdpaAttention:
    """torch's scaled dot product over gathered pages."""

    can_capture = False
    unturned = None

    def __init__(self, pool: DevicePool, instead: str = "") -> None:
        """``instead``: why flashinfer is not used."""
        self.name = "torch's own, over gathered pages" + (
            f", which is slower than flashinfer ({instead})" if instead else "")
        self._pool = pool
        self._step: DeviceStep | None = None
        self._slots = torch.empty(0)
        # Of the step: pages of each chunk filled up to one length, and what of them its tokens see.
        self._table = torch.empty(0)
        self._seen: dict[int | None, torch.Tensor] = {}

    def sizes(self, max_requests: int) -> list[int]:
        return [1] if max_requests > 0 else []

    def begin(self, step: DeviceStep) -> None:
        self._step = step
        self._slots = step.slots.long()
        self._seen = {}
        if step.host.is_generation:
            counts = step.page_starts[1:] - step.page_starts[:-1]
            longest = int((step.host.page_starts[1:] - step.host.page_starts[:-1]).max())
            places = step.page_starts[:-1, None] + torch.arange(longest, device=counts.device)
            self._table = step.pages[places.clamp(max=len(step.pages) - 1).long()].long()

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scaling: float | None = None, window: int | None = None,
    ) -> torch.Tensor:
        step = self._step
        assert step is not None  # begin comes first
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        for plane, rows in ((keys, key), (values, value)):
            blocks, within = self._slots // plane.shape[1], self._slots % plane.shape[1]
            plane[blocks, within] = rows.to(plane.dtype)
        if step.host.is_generation:
            return self._attend_ones(step, query, keys, values, scaling, window)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        arrays = step.host
        for chunk, kv_length in enumerate(arrays.kv_lengths.tolist()):
            first, end = arrays.token_starts[chunk : chunk + 2].tolist()
            pages = step.pages[arrays.page_starts[chunk] : arrays.page_starts[chunk + 1]].long()
            k, v = (plane[pages].flatten(0, 1)[:kv_length].to(query.dtype) for plane in (keys, values))
            rows = torch.arange(kv_length - (end - first), kv_length, device=query.device)[:, None]
            columns = torch.arange(kv_length, device=query.device)[None, :]
            seen = columns <= rows
            if window is not None:
                seen &= columns > rows - window
            out[first:end] = _sdpa(query[first:end].transpose(0, 1)[None], k.transpose(0, 1)[None],
                                   v.transpose(0, 1)[None], seen, scaling)[0].transpose(0, 1)
        return out

    def _attend_ones(self, step: DeviceStep, query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
                     scaling: float | None, window: int | None) -> torch.Tensor:
        """All chunks at once: one token each."""
        k, v = (plane[self._table].flatten(1, 2).transpose(1, 2).to(query.dtype) for plane in (keys, values))
        if window not in self._seen:
            columns = torch.arange(k.shape[2], device=query.device)[None, :]
            rows = step.positions[:, None]
            seen = columns <= rows
            if window is not None:
                seen &= columns > rows - window
            self._seen[window] = seen[:, None, None, :]
        return _sdpa(query.unsqueeze(2), k, v, self._seen[window], scaling).squeeze(2)


def _sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor,
          scaling: float | None) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=scaling, enable_gqa=query.shape[1] != key.shape[1])
