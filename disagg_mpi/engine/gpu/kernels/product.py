"""One row times a matrix, with the norm before it and the activation or the sum after it: one launch.

A step of one request reads every weight once and computes almost nothing, so what counts is that the memory
never rests: a program asks for its first weights before it waits for the kernel before it (programmatic
dependent launch), and no launch lies between two products but attention's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit  # type: ignore[untyped-decorator]
def row_product(  # type: ignore[no-untyped-def]
    x, weight, norm, eps, out, N,
    K: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, NORMED: tl.constexpr, GATED: tl.constexpr,
    ADDED: tl.constexpr, OVERLAPS: tl.constexpr,
):
    """Grid ``(N / ROWS,)``: ``out[N]`` from ``x[K]`` and ``weight[N or 2 N, K]``; ``WIDTH`` divides ``K``.

    ``NORMED``: of ``x``'s root mean square norm (Zhang and Sennrich 2019), with the weight ``norm[K]``.
    ``GATED``: ``silu(first N) * last N``. ``ADDED``: to what ``out`` holds.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, WIDTH)
    at = weight + rows[:, None].to(tl.int64) * K + columns[None, :]
    part = tl.load(at)
    if GATED:
        above = tl.load(at + N.to(tl.int64) * K)
    if OVERLAPS:
        gdc_launch_dependents()
        gdc_wait()
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    if GATED:
        total_above = tl.zeros((ROWS, WIDTH), tl.float32)
    squares = tl.zeros((WIDTH,), tl.float32)
    for start in tl.static_range(0, K, WIDTH):
        if start + WIDTH < K:
            next_part = tl.load(at + start + WIDTH)
            if GATED:
                next_above = tl.load(at + N.to(tl.int64) * K + start + WIDTH)
        values = tl.load(x + start + columns).to(tl.float32)
        if NORMED:
            squares += values * values
            values *= tl.load(norm + start + columns).to(tl.float32)
        total += part.to(tl.float32) * values[None, :]
        if GATED:
            total_above += above.to(tl.float32) * values[None, :]
        if start + WIDTH < K:
            part = next_part
            if GATED:
                above = next_above
    result = tl.sum(total, 1)
    if NORMED:
        factor = tl.rsqrt(tl.sum(squares, 0) / K + eps)
        result *= factor
    if GATED:
        result_above = tl.sum(total_above, 1)
        if NORMED:
            result_above *= factor
        result = result * tl.sigmoid(result) * result_above
    if ADDED:
        result += tl.load(out + rows).to(tl.float32)
    tl.store(out + rows, result.to(out.dtype.element_ty))
