"""Shapes and ids as text, placed on ranks: round trips, and every rank in one group or an error."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_mpi.config import Instance, JobConfig
from disagg_mpi.errors import ConfigError, LayoutError
from disagg_mpi.rank_map import rank_map
from disagg_mpi.shapes import MAX_RANKS, format_ids, format_instances, parse_ids, parse_instances
from disagg_mpi.topology import Role, Topology, build_topology, check_model_fits

SHAPES = st.builds(Instance, tp=st.integers(1, 12), pp=st.integers(1, 12))
IDS = st.lists(st.lists(st.integers(0, 99999), min_size=1, max_size=5).map(tuple), min_size=1, max_size=5)


def place(**keywords: Any) -> Topology:
    return build_topology(JobConfig(**keywords))


def fault(**keywords: Any) -> str:
    with pytest.raises(LayoutError) as caught:
        place(**keywords)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- text ----


@pytest.mark.parametrize(("text", "shapes"), [
    ("0", ()), ("3", ((1, 1),) * 3), ("tp2", ((2, 1),)), ("pp2", ((1, 2),)), ("tp2pp3", ((2, 3),)),
    ("2xtp3", ((3, 1),) * 2), (" 2xTP3 , tp1pp2,2", ((3, 1), (3, 1), (1, 2), (1, 1), (1, 1))),
])
def test_shapes_are_read(text: str, shapes: tuple[tuple[int, int], ...]) -> None:
    assert parse_instances(text) == tuple(Instance(tp, pp) for tp, pp in shapes)


@given(st.lists(SHAPES, max_size=8).map(tuple))
def test_shapes_go_to_text_and_back(instances: tuple[Instance, ...]) -> None:
    assert parse_instances(format_instances(instances)) == instances
    assert all(parse_instances(str(instance)) == (instance,) for instance in instances)


@given(IDS.map(tuple))
def test_ids_go_to_text_and_back(groups: tuple[tuple[int, ...], ...]) -> None:
    assert parse_ids(format_ids(groups), "ids") == groups


@given(st.text(alphabet="0123456789xtp,; -", max_size=12))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_instances, lambda text: parse_ids(text, "ids")):
        try:
            parse(text)
        except ConfigError:
            continue


@pytest.mark.parametrize("text", [
    "", "tp", "tp0", "0xtp2", "2x", "x2", "tp2x2", "2,0", "2,,3", "-1", "1.5", "tp2pp", "pp2tp2", "²", "٣",
    "tp1e9"])
def test_what_is_no_shape_is_shown_with_what_is(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_instances(text, "context")
    assert str(caught.value).startswith(f"context is {text!r}")
    assert "2xtp3,tp1pp2" in str(caught.value)


def test_the_wrong_one_of_several_shapes_is_named() -> None:
    with pytest.raises(ConfigError, match="'2xtp3,foo', with 'foo'"):
        parse_instances("2xtp3,foo")


@pytest.mark.parametrize("asked", ["65537", "999999xtp999999", 10**12, (Instance(tp=2**17),)])
def test_more_ranks_than_there_can_be_cost_no_memory(asked: Any) -> None:
    with pytest.raises(ConfigError, match=f"context asks for .* ranks; {MAX_RANKS} at most"):
        JobConfig(context=asked)


@pytest.mark.parametrize("text", ["", "1,", "1;;2", "1-3", "a", "-1", "1.0", ";"])
def test_what_are_no_ids_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"context_device_ids is .*1,2;3,4"):
        JobConfig(context_device_ids=text)


# ---- instances of a configuration ----


def test_ids_make_the_shape_where_none_is_given() -> None:
    config = JobConfig(context_participant_ids="1,2;3", generation_device_ids="0,1,2", generation=2)
    assert config.instances("context") == (
        Instance(tp=2, participant_ids=(1, 2)), Instance(participant_ids=(3,)))
    # A number says how many; the second has no group, which build_topology refuses.
    assert config.instances("generation") == (Instance(tp=3, device_ids=(0, 1, 2)), Instance())


def test_a_shape_takes_ids() -> None:
    config = JobConfig(context="pp2", context_participant_ids="3,1", context_device_ids="0,1")
    assert config.instances("context") == (Instance(pp=2, participant_ids=(3, 1), device_ids=(0, 1)),)
    assert config.instances("generation") == (Instance(),)


def test_participant_ids_alone_ask_for_aggregated_instances() -> None:
    config = JobConfig(aggregated_participant_ids="1;2")
    assert config.is_aggregated
    assert len(config.instances("aggregated")) == 2
    assert config.instances("context") == ()


def test_ids_are_given_once() -> None:
    with pytest.raises(ConfigError, match=r"context names participant_ids .* context_participant_ids again"):
        JobConfig(context=(Instance(participant_ids=(1,)),), context_participant_ids="1")


# ---- places ----


@given(st.data())
def test_every_rank_is_in_one_group_or_there_is_an_error(data: st.DataObject) -> None:
    asked = [data.draw(st.lists(st.builds(Instance, tp=st.integers(1, 3), pp=st.integers(1, 2)),
                                min_size=1, max_size=3)) for _ in range(2)]
    num_ranks = 1 + sum(shape.num_ranks for shapes in asked for shape in shapes)
    ranks = st.integers(data.draw(st.sampled_from([0, 1])), num_ranks)

    def with_ids(shape: Instance) -> Instance:
        ids = data.draw(st.none() | st.lists(ranks, min_size=shape.num_ranks, max_size=shape.num_ranks))
        return Instance(shape.tp, shape.pp, None if ids is None else tuple(ids))

    context, generation = (tuple(map(with_ids, shapes)) for shapes in asked)
    named = [rank for shape in context + generation for rank in shape.participant_ids or ()]
    is_good = len(set(named)) == len(named) and 0 not in named and max(named, default=0) < num_ranks
    if not is_good:
        text = fault(context=context, generation=generation)
        assert f"needed: every rank 1..{num_ranks - 1} in exactly one group" in text
        assert all(f"  rank {rank} " in text for rank in named)
        return
    topology = place(context=context, generation=generation)
    assert sorted(rank for group in topology.groups for rank in group.ranks) == list(range(1, num_ranks))
    assert topology.world_size == num_ranks
    for group, shape in zip(topology.groups, context + generation, strict=True):
        assert group.shape == shape
        assert shape.participant_ids in (None, group.ranks)
        assert len(group.ranks) == shape.num_ranks


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=2, max_size=5), st.randoms())
def test_any_order_of_ranks_can_be_named(sizes: list[tuple[int, int]], random: Any) -> None:
    ranks = list(range(1, 1 + sum(tp * pp for tp, pp in sizes)))
    random.shuffle(ranks)
    left = iter(ranks)
    groups = [[next(left) for _ in range(tp * pp)] for tp, pp in sizes]
    shapes = format_instances([Instance(*size) for size in sizes[1:]])
    topology = place(context=str(Instance(*sizes[0])), context_participant_ids=format_ids(groups[:1]),
                     generation=shapes, generation_participant_ids=format_ids(groups[1:]))
    assert [list(group.ranks) for group in topology.groups] == groups
    for group, (tp, pp) in zip(topology.groups, sizes, strict=True):
        assert group.leader == group.ranks[0]
        assert [rank for stage in range(pp) for rank in group.stage_ranks(stage)] == list(group.ranks)
        for index, rank in enumerate(group.ranks):
            assert topology.group_of(rank) is group
            assert group.index_of(rank) == index == group.pp_rank(rank) * tp + group.tp_rank(rank)
            assert group.stage_ranks(group.pp_rank(rank))[group.tp_rank(rank)] == rank
        with pytest.raises(ValueError):
            group.index_of(0)


def test_others_take_the_free_ranks_in_order() -> None:
    topology = place(context=2, generation="tp2", generation_participant_ids="4,2")
    assert [group.ranks for group in topology.groups] == [(1,), (3,), (4, 2)]
    assert topology.label(4) == "rank 4 · generation 0 · leader"


def test_devices_go_with_their_ranks() -> None:
    topology = place(context_participant_ids="2,1", context_device_ids="0,5")
    context, generation = topology.groups
    assert (context.device_of(2), context.device_of(1)) == (0, 5)
    assert generation.device_ids is generation.device_of(3) is None


def test_a_rank_of_two_groups_is_shown_in_the_whole_map() -> None:
    assert fault(context_participant_ids="1,2", generation_participant_ids="2") == """\
rank 2 is named by context 0 and by generation 0
  rank 0   orchestrator
  rank 1   context 0 (leader)
  rank 2   context 0, generation 0   <-- taken twice
  rank 3   -                         <-- nobody's
needed: every rank 1..3 in exactly one group; type e.g. --context-participant-ids "1,2" \
--generation-participant-ids "3\""""


@pytest.mark.parametrize(("keywords", "first", "row"), [
    ({"context_participant_ids": "0"}, "rank 0 is named by context 0, but is the orchestrator's",
     "rank 0   orchestrator, context 0   <-- the orchestrator's"),
    ({"context_participant_ids": "1,1"}, "rank 1 is named twice by context 0",
     "rank 1   context 0, context 0   <-- taken twice"),
    ({"context_participant_ids": "5"}, "rank 2 is nobody's, but context 0 names rank 5",
     "rank 2..4 -              <-- nobody's"),
    ({"context": 2, "context_participant_ids": "1"},
     "--context-participant-ids has 1 group of ids, but there are 2 context instances: 2xtp1",
     "rank 2   context 1      <-- no participant ids for context 1"),
    ({"context": "tp1", "context_participant_ids": "1;2"},
     "--context-participant-ids has 2 groups of ids, but there is 1 context instance: tp1",
     "rank 2   context 1      <-- there is no context 1"),
    ({"context": "pp2", "context_participant_ids": "1"},
     "context 0 is tp1pp2, 2 ranks, but has 1 participant id: 1",
     "rank 1   context 0      <-- 1 participant id for tp1pp2"),
    ({"generation": "tp2", "generation_device_ids": "0,1,2"},
     "generation 0 is tp2, 2 ranks, but has 3 device ids: 0,1,2",
     "rank 3   generation 0            <-- 3 device ids for tp2"),
    ({"generation": (Instance(tp=2, device_ids=()),)}, "generation 0 is tp2, 2 ranks, but has 0 device ids: ",
     "rank 2   generation 0 (leader)   <-- 0 device ids for tp2"),
])
def test_each_fault_is_said_and_marked(keywords: dict[str, Any], first: str, row: str) -> None:
    lines = fault(**keywords).splitlines()
    assert lines[0] == first
    assert f"  {row}" in lines
    assert lines[-1].startswith("needed: ") and "; type e.g. --" in lines[-1]


def test_what_an_error_says_to_type_works() -> None:
    for keywords in ({"context": "2xtp2", "context_participant_ids": "1,2;2,3", "generation": "pp3"},
                     {"context": "2xtp2", "context_device_ids": "1", "generation": "pp3"}):
        words = fault(**keywords).rsplit("type e.g. ", 1)[1].split()
        options = {option.strip("-").replace("-", "_"): ids.strip('"')
                   for option, ids in zip(words[::2], words[1::2], strict=True)}
        assert place(**keywords | options).world_size == 8


def test_a_map_of_nothing_but_the_orchestrator() -> None:
    assert rank_map([], 1) == "  rank 0   orchestrator"
    assert rank_map([], 3).splitlines()[1] == "  rank 1..2 -              <-- nobody's"


def test_the_world_is_mapped() -> None:
    topology = place(context="tp2")
    with pytest.raises(LayoutError) as caught:
        topology.check_world(3)
    assert str(caught.value).splitlines()[1:] == [
        "  rank 0   orchestrator", "  rank 1   context 0 (leader)", "  rank 2   context 0",
        "  rank 3   generation 0         <-- not in this world of 3 ranks"]
    with pytest.raises(LayoutError) as caught:
        topology.check_world(6)
    assert str(caught.value).splitlines()[-1] == "  rank 4..5 -                    <-- nobody's"


# ---- the model ----


@pytest.mark.parametrize(("shape", "fits"), [
    ("tp1", True), ("tp3", True), ("tp9", True), ("tp3pp30", True), ("tp2", False), ("tp6", False),
    ("tp27", False), ("pp31", False)])
def test_the_model_must_divide(shape: str, fits: bool) -> None:
    topology = place(context=1, generation=shape)
    if fits:
        check_model_fits(topology, num_layers=30, num_heads=9, num_kv_heads=3)
        return
    with pytest.raises(LayoutError) as caught:
        check_model_fits(topology, num_layers=30, num_heads=9, num_kv_heads=3)
    text = str(caught.value)
    assert text.startswith(f"generation 0 is {topology.groups[1].shape}: ")
    assert ("pp can be 30 at most" if shape == "pp31" else "tp can be 1, 3 or 9") in text.splitlines()[0]
    assert text.count("does not fit the model") == topology.groups[1].shape.num_ranks


@given(st.integers(1, 8), st.integers(1, 6), st.integers(1, 30))
def test_what_fits_gives_each_rank_whole_heads(num_kv_heads: int, per_kv_head: int, tp: int) -> None:
    num_heads = num_kv_heads * per_kv_head
    try:
        check_model_fits(place(context=f"tp{tp}"), 1, num_heads, num_kv_heads)
    except LayoutError:
        assert num_heads % tp or (num_kv_heads % tp and tp % num_kv_heads)
        return
    # The query heads of a rank use the KV heads that it has, and no others.
    mine, local = num_heads // tp, max(1, num_kv_heads // tp)
    for rank in range(tp):
        used = {head // per_kv_head for head in range(rank * mine, (rank + 1) * mine)}
        first = rank * num_kv_heads // tp
        assert used == set(range(first, first + local))


def test_roles_are_laid_out_alike() -> None:
    topology = place(aggregated="2xtp2", aggregated_participant_ids="1,3;2,4")
    assert [(group.role, group.ranks) for group in topology.groups] == [
        (Role.AGGREGATED, (1, 3)), (Role.AGGREGATED, (2, 4))]
