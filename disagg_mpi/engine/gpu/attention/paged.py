"""flashinfer's paged kernels: one plan a step, kind of layer and kind of step, one kernel a layer.

Its kernels are built when they are first asked for, and kept in its own cache: :class:`FlashInferAttention`
asks for all that it will use when it is made, so that whoever chose it learns then whether they can be had.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from disagg_mpi.engine.gpu.attention.base import DevicePool, HeadShape
from disagg_mpi.engine.gpu.buffers import DeviceStep
from disagg_mpi.engine.gpu.device import Device, Mark

# Scratch of flashinfer's split over a request's positions; its documentation recommends this much.
_WORKSPACE_BYTES = 128 * 2**20

# Query heads a KV head from which on its kernels on matrix units win in generation (vLLM and SGLang draw the
# line here too).
_MATRIX_UNITS_FROM = 4

# Of its kernels for prompts, in order of speed: the first needs Hopper, and CUDA's headers to be built.
_BACKENDS = ("auto", "fa2")


class FlashInferAttention:
    """flashinfer's paged kernels: one plan a step, kind of layer and kind of step, one kernel a layer."""

    can_capture = True

    def __init__(self, device: Device, pool: DevicePool, shape: HeadShape) -> None:
        """Raises :class:`RuntimeError` or :class:`OSError` if its kernels cannot be built here."""
        import flashinfer

        self._library: Any = flashinfer
        self._device = device
        self._pool = pool
        self._shape = shape
        self._uses_matrix_units = shape.num_heads // shape.num_kv_heads >= _MATRIX_UNITS_FROM
        self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=device.place)
        self._heads = (shape.num_heads, shape.num_kv_heads, shape.head_dim,
                       pool.view.layout.tokens_per_block)
        # By window: of prompts, of generation beside them, of captured generation by size too.
        self._prompts: dict[int | None, Any] = {}
        self._beside: dict[int | None, Any] = {}
        self._generation: dict[tuple[int, int | None], Any] = {}
        # Of the step: the wrapper of its first chunks, which are one token each, how many these are, and the
        # wrapper of the others.
        self._current: dict[int | None, tuple[Any, int, Any]] = {}
        self._step: DeviceStep | None = None
        # A plan is copied to the device from the wrapper's own host memory, which the next plan writes.
        self._planned: Mark | None = None
        self.name = f"flashinfer{self._build()}"

    def _build(self) -> str:
        """Have all kernels built, by one query over the pool's first page; what must be said of them."""
        failed = ""
        for backend in _BACKENDS:
            self._prompts = {window: self._library.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, "NHD", backend=backend) for window in self._shape.windows}
            try:
                for window, wrapper in self._prompts.items():
                    self._try(wrapper, window, [torch.tensor([0, 1], dtype=torch.int32)], causal=True)
                break
            except (RuntimeError, OSError) as error:
                if backend == _BACKENDS[-1]:
                    raise
                failed = (f" (with {_BACKENDS[-1]} kernels for prompts; faster ones cannot be built here: "
                          f"{last_line(error)})")
        for window in self._shape.windows:
            self._beside[window] = self._library.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "NHD", use_tensor_cores=self._uses_matrix_units, backend="fa2")
            self._try(self._beside[window], window, [])
        return failed

    def _try(self, wrapper: Any, window: int | None, token_starts: list[torch.Tensor],
             **options: Any) -> None:
        place, shape = self._device.place, self._shape
        starts, one = (torch.tensor(values, dtype=torch.int32) for values in ([0, 1], [1]))
        pages = torch.zeros(1, dtype=torch.int32, device=place)
        wrapper.plan(*token_starts, starts, pages, one, *self._heads, **self._plan_options(window), **options)
        query = torch.zeros(1, shape.num_heads, shape.head_dim, dtype=self._pool.dtype, device=place)
        wrapper.run(query, (self._pool.keys[0], self._pool.values[0]))
        self._device.synchronize()

    def _plan_options(self, window: int | None) -> dict[str, Any]:
        return {"window_left": -1 if window is None else window - 1, "sm_scale": self._shape.scaling,
                "q_data_type": self._pool.dtype, "kv_data_type": self._pool.dtype}

    def begin(self, step: DeviceStep, *, captured: bool = False) -> None:
        if self._planned is not None:
            self._planned.wait()
        self._step = step
        arrays, pinned = step.host, step.pinned
        page_starts, last = pinned["page_starts"], pinned["last_page_lengths"]
        # Generation comes first in a step. The kernels for prompts would work on 128 rows for each of its
        # ones, in every head, and read its KV-cache once a query head.
        num_ones = int(np.argmin(np.append(np.diff(arrays.token_starts) == 1, False)))
        first_page = int(arrays.page_starts[num_ones])
        for window in self._shape.windows:
            options = self._plan_options(window)
            if captured:
                wrapper = self._generation_wrapper(step, window)
                wrapper.plan(page_starts, step.pages, last, *self._heads, **options)
                self._current[window] = wrapper, arrays.num_tokens, None
                continue
            if num_ones:
                self._beside[window].plan(
                    page_starts[: num_ones + 1], step.pages[:first_page], last[:num_ones], *self._heads,
                    **options)
            if num_ones < arrays.num_chunks:
                self._prompts[window].plan(
                    pinned["token_starts"][num_ones:] - num_ones, page_starts[num_ones:] - first_page,
                    step.pages[first_page:], last[num_ones:], *self._heads, causal=True, **options)
            self._current[window] = self._beside[window], num_ones, self._prompts[window]
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
        generation, num_ones, prompts = self._current[window]
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        if num_ones:
            generation.run(query[:num_ones], planes, out=out[:num_ones])
        if num_ones < len(query):
            prompts.run(query[num_ones:], planes, out=out[num_ones:])
        return out

    def _generation_wrapper(self, step: DeviceStep, window: int | None) -> Any:
        """Of the step's size; it reads the step's arrays where they lie, so replays find the next ones
        there."""
        size = step.host.num_chunks
        if (size, window) not in self._generation:
            self._generation[size, window] = self._library.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace, "NHD", use_cuda_graph=True, use_tensor_cores=self._uses_matrix_units,
                backend="fa2",  # others cannot be planned anew for a captured step
                paged_kv_indptr_buffer=step.page_starts, paged_kv_indices_buffer=self._all_pages(step),
                paged_kv_last_page_len_buffer=step.last_page_lengths)
        return self._generation[size, window]

    @staticmethod
    def _all_pages(step: DeviceStep) -> torch.Tensor:
        """From the step's first page to the end of the room for pages, which is the last there is."""
        first = step.pages.storage_offset()
        end = step.pages.untyped_storage().nbytes() // step.pages.element_size()
        return step.pages.as_strided((end - first,), (1,), first)


def last_line(error: BaseException) -> str:
    """Of what a compiler has said."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]
