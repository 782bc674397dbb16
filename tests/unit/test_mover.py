"""One rank's part in moving bytes: what it asks for, what it sends, and when a piece is here."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from handover import Ranks, model_spec

from disagg_mpi.comm.messages import PullPart, PullRequest
from disagg_mpi.errors import RequestError

WHOLE = PullPart(piece=5, source_instance=0, source_block_ids=[3, 1], block_ids=[0, 2], first_token=0,
                 end_token=8, first_layer=0, end_layer=4)


def part(**changes: object) -> PullPart:
    return msgspec.structs.replace(WHOLE, **changes)


def serve(ranks: Ranks) -> list[PullRequest]:
    """Context ranks take what they are asked for, and send it."""
    requests = []
    for rank in ranks.groups[0]:
        for asker, request in ranks.network.channel(rank).poll():
            ranks.movers[rank].serve(asker, request)
            requests.append(request)
    return requests


def test_a_piece_is_here_when_all_its_sources_have_sent() -> None:
    """Rank 5 needs all; it gets a quarter from each of four."""
    ranks = Ranks("tp2pp2", "1", transport="mpi")
    content = ranks.content(0, 8)
    ranks.write(0, WHOLE.source_block_ids, content)
    mover = ranks.movers[5]
    mover.start(WHOLE)
    assert mover.is_moving
    assert mover.num_requests == 4
    assert mover.advance() == []
    ranks.wire.hold = True
    requests = serve(ranks)
    assert [request.box for request in requests] == [
        (0, 2, 0, 2, 0, 8), (0, 2, 2, 4, 0, 8), (2, 4, 0, 2, 0, 8), (2, 4, 2, 4, 0, 8)]
    assert all(request.block_ids == [3, 1] for request in requests)
    assert len({request.tag for request in requests}) == 4
    ranks.wire.hold = False
    assert ranks.movers[1].advance() == [], "a send is no piece"
    assert not ranks.movers[1].is_moving
    assert mover.advance() == [5]
    assert not mover.is_moving
    assert mover.advance() == [], "told once"
    assert ranks.holds(1, WHOLE.block_ids, content)


def test_pieces_end_in_any_order() -> None:
    ranks = Ranks("tp2", "1", transport="mpi")
    mover = ranks.movers[3]
    mover.start(part(piece=8))
    mover.start(part(piece=9, block_ids=[4, 5]))
    asked = {rank: ranks.network.channel(rank).poll() for rank in (1, 2)}
    for rank in (1, 2):
        ranks.movers[rank].serve(*asked[rank][1])
    assert mover.advance() == [9]
    for rank in (1, 2):
        ranks.movers[rank].serve(*asked[rank][0])
    assert mover.advance() == [8]


@pytest.mark.parametrize(("options", "num_requests"), [
    ({"transport": "mpi"}, 2), ({"hosts": [0, 0, 2, 0]}, 1), ({"generation_tokens_per_block": 2}, 0)],
    ids=["none-here", "one-here", "both-here"])
def test_only_ranks_of_other_hosts_are_asked(options: dict[str, Any], num_requests: int) -> None:
    ranks = Ranks("tp2", "1", **options)
    content = ranks.content(0, 8)
    ranks.write(0, WHOLE.source_block_ids, content)
    here = part(block_ids=[0, 2, 4, 5])
    ranks.movers[3].start(here)
    assert ranks.movers[3].num_requests == num_requests
    assert len(serve(ranks)) == num_requests
    assert ranks.movers[3].advance() == [5]
    assert ranks.holds(1, here.block_ids, content)


def test_only_layers_of_the_piece_are_brought() -> None:
    """Of 5 layers the first stage here has 2, that of the context 1, 2 and 2."""
    ranks = Ranks("pp3", "pp2", transport="mpi", spec=model_spec(5))
    movers = ranks.movers
    piece = part(first_layer=2, end_layer=4)
    assert [movers[4].takes_part(piece, index) for index in (0, 1)] == [False, True]
    assert [movers[4].takes_part(WHOLE, index) for index in (0, 1)] == [True, True]
    assert [movers[5].takes_part(part(end_layer=2), index) for index in (0, 1)] == [True, False]
    assert not movers[4].takes_part(part(first_token=8), 0)
    movers[5].start(piece)
    assert [request.box[:2] for request in serve(ranks)] == [(2, 3), (3, 4)]
    assert movers[5].advance() == [5]
    movers[4].start(piece)
    assert movers[4].advance() == [5], "nothing to bring is brought at once"


def test_tags_are_unique_among_open_transfers_and_used_again() -> None:
    ranks = Ranks("tp2", "1", transport="mpi", max_tag=4)
    mover = ranks.movers[3]
    tags = []
    for piece in range(2):
        mover.start(part(piece=piece))
    with pytest.raises(RequestError, match=r"4 transfers are open, of 5 .*; 2 more are needed"):
        mover.start(part(piece=2))
    assert mover.num_requests == 4, "nothing was begun"
    tags += [request.tag for request in serve(ranks)]
    assert sorted(tags) == [0, 1, 2, 3]
    assert mover.advance() == [0, 1]
    for piece in range(2, 20):
        mover.start(part(piece=piece))
        new = [request.tag for request in serve(ranks)]
        assert len(set(new)) == 2 and set(new) <= set(range(5))
        tags += new
        assert mover.advance() == [piece]
    assert len(set(tags)) == 5


def test_tags_that_are_taken_are_passed_over() -> None:
    ranks = Ranks("1", "1", transport="mpi", max_tag=2)
    mover = ranks.movers[2]
    mover.start(part(piece=0))
    [(asker, stalled)] = ranks.network.channel(1).poll()
    tags = []
    for piece in range(1, 6):
        mover.start(part(piece=piece))
        tags += [request.tag for request in serve(ranks)]
        assert mover.advance() == [piece]
    assert tags == [1, 2, 1, 2, 1]
    ranks.movers[1].serve(asker, stalled)
    assert mover.advance() == [0]


def test_a_box_that_is_not_here_is_refused() -> None:
    ranks = Ranks("tp2", "1", transport="mpi")
    with pytest.raises(ValueError, match="is not in rank 1's"):
        ranks.movers[1].serve(3, PullRequest(0, [0], (0, 4, 0, 4, 0, 4)))


def test_bytes_are_urgent_for_as_long_as_they_should_take(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    ranks = Ranks("1", "1", transport="mpi")
    mover = ranks.movers[2]
    assert not mover.is_urgent
    mover.start(WHOLE)
    assert mover.is_urgent
    now[0] += 1.0
    assert not mover.is_urgent, "the other side is busy with something else"
    assert mover.is_moving
    serve(ranks)
    assert ranks.movers[1].is_urgent
    assert mover.advance() == [5]
