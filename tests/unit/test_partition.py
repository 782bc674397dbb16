"""Who holds and who sends which part of a KV-cache, against counting every (layer, head)."""

from __future__ import annotations

from collections import Counter

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_mpi.transfer.partition import KvShard, Part, partition, shard_of

WIDTHS = (1, 2, 3, 4, 6, 8, 9, 12)


@st.composite
def shapes(draw: st.DrawFn, num_layers: int, num_heads: int) -> list[KvShard]:
    """The shards of a group of any shape that the model can be cut to."""
    tp = draw(st.sampled_from([n for n in WIDTHS if num_heads % n == 0 or n % num_heads == 0]))
    pp = draw(st.integers(1, min(num_layers, 9)))
    return [shard_of(num_layers, num_heads, tp, pp, index) for index in range(tp * pp)]


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, int, list[KvShard], list[KvShard]]:
    num_layers, num_heads = draw(st.integers(1, 13)), draw(st.sampled_from((1, 2, 3, 4, 8, 9)))
    return (num_layers, num_heads, draw(shapes(num_layers, num_heads)), draw(shapes(num_layers, num_heads)))


def cells(shard: KvShard | Part) -> set[tuple[int, int]]:
    """Every (layer, head), counted out."""
    return {(layer, head)
            for layer in range(shard.first_layer, shard.first_layer + shard.num_layers)
            for head in range(shard.first_head, shard.first_head + shard.num_heads)}


@settings(max_examples=400, deadline=None)
@given(pairs())
def test_a_group_holds_the_model_with_neighbours_sharing_heads(
    case: tuple[int, int, list[KvShard], list[KvShard]]
) -> None:
    num_layers, num_heads, group, _ = case
    held = Counter(cell for shard in group for cell in cells(shard))
    # Every cell is held, and by as many ranks as every other.
    assert len(held) == num_layers * num_heads
    assert len(set(held.values())) == 1
    # Stages differ by at most a layer, tp ranks of a stage hold the same layers, and their heads rise.
    assert max(s.num_layers for s in group) - min(s.num_layers for s in group) <= 1
    assert group == sorted(group, key=lambda shard: (shard.first_layer, shard.first_head))


@pytest.mark.parametrize(("tp", "heads"), [
    (1, [(0, 4)]), (2, [(0, 2), (2, 2)]), (4, [(0, 1), (1, 1), (2, 1), (3, 1)]),
    (8, [(0, 1), (0, 1), (1, 1), (1, 1), (2, 1), (2, 1), (3, 1), (3, 1)])])
def test_heads_of_each_rank(tp: int, heads: list[tuple[int, int]]) -> None:
    found = [shard_of(6, 4, tp, 1, index) for index in range(tp)]
    assert [(shard.first_head, shard.num_heads) for shard in found] == heads


@pytest.mark.parametrize(("layers", "heads", "tp", "pp", "index", "message"), [
    (4, 3, 2, 1, 0, "3 KV heads on tp=2"), (4, 3, 4, 1, 0, "3 KV heads on tp=4"),
    (2, 3, 1, 3, 0, "2 layers on pp=3"), (4, 4, 2, 2, 4, "rank 4 of a group of 4"),
    (4, 4, 2, 2, -1, "rank -1 of a group of 4")])
def test_a_shape_that_does_not_fit_is_refused(
    layers: int, heads: int, tp: int, pp: int, index: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        shard_of(layers, heads, tp, pp, index)


@settings(max_examples=3000, deadline=None)
@given(pairs())
def test_every_target_gets_its_shard_once_and_holders_take_turns(
    case: tuple[int, int, list[KvShard], list[KvShard]]
) -> None:
    _, _, sources, targets = case
    parts = partition(sources, targets)
    # Each part is something that its source holds.
    assert all(cells(part) and cells(part) <= cells(sources[part.source]) for part in parts)
    # Together they are each target's shard, once.
    received = Counter((part.target, *cell) for part in parts for cell in cells(part))
    wanted = {(target, *cell) for target, shard in enumerate(targets) for cell in cells(shard)}
    assert received == dict.fromkeys(wanted, 1)
    # One message for each distinct source shard that a target needs, which is the least possible.
    assert len({(part.source, part.target) for part in parts}) == len(parts)
    needed = [(target, shard) for target, wish in enumerate(targets) for shard in set(sources)
              if cells(wish) & cells(shard)]
    assert len(parts) == len(needed)
    # Ranks that hold the same send equally often.
    sends = Counter(part.source for part in parts)
    for shard in set(sources):
        counts = [sends[index] for index, held in enumerate(sources) if held == shard]
        assert max(counts) - min(counts) <= 1
    assert parts == sorted(parts, key=lambda part: (part.target, part.source))


def test_equal_shapes_send_to_themselves() -> None:
    group = [shard_of(5, 2, 4, 2, index) for index in range(8)]  # each head twice
    assert [(part.source, part.target) for part in partition(group, group)] == [(i, i) for i in range(8)]


def test_sources_that_lack_something_are_refused() -> None:
    whole = shard_of(4, 4, 1, 1, 0)
    halves = [shard_of(4, 4, 2, 1, index) for index in range(2)]
    with pytest.raises(ValueError, match=r"target 0 needs .*the sources hold only"):
        partition(halves[:1], [whole])
    with pytest.raises(ValueError, match="target 0 needs"):
        partition([], [whole])
    with pytest.raises(ValueError, match="equal or apart"):
        partition([whole, halves[0]], [whole])


def test_parts_travel_as_short_lists() -> None:
    part = partition([shard_of(4, 4, 1, 1, 0)], [shard_of(4, 4, 2, 2, 3)])[0]
    assert msgspec.json.encode(part) == b"[0,0,2,2,2,2]"
    assert msgspec.json.decode(b"[0,0,2,2,2,2]", type=Part) == part
    assert part.shard == KvShard(2, 2, 2, 2)
