"""flashinfer's paged kernels for prompts, one plan a step and kind of layer; for generation one of our own.

Its kernels are built when they are first asked for, and kept in its own cache: :class:`FlashInferAttention`
asks for all that it will use when it is made, so that whoever chose it learns then whether they can be had.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from disagg_mpi.engine.gpu.attention.base import AttendUnturned, DevicePool, HeadShape
from disagg_mpi.engine.gpu.attention.ones import OnesAttention
from disagg_mpi.engine.gpu.buffers import DeviceStep
from disagg_mpi.engine.gpu.device import Device, Mark

# Scratch of flashinfer's split over a request's positions; its documentation recommends this much.
_WORKSPACE_BYTES = 128 * 2**20

# Of its kernels for prompts, in order of speed: the first needs Hopper, and CUDA's headers to be built.
_BACKENDS = ("auto", "fa2")


class FlashInferAttention:
    """flashinfer's paged kernels, and :class:`OnesAttention` for what has one token in the step."""

    can_capture = True

    def __init__(self, device: Device, pool: DevicePool, shape: HeadShape, max_requests: int) -> None:
        """``max_requests`` in a step.

        Raises :class:`RuntimeError` or :class:`OSError` if its kernels cannot be built here.
        """
        import flashinfer

        self._library: Any = flashinfer
        self._device = device
        self._pool = pool
        self._shape = shape
        self._ones = self._make_ones(max_requests)
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device.place)
        self._heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim,
                       pool.view.layout.tokens_per_block)
        self._prompts: dict[int | None, Any] = {}  # by window
        self._num_ones = 0  # the step's first chunks, which are one token each
        self._step: DeviceStep | None = None
        # A plan is copied to the device from the wrapper's own host memory, which the next plan writes.
        self._planned: Mark | None = None
        self.name = f"flashinfer, and Triton's for generation{self._build()}"

    def _make_ones(self, max_requests: int) -> OnesAttention:
        try:
            ones = OnesAttention(self._device, self._pool, self._shape, max_requests)
            ones.try_it()
        except Exception as error:  # Triton has many, and some name no cause
            raise RuntimeError(f"{type(error).__name__} of Triton's: {last_line(error)}") from error
        return ones

    def _build(self) -> str:
        """Have flashinfer's kernels built, by one query over the pool's first page; what must be said."""
        failed = ""
        for backend in _BACKENDS:
            self._prompts = {window: self._library.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, "NHD", backend=backend) for window in self._shape.windows}
            try:
                for window, wrapper in self._prompts.items():
                    self._try(wrapper, window)
                break
            except (RuntimeError, OSError) as error:
                if backend == _BACKENDS[-1]:
                    raise
                failed = (f" (with {_BACKENDS[-1]} kernels for prompts; faster ones cannot be built here: "
                          f"{last_line(error)})")
        return failed

    def _try(self, wrapper: Any, window: int | None) -> None:
        place, shape = self._device.place, self._shape
        starts, one = (torch.tensor(values, dtype=torch.int32) for values in ([0, 1], [1]))
        pages = torch.zeros(1, dtype=torch.int32, device=place)
        wrapper.plan(starts, starts, pages, one, *self._heads, causal=True, **self._plan_options(window))
        query = torch.zeros(1, shape.num_heads, shape.head_dim, dtype=self._pool.dtype, device=place)
        wrapper.run(query, (self._pool.keys[0], self._pool.values[0]))
        self._device.synchronize()

    def _plan_options(self, window: int | None) -> dict[str, Any]:
        return {"window_left": -1 if window is None else window - 1, "sm_scale": self._shape.scaling,
                "q_data_type": self._pool.dtype, "kv_data_type": self._pool.dtype}

    def sizes(self, max_requests: int) -> list[int]:
        return self._ones.sizes(max_requests)

    def begin(self, step: DeviceStep) -> None:
        self._step = step
        arrays, pinned = step.host, step.pinned
        # Generation comes first in a step. The kernels for prompts would work on 128 rows for each of its
        # ones, in every head, and read its KV-cache once a query head.
        self._num_ones = num_ones = int(np.argmin(np.append(np.diff(arrays.token_starts) == 1, False)))
        if num_ones == arrays.num_chunks:
            return
        if self._planned is not None:
            self._planned.wait()
        first_page = int(arrays.page_starts[num_ones])
        for window in self._shape.windows:
            self._prompts[window].plan(
                pinned["token_starts"][num_ones:] - num_ones, pinned["page_starts"][num_ones:] - first_page,
                step.pages[first_page:], pinned["last_page_lengths"][num_ones:], *self._heads, causal=True,
                **self._plan_options(window))
        self._planned = self._device.mark()

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scaling: float | None = None, window: int | None = None,
    ) -> torch.Tensor:
        step = self._step
        assert step is not None  # begin comes first
        planes = self._pool.keys[layer], self._pool.values[layer]
        self._library.append_paged_kv_cache(
            key, value, step.chunk_of, step.positions, planes, step.pages, step.page_starts,
            step.last_page_lengths, kv_layout="NHD")
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        num_ones = self._num_ones
        if num_ones:
            # Some families' queries lie head by head; of ours a row's heads lie together.
            ones = query[:num_ones]
            ones = ones if ones.stride(1) == self._shape.head_dim else ones.contiguous()
            # Nothing is turned: the rotation's table is not read.
            self._ones.attend(layer, ones, step, self._workspace, turns=False, window=window,
                              out=out[:num_ones])
        if num_ones < len(query):
            self._prompts[window].run(query[num_ones:], planes, out=out[num_ones:])
        return out

    @property
    def unturned(self) -> AttendUnturned | None:
        is_generation = self._step is not None and self._num_ones == self._step.host.num_chunks
        return self._attend_unturned if is_generation else None

    def _attend_unturned(self, layer: int, qkv: torch.Tensor, rotary: torch.Tensor,
                         ahead: torch.Tensor | None) -> torch.Tensor:
        assert self._step is not None  # or it was not given out
        out = torch.empty(len(qkv), self._shape.num_heads * self._shape.head_dim, dtype=qkv.dtype,
                          device=qkv.device)
        self._ones.attend(layer, qkv, self._step, rotary, turns=True, window=None, out=out,
                          ahead=ahead)
        return out


def last_line(error: BaseException) -> str:
    """Of what a compiler has said."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
