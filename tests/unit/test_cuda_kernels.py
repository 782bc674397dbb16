"""Rows from pool to pool and to messages, against numpy; and the same cases once more with the Triton kernel,
in its interpreter."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import numpy as np
import pytest
import torch
from cudacase import Case, array_of, content
from interpreter import INTERPRETS, in_the_first_run, run_again

from disagg_mpi.transfer.cuda import kernels
from disagg_mpi.transfer.cuda.gather import GatherTransport
from disagg_mpi.transfer.layout import Box, CacheView, KvLayout
from disagg_mpi.transfer.partition import KvShard

# One launch takes as long as all its programs: the interpreter gets fewer and smaller cases.
SEEDS = range(24) if INTERPRETS else range(200)


def test_the_kernel_runs_where_it_should() -> None:
    assert kernels._has_kernel(torch.device("cpu")) == (
        INTERPRETS and importlib.util.find_spec("triton") is not None)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_box_is_gathered(seed: int) -> None:
    case = Case(seed, 24 if INTERPRETS else 90)
    pool = case.tensor(1)
    transport = GatherTransport(pool, case.views[1], {case.views[0].memory: case.tensor(0)})
    transfer = transport.receive(case.views[0], case.tables[0], case.tables[1], case.box)
    assert transfer.done(3)
    assert np.array_equal(pool.numpy(), case.handed_over())


def test_what_copies_have_in_common_is_kept() -> None:
    """Other blocks, another length and a start within a block, through one transport."""
    layout, shard = KvLayout(2, 2, 8, 4, 9, "bf16"), KvShard(0, 2, 0, 2)
    source, target = (CacheView(rank, 0, f"pool {rank}", 0, layout, 0, 0, shard) for rank in (0, 1))
    theirs = np.random.default_rng(0).integers(0, 256, layout.pool_bytes, dtype=np.uint8)
    pool, wanted = torch.zeros(layout.pool_bytes, dtype=torch.uint8), np.zeros_like(theirs)
    transport = GatherTransport(pool, target, {"pool 0": torch.from_numpy(theirs.copy())})
    for (first, end), sources, targets, num_kept in (
            ((0, 8), [5, 2], [1, 8], 1), ((4, 11), [0, 7, 3], [0, 2, 6], 1),
            ((6, 9), [4, 1, 8], [4, 3, 5], 2)):
        assert transport.receive(source, sources, targets, Box.of(shard, first, end)).done()
        here, there = array_of(theirs, source), array_of(wanted, target)
        for token in range(first, end):
            at = token // 4, token % 4
            there[:, :, targets[at[0]], at[1]] = here[:, :, sources[at[0]], at[1]]
        assert np.array_equal(pool.numpy(), wanted)
        assert len(transport._copies) == num_kept


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("variant", [kernels.VARIANTS[0], (64, 1)])
def test_a_box_is_packed_and_unpacked(seed: int, variant: tuple[int, int]) -> None:
    """Into a message and out of it, tiles smaller than a cell and than a row among them."""
    case = Case(seed, 24 if INTERPRETS else 90)
    box, (source, target) = case.box, case.views
    row_bytes, num_planes = source.row_bytes(box), 2 * box.num_layers
    message = torch.full((source.num_bytes(box) + 32,), 7, dtype=torch.uint8)
    inner = kernels.message_planes(message, 16, box.num_tokens, row_bytes)
    pool = case.tensor(1)
    step = kernels.cell_tokens(box.first_token, source.layout.tokens_per_block)
    places = np.arange(0, box.num_tokens, step)
    kernels.Copy(
        kernels.pool_planes(case.tensor(0), source, box), inner, step, num_planes, row_bytes, variant,
    ).run(kernels.Cells(source.slots(case.tables[0], box, step), places, step, box.num_tokens))
    data = message.numpy()
    assert np.array_equal(data[16:-16], content(case.memories[0], source, case.tables[0], box))
    assert (data[:16] == 7).all() and (data[-16:] == 7).all(), "nothing beside the message"
    step = kernels.cell_tokens(box.first_token, target.layout.tokens_per_block)
    places = np.arange(0, box.num_tokens, step)
    kernels.Copy(
        inner, kernels.pool_planes(pool, target, box), step, num_planes, row_bytes, variant,
    ).run(kernels.Cells(places, target.slots(case.tables[1], box, step), step, box.num_tokens))
    assert np.array_equal(pool.numpy(), case.handed_over())


def test_whole_blocks_are_copied_within_a_pool() -> None:
    """All layers and heads of the shard, and nothing of the pool's other heads."""
    layout = KvLayout(3, 4, 8, 4, 7, "bf16")
    view = CacheView(0, 0, "pool", 64, layout, 0, 0, KvShard(1, 2, 1, 2))
    memory = np.random.default_rng(0).integers(0, 256, 64 + layout.pool_bytes, dtype=np.uint8)
    pool, wanted = torch.from_numpy(memory.copy()), memory.copy()
    kernels.copy_blocks(pool, view, [5, 0, 3], [1, 6, 2])
    array = array_of(wanted, view)
    array[1:3, :, [1, 6, 2], :, 1:3] = array[1:3, :, [5, 0, 3], :, 1:3]
    assert np.array_equal(pool.numpy(), wanted)
    kernels.copy_blocks(pool, view, [], [])
    assert np.array_equal(pool.numpy(), wanted)
    with pytest.raises(ValueError, match="2 blocks to copy into 1"):
        kernels.copy_blocks(pool, view, [0, 1], [2])
    with pytest.raises(ValueError, match="of a pool of 7"):
        kernels.copy_blocks(pool, view, [0], [7])


def test_cells_are_as_large_as_blocks_and_the_start_allow() -> None:
    assert kernels.cell_tokens(0, 16, 64) == 16
    assert kernels.cell_tokens(32, 16, 64) == 16
    assert kernels.cell_tokens(24, 16) == 8
    assert kernels.cell_tokens(0, 6, 16) == 2
    assert kernels.cell_tokens(5, 16) == 1


def test_a_cell_knows_its_tokens() -> None:
    cells = kernels.Cells(np.array([32, 0, 16]), np.array([0, 64, 32]), 16, 37)
    assert cells.table.tolist() == [[32, 0, 16], [0, 64, 16], [16, 32, 5]]
    assert cells.slots(0).tolist() == [*range(32, 48), *range(16), *range(16, 21)]


def test_a_pool_has_slots_of_32_bits() -> None:
    view = CacheView(0, 0, "pool", 0, KvLayout(1, 1, 8, 64, 2**25 + 1, "bf16"), 0, 0, KvShard(0, 1, 0, 1))
    with pytest.raises(ValueError, match="33554433 blocks of 64 tokens has more"):
        kernels.pool_planes(torch.empty(0, dtype=torch.uint8), view, Box(0, 1, 0, 1, 0, 64))


@pytest.mark.parametrize(("change", "text"), [
    ({"memory": "rank 7"}, "lie in rank 7 of host 0, open at rank 1 of host 0: rank 0, rank 1"),
    ({"host": 3}, "of host 3"),
    ({"offset": 10**9}, "which has"),
])
def test_what_is_not_open_is_refused(change: dict[str, Any], text: str) -> None:
    import msgspec

    case = Case(1, 24)
    transport = GatherTransport(case.tensor(1), case.views[1], {"rank 0": case.tensor(0)})
    with pytest.raises(ValueError, match=text):
        transport.receive(msgspec.structs.replace(case.views[0], **change), case.tables[0], case.tables[1],
                          case.box)


def test_what_is_not_in_the_shard_is_refused() -> None:
    view = CacheView(0, 0, "pool", 0, KvLayout(2, 1, 8, 4, 4, "fp32"), 2, 1, KvShard(2, 2, 1, 1))
    transport = GatherTransport(torch.zeros(view.layout.pool_bytes, dtype=torch.uint8), view, {})
    for box, blocks in ((Box(0, 2, 1, 2, 0, 4), [0]), (Box(2, 4, 0, 1, 0, 4), [0]),
                        (Box(2, 4, 1, 2, 0, 5), [0]), (Box(2, 4, 1, 2, 0, 4), [4])):
        with pytest.raises(ValueError, match=r"of a pool of|is not in|tokens"):
            transport.receive(view, blocks, blocks, box)


@in_the_first_run
def test_the_triton_kernel_does_the_same() -> None:
    run_again(__file__)


@in_the_first_run
@pytest.mark.parametrize("shape", [(True, 1, 4096), (False, 16, 256), (False, 128, 32)])
def test_what_a_hopper_would_run(shape: tuple[bool, int, int]) -> None:
    """Compiled without a GPU: by loads of 16 bytes, all of a tile on their way before its first store."""
    pytest.importorskip("triton", minversion="3.3")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from disagg_mpi.transfer.cuda.rows import copy_cells

    kinds = {"source": "*i64", "target": "*i64", "cells": "*i32"}
    names = copy_cells.arg_names
    signature = {name: kinds.get(name, "constexpr" if name.isupper() else "i32") for name in names}
    constants = {(names.index(name),): value
                 for name, value in zip(("JOINED", "ROWS", "COLUMNS"), shape, strict=True)}
    # Of Llama-3-8B all pointers and distances are multiples of 16 elements; others get smaller loads.
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(8)}
    compiled = triton.compile(
        ASTSource(copy_cells, signature, constants, aligned), target=GPUTarget("cuda", 90, 32),
        options={"num_warps": kernels.NUM_WARPS})
    moves = re.findall(r"(ld|st)\.global\S*\.v2\.b64", compiled.asm["ptx"])
    tile_loads = kernels.TILE_BYTES // (16 * 32 * kernels.NUM_WARPS)
    assert moves == ["ld"] * tile_loads + ["st"] * tile_loads
