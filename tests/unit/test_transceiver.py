"""The hand-over: where bytes lie, and the protocol of both sides in every order of events."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_mpi.comm.channel import MemoryNetwork
from disagg_mpi.comm.messages import PullRequest, Release
from disagg_mpi.errors import RequestError
from disagg_mpi.transfer.layout import ITEM_BYTES, KvLayout, runs_of
from disagg_mpi.transfer.memory import check_shared_memory, private_pool
from disagg_mpi.transfer.transceiver import SHARED, Pulled, Released, Transceiver
from disagg_mpi.transfer.transports import MemoryTransport, MemoryWire

LAYOUT = KvLayout(num_layers=2, num_kv_heads=2, head_dim=2, tokens_per_block=4, num_blocks=8,
                  dtype="fp32")


# ---- layout ----


def array_of(pool: Any, layout: KvLayout) -> Any:
    """The pool as ``[planes, blocks, tokens, bytes of a token]``."""
    return pool.reshape(layout.num_planes, layout.num_blocks, layout.tokens_per_block,
                        layout.token_bytes)


@st.composite
def tables(draw: st.DrawFn) -> tuple[KvLayout, list[int], list[int], int]:
    layout = KvLayout(draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4)),
                      draw(st.integers(1, 5)), draw(st.integers(1, 9)),
                      draw(st.sampled_from(sorted(ITEM_BYTES))))
    blocks = st.permutations(range(layout.num_blocks))
    count = draw(st.integers(1, layout.num_blocks))
    full = count * layout.tokens_per_block
    num_tokens = draw(st.integers(max(1, full - layout.tokens_per_block + 1), full))
    spare = draw(st.integers(0, layout.num_blocks - count))
    return layout, draw(blocks)[: count + spare], draw(blocks)[:count], num_tokens


@given(tables())
@settings(deadline=None)
def test_bytes_have_one_order_however_the_blocks_are_cut(
        case: tuple[KvLayout, list[int], list[int], int]) -> None:
    layout, source, target, num_tokens = case
    pools = [private_pool(layout.pool_bytes) for _ in range(2)]
    rng = np.random.default_rng(0)
    for pool in pools:
        pool[:] = rng.integers(0, 256, len(pool), dtype=np.uint8)
    before = array_of(pools[1].copy(), layout)
    wire = MemoryWire()
    sent = MemoryTransport(1, wire, pools[0], layout).send(2, 5, source, num_tokens)
    assert not sent.done()
    received = MemoryTransport(2, wire, pools[1], layout).receive(1, 5, target, num_tokens)
    assert received.done() and sent.done()
    reference = before.copy()
    for position in range(num_tokens):
        block, slot = divmod(position, layout.tokens_per_block)
        reference[:, target[block], slot] = array_of(pools[0], layout)[:, source[block], slot]
    assert np.array_equal(array_of(pools[1], layout), reference), "just these tokens, no other byte"


@given(tables())
@settings(deadline=None)
def test_pieces_are_the_tokens_once_each(case: tuple[KvLayout, list[int], list[int], int]) -> None:
    layout, source, _, num_tokens = case
    offsets, counts = layout.pieces(source, num_tokens)
    assert int(counts.sum()) == num_tokens * layout.num_planes
    covered = np.zeros(layout.pool_bytes, dtype=np.int64)
    for offset, count in zip(offsets, counts, strict=True):
        covered[offset : offset + count * layout.token_bytes] += 1
    assert covered.max() == 1
    assert covered.sum() == layout.kv_bytes(num_tokens)
    used = source[: layout.blocks_for(num_tokens)]
    assert len(offsets) == len(runs_of(used)) * layout.num_planes


@given(st.lists(st.integers(0, 30), unique=True))
def test_runs_join_neighbours_and_nothing_else(blocks: list[int]) -> None:
    runs = runs_of(blocks)
    assert [b for first, count in runs for b in range(first, first + count)] == blocks
    assert all(a + n != b for (a, n), (b, _) in itertools.pairwise(runs))


def test_sizes() -> None:
    assert LAYOUT.token_bytes == 2 * 2 * 4
    assert LAYOUT.block_bytes * LAYOUT.num_blocks == LAYOUT.pool_bytes
    assert [LAYOUT.blocks_for(n) for n in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
    assert LAYOUT.token_runs([3, 4, 1], 9) == [(12, 8), (4, 1)]


def test_pools_of_different_length_have_the_same_blocks() -> None:
    import msgspec

    assert LAYOUT.same_block(msgspec.structs.replace(LAYOUT, num_blocks=99))
    for change in ({"num_layers": 3}, {"num_kv_heads": 1}, {"head_dim": 4}, {"tokens_per_block": 8},
                   {"dtype": "bf16"}):
        assert not LAYOUT.same_block(msgspec.structs.replace(LAYOUT, **change))


def test_private_memory_is_page_aligned_and_writable() -> None:
    pool = private_pool(10000)
    assert pool.ctypes.data % 4096 == 0
    assert len(pool) == 10000
    pool[-1] = 7
    assert private_pool(0) is not None


def test_a_window_that_does_not_fit_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    from disagg_mpi.errors import ConfigError

    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 64 * 2**20}))
    check_shared_memory(64 * 2**20)
    with pytest.raises(ConfigError, match=r"100 MiB .* 64 MiB free; .*--shm-size.*--transport mpi"):
        check_shared_memory(100 * 2**20)


# ---- the protocol ----


class Pair:
    """A context rank 1 and a generation rank 2."""

    def __init__(self, *, shared: bool, layouts: tuple[KvLayout, KvLayout] = (LAYOUT, LAYOUT),
                 use_shared: bool = True, max_tag: int = 2**15 - 1) -> None:
        self.network, self.wire = MemoryNetwork(), MemoryWire()
        self.messages: list[Any] = []
        self.network.on_send = lambda _source, _rank, message: self.messages.append(message)
        one = private_pool(layouts[0].pool_bytes)
        self.pools = [one, one if shared else private_pool(layouts[1].pool_bytes)]
        self.context, self.generation = (
            Transceiver(rank, self.network.channel(rank),
                        MemoryTransport(rank, self.wire, pool, layout), layout,
                        pool="host" if shared else str(rank), use_shared=use_shared,
                        max_tag=max_tag)
            for rank, pool, layout in zip((1, 2), self.pools, layouts, strict=True))

    def rounds(self, count: int = 4) -> list[Any]:
        """Both sides move on; their events, context's first in each round."""
        return [event for _ in range(count)
                for event in self.context.progress() + self.generation.progress()]

    def assert_over(self) -> None:
        assert self.rounds() == []
        assert self.context.num_open == self.generation.num_open == 0
        assert not self.context.is_moving and not self.generation.is_moving
        assert self.wire._sides == {}


def kinds(events: list[Any]) -> list[tuple[type, int]]:
    return [(type(event), event.request_id) for event in events]


def test_copying_brings_the_bytes_and_then_frees_the_context() -> None:
    pair = Pair(shared=False)
    pair.pools[0][:] = np.arange(LAYOUT.pool_bytes) % 251
    state = pair.context.offer(7, [5, 2, 6], 10)
    assert pair.context.has_offer(7)
    pair.generation.pull(70, 7, state, [1, 3, 4])
    assert pair.generation.is_moving
    events = pair.rounds()
    assert kinds(events) == [(Pulled, 70), (Released, 7)]
    pulled, released = events
    assert (pulled.taken, pulled.abandoned, pulled.transport) == (None, False, "memory")
    assert pulled.bytes_moved == pulled.kv_bytes == LAYOUT.kv_bytes(10)
    assert released.exchanged is None
    source, target = (array_of(pool, LAYOUT) for pool in pair.pools)
    assert np.array_equal(target[:, [1, 3]], source[:, [5, 2]])
    assert np.array_equal(target[:, 4, :2], source[:, 6, :2])
    assert not target[:, 4, 2:].any()
    pair.assert_over()


def test_in_one_pool_blocks_are_exchanged_and_no_byte_moves() -> None:
    pair = Pair(shared=True)
    before = pair.pools[0].copy()
    state = pair.context.offer(7, [0, 1, 2], 10)
    pair.generation.pull(70, 7, state, [4, 5, 6, 7])
    events = pair.rounds()
    pulled = next(e for e in events if isinstance(e, Pulled))
    released = next(e for e in events if isinstance(e, Released))
    assert pulled.taken == [0, 1, 2]
    assert released.exchanged == [4, 5, 6]
    assert (pulled.bytes_moved, pulled.kv_bytes, pulled.transport) == (0, LAYOUT.kv_bytes(10), SHARED)
    assert np.array_equal(before, pair.pools[0])
    assert [type(m) for m in pair.messages] == [Release]
    pair.assert_over()


def test_what_the_context_holds_beyond_the_reservation_goes_back() -> None:
    pair = Pair(shared=True)
    state = pair.context.offer(7, [0, 1, 2, 3], 6)
    pair.generation.pull(70, 7, state, [5, 6])
    events = pair.rounds()
    assert next(e for e in events if isinstance(e, Pulled)).taken == [0, 1]
    assert next(e for e in events if isinstance(e, Released)).exchanged == [5, 6, 2, 3]


def test_one_pool_may_still_be_copied_within() -> None:
    pair = Pair(shared=True, use_shared=False)
    pair.pools[0][:] = np.arange(LAYOUT.pool_bytes) % 251
    source = array_of(pair.pools[0], LAYOUT)[:, [0, 1]].copy()
    pair.generation.pull(70, 7, pair.context.offer(7, [0, 1], 8), [4, 5])
    assert next(e for e in pair.rounds() if isinstance(e, Pulled)).bytes_moved
    assert np.array_equal(array_of(pair.pools[0], LAYOUT)[:, [4, 5]], source)
    pair.assert_over()


@pytest.mark.parametrize("shared", [True, False])
def test_a_dropped_offer_is_released_once(shared: bool) -> None:
    pair = Pair(shared=shared)
    pair.context.offer(7, [0], 4)
    pair.context.drop(7)
    pair.context.drop(7)
    pair.context.drop(8)
    assert kinds(pair.rounds()) == [(Released, 7)]
    pair.assert_over()


@pytest.mark.parametrize("shared", [True, False])
def test_a_refused_offer_is_released(shared: bool) -> None:
    pair = Pair(shared=shared)
    pair.generation.refuse(7, pair.context.offer(7, [0], 4))
    events = pair.rounds()
    assert kinds(events) == [(Released, 7)]
    assert events[0].exchanged is None
    pair.assert_over()


def test_an_offer_is_kept_as_long_as_nobody_asks() -> None:
    pair = Pair(shared=False)
    pair.context.offer(7, [0], 4)
    assert pair.rounds() == []
    assert pair.context.num_open == 1
    assert not pair.context.is_moving


def test_an_abandoned_pull_keeps_its_blocks_until_the_bytes_are_there() -> None:
    pair = Pair(shared=False)
    pair.wire.hold = True
    pair.generation.pull(70, 7, pair.context.offer(7, [0, 1], 8), [2, 3])
    assert pair.rounds() == []
    assert pair.context.is_moving
    assert pair.generation.abandon(70)
    assert pair.rounds() == []
    pair.context.drop(7)  # whoever asks for it: the send is open, the blocks stay
    assert pair.rounds() == []
    assert pair.generation.num_open == pair.context.num_open == 1
    pair.wire.hold = False
    events = pair.rounds()
    assert kinds(events) == [(Pulled, 70), (Released, 7)]
    assert events[0].abandoned
    pair.assert_over()


def test_abandon_says_whether_there_was_anything() -> None:
    pair = Pair(shared=False)
    assert not pair.generation.abandon(70)
    pair.generation.pull(70, 7, pair.context.offer(7, [0], 4), [2])
    assert pair.generation.abandon(70)
    assert pair.generation.abandon(70)
    assert kinds(pair.rounds()) == [(Pulled, 70), (Released, 7)]
    assert not pair.generation.abandon(70)


def test_the_context_frees_only_when_its_send_is_over_too() -> None:
    """A Release may overtake the completion of the send at the sender's side."""
    pair = Pair(shared=False)
    pair.wire.hold = True
    state = pair.context.offer(7, [0], 4)
    pair.generation.pull(70, 7, state, [2])
    pair.context.progress()
    pair.generation.refuse(7, state)  # stands for the early Release
    assert pair.context.progress() == []
    pair.wire.hold = False
    assert (Released, 7) in kinds(pair.rounds())


@pytest.mark.parametrize("change", [
    {"num_layers": 1}, {"tokens_per_block": 8}, {"dtype": "bf16"}, {"head_dim": 4}])
def test_pools_that_do_not_match_are_refused(change: dict[str, Any]) -> None:
    import msgspec

    pair = Pair(shared=False, layouts=(LAYOUT, msgspec.structs.replace(LAYOUT, **change)))
    state = pair.context.offer(7, [0], 4)
    with pytest.raises(RequestError, match="differ"):
        pair.generation.pull(70, 7, state, [2])
    pair.generation.refuse(7, state)
    assert kinds(pair.rounds()) == [(Released, 7)]
    pair.assert_over()


@pytest.mark.parametrize("shared", [True, False])
def test_too_few_reserved_blocks_are_refused(shared: bool) -> None:
    pair = Pair(shared=shared)
    state = pair.context.offer(7, [0, 1, 2], 10)
    with pytest.raises(RequestError, match="3 blocks to hand over, 2 reserved"):
        pair.generation.pull(70, 7, state, [4, 5])
    assert pair.generation.num_open == 0


@pytest.mark.parametrize("state", [b"", b"nonsense", b"\x90"])
def test_a_state_that_is_none_is_refused(state: bytes) -> None:
    pair = Pair(shared=False)
    with pytest.raises(RequestError):
        pair.generation.pull(70, 7, state, [4, 5])


def test_tags_are_unique_among_open_pulls_and_used_again() -> None:
    pair = Pair(shared=False, max_tag=2)
    pair.wire.hold = True
    for index in range(3):
        pair.generation.pull(70 + index, index, pair.context.offer(index, [index], 4), [index])
    tags = [m.tag for m in pair.messages if isinstance(m, PullRequest)]
    assert sorted(tags) == [0, 1, 2]
    state = pair.context.offer(9, [5], 4)
    with pytest.raises(RequestError, match="all tags are in use"):
        pair.generation.pull(79, 9, state, [5])
    pair.wire.hold = False
    assert len(pair.rounds()) == 6
    pair.generation.pull(79, 9, state, [5])
    assert pair.messages[-1].tag in (0, 1, 2)
    assert kinds(pair.rounds()) == [(Pulled, 79), (Released, 9)]
    pair.assert_over()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_many_at_once_in_any_order_end_with_nothing_open(data: st.DataObject) -> None:
    """Offers are pulled, abandoned, dropped or refused while the wire stalls; each ends exactly once."""
    shared = data.draw(st.booleans())
    pair = Pair(shared=shared)
    rng = np.random.default_rng(1)
    pair.pools[0][:] = rng.integers(0, 256, LAYOUT.pool_bytes, dtype=np.uint8)
    # Blocks 0-3 are the context's, one a request; 4-7 the generation's.
    states = {request: pair.context.offer(request, [request], 4) for request in range(4)}
    source = array_of(pair.pools[0].copy(), LAYOUT)
    unpulled, pulled_ids, events = set(states), set(), []
    abandoned: set[int] = set()
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(
            ["pull", "drop", "refuse", "abandon", "context", "generation", "hold", "free"]))
        if action in ("pull", "drop", "refuse") and unpulled:
            request = data.draw(st.sampled_from(sorted(unpulled)))
            unpulled.discard(request)
            if action == "pull":
                pair.generation.pull(request, request, states[request], [request + 4])
                pulled_ids.add(request)
            elif action == "drop":
                pair.context.drop(request)
            else:
                pair.generation.refuse(request, states[request])
        elif action == "abandon" and pulled_ids:
            request = data.draw(st.sampled_from(sorted(pulled_ids)))
            if pair.generation.abandon(request):
                abandoned.add(request)
        elif action == "context":
            events += pair.context.progress()
        elif action == "generation":
            events += pair.generation.progress()
        elif action in ("hold", "free"):
            pair.wire.hold = action == "hold"
    pair.wire.hold = False
    for request in unpulled:
        pair.context.drop(request)
    events += pair.rounds(6)
    assert sorted(e.request_id for e in events if isinstance(e, Released)) == [0, 1, 2, 3]
    ends = [e for e in events if isinstance(e, Pulled)]
    assert sorted(e.request_id for e in ends) == sorted(pulled_ids)
    target = array_of(pair.pools[1], LAYOUT)
    for end in ends:
        block = end.taken[0] if end.taken is not None else end.request_id + 4
        assert np.array_equal(target[:, block], source[:, end.request_id])
        if end.abandoned:
            assert end.request_id in abandoned
    pair.assert_over()
