"""Messages between real ranks: each byte of a box to its place, and no other byte touched."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from disagg_mpi.transfer.layout import Box, CacheView, KvLayout
from disagg_mpi.transfer.memory import SharedMemory
from disagg_mpi.transfer.partition import KvShard, partition, shard_of
from disagg_mpi.transfer.transports import CopyTransport, MpiTransport, Pool, Transfer

if TYPE_CHECKING:
    from mpi4py import MPI

DEADLINE = 30.0
pytestmark = pytest.mark.mpi(min_size=2)


def finish(transfers: list[Transfer]) -> None:
    end = time.monotonic() + DEADLINE
    while transfers := [transfer for transfer in transfers if not transfer.done()]:
        assert time.monotonic() < end, f"{len(transfers)} transfers are open"


def array_of(memory: Pool, view: CacheView) -> Any:
    layout = view.layout
    return memory[view.offset : view.offset + layout.pool_bytes].reshape(
        layout.num_layers, 2, layout.num_blocks, layout.tokens_per_block, layout.num_kv_heads, -1)


def filled(view: CacheView, seed: int) -> Pool:
    size = view.offset + view.layout.pool_bytes + 5
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def copy_box(
    source: Pool, source_view: CacheView, source_blocks: list[int],
    memory: Pool, view: CacheView, blocks: list[int], box: Box,
) -> None:
    """The oracle: token by token of each plane, in place."""
    here, there = array_of(memory, view), array_of(source, source_view)
    for layer in range(box.first_layer, box.end_layer):
        for token in range(box.first_token, box.end_token):
            rows = []
            for one, table in ((view, blocks), (source_view, source_blocks)):
                size = one.layout.tokens_per_block
                heads = slice(box.first_head - one.origin_head, box.end_head - one.origin_head)
                rows.append((layer - one.origin_layer, slice(None), table[token // size], token % size,
                             heads))
            here[rows[0]] = there[rows[1]]


def random_case(seed: int) -> tuple[Box, list[CacheView], list[list[int]]]:
    """A box, and the views and tables of two ranks that have it; equal on all ranks."""
    draw = random.Random(seed)
    cuts = []
    for _ in range(2):  # layers, heads
        first = draw.randint(0, 4)
        cuts.append((first, draw.randint(first + 1, 6)))
    first_token = draw.randint(0, 30)
    box = Box(*cuts[0], *cuts[1], first_token, first_token + draw.randint(0 if seed % 9 == 0 else 1, 60))
    dtype, head_dim = draw.choice(["fp32", "bf16"]), draw.choice([1, 3, 8, 64])
    views, tables = [], []
    for rank in range(2):
        shard: list[int] = []
        origins, extents = [], []
        for first, end in cuts:
            held = (draw.randint(0, first), draw.randint(end, 6))
            origins.append(draw.randint(0, held[0]))
            extents.append(draw.randint(held[1], 6) - origins[-1])
            shard += [held[0], held[1] - held[0]]
        size = draw.choice([1, 4, 7, 16])
        needed = -(-box.end_token // size)
        layout = KvLayout(*extents, head_dim, size, needed + draw.randint(1, 6), dtype)
        views.append(CacheView(rank, rank, f"rank {rank}", draw.choice([0, 3, 4096]), layout, *origins,
                               KvShard(*shard)))
        blocks = list(range(layout.num_blocks))
        if draw.random() < 0.7:
            draw.shuffle(blocks)
        tables.append(blocks[: needed + draw.randint(0, 1)])
    return box, views, tables


@pytest.mark.parametrize("first_seed", range(0, 90, 15))
def test_any_box_comes_to_its_place(
    world: MPI.Intracomm, agree: Callable[[list[str]], None], first_seed: int
) -> None:
    """Fifteen transfers at once, the receives posted in another order than the sends."""
    problems, open_transfers, checks, ends = [], [], [], []
    comm = world.Dup()
    seeds = list(range(first_seed, first_seed + 15))
    if comm.rank == 1:
        random.Random(first_seed).shuffle(seeds)
    for seed in seeds:
        box, views, tables = random_case(seed)
        if comm.rank < 2:
            memory = filled(views[comm.rank], 2 * seed + comm.rank)
            end = MpiTransport(comm, memory, views[comm.rank])
            ends.append(end)
            start = end.send if comm.rank == 0 else end.receive
            open_transfers.append(start(1 - comm.rank, seed, tables[comm.rank], box))
            checks.append((seed, memory, box, views, tables))
    finish(open_transfers)
    for seed, memory, box, views, tables in checks:
        wanted = filled(views[comm.rank], 2 * seed + comm.rank)
        if comm.rank == 1:
            copy_box(filled(views[0], 2 * seed), views[0], tables[0], wanted, views[1], tables[1], box)
        if not (memory == wanted).all():
            problems.append(f"case {seed} {box}: {(memory != wanted).sum()} bytes are wrong")
    for end in ends:
        end.close()
    agree(problems)
    comm.Free()


@pytest.mark.parametrize(("source_shape", "target_shape"), [
    ((1, 1), (3, 2)), ((3, 1), (1, 2)), ((6, 2), (3, 1)), ((1, 3), (6, 1))])
def test_every_rank_of_a_group_gets_its_shard(
    world: MPI.Intracomm, agree: Callable[[list[str]], None],
    source_shape: tuple[int, int], target_shape: tuple[int, int],
) -> None:
    """Rank 0 plays all ranks of one group, rank 1 of another; tp=6 holds each of three KV heads twice."""
    comm = world.Dup()
    num_layers, num_heads, num_tokens, sizes = 5, 3, 37, (16, 4)
    groups = []
    for side, (tp, pp) in enumerate((source_shape, target_shape)):
        views = []
        for index in range(tp * pp):
            shard = shard_of(num_layers, num_heads, tp, pp, index)
            layout = KvLayout(shard.num_layers, shard.num_heads, 8, sizes[side], 40 // sizes[side] + 2,
                              "bf16")
            views.append(CacheView(index, side, f"{side}.{index}", 0, layout, shard.first_layer,
                                   shard.first_head, shard))
        groups.append(views)
    whole = np.random.default_rng(1).integers(0, 256, (num_layers, 2, num_tokens, num_heads, 16), np.uint8)
    tables = [list(reversed(range(-(-num_tokens // size)))) for size in sizes]
    mine: list[tuple[CacheView, Pool, MpiTransport]] = []
    if comm.rank < 2:
        for view in groups[comm.rank]:
            memory = np.zeros(view.layout.pool_bytes, np.uint8)
            mine.append((view, memory, MpiTransport(comm, memory, view)))

    def tokens_of(view: CacheView, memory: Pool) -> Any:
        """Of a rank's array, ``[layers, 2, tokens, heads, bytes]`` (a copy) for its side's table."""
        blocks = array_of(memory, view)[:, :, tables[comm.rank]]
        return blocks.reshape(*blocks.shape[:2], -1, *blocks.shape[4:])[:, :, :num_tokens]

    def shard_in(view: CacheView) -> Any:
        shard = view.shard
        return whole[shard.first_layer : shard.end_layer, :, :, shard.first_head : shard.end_head]

    if comm.rank == 0:
        for view, memory, _ in mine:
            array = array_of(memory, view)
            for token in range(num_tokens):
                array[:, :, tables[0][token // sizes[0]], token % sizes[0]] = shard_in(view)[:, :, token]
    parts = partition([view.shard for view in groups[0]], [view.shard for view in groups[1]])
    transfers = []
    for tag, part in enumerate(parts):
        box = Box.of(part, 0, num_tokens)
        if comm.rank == 0:
            transfers.append(mine[part.source][2].send(1, tag, tables[0], box))
        elif comm.rank == 1:
            transfers.append(mine[part.target][2].receive(0, tag, tables[1], box))
    finish(transfers)
    problems = [f"{view}" for view, memory, _ in mine
                if not (tokens_of(view, memory) == shard_in(view)).all()]
    for _, _, end in mine:
        end.close()
    agree(problems)
    comm.Free()


def test_a_copy_sees_what_another_rank_wrote(
    world: MPI.Intracomm, agree: Callable[[list[str]], None]
) -> None:
    """Two pools with blocks of other sizes in one window; one head of three, from the middle of a block."""
    shard = KvShard(0, 4, 1, 1)
    source = CacheView(0, 0, "window", 0, KvLayout(4, 3, 64, 16, 8, "fp32"), 0, 0, shard)
    target = CacheView(1, 0, "window", source.layout.pool_bytes, KvLayout(4, 3, 64, 4, 40, "fp32"), 0, 0,
                       shard)
    tables = [5, 0, 7, 6], list(reversed(range(20)))
    box = Box(0, 4, 1, 2, 9, 61)
    window = SharedMemory(world, source.layout.pool_bytes + target.layout.pool_bytes)
    problems = []
    before = np.random.default_rng(0).integers(0, 256, len(window.memory), np.uint8)
    if world.rank == 0:
        window.memory[:] = before
    world.Barrier()
    if world.rank == 1:
        finish([CopyTransport(window.memory, target).receive(source, tables[0], tables[1], box)])
        wanted = before.copy()
        copy_box(before, source, tables[0], wanted, target, tables[1], box)
        if not (window.memory == wanted).all():
            problems.append(f"{(window.memory != wanted).sum()} bytes are wrong")
    agree(problems)
    window.close()


def test_a_box_of_another_rank_is_refused_before_anything_is_sent(
    world: MPI.Intracomm, agree: Callable[[list[str]], None]
) -> None:
    view = CacheView(0, 0, "private", 0, KvLayout(2, 1, 8, 4, 4, "fp32"), 2, 1, KvShard(2, 2, 1, 1))
    end = MpiTransport(world, np.zeros(view.layout.pool_bytes, np.uint8), view)
    problems = []
    for box in (Box(0, 2, 1, 2, 0, 4), Box(2, 4, 0, 1, 0, 4), Box(2, 4, 1, 2, 0, 17)):
        for start in (end.send, end.receive):
            try:
                start(0, 1, [0, 1, 2, 3], box)
                problems.append(f"{box} was taken")
            except ValueError:
                pass
    end.close()
    agree(problems)
