"""Attention of generation, with all that lies between two matrix products there: one launch a layer.

Each program takes one request, one KV head with the query heads that share it, and one *part* of the
request's positions. The part with the newest position turns its key (Su et al. 2021) and writes K and V into
the pool first. Whoever ends a request's last part joins them (flash-decoding, Dao et al. 2023), so that no
second launch waits for all. Counters end at zero, as they began.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit  # type: ignore[untyped-decorator]
def _ask_for(start, BYTES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Have ``BYTES`` brought into the device's cache, 2 KiB by each thread."""
    places = start + tl.arange(0, BYTES // 2048) * 2048
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], 2048; mov.u32 $0, 0;", "=r,l",
        [places.to(tl.uint64, bitcast=True)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit  # type: ignore[untyped-decorator]
def attend_ones(  # type: ignore[no-untyped-def]
    qkv, row_stride, out, keys, values, rotary, positions, pages, page_starts, partial, partial_max,
    partial_sum, counters, ahead, block_stride, token_stride, head_stride, scale, least,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
    PARTS: tl.constexpr, WINDOW: tl.constexpr, STAGES: tl.constexpr, TURNS: tl.constexpr,
    OVERLAPS: tl.constexpr, ASKED: tl.constexpr,
):
    """Grid ``(requests, KV_HEADS, PARTS)``; a request has no more parts than leave each ``least`` positions.

    ``qkv`` ``[requests, (HEADS + 2 KV_HEADS) DIM]``, or without ``TURNS`` queries alone, turned, whose keys
    and values are in the pool; ``rotary`` fp32 ``[positions, DIM]``, cosines before sines; ``scale`` is of
    scores in base 2. ``partial`` fp32 ``[requests, KV_HEADS, PARTS, HEADS / KV_HEADS, DIM]``, its maxima and
    sums without the last dimension; ``counters`` int32 ``[requests, KV_HEADS]``, zeros. ``positions``,
    ``page_starts`` and ``rotary`` are not of the launch before: they are read while it ends. Programs beyond
    ``PARTS`` ask for ``ASKED`` bytes each of ``ahead``, which the next launch will read.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    ROWS: tl.constexpr = 16 if GROUP <= 16 else triton.next_power_of_2(GROUP)
    HALF: tl.constexpr = DIM // 2
    request, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if OVERLAPS:
        gdc_launch_dependents()
    if ASKED > 0:  # noqa: SIM102 - known when it is built, the other is not
        if part >= PARTS:
            piece = ((part - PARTS) * KV_HEADS + head) * tl.num_programs(0) + request
            _ask_for(ahead.to(tl.pointer_type(tl.int8), bitcast=True) + piece * ASKED, ASKED)
    newest = tl.load(positions + request)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(newest - WINDOW + 1, 0)
    length = newest + 1 - first // TILE * TILE
    share = tl.maximum(tl.cdiv(tl.cdiv(length, PARTS), TILE) * TILE, least)
    num_parts = tl.cdiv(length, share)
    if part < num_parts:
        start = first // TILE * TILE + part * share
        end = tl.minimum(start + share, newest + 1)
        half = tl.arange(0, HALF)
        dims = tl.arange(0, DIM)
        rows = tl.arange(0, ROWS)
        row = qkv + request.to(tl.int64) * row_stride
        my_pages = pages + tl.load(page_starts + request)
        if TURNS:
            cos = tl.load(rotary + newest.to(tl.int64) * DIM + half)
            sin = tl.load(rotary + newest.to(tl.int64) * DIM + HALF + half)
        if OVERLAPS:
            gdc_wait()
        query = row + (head * GROUP + rows[:, None]) * DIM + half[None, :]
        is_row = (rows < GROUP)[:, None]
        query1 = tl.load(query, mask=is_row, other=0.0)
        query2 = tl.load(query + HALF, mask=is_row, other=0.0)
        if TURNS:
            if end == newest + 1:
                to = (tl.load(my_pages + newest // PAGE).to(tl.int64) * block_stride
                      + newest % PAGE * token_stride + head * head_stride)
                key = row + (HEADS + head) * DIM
                key1 = tl.load(key + half).to(tl.float32)
                key2 = tl.load(key + HALF + half).to(tl.float32)
                tl.store(keys + to + half, (key1 * cos - key2 * sin).to(keys.dtype.element_ty))
                tl.store(keys + to + HALF + half, (key2 * cos + key1 * sin).to(keys.dtype.element_ty))
                tl.store(values + to + dims, tl.load(row + (HEADS + KV_HEADS + head) * DIM + dims))
                tl.debug_barrier()  # other threads of this program read it back
            wide1, wide2 = query1.to(tl.float32), query2.to(tl.float32)
            query1 = (wide1 * cos[None, :] - wide2 * sin[None, :]).to(keys.dtype.element_ty)
            query2 = (wide2 * cos[None, :] + wide1 * sin[None, :]).to(keys.dtype.element_ty)

        most = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        summed = tl.zeros((ROWS, DIM), tl.float32)
        for tile in tl.range(start, end, TILE, num_stages=STAGES):
            place = tile + tl.arange(0, TILE)
            is_there = place < end
            page = tl.load(my_pages + place // PAGE, mask=is_there, other=0)
            at = page.to(tl.int64) * block_stride + place % PAGE * token_stride + head * head_stride
            key1 = tl.load(keys + at[None, :] + half[:, None], mask=is_there[None, :], other=0.0)
            key2 = tl.load(keys + at[None, :] + HALF + half[:, None], mask=is_there[None, :], other=0.0)
            value = tl.load(values + at[:, None] + dims[None, :], mask=is_there[:, None], other=0.0)
            scores = tl.dot(query1, key1)
            scores = tl.dot(query2, key2, scores) * scale
            seen = is_there & (place >= first)
            scores = tl.where(seen[None, :], scores, float("-inf"))
            higher = tl.maximum(most, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            kept = tl.exp2(most - higher)
            total = total * kept + tl.sum(weights, 1)
            summed = tl.dot(weights.to(value.dtype), value, summed * kept[:, None])
            most = higher

        target = out + (request.to(tl.int64) * HEADS + head * GROUP + rows[:, None]) * DIM + dims[None, :]
        if num_parts == 1:
            tl.store(target, (summed / total[:, None]).to(out.dtype.element_ty), mask=is_row)
        else:
            mine = (request * KV_HEADS + head).to(tl.int64)
            place_of_part = (mine * PARTS + part) * GROUP + rows
            tl.store(partial + place_of_part[:, None] * DIM + dims[None, :], summed, mask=is_row)
            tl.store(partial_max + place_of_part, most, mask=rows < GROUP)
            tl.store(partial_sum + place_of_part, total, mask=rows < GROUP)
            tl.debug_barrier()  # all of it before the count
            if tl.atomic_add(counters + mine, 1, sem="acq_rel") == num_parts - 1:
                parts = tl.arange(0, PARTS)
                for member in tl.static_range(GROUP):
                    places = (mine * PARTS + parts) * GROUP + member
                    maxima = tl.load(partial_max + places, mask=parts < num_parts, other=float("-inf"),
                                     cache_modifier=".cg")
                    sums = tl.load(partial_sum + places, mask=parts < num_parts, other=0.0,
                                   cache_modifier=".cg")
                    factors = tl.exp2(maxima - tl.max(maxima, 0))
                    pieces = tl.load(partial + places[:, None] * DIM + dims[None, :],
                                     mask=(parts < num_parts)[:, None], other=0.0, cache_modifier=".cg")
                    joined = tl.sum(pieces * factors[:, None], 0) / tl.sum(sums * factors, 0)
                    tl.store(out + (request.to(tl.int64) * HEADS + head * GROUP + member) * DIM + dims,
                             joined.to(out.dtype.element_ty))
                tl.store(counters + mine, 0)
