"""Paged attention behind transformers' ``AttentionInterface``.

A step is packed: all its chunks stand one after another in one row of tokens. :class:`StepLayout` says
which slots of the pool they are written to and which each of them attends to; it travels through the
model's forward as the keyword ``paged`` and arrives at :func:`paged_attention` in every layer.

A request's slots are mostly one run, read as a view; in a pool of the whole model it has gaps where other
ranks' heads lie. Where they are several, the runs are copied together first; both give the kernel the same
strides, so the same bits come out.
Query heads that share a KV head are folded into the query length instead of repeating K and V
(646 against 5495 µs a layer at batch 8).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from disagg_mpi.errors import ModelError
from disagg_mpi.transfer.layout import CacheView

NAME = "disagg_mpi_paged"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Writing 512 tokens (3 heads of 64, fp32) as one run takes 8 µs, by index 40; a run costs 1.3 µs whatever its
# length. 8 tokens apart: 14 against 2.
_TOKENS_WORTH_A_RUN = 16


class KvPool:
    """One rank's part of a pool as tensors; the memory belongs to whoever made it.

    Where the array holds more layers and heads than the rank's, all here are views with gaps: nothing of
    the others' is touched.
    """

    def __init__(self, memory: Any, view: CacheView) -> None:
        layout, shard = view.layout, view.shard
        dtype = _DTYPES[layout.dtype]
        flat = torch.frombuffer(
            memory, dtype=dtype, count=layout.pool_bytes // dtype.itemsize, offset=view.offset)
        slots = layout.num_blocks * layout.tokens_per_block
        array = flat.view(layout.num_layers, 2, slots, layout.num_kv_heads, layout.head_dim)
        layers = array.narrow(0, shard.first_layer - view.origin_layer, shard.num_layers)
        self._part = layers.narrow(3, shard.first_head - view.origin_head, shard.num_heads)
        self.view = view
        self.keys = [layer[0] for layer in self._part]
        self.values = [layer[1] for layer in self._part]
        """Per layer of the rank ``[slots, num_heads, head_dim]``."""

    def copy_blocks(self, sources: list[int], targets: list[int]) -> None:
        """Copy whole blocks, K and V of all the rank's layers; no target is also a source."""
        size = self.view.layout.tokens_per_block
        runs: list[tuple[int, int, int]] = []
        for source, target in zip(sources, targets, strict=True):
            if runs and (source, target) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
                runs[-1] = (*runs[-1][:2], runs[-1][2] + 1)
            else:
                runs.append((source, target, 1))
        for source, target, count in runs:
            self._part[:, :, target * size : (target + count) * size] = (
                self._part[:, :, source * size : (source + count) * size])


class Attends(Protocol):
    """A step, as a model's layers see it: :class:`StepLayout`, or an attention of :mod:`.gpu.attention`."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scaling: float | None = None, window: int | None = None,
    ) -> torch.Tensor: ...


class _Part:
    """One chunk's place in the packed step."""

    __slots__ = ("end", "kv_end", "length", "mask", "runs", "start")

    def __init__(
        self, start: int, length: int, kv_end: int, runs: Sequence[tuple[int, int]]
    ) -> None:
        self.start = start
        self.end = start + length
        self.length = length
        self.kv_end = kv_end
        self.runs = runs
        self.mask: dict[int | None, torch.Tensor | None] = {}


class StepLayout:
    """What attention needs to know of one step. Made once a step, used by every layer."""

    def __init__(
        self,
        pool: KvPool,
        chunks: Sequence[tuple[int, int, Sequence[tuple[int, int]]]],
        on_layer: Callable[[int], None] | None = None,
    ) -> None:
        """``chunks``: first position, number of tokens, and the slots of all positions up to the last of
        these, as runs (first slot, count). ``on_layer(i)`` is called when K and V of the rank's ``i``-th
        layer (from 0) are in the pool.
        """
        self.pool = pool
        self.on_layer = on_layer
        self.parts: list[_Part] = []
        self._writes: list[tuple[int, int, int]] = []
        place = 0
        for start, length, runs in chunks:
            self.parts.append(_Part(place, length, start + length, runs))
            self._add_writes(place, start, runs)
            place += length
        self._slots: torch.Tensor | None = None
        if place < _TOKENS_WORTH_A_RUN * len(self._writes):
            self._slots = torch.cat(
                [torch.arange(slot, slot + count) for _, slot, count in self._writes])

    def write(self, plane: torch.Tensor, rows: torch.Tensor) -> None:
        """Put the step's ``rows`` ``[tokens, heads, head_dim]`` where they belong in ``plane``."""
        if self._slots is not None:
            plane.index_copy_(0, self._slots, rows.to(plane.dtype))
            return
        for place, slot, count in self._writes:
            plane[slot : slot + count] = rows[place : place + count]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """Write K and V ``[tokens, kv_heads, head_dim]`` to the pool, and attend over it.

        ``query`` and the result are ``[tokens, heads, head_dim]``.
        """
        keys, values = self.pool.keys[layer], self.pool.values[layer]
        self.write(keys, key)
        self.write(values, value)
        if self.on_layer is not None:
            self.on_layer(layer)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        for part in self.parts:
            k, v = _read(keys, part.runs, query.dtype), _read(values, part.runs, query.dtype)
            out[part.start : part.end] = _attend(
                query[part.start : part.end], k, v, part, scaling, window)
        return out

    def _add_writes(self, place: int, start: int, runs: Sequence[tuple[int, int]]) -> None:
        """(place in the step, first slot, count) of each run from position ``start`` on."""
        position = 0
        for first, count in runs:
            skip = max(0, start - position)
            if skip < count:
                self._writes.append((place, first + skip, count - skip))
                place += count - skip
            position += count


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    paged: Attends | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_unused: Any,
) -> tuple[torch.Tensor, None]:
    """Write K and V ``[1, kv_heads, tokens, head_dim]`` to the pool, and attend.

    Returns ``[1, tokens, heads, head_dim]``, as transformers' own attention functions do.
    """
    if paged is None:
        raise ModelError(f"{type(module).__name__} does not pass on what paged attention needs")
    if softcap is not None or s_aux is not None:
        raise ModelError("softcapped logits and attention sinks are beyond the paged attention")
    layer: int = module.layer_idx  # type: ignore[assignment]
    out = paged.attend(layer, *(x[0].transpose(0, 1) for x in (query, key, value)),
                       scaling=scaling, window=sliding_window)
    return out.unsqueeze(0), None


def _read(plane: torch.Tensor, runs: Sequence[tuple[int, int]], dtype: torch.dtype) -> torch.Tensor:
    """The slots of ``runs`` as ``[1, kv_heads, tokens, head_dim]``."""
    if len(runs) == 1:
        first, count = runs[0]
        rows = plane[first : first + count]
    else:
        total = sum(count for _, count in runs)
        rows = plane.new_empty_strided((total, *plane.shape[1:]), plane.stride())
        torch.cat([plane[first : first + count] for first, count in runs], out=rows)
    return rows.to(dtype).transpose(0, 1).unsqueeze(0)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    part: _Part,
    scaling: float | None,
    window: int | None,
) -> torch.Tensor:
    """One chunk: ``[tokens, heads, head_dim]``; ``key`` and ``value`` as :func:`_read` gives them."""
    length, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    if length == 1:
        if window is not None and part.kv_end > window:
            key, value = key[:, :, -window:], value[:, :, -window:]
        folded = query.reshape(1, kv_heads, group, head_dim)
        out = F.scaled_dot_product_attention(folded, key, value, scale=scaling)
        return out.view(1, heads, head_dim)
    if group > 1:
        key, value = (
            x[:, :, None].expand(-1, -1, group, -1, -1).reshape(1, heads, part.kv_end, head_dim)
            for x in (key, value))
    mask = _mask(part, window)
    out = F.scaled_dot_product_attention(
        query.transpose(0, 1).unsqueeze(0), key, value, attn_mask=mask, is_causal=mask is None,
        scale=scaling)
    return out[0].transpose(0, 1)


def _mask(part: _Part, window: int | None) -> torch.Tensor | None:
    """``None`` for plain causal; else which positions each token of the chunk sees."""
    plain_window = window is None or part.kv_end <= window
    if part.length == part.kv_end and plain_window:
        return None
    key = None if plain_window else window
    if key not in part.mask:
        rows = torch.arange(part.kv_end - part.length, part.kv_end)[:, None]
        columns = torch.arange(part.kv_end)[None, :]
        seen = columns <= rows
        if key is not None:
            seen &= columns > rows - key
        part.mask[key] = seen
    return part.mask[key]


def no_mask(*_args: Any, **_kwargs: Any) -> None:
    """transformers asks for a mask of the packed row; there is none, the pool's tables are it."""
    return None


def register() -> None:
    """Make the implementation known to transformers under :data:`NAME`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, paged_attention)
    AttentionMaskInterface.register(NAME, no_mask)
