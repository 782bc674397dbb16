"""A few rows times a matrix, with the activation or the sum after it; and their norm: a launch each.

Tensor cores take 64 rows of the weights at a time, whatever the number of rows is, so the weights stand on
the left. They go straight to shared memory (TMA), several tiles on their way. A product whose matrix has few
tiles is *split* over its columns; whoever ends a tile's last part sums them in their order, so that a result
does not depend on who that is. Counters end at zero, as they began.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["M"])  # type: ignore[untyped-decorator]
def few_rows_product(  # type: ignore[no-untyped-def]
    x, weight, out, partial, counters, M, N,
    K: tl.constexpr, MOST: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, SPLITS: tl.constexpr,
    STAGES: tl.constexpr, GATED: tl.constexpr, ADDED: tl.constexpr, OVERLAPS: tl.constexpr,
):
    """Grid ``(N / ROWS, SPLITS)``: ``out[M, N]`` from ``x[M, K]`` and ``weight[N or 2 N, K]``.

    ``x`` and ``weight`` are descriptors of tiles ``[MOST, WIDTH]``, ``M`` at most ``MOST``, and ``[ROWS,
    WIDTH]``; ``SPLITS * WIDTH`` divides ``K``. ``GATED``, which is not split: ``silu(first N) * last N``.
    ``ADDED``: to what ``out`` holds. ``partial`` fp32 ``[N / ROWS, SPLITS, ROWS, MOST]``, ``counters`` int32
    ``[N / ROWS]``, zeros.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    members = tl.arange(0, MOST)
    first = split * (K // SPLITS)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((ROWS, MOST), tl.float32)
    if GATED:
        total_above = tl.zeros((ROWS, MOST), tl.float32)
    for start in tl.range(first, first + K // SPLITS, WIDTH, num_stages=STAGES):
        part = weight.load([tile * ROWS, start])
        values = x.load([0, start])
        total = tl.dot(part, values.T, total)
        if GATED:
            above = weight.load([N + tile * ROWS, start])
            total_above = tl.dot(above, values.T, total_above)
    is_last = True
    if SPLITS > 1:
        SIZE: tl.constexpr = ROWS * MOST
        parts = partial + tile.to(tl.int64) * SPLITS * SIZE + rows[:, None] * MOST + members[None, :]
        tl.store(parts + split * SIZE, total)
        tl.debug_barrier()  # all of it before the count
        is_last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLITS - 1
        if is_last:
            total = tl.load(parts, cache_modifier=".cg")
            for other in tl.static_range(1, SPLITS):
                total += tl.load(parts + other * SIZE, cache_modifier=".cg")
            tl.store(counters + tile, 0)
    if is_last:
        if GATED:
            total = total * tl.sigmoid(total) * total_above
        at = out + members[None, :].to(tl.int64) * N + tile * ROWS + rows[:, None]
        is_there = (members < M)[None, :]
        if ADDED:
            total += tl.load(at, mask=is_there, other=0.0).to(tl.float32)
        tl.store(at, total.to(out.dtype.element_ty), mask=is_there)


@triton.jit  # type: ignore[untyped-decorator]
def norm_rows(  # type: ignore[no-untyped-def]
    x, weight, eps, out, K: tl.constexpr, WIDTH: tl.constexpr, OVERLAPS: tl.constexpr
):
    """Grid ``(rows,)``: their root mean square norm (Zhang and Sennrich 2019); ``WIDTH`` is not below ``K``.
    """
    columns = tl.arange(0, WIDTH)
    is_there = columns < K
    factors = tl.load(weight + columns, mask=is_there, other=0.0).to(tl.float32)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0).to(tl.int64) * K + columns
    values = tl.load(x + at, mask=is_there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / K + eps)
    tl.store(out + at, (values * scale * factors).to(out.dtype.element_ty), mask=is_there)
