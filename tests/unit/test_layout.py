"""Where bytes lie and how they move within a process, against an oracle that knows no runs or strides."""

from __future__ import annotations

import itertools
import math
import sys
import threading
import time
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_mpi.transfer import transports
from disagg_mpi.transfer.layout import ITEM_BYTES, Box, CacheView, KvLayout, runs_of
from disagg_mpi.transfer.partition import KvShard, Part
from disagg_mpi.transfer.transports import CopyTransport, MemoryTransport, MemoryWire, Pool, Transfer

WHOLE = KvShard(first_layer=0, num_layers=4, first_head=0, num_heads=4)


def array_of(memory: Pool, view: CacheView) -> Any:
    """``[layers, 2, blocks, tokens_per_block, heads, bytes of a head]``, written out from the definition."""
    layout = view.layout
    return memory[view.offset : view.offset + layout.pool_bytes].reshape(
        layout.num_layers, 2, layout.num_blocks, layout.tokens_per_block, layout.num_kv_heads, -1)


def copied(
    source: Any, source_view: CacheView, source_blocks: list[int],
    memory: Pool, view: CacheView, blocks: list[int], box: Box,
) -> Pool:
    """The oracle: ``memory`` after ``box`` has come, one head of one token at a time."""
    memory = memory.copy()
    there, here = array_of(source.copy(), source_view), array_of(memory, view)

    def place(one: CacheView, table: list[int], layer: int, kv: int, token: int, head: int) -> Any:
        size = one.layout.tokens_per_block
        return (layer - one.origin_layer, kv, table[token // size], token % size, head - one.origin_head)

    for layer in range(box.first_layer, box.end_layer):
        for kv in (0, 1):
            for token in range(box.first_token, box.end_token):
                for head in range(box.first_head, box.end_head):
                    here[place(view, blocks, layer, kv, token, head)] = there[
                        place(source_view, source_blocks, layer, kv, token, head)]
    return memory


class Case(msgspec.Struct):
    """A box, and two ranks' views and tables that have it."""

    box: Box
    views: list[CacheView]
    tables: list[list[int]]
    seed: int


@st.composite
def cases(draw: st.DrawFn, one_memory: bool) -> Case:
    """Any box in any two views; in one memory (one after the other), or each in its own."""
    starts = [sorted(draw(st.lists(st.integers(0, 4), min_size=2, max_size=2, unique=True)))
              for _ in range(2)]
    (first_layer, end_layer), (first_head, end_head) = starts
    first_token = draw(st.integers(0, 12))
    end_token = first_token + draw(st.integers(0, 15))
    box = Box(first_layer, end_layer, first_head, end_head, first_token, end_token)
    dtype, head_dim = draw(st.sampled_from(sorted(ITEM_BYTES))), draw(st.integers(1, 4))
    views, tables, offset = [], [], draw(st.integers(0, 9))
    for rank in range(2):
        # What this rank has lies around the box, and what the array has around that.
        shard, origin, extent = [], [], []
        for first, end in ((first_layer, end_layer), (first_head, end_head)):
            held = draw(st.integers(0, first)), draw(st.integers(end, 4))
            begin = draw(st.integers(0, held[0]))
            shard += [held[0], held[1] - held[0]]
            origin.append(begin)
            extent.append(draw(st.integers(held[1], 4)) - begin)
        size = draw(st.integers(1, 5))
        needed = -(-end_token // size)
        layout = KvLayout(extent[0], extent[1], head_dim, size, needed + draw(st.integers(1, 3)), dtype)
        views.append(CacheView(rank, 0, "window" if one_memory else f"rank {rank}", offset, layout,
                               origin[0], origin[1], KvShard(*shard)))
        tables.append(draw(st.permutations(range(layout.num_blocks)))[: needed + draw(st.integers(0, 1))])
        if one_memory:
            offset += layout.pool_bytes + draw(st.integers(0, 5))
    return Case(box, views, tables, draw(st.integers(0, 99)))


def filled(view: CacheView, seed: int) -> Pool:
    size = view.offset + view.layout.pool_bytes + 3
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


# ---- arithmetic ----


@given(st.lists(st.integers(0, 9)))
def test_runs_join_neighbours_and_keep_the_order(block_ids: list[int]) -> None:
    runs = runs_of(block_ids)
    assert [first + i for first, count in runs for i in range(count)] == block_ids
    assert all(a + n != b for (a, n), (b, _) in itertools.pairwise(runs))


@settings(max_examples=300, deadline=None)
@given(cases(one_memory=False))
def test_token_runs_are_the_slots_of_the_positions(case: Case) -> None:
    box, layout, table = case.box, case.views[0].layout, case.tables[0]
    size = layout.tokens_per_block
    slots = [first + i for first, count in layout.token_runs(table, box.end_token, box.first_token)
             for i in range(count)]
    assert slots == [table[t // size] * size + t % size for t in range(box.first_token, box.end_token)]
    for step in {1, math.gcd(box.first_token, size)}:
        assert case.views[0].slots(table, box, step).tolist() == slots[::step]


@settings(max_examples=300, deadline=None)
@given(cases(one_memory=False))
def test_pieces_are_the_bytes_of_the_box_in_canonical_order(case: Case) -> None:
    box, view, table = case.box, case.views[0], case.tables[0]
    # Every byte of the memory is its own number.
    size = view.offset + view.layout.pool_bytes
    numbers = np.arange(size)
    array = array_of(numbers.view(), view)
    tokens = view.layout.tokens_per_block
    wanted = [array[layer - view.origin_layer, kv, table[t // tokens], t % tokens,
                    box.first_head - view.origin_head : box.end_head - view.origin_head].ravel()
              for layer in range(box.first_layer, box.end_layer) for kv in (0, 1)
              for t in range(box.first_token, box.end_token)]
    row = view.row_bytes(box)
    found = [np.arange(offset + i * view.layout.token_bytes, offset + i * view.layout.token_bytes + row)
             for offset, count in zip(*view.pieces(table, box), strict=True) for i in range(count)]
    assert [list(r) for r in found] == [list(r) for r in wanted]
    assert sum(map(len, found)) == view.num_bytes(box)


def view_of(shard: KvShard = WHOLE, *, rank: int = 0, num_blocks: int = 4, offset: int = 0,
            memory: str = "window", host: int = 0, **layout: Any) -> CacheView:
    given = {"num_layers": 4, "num_kv_heads": 4, "head_dim": 2, "tokens_per_block": 4, "dtype": "fp32"}
    return CacheView(rank, host, memory, offset, KvLayout(**(given | {"num_blocks": num_blocks} | layout)),
                     0, 0, shard)


@pytest.mark.parametrize(("box", "blocks", "message"), [
    (Box(0, 5, 0, 4, 0, 4), [0], "is not in rank 0's"),
    (Box(0, 4, 0, 5, 0, 4), [0], "is not in rank 0's"),
    (Box(2, 2, 0, 4, 0, 4), [0], "is not in rank 0's"),
    (Box(0, 4, 3, 3, 0, 4), [0], "is not in rank 0's"),
    (Box(0, 4, 0, 4, 0, 5), [0], r"tokens \[0, 5\) of 1 blocks"),
    (Box(0, 4, 0, 4, 3, 2), [0], r"tokens \[3, 2\)"),
    (Box(0, 4, 0, 4, -1, 2), [0], r"tokens \[-1, 2\)"),
    (Box(0, 4, 0, 4, 0, 4), [4], "of a pool of 4"),
    (Box(0, 4, 0, 4, 0, 4), [-1], "of a pool of 4"),
])
def test_what_a_view_does_not_have_is_refused(box: Box, blocks: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        view_of().pieces(blocks, box)
    with pytest.raises(ValueError, match=message):
        view_of().slots(blocks, box)


def test_a_rank_may_not_reach_past_its_own_shard_of_an_exchange_pool() -> None:
    view = view_of(KvShard(2, 2, 1, 1))  # the array has it, the rank has not
    view.runs([0], Box(2, 4, 1, 2, 0, 4))
    for box in (Box(1, 4, 1, 2, 0, 4), Box(2, 4, 0, 2, 0, 4), Box(2, 4, 1, 3, 0, 4)):
        with pytest.raises(ValueError, match="is not in"):
            view.runs([0], box)


def test_a_box_is_cut_from_a_shard_or_a_part() -> None:
    assert Box.of(KvShard(2, 3, 1, 2), 7, 9) == Box(2, 5, 1, 3, 7, 9)
    assert Box.of(Part(8, 9, 2, 3, 1, 2), 7, 9) == Box(2, 5, 1, 3, 7, 9)


# ---- copies within one memory ----


@settings(max_examples=400, deadline=None)
@given(cases(one_memory=True), st.integers(1, 200), st.integers(1, 200))
def test_a_copy_brings_the_box_and_touches_nothing_else(case: Case, slab: int, call: int) -> None:
    source, target = case.views
    memory = filled(target, case.seed)
    wanted = copied(memory, source, case.tables[0], memory, target, case.tables[1], case.box)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transports, "_SLAB_BYTES", slab)
        patch.setattr(transports, "_CALL_BYTES", call)
        transfer = CopyTransport(memory, target).receive(source, case.tables[0], case.tables[1], case.box)
        while not transfer.done():
            pass
    assert transfer.done()
    assert (memory == wanted).all()


def test_a_copy_goes_in_slabs_however_many_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = view_of(num_blocks=16), view_of(num_blocks=16, rank=1, offset=view_of(num_blocks=16)
                                                     .layout.pool_bytes)
    memory = filled(target, 0)
    total = target.num_bytes(box := Box(0, 4, 0, 4, 0, 64))
    monkeypatch.setattr(transports, "_SLAB_BYTES", total // 8)
    monkeypatch.setattr(transports, "_CALL_BYTES", 1)
    transfer = CopyTransport(memory, target).receive(source, list(range(16)), list(range(16)), box)
    looks = 1
    while not transfer.done(1000):
        looks += 1
    assert 8 <= looks <= 9
    assert (array_of(memory, source) == array_of(memory, target)).all()


LARGE = view_of(KvShard(0, 4, 0, 2), num_blocks=1024, tokens_per_block=16, head_dim=64)


def large_copies() -> CopyTransport:
    return CopyTransport(np.ones(LARGE.layout.pool_bytes, np.uint8), msgspec.structs.replace(LARGE, rank=1))


def large_copy(copies: CopyTransport, target: list[int]) -> Transfer:
    """Half of the heads, from the lower half of the blocks to the upper: 32 MiB."""
    return copies.receive(LARGE, list(range(512)), target, Box(0, 4, 0, 2, 0, 512 * 16))


def test_large_copies_need_no_memory() -> None:
    """numpy would suspect that the two, which alternate in every plane, overlap, and copy twice."""
    transfer = large_copy(large_copies(), list(range(512, 1024)))
    tracemalloc.start()
    while not transfer.done():
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20


def test_copies_of_scattered_blocks_leave_the_interpreter_to_other_threads() -> None:
    """Short runs are where numpy might keep the lock; repeated, for the other thread may lack a core."""
    copies, scattered = large_copies(), list(range(1023, 511, -1))
    ran: list[bool] = []
    interval = sys.getswitchinterval()

    def wait_and_run() -> None:
        time.sleep(0.05)
        ran.append(True)

    thread = threading.Thread(target=wait_and_run)
    thread.start()
    # From here on a thread runs only if another lets go of the lock by itself.
    sys.setswitchinterval(60)
    try:
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end:
            pass
        assert not ran
        end += 10
        while not ran and time.perf_counter() < end:
            transfer = large_copy(copies, scattered)
            while not transfer.done():
                pass
        assert ran
    finally:
        sys.setswitchinterval(interval)
        thread.join()


@pytest.mark.parametrize(("change", "message"), [
    ({"memory": "other"}, "blocks lie in other of host 0"), ({"host": 1}, "window of host 1"),
    ({"dtype": "bf16"}, "dtype: bf16 at rank 7, fp32 at rank 0"), ({"head_dim": 3}, "head_dim: 3 at rank 7"),
    ({"num_blocks": 99}, "which has")])
def test_a_source_that_cannot_be_copied_is_refused(change: dict[str, Any], message: str) -> None:
    memory = np.zeros(view_of().layout.pool_bytes, np.uint8)
    with pytest.raises(ValueError, match=message):
        CopyTransport(memory, view_of()).receive(view_of(rank=7, **change), [0], [1], Box(0, 4, 0, 4, 0, 4))


def test_memory_must_hold_the_pool() -> None:
    view = view_of(offset=8)
    for small in (view.layout.pool_bytes, 0):
        with pytest.raises(ValueError, match=f"which has {small}"):
            CopyTransport(np.zeros(small, np.uint8), view)
    CopyTransport(np.zeros(view.layout.pool_bytes + 8, np.uint8), view)


# ---- messages within a process ----


@settings(max_examples=200, deadline=None)
@given(cases(one_memory=False), st.booleans())
def test_a_message_brings_the_box_and_touches_nothing_else(case: Case, receive_first: bool) -> None:
    wire = MemoryWire()
    memories = [filled(view, case.seed + rank) for rank, view in enumerate(case.views)]
    ends = [MemoryTransport(rank, wire, memories[rank], case.views[rank]) for rank in range(2)]
    wanted = copied(memories[0], case.views[0], case.tables[0], memories[1], case.views[1],
                    case.tables[1], case.box)
    sends = [lambda: ends[0].send(1, 5, case.tables[0], case.box),
             lambda: ends[1].receive(0, 5, case.tables[1], case.box)]
    first, second = reversed(sends) if receive_first else sends
    transfer = first()
    assert not transfer.done()
    other = second()
    assert other.done()
    assert transfer.done()
    assert (memories[1] == wanted).all()


def test_messages_are_held_and_told_apart_by_their_tags() -> None:
    wire, box = MemoryWire(), Box(0, 4, 0, 4, 0, 4)
    views = [view_of(rank=rank) for rank in range(2)]
    memories = [filled(view, rank) for rank, view in enumerate(views)]
    ends = [MemoryTransport(rank, wire, memories[rank], views[rank]) for rank in range(2)]
    wire.hold = True
    transfers = [ends[0].send(1, 3, [0], box), ends[1].receive(0, 3, [1], box)]
    assert not any(transfer.done() for transfer in transfers)
    with pytest.raises(ValueError, match="share source, destination and tag"):
        ends[0].send(1, 3, [0], box)
    wire.hold = False
    assert all(transfer.done() for transfer in transfers)
    ends[0].send(1, 4, [0], box)
    late = ends[1].receive(0, 4, [1], Box(0, 4, 0, 4, 0, 3))
    with pytest.raises(ValueError, match="bytes sent"):
        late.done()
