"""The Triton kernel that copies rows. Imported only where it is used: Triton is no part of a CPU's torch.

``TRITON_INTERPRET=1`` runs it on CPU tensors. Addresses are 64-bit: pools exceed 2**31 elements.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def copy_cells(  # type: ignore[no-untyped-def]
    source, target, cells, source_plane, target_plane, source_token, target_token, row,
    JOINED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):
    """One tile of one cell in one plane a program; the program ids are cell, plane and tile.

    All distances are in elements. ``cells`` has, for each, first slot of the source, of the target, and
    number of tokens. ``JOINED``: rows follow each other without gaps on both sides, a cell is one row.
    """
    cell = tl.program_id(0)
    plane = tl.program_id(1).to(tl.int64)
    count = tl.load(cells + 3 * cell + 2)
    here = source + plane * source_plane + tl.load(cells + 3 * cell).to(tl.int64) * source_token
    there = target + plane * target_plane + tl.load(cells + 3 * cell + 1).to(tl.int64) * target_token
    columns = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    # Nobody reads the same bytes again soon: they should not drive others out of the cache.
    if JOINED:
        inside = columns < count * row
        data = tl.load(here + columns, mask=inside, eviction_policy="evict_first")
        tl.store(there + columns, data, mask=inside, eviction_policy="evict_first")
    else:
        rows = tl.arange(0, ROWS)[:, None]
        columns = columns[None, :]
        inside = (rows < count) & (columns < row)
        data = tl.load(here + rows * source_token + columns, mask=inside, eviction_policy="evict_first")
        tl.store(there + rows * target_token + columns, data, mask=inside, eviction_policy="evict_first")
