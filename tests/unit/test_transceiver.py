"""The hand-over's protocol between instances of any shape: the bytes, and every order of events."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from handover import Ranks, model_spec
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from disagg_mpi.comm.messages import Announce, Ended, PartDone, PullPart, PullRequest, Release, Watch
from disagg_mpi.errors import ConfigError, IntegrityError, RequestError
from disagg_mpi.transfer import offers, transports
from disagg_mpi.transfer.directory import COPY, MPI, SHARED
from disagg_mpi.transfer.memory import check_shared_memory, private_memory
from disagg_mpi.transfer.offers import MAX_LAYER_GROUPS, MAX_PIECES, Released
from disagg_mpi.transfer.pulls import Pulled

# Context rank 1 and generation rank 2, and how bytes pass between them.
WAYS: dict[str, dict[str, Any]] = {
    "messages": {"transport": "mpi"}, "hosts": {"hosts": [0, 0, 2]},
    "copy": {"generation_tokens_per_block": 3}, "exchange": {}}
MOVING = ["messages", "hosts", "copy"]
SHAPES = ["tp1", "tp2", "tp4", "tp8", "pp2", "pp3", "tp2pp2", "tp4pp2", "tp8pp2"]


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "MIN_PIECE_TOKENS", 1)


def kinds(events: list[Any]) -> list[tuple[type, int]]:
    return [(type(event), event.request_id) for event in events]


def are_over(events: list[Any]) -> bool:
    """Just the pull of request 7 as 70 and its offer, once each."""
    return Counter(kinds(events)) == Counter([(Pulled, 70), (Released, 7)])


def pulled_of(events: list[Any]) -> Pulled:
    return next(event for event in events if isinstance(event, Pulled))


def table(ranks: Ranks, instance: int, start: int, num_tokens: int) -> list[int]:
    """Blocks of ``instance`` for ``num_tokens``, last one first."""
    layout = ranks.views[ranks.groups[instance][0]].layout
    own = ranks.arrangement.block_ids[instance]
    return [own[start + at] for at in range(layout.blocks_for(num_tokens))][::-1]


# ---- the bytes ----


class Case:
    """A hand-over between any two shapes; the first instance is context, the last generation."""

    def __init__(self, data: st.DataObject, way: str) -> None:
        draw = data.draw
        shapes = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(SHAPES))
        sizes = draw(st.integers(1, 5)), draw(st.integers(1, 5))
        options: dict[str, Any] = {"kv_tokens": 60, "tokens_per_block": sizes[0]}
        if way != "exchange":
            options["generation_tokens_per_block"] = sizes[1]
        if way == "messages":
            options["transport"] = "mpi"
        if way == "hosts":
            count = draw(st.integers(2, 3))
            options["hosts"] = [0] * 100
        ranks = Ranks(*shapes, spec=model_spec(draw(st.integers(3, 5)), draw(st.sampled_from([4, 8])),
                                               draw(st.integers(1, 3))),
                      dtype=draw(st.sampled_from(["fp32", "bf16"])), **options)
        if way == "hosts":
            options["hosts"] = [draw(st.integers(0, count - 1)) for _ in range(ranks.topology.world_size)]
            ranks = Ranks(*shapes, spec=ranks.spec, dtype=ranks.config.dtype, **options)
        self.ranks = ranks
        self.num_tokens = draw(st.integers(1, 30))
        self.first_token = draw(st.one_of(st.just(0), st.integers(0, self.num_tokens)))
        self.tables = [
            draw(st.permutations(ranks.arrangement.block_ids[instance]))[
                : ranks.views[ranks.groups[instance][0]].layout.blocks_for(self.num_tokens)
                + draw(st.integers(0, 2))]
            for instance in (0, 1)]
        self.content = ranks.content(draw(st.integers(0, 99)), self.num_tokens)
        self.before = ranks.snapshot()

    def assert_bytes(self) -> None:
        """Since the beginning these tokens have been written, on both sides, and no other byte."""
        ranks, after = self.ranks, self.ranks.snapshot()
        ranks.restore(self.before)
        ranks.write(0, self.tables[0], self.content)
        ranks.write(1, self.tables[1], self.content, self.first_token)
        assert all(np.array_equal(*pair) for pair in zip(ranks.snapshot(), after, strict=True))

    @property
    def num_message_pairs(self) -> int:
        directory, groups = self.ranks.directory, self.ranks.groups
        return sum(directory.pair_way(groups[0][part.source], groups[1][part.target]) == MPI
                   for part in directory.parts(0, 1))

    @property
    def num_followers(self) -> int:
        return len(self.ranks.groups[1]) - 1


@pytest.mark.parametrize("way", ["messages", "hosts", "copy"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_any_shape_gets_its_bytes_from_any_other(way: str, data: st.DataObject) -> None:
    case = Case(data, way)
    ranks = case.ranks
    assume(not ranks.directory.is_exchange(0, 1))  # all on one host, in equal blocks
    ranks.write(0, case.tables[0], case.content)
    state = ranks.context.offer(7, case.tables[0], case.num_tokens)
    ranks.generation.pull(70, 7, state, case.tables[1], case.num_tokens, case.first_token)
    events = ranks.rounds()
    assert are_over(events)
    pulled, released = sorted(events, key=lambda event: isinstance(event, Released))
    moved = sum(2 * view.shard.num_layers * view.shard.num_heads * view.layout.head_bytes
                for view in (ranks.views[rank] for rank in ranks.groups[1]))
    assert pulled.bytes_moved == moved * (case.num_tokens - case.first_token)
    assert pulled.kv_bytes == moved * case.num_tokens
    assert (pulled.taken, pulled.abandoned, released.exchanged) == (None, False, None)
    assert pulled.way == ranks.directory.way(0, 1)
    case.assert_bytes()
    ranks.assert_over()
    # One message for each pair of ranks that share something, and two for each follower; none a token.
    brings = case.first_token < case.num_tokens
    counts = ranks.network.counts
    assert counts[PullRequest] == case.num_message_pairs * brings
    assert counts[PullPart] == counts[PartDone] == case.num_followers * brings
    assert (counts[Release], counts[Announce], counts[Watch]) == (1, 0, 0)


@pytest.mark.parametrize("way", ["messages", "hosts", "copy"])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_watched_context_arrives_while_it_is_computed(way: str, data: st.DataObject) -> None:
    """The watch may come at any time; the bytes of a piece are written just before it is announced."""
    case = Case(data, way)
    ranks, num_tokens = case.ranks, case.num_tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offers, "MIN_PIECE_TOKENS", data.draw(st.integers(1, 8)))
        cuts = sorted(data.draw(st.sets(st.integers(1, max(1, num_tokens - 1)), max_size=12)) - {num_tokens})
        watch_at = data.draw(st.integers(0, len(cuts) + 1))
        by_layer = data.draw(st.booleans())
        first = 0
        for at, end in enumerate([*cuts, num_tokens]):
            if at == watch_at:
                ranks.generation.expect(70, 7, 0, case.tables[1], num_tokens, case.first_token)
            if data.draw(st.booleans()):
                ranks.rounds(data.draw(st.integers(0, 3)))
            if end == num_tokens and by_layer:
                for layer in range(ranks.spec.num_layers):
                    ranks.write(0, case.tables[0], case.content, first, end, (layer, layer + 1))
                    ranks.context.computed(7, case.tables[0], num_tokens, end, layer + 1)
                    ranks.rounds(data.draw(st.integers(0, 1)))
            else:
                ranks.write(0, case.tables[0], case.content, first, end)
                ranks.context.computed(7, case.tables[0], num_tokens, end)
            first = end
        ranks.context.offer(7, case.tables[0], num_tokens)
        if watch_at == len(cuts) + 1:
            ranks.generation.expect(70, 7, 0, case.tables[1], num_tokens, case.first_token)
        if data.draw(st.booleans()):
            assert ranks.rounds() == [], "not before it is told to go on"
        ranks.generation.proceed(70)
        events = ranks.rounds()
    assert are_over(events)
    case.assert_bytes()
    ranks.assert_over()
    counts = ranks.network.counts
    assert counts[Watch] == counts[Release] == 1
    assert 1 <= counts[Announce] <= MAX_PIECES + MAX_LAYER_GROUPS
    assert counts[PullRequest] <= counts[Announce] * case.num_message_pairs
    assert counts[PullPart] == counts[PartDone] <= counts[Announce] * case.num_followers


@pytest.mark.parametrize("num_tokens", [1000, 4000])
def test_messages_do_not_grow_with_tokens(num_tokens: int) -> None:
    """Announced as often as a prompt can be, token by token and layer by layer."""
    ranks = Ranks("tp2", "pp2", transport="mpi", kv_tokens=num_tokens, spec=model_spec(20, 2, 1),
                  generation_tokens_per_block=7)
    tables = [list(ranks.arrangement.block_ids[instance]) for instance in (0, 1)]
    ranks.generation.expect(70, 7, 0, tables[1], num_tokens)
    for end in range(1, num_tokens):
        ranks.context.progress()
        ranks.context.computed(7, tables[0], num_tokens, end)
    for layer in range(ranks.spec.num_layers + 1):
        ranks.context.computed(7, tables[0], num_tokens, num_tokens, layer)
    ranks.context.offer(7, tables[0], num_tokens)
    ranks.generation.proceed(70)
    assert are_over(ranks.rounds())
    layer_groups = 7  # of 3 layers, the last one of 2
    assert ranks.network.counts[Announce] == MAX_PIECES - 1 + layer_groups
    # Each early piece from 2 ranks to 2; a group of layers is one stage's, but for the one across both.
    assert ranks.network.counts[PullRequest] == (MAX_PIECES - 1) * 4 + (layer_groups + 1) * 2
    ranks.assert_over()


def test_in_one_pool_blocks_are_exchanged_whatever_the_shapes() -> None:
    for shapes in (("1", "1"), ("tp2", "pp2"), ("tp4pp2", "tp2"), ("1", "tp8pp3")):
        ranks = Ranks(*shapes)
        given, taken = table(ranks, 1, 0, 16), table(ranks, 0, 2, 12)
        content = ranks.content(1, 10)
        ranks.write(0, taken, content)
        before = ranks.snapshot()
        ranks.generation.pull(70, 7, ranks.context.offer(7, taken, 10), given, 10)
        events = ranks.rounds()
        pulled = pulled_of(events)
        released = next(e for e in events if isinstance(e, Released))
        assert pulled.taken == taken
        assert released.exchanged == given[:3]
        assert (pulled.bytes_moved, pulled.way) == (0, SHARED)
        assert pulled.kv_bytes > 0
        assert ranks.holds(1, taken, content)
        assert all(np.array_equal(*pair) for pair in zip(before, ranks.snapshot(), strict=True))
        assert ranks.network.counts == {Release: 1}
        ranks.assert_over()


def test_what_the_context_holds_beyond_the_reservation_goes_back() -> None:
    ranks = Ranks()
    theirs, ours = table(ranks, 0, 0, 16), table(ranks, 1, 0, 8)
    ranks.generation.pull(70, 7, ranks.context.offer(7, theirs, 6), ours, 6)
    events = ranks.rounds()
    assert pulled_of(events).taken == theirs[:2]
    assert next(e for e in events if isinstance(e, Released)).exchanged == [*ours, *theirs[2:]]


def test_what_moves_bytes_is_told() -> None:
    for way, options in WAYS.items():
        ranks = Ranks(**options)
        state = ranks.context.offer(7, table(ranks, 0, 0, 4), 4)
        assert ranks.generation.fetches(0) == ranks.generation.fetches(state) == (way != "exchange")
        assert ranks.directory.way(0, 1) == {"exchange": SHARED, "copy": COPY}.get(way, MPI)
        assert (ranks.context.pool == ranks.generation.pool) == (way == "exchange")
        assert not ranks.generation.fetches(b"nonsense"), "the pull says so"


# ---- endings ----


@pytest.fixture(params=WAYS)
def any_pair(request: pytest.FixtureRequest) -> Ranks:
    return Ranks(**WAYS[request.param])


@pytest.fixture(params=MOVING)
def pair(request: pytest.FixtureRequest) -> Ranks:
    return Ranks(**WAYS[request.param])


@pytest.fixture(params=["1", "tp2"])
def slow(request: pytest.FixtureRequest, short_pieces: None) -> Iterator[Ranks]:
    """Over messages, whose bytes move when the test says so."""
    ranks = Ranks("tp2", request.param, transport="mpi")
    ranks.wire.hold = True
    yield ranks
    ranks.assert_over()


def test_a_dropped_offer_is_released_once(any_pair: Ranks) -> None:
    any_pair.context.offer(7, [0], 4)
    any_pair.context.drop(7)
    any_pair.context.drop(7)
    any_pair.context.drop(8)
    assert kinds(any_pair.rounds()) == [(Released, 7)]
    any_pair.assert_over()


def test_a_refused_offer_is_released(any_pair: Ranks) -> None:
    any_pair.generation.refuse(7, any_pair.context.offer(7, [0], 4))
    assert any_pair.rounds() == [Released(7, None)]
    any_pair.assert_over()


def test_an_offer_is_kept_as_long_as_nobody_asks(any_pair: Ranks) -> None:
    any_pair.context.offer(7, [0], 4)
    assert any_pair.rounds() == []
    assert any_pair.context.has_offer(7)
    assert any_pair.context.num_open == 1
    assert not any_pair.context.is_moving


def test_an_abandoned_pull_keeps_its_blocks_until_the_bytes_are_there(slow: Ranks) -> None:
    content, blocks = slow.content(1, 8), table(slow, 1, 3, 8)
    slow.write(0, table(slow, 0, 0, 8), content)
    slow.generation.pull(70, 7, slow.context.offer(7, table(slow, 0, 0, 8), 8), blocks, 8)
    assert slow.rounds() == []
    assert slow.context.is_moving
    assert slow.generation.abandon(70)
    assert slow.rounds() == []
    assert slow.generation.num_open == slow.context.num_open == 1
    slow.wire.hold = False
    events = slow.rounds()
    assert are_over(events)
    assert pulled_of(events).abandoned
    assert slow.holds(1, blocks, content)


def test_abandon_says_whether_there_was_anything(any_pair: Ranks) -> None:
    generation, blocks = any_pair.generation, table(any_pair, 1, 0, 4)
    assert not generation.abandon(70)
    generation.pull(70, 7, any_pair.context.offer(7, [0], 4), blocks, 4)
    assert generation.abandon(70)
    assert generation.abandon(70), "over, but not yet taken"
    events = any_pair.rounds()
    assert are_over(events)
    assert [e.abandoned for e in events if isinstance(e, Pulled)] == [True]
    assert not generation.abandon(70)
    any_pair.assert_over()


@pytest.mark.parametrize("when", ["unseen", "watched", "asked", "moving", "offered", "whole"])
def test_an_expected_pull_is_abandoned(slow: Ranks, when: str) -> None:
    """At any point; the context goes on as if nobody had watched, unless its blocks were being read."""
    mine, theirs = table(slow, 1, 0, 12), table(slow, 0, 0, 12)
    slow.generation.expect(70, 7, 0, mine, 12)
    if when != "unseen":
        slow.context.progress()
        assert slow.context.is_watched(7)
    if when not in ("unseen", "watched"):
        slow.context.computed(7, theirs, 12, 8)
        slow.generation.progress()
    if when not in ("unseen", "watched", "asked"):
        slow.turn()
        assert slow.context.is_moving
    if when in ("offered", "whole"):
        slow.context.offer(7, theirs, 12)
    if when == "whole":
        slow.wire.hold = False
        assert slow.rounds() == []
    assert slow.generation.abandon(70)
    moving = when not in ("unseen", "watched", "whole")
    events = slow.rounds()
    if moving:
        assert events == []
        assert slow.generation.num_open == 1
    if when not in ("offered", "whole"):  # computed in the meantime
        slow.context.computed(7, theirs, 12, 12)
        slow.context.offer(7, theirs, 12)
    slow.wire.hold = False
    events += slow.rounds()
    pulled = [e for e in events if isinstance(e, Pulled)]
    assert [(e.request_id, e.abandoned) for e in pulled] == [(70, True)]
    assert slow.network.counts[Release] == 1
    if not moving and when != "whole":
        assert slow.context.has_offer(7), "the watcher left before there was an offer"
        assert not slow.context.is_watched(7)
    slow.context.drop(7)
    events += slow.rounds()
    assert [e for e in events if isinstance(e, Released)] == [Released(7, None)]


def test_an_abandoned_pull_asks_for_nothing_more(slow: Ranks) -> None:
    blocks = table(slow, 0, 0, 12)
    slow.generation.expect(70, 7, 0, table(slow, 1, 0, 12), 12)
    slow.context.progress()
    slow.context.computed(7, blocks, 12, 4)
    slow.rounds()
    asked = slow.network.counts[PullRequest]
    slow.generation.abandon(70)
    slow.context.computed(7, blocks, 12, 8)
    slow.context.offer(7, blocks, 12)
    slow.rounds()
    assert slow.network.counts[Announce] == 3
    assert slow.network.counts[PullRequest] == asked == 2
    slow.wire.hold = False
    assert are_over(slow.rounds())


def test_a_context_given_up_while_it_is_read_keeps_its_blocks(slow: Ranks) -> None:
    slow.generation.expect(70, 7, 0, table(slow, 1, 0, 12), 12)
    slow.context.progress()
    slow.context.computed(7, table(slow, 0, 0, 12), 12, 8)
    slow.rounds()
    assert slow.context.end(7), "a watcher reads it"
    assert slow.context.has_offer(7)
    assert slow.rounds() == []
    assert slow.generation.abandon(70)
    assert slow.rounds() == [], "its bytes are on their way"
    slow.wire.hold = False
    events = slow.rounds()
    assert are_over(events)
    assert pulled_of(events).abandoned


def test_a_context_given_up_unwatched_is_free_at_once(slow: Ranks) -> None:
    """Its watcher learns it from rank 0; the watch is on its way."""
    slow.generation.expect(70, 7, 0, [0], 4)
    assert not slow.context.end(7)
    assert slow.rounds() == []
    assert slow.network.counts[Ended] == 0
    slow.generation.abandon(70)
    assert kinds(slow.rounds()) == [(Pulled, 70)]


def test_a_context_given_up_as_its_watcher_leaves_is_released_once(slow: Ranks) -> None:
    """``Ended`` and ``Release`` cross."""
    slow.generation.expect(70, 7, 0, [0], 4)
    slow.context.progress()
    slow.generation.abandon(70)
    assert slow.context.end(7)
    events = slow.rounds()
    assert are_over(events)
    assert slow.network.counts[Release] == 2, "one of them let go of nothing"


def test_a_watched_offer_is_dropped(slow: Ranks) -> None:
    """While its bytes move: rank 0 gives both sides up."""
    blocks = table(slow, 0, 0, 12)
    slow.generation.expect(70, 7, 0, table(slow, 1, 0, 12), 12)
    slow.context.progress()
    slow.context.offer(7, blocks, 12)
    slow.rounds()
    slow.context.drop(7)
    slow.context.drop(7)
    assert slow.rounds() == []
    assert slow.context.has_offer(7), "it is being read"
    slow.generation.abandon(70)
    assert slow.rounds() == []
    slow.wire.hold = False
    assert are_over(slow.rounds())
    assert slow.network.counts[Ended] == 1


def test_a_watched_offer_is_refused_while_its_bytes_move(slow: Ranks) -> None:
    """``Cancel`` came, then ``Proceed``: the pull lets go of it when its bytes are there, nobody before."""
    slow.generation.expect(70, 7, 0, table(slow, 1, 0, 12), 12)
    slow.context.progress()
    state = slow.context.offer(7, table(slow, 0, 0, 12), 12)
    slow.rounds()
    slow.generation.abandon(70)
    slow.generation.refuse(7, state)
    assert slow.rounds() == []
    assert slow.context.has_offer(7)
    slow.wire.hold = False
    assert are_over(slow.rounds())


def test_a_watched_offer_is_refused_after_its_watcher_left(slow: Ranks) -> None:
    slow.generation.expect(70, 7, 0, table(slow, 1, 0, 4), 4)
    slow.generation.abandon(70)
    assert kinds(slow.rounds()) == [(Pulled, 70)]
    slow.generation.refuse(7, slow.context.offer(7, table(slow, 0, 0, 4), 4))
    assert slow.rounds() == [Released(7, None)]


def test_a_watch_that_comes_after_the_offer_is_answered_with_all_of_it(slow: Ranks) -> None:
    slow.wire.hold = False
    content, blocks = slow.content(1, 12), table(slow, 1, 0, 12)
    slow.write(0, table(slow, 0, 0, 12), content)
    slow.context.offer(7, table(slow, 0, 0, 12), 12)
    slow.generation.expect(70, 7, 0, blocks, 12)
    assert slow.rounds() == []
    slow.generation.proceed(70)
    events = slow.rounds()
    assert are_over(events)
    assert pulled_of(events).num_pieces == slow.network.counts[Announce] == 1
    assert slow.holds(1, blocks, content)


def test_a_watch_for_a_request_that_never_begins(slow: Ranks) -> None:
    slow.generation.expect(70, 7, 0, [0], 4)
    assert slow.rounds() == []
    assert slow.context.num_open == 0, "nothing is lent"
    assert slow.generation.num_open == 1
    slow.generation.abandon(70)
    assert kinds(slow.rounds()) == [(Pulled, 70)]


def test_a_watch_that_comes_after_the_drop(slow: Ranks) -> None:
    slow.context.offer(7, [0], 4)
    slow.context.drop(7)
    slow.generation.expect(70, 7, 0, [0], 4)
    assert slow.rounds() == [Released(7, None)]
    slow.generation.abandon(70)
    assert kinds(slow.rounds()) == [(Pulled, 70)]


def test_proceed_of_what_is_not_expected_does_nothing(pair: Ranks) -> None:
    pair.generation.proceed(70)
    assert pair.rounds() == []


def test_all_of_it_is_there_already(pair: Ranks) -> None:
    before = pair.snapshot()
    state = pair.context.offer(7, table(pair, 0, 0, 8), 8)
    pair.generation.pull(70, 7, state, table(pair, 1, 0, 8), 8, 8)
    events = pair.rounds()
    assert are_over(events)
    pulled = pulled_of(events)
    assert (pulled.bytes_moved, pulled.num_pieces, pulled.abandoned, pulled.seconds) == (0, 0, False, 0.0)
    assert pulled.kv_bytes > 0
    assert all(np.array_equal(*both) for both in zip(before, pair.snapshot(), strict=True))
    assert pair.network.counts == {Release: 1}
    pair.assert_over()


def test_times_count_from_the_first_piece_and_from_when_generation_waits(slow: Ranks) -> None:
    slow.generation.expect(70, 7, 0, table(slow, 1, 0, 12), 12)
    slow.context.progress()
    slow.context.offer(7, table(slow, 0, 0, 12), 12)
    slow.wire.hold = False
    slow.rounds()
    slow.generation.proceed(70)
    pulled = pulled_of(slow.rounds())
    assert pulled.seconds > 0
    assert 0 <= pulled.exposed < pulled.seconds


# ---- what is refused ----


def test_too_few_reserved_blocks_are_refused(any_pair: Ranks) -> None:
    state = any_pair.context.offer(7, table(any_pair, 0, 0, 10), 10)
    short = table(any_pair, 1, 0, 10)[1:]
    needed = len(short) + 1
    with pytest.raises(RequestError, match=f"{needed} blocks to hand over, {len(short)} reserved"):
        any_pair.generation.pull(70, 7, state, short, 10)
    assert any_pair.generation.num_open == 0
    any_pair.generation.refuse(7, state)
    assert any_pair.rounds() == [Released(7, None)]


def test_another_number_of_tokens_is_refused(any_pair: Ranks) -> None:
    state = any_pair.context.offer(7, table(any_pair, 0, 0, 10), 10)
    with pytest.raises(RequestError, match="computed 10 tokens, the prompt has 11"):
        any_pair.generation.pull(70, 7, state, table(any_pair, 1, 0, 12), 11)
    assert any_pair.generation.num_open == 0


@pytest.mark.parametrize(("state", "message"), [
    (b"", "not of this executor"), (b"nonsense", "not of this executor"), (b"\x90", "not of this executor"),
    (b"\x93\x02\x91\x00\x04", "name instance 2; this job has 2")])
def test_a_state_that_is_none_is_refused(pair: Ranks, state: bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        pair.generation.pull(70, 7, state, [4, 5], 4)
    with pytest.raises(RequestError, match=message):
        pair.generation.refuse(7, state)
    assert pair.generation.num_open == 0


@pytest.mark.parametrize("when", ["at once", "afterwards"])
def test_a_second_use_of_a_state_is_an_integrity_error(any_pair: Ranks, when: str) -> None:
    """It would bring tokens of blocks that are somebody else's by now."""
    state = any_pair.context.offer(7, table(any_pair, 0, 0, 4), 4)
    any_pair.generation.pull(70, 7, state, table(any_pair, 1, 0, 4), 4)
    if when == "afterwards":
        any_pair.rounds()
    any_pair.generation.pull(71, 7, state, table(any_pair, 1, 4, 4), 4)
    with pytest.raises(IntegrityError, match=r"took over request 7, .* good for one generation request"):
        any_pair.rounds()


def test_a_second_use_by_another_instance_is_an_integrity_error() -> None:
    ranks = Ranks("tp2", "1,tp2", transport="mpi")
    state = ranks.context.offer(7, [0], 4)
    for instance in (1, 2):
        leader = ranks.transceivers[ranks.groups[instance][0]]
        leader.pull(70, 7, state, [0], 4)
    with pytest.raises(IntegrityError, match="took over request 7"):
        ranks.rounds()


def test_a_release_of_nothing_is_harmless_unless_something_was_taken(pair: Ranks) -> None:
    channel = pair.network.channel(2)
    channel.send(1, Release(5, None))
    assert pair.rounds() == []
    for release in (Release(5, [0]), Release(5, None, was_read=True)):
        channel.send(1, release)
        with pytest.raises(IntegrityError, match="rank 2 took over request 5"):
            pair.rounds()


def test_what_is_no_message_of_the_hand_over(pair: Ranks) -> None:
    from disagg_mpi.comm.messages import Shutdown

    pair.network.channel(2).send(1, Shutdown())
    with pytest.raises(TypeError, match="takes no Shutdown"):
        pair.rounds()


def test_a_pull_that_finds_no_tags_leaves_nothing() -> None:
    ranks = Ranks("tp2", "1", transport="mpi", max_tag=4)
    ranks.wire.hold = True
    states = [ranks.context.offer(request, [request], 4) for request in range(3)]
    for request in range(2):
        ranks.generation.pull(70 + request, request, states[request], [request], 4)
    with pytest.raises(RequestError, match=r"4 transfers are open, of 5 .*; 2 more"):
        ranks.generation.pull(72, 2, states[2], [2], 4)
    assert ranks.generation.num_open == 2
    ranks.wire.hold = False
    assert Counter(kinds(ranks.rounds())) == Counter(
        [(Pulled, 70), (Pulled, 71), (Released, 0), (Released, 1)])
    ranks.generation.pull(72, 2, states[2], [2], 4)
    assert kinds(ranks.rounds()) == [(Pulled, 72), (Released, 2)]
    ranks.assert_over()


# ---- any order ----


class Story:
    """One request, as rank 0 and both engines treat it: what has happened, and what may happen next.

    Whoever gets blocks back writes into them at once, so a byte that is read or comes too late shows.
    """

    CHUNK, TOKENS = 4, 10

    def __init__(self, ranks: Ranks, request: int, early: bool, has_error: bool) -> None:
        self.ranks, self.id, self.early, self.has_error = ranks, request, early, has_error
        self.content = ranks.content(request, self.TOKENS)
        self.blocks = [table(ranks, instance, 4 * request, self.TOKENS) for instance in (0, 1)]
        self.computed = 0
        self.state = b""
        self.handed = self.cancelled = False  # at rank 0
        self.told_context = self.told_generation = self.has_proceeded = False
        self.bringing = False
        self.released = 0
        self.pulled: Pulled | None = None

    def next_steps(self) -> list[str]:
        steps = {
            "compute": not self.state and not self.told_context,
            "hand_over": bool(self.state) and not self.handed and not self.cancelled,
            "cancel": not self.cancelled,
            "expect": self.early and not self.bringing and not self.told_generation,
            "proceed": self.handed and not self.has_proceeded and (
                self.bringing or self.told_generation or not self.early),
            "cancel_context": self.cancelled and not self.handed and not self.told_context,
            "cancel_generation": self.cancelled and not self.told_generation and (
                self.early or self.has_proceeded or not self.handed)}
        return [step for step, may in steps.items() if may]

    # ---- rank 0 ----

    def hand_over(self) -> None:
        self.handed = True

    def cancel(self) -> None:
        self.cancelled = True

    # ---- context ----

    def compute(self) -> None:
        context, first = self.ranks.context, self.computed
        self.computed = min(first + self.CHUNK, self.TOKENS)
        for layer in range(self.ranks.spec.num_layers):
            self.ranks.write(0, self.blocks[0], self.content, first, self.computed, (layer, layer + 1))
            context.computed(self.id, self.blocks[0], self.TOKENS, self.computed, layer + 1)
        if self.computed == self.TOKENS:
            self.state = context.offer(self.id, self.blocks[0], self.TOKENS)

    def cancel_context(self) -> None:
        self.told_context = True
        if self.state:
            self.ranks.context.drop(self.id)
        elif not self.ranks.context.end(self.id):
            self.on_released(Released(self.id, None))

    def on_released(self, event: Released) -> None:
        self.released += 1
        self.blocks[0] = event.exchanged or self.blocks[0]
        self.ranks.scribble(0, self.blocks[0])

    # ---- generation ----

    def expect(self) -> None:
        self.bringing = True
        self.ranks.generation.expect(100 + self.id, self.id, 0, self.blocks[1], self.TOKENS)

    def proceed(self) -> None:
        self.has_proceeded = True
        if self.told_generation or (self.has_error and not self.early):
            self.ranks.generation.refuse(self.id, self.state)
        elif self.early:
            self.ranks.generation.proceed(100 + self.id)
        else:
            self.bringing = True
            self.ranks.generation.pull(100 + self.id, self.id, self.state, self.blocks[1], self.TOKENS)

    def cancel_generation(self) -> None:
        self.told_generation = True
        is_open = self.bringing and self.pulled is None
        assert self.ranks.generation.abandon(100 + self.id) == is_open

    def on_pulled(self, event: Pulled) -> None:
        assert self.pulled is None
        self.pulled = event
        self.blocks[1] = event.taken or self.blocks[1]
        assert event.abandoned == self.told_generation
        if event.abandoned:
            self.ranks.scribble(1, self.blocks[1])
        else:
            assert self.ranks.holds(1, self.blocks[1], self.content)

    def assert_over(self) -> None:
        assert self.released == 1
        assert (self.pulled is not None) == self.bringing
        size = self.ranks.views[self.ranks.groups[1][0]].layout.tokens_per_block
        if self.pulled is not None and self.pulled.abandoned:
            full = self.ranks.content(0, len(self.blocks[1]) * size)
            assert self.ranks.holds(1, self.blocks[1], np.full_like(full, 0xEE)), "written after its end"
        elif self.pulled is not None:
            assert self.ranks.holds(1, self.blocks[1], self.content)


@pytest.mark.parametrize("way", [
    {"transport": "mpi"}, {"transport": "mpi", "context": "tp2", "generation": "pp2"},
    {"context": "tp2pp2", "generation": "tp2", "hosts": [0, 0, 0, 3, 3, 0, 3]},
    {"generation_tokens_per_block": 3}, {"context": "pp2", "generation": "tp2",
                                         "generation_tokens_per_block": 6},
    {"context": "tp2", "generation": "pp2"}],
    ids=["messages", "messages-groups", "hosts", "copy", "copy-groups", "exchange"])
@given(data=st.data())
@settings(max_examples=250, deadline=None)
def test_everything_ends_once_in_any_order(way: dict[str, Any], data: st.DataObject) -> None:
    """Requests are computed, watched, handed over, refused and cancelled while messages and bytes stall."""
    ranks = Ranks(**way)
    moves = ranks.generation.fetches(0)
    stories = {request: Story(ranks, request, moves and data.draw(st.booleans()), data.draw(st.booleans()))
               for request in range(data.draw(st.integers(1, 3)))}

    def take(ranks_that_move: list[int]) -> int:
        events = ranks.turn(ranks_that_move)
        for event in events:
            if isinstance(event, Released):
                stories[event.request_id].on_released(event)
            else:
                stories[event.request_id - 100].on_pulled(event)
        return len(events)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(offers, "MIN_PIECE_TOKENS", 1)
        patch.setattr(transports, "_SLAB_BYTES", 200)
        patch.setattr(transports, "_CALL_BYTES", 1)
        ranks.network.holds = True
        for _ in range(data.draw(st.sampled_from([0, 8, 20, 40, 80]))):
            choices: list[tuple[Any, ...]] = [("let", pair) for pair in ranks.network.waiting]
            choices += [("turn", rank) for rank in ranks.transceivers if ranks.transceivers[rank].is_moving]
            choices += [(step, story) for story in stories.values() for step in story.next_steps()]
            choices.append(("hold", not ranks.wire.hold))
            action, what = choices[data.draw(st.integers(0, len(choices) - 1))]
            if action == "let":
                ranks.network.let_through(what)
                take([what[1]])
            elif action == "turn":
                take([what])
            elif action == "hold":
                ranks.wire.hold = what
            else:
                getattr(what, action)()
        ranks.network.flow()
        ranks.wire.hold = False
        for story in stories.values():
            while steps := [step for step in story.next_steps() if step != "cancel"]:
                getattr(story, steps[0])()
        quiet = 0
        while quiet < 30:  # longer than a copy of the longest request takes
            quiet = 0 if take(list(ranks.transceivers)) else quiet + 1
    for story in stories.values():
        story.assert_over()
    ranks.assert_over()


# ---- memory ----


def test_private_memory_is_page_aligned_and_writable() -> None:
    pool = private_memory(10000)
    assert pool.ctypes.data % 4096 == 0
    assert len(pool) == 10000
    pool[-1] = 7
    assert private_memory(0) is not None


def test_a_window_that_does_not_fit_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 64 * 2**20}))
    check_shared_memory(64 * 2**20)
    with pytest.raises(ConfigError, match=r"100 MiB .* 64 MiB free; .*--shm-size.*--transport mpi"):
        check_shared_memory(100 * 2**20)
