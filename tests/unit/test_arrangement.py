"""Where every rank's KV-cache lies: for any instances on any hosts, nobody's bytes are anybody else's."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
import pytest
from handover import model_spec
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_mpi.config import JobConfig
from disagg_mpi.job.arrangement import Arrangement, arrange, moves_bytes
from disagg_mpi.model.checkpoint import ModelSpec
from disagg_mpi.prefix import PrefixTags
from disagg_mpi.topology import Group, Role, Topology, build_topology
from disagg_mpi.transfer.directory import COPY, MPI, SHARED, CacheDirectory
from disagg_mpi.transfer.layout import Box
from disagg_mpi.transfer.partition import shard_of

PAGE = 4096
SCRATCH = -2
SHAPES = ["tp1", "tp2", "tp4", "tp8", "pp2", "pp3", "tp2pp2", "tp8pp2"]


class Case(msgspec.Struct):
    """A job, and the hosts that its ranks are on."""

    config: JobConfig
    topology: Topology
    host_of: list[int]
    spec: ModelSpec
    gpu_of: dict[int, str] = {}

    @property
    def found(self) -> Arrangement:
        return arrange(self.config, self.topology, self.host_of, self.spec, self.gpu_of)

    @property
    def directory(self) -> CacheDirectory:
        return CacheDirectory(self.found.views, [group.ranks for group in self.topology.groups],
                              use_memory=self.config.transport != "mpi")


@st.composite
def cases(draw: st.DrawFn) -> Case:
    def copies() -> str:
        return ",".join(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3)))

    roles: dict[str, Any] = {"context": copies(), "generation": copies()}
    if draw(st.integers(0, 4)) == 0:
        roles = {"aggregated": copies()}
    config = JobConfig(
        **roles, transport=draw(st.sampled_from(["auto", "auto", "shared", "mpi"])),
        tokens_per_block=draw(st.integers(1, 6)),
        generation_tokens_per_block=draw(st.one_of(st.none(), st.integers(1, 6))),
        kv_tokens=draw(st.integers(1, 20)), dtype=draw(st.sampled_from(["fp32", "bf16"])))
    topology = build_topology(config)
    # Hosts are named by the lowest rank on them.
    on = [draw(st.integers(0, 2)) for _ in range(topology.world_size)]
    spec = model_spec(draw(st.integers(3, 5)), draw(st.sampled_from([4, 8])), draw(st.integers(1, 3)))
    return Case(config, topology, [on.index(host) for host in on], spec)


@settings(max_examples=200, deadline=None)
@given(cases())
def test_every_byte_is_of_one_instance_and_one_rank(case: Case) -> None:
    """Counted byte by byte; only ranks with the same KV head write the same bytes, in an exchange pool."""
    found, spec = case.found, case.spec
    sizes = {f"host {host}": size for host, size in found.window_bytes.items()}
    sizes |= {f"rank {rank}": size for rank, size in found.private_bytes.items()}
    owner = {name: np.zeros(size, np.int16) for name, size in sizes.items()}
    for place in {id(tags): tags for tags in found.tags.values()}.values():
        if place.offset is not None:
            pools = {view.memory for group in case.topology.groups for rank in group.ranks
                     if found.tags[group.instance_id] is place for view in [found.views[rank]]}
            [memory] = pools
            tags = owner[memory][place.offset : place.offset + PrefixTags.bytes_needed(place.num_blocks)]
            assert len(tags) == PrefixTags.bytes_needed(place.num_blocks)
            assert not tags.any()
            tags[:] = -1
    for group in case.topology.groups:
        writers: dict[str, Any] = {name: np.zeros(size, np.int8) for name, size in sizes.items()}
        blocks = list(found.block_ids[group.instance_id])
        for rank in group.ranks:
            view = found.views[rank]
            num_tokens = len(blocks) * view.layout.tokens_per_block
            box = Box.of(view.shard, 0, num_tokens)
            here, row = writers[view.memory], view.row_bytes(box)
            for offset, count in zip(*view.pieces(blocks, box), strict=True):
                for at in range(offset, offset + count * view.layout.token_bytes, view.layout.token_bytes):
                    assert at + row <= len(here)
                    here[at : at + row] += 1
        same_head = max(1, group.shape.tp // spec.num_kv_heads)
        for name, count in writers.items():
            assert set(np.unique(count)) <= {0, 1, same_head}
            assert not owner[name][count > 0].any(), "somebody else's"
            owner[name][count > 0] = group.instance_id + 1


@settings(max_examples=200, deadline=None)
@given(cases())
def test_ranks_have_their_part_on_their_host(case: Case) -> None:
    found, spec = case.found, case.spec
    assert sorted(found.views) == list(range(1, case.topology.world_size))
    for group in case.topology.groups:
        blocks = found.block_ids[group.instance_id]
        size = case.config.block_size(group.role)
        assert len(blocks) == -(-case.config.kv_tokens // size)
        for index, rank in enumerate(group.ranks):
            view = found.views[rank]
            assert (view.rank, view.host) == (rank, case.host_of[rank])
            assert view.shard == shard_of(
                spec.num_layers, spec.num_kv_heads, group.shape.tp, group.shape.pp, index)
            assert view.layout.tokens_per_block == size
            assert blocks.stop <= view.layout.num_blocks
            assert view.layout.dtype == case.config.dtype
            assert view.offset % PAGE == 0
            if case.config.transport == "mpi":
                assert found.private_bytes[rank] == view.layout.pool_bytes
                assert not found.window_bytes
            else:
                assert view.offset + view.layout.pool_bytes <= found.window_bytes[view.host]
                assert not found.private_bytes


@settings(max_examples=200, deadline=None)
@given(cases())
def test_blocks_and_tags_of_a_pool_are_dealt_out(case: Case) -> None:
    found, directory = case.found, case.directory
    pools: dict[tuple[str, int], list[int]] = defaultdict(list)
    for group in case.topology.groups:
        views = {(found.views[rank].memory, found.views[rank].offset) for rank in group.ranks}
        place = found.tags[group.instance_id]
        leader = found.views[group.leader]
        assert place.num_blocks == leader.layout.num_blocks
        if place.offset is not None:
            assert len(views) == 1
            assert place.offset % PAGE == 0
            pools[views.pop()].append(group.instance_id)
        else:
            assert found.block_ids[group.instance_id] == range(leader.layout.num_blocks)
            assert len(views) == len(group.ranks), "an array each"
    for members in pools.values():
        blocks = [block for instance in members for block in found.block_ids[instance]]
        assert blocks == list(range(found.tags[members[0]].num_blocks))
        assert len({id(found.tags[instance]) for instance in members}) == 1, "what one has tagged, all find"
    for one in case.topology.groups:
        for other in case.topology.groups:
            pair = one.instance_id, other.instance_id
            if one is not other:
                assert directory.is_exchange(*pair) == any(set(pair) <= set(m) for m in pools.values())


@settings(max_examples=400, deadline=None)
@given(cases())
def test_whether_bytes_move_agrees_with_the_way_of_every_pair(case: Case) -> None:
    directory = case.directory
    ways = [directory.way(source.instance_id, target.instance_id)
            for source in case.topology.groups if source.role is Role.CONTEXT
            for target in case.topology.groups if target.role is Role.GENERATION]
    assert moves_bytes(case.config, case.topology, case.host_of) == any(way != SHARED for way in ways)


def place(context: str, generation: str, host_of: list[int], **options: Any) -> Arrangement:
    config = JobConfig(context=context, generation=generation, tokens_per_block=4, kv_tokens=30, **options)
    return arrange(config, build_topology(config), host_of, model_spec())


def test_one_host_has_one_pool_of_the_whole_model() -> None:
    found = place("tp2", "pp2", [0] * 5)
    assert {(view.memory, view.offset, view.origin_layer, view.origin_head, view.layout.num_layers,
             view.layout.num_kv_heads, view.layout.num_blocks) for view in found.views.values()} == {
        ("host 0", 0, 0, 0, 4, 4, 16)}
    assert found.block_ids == {0: range(8), 1: range(8, 16)}
    assert found.tags[0] is found.tags[1]


def test_a_block_size_has_a_pool_of_its_own() -> None:
    found = place("1", "1,1", [0] * 4, generation_tokens_per_block=7)
    assert [view.layout.num_blocks for view in found.views.values()] == [8, 10, 10]
    assert found.block_ids == {0: range(8), 1: range(5), 2: range(5, 10)}
    assert found.tags[0].offset != found.tags[1].offset
    assert found.tags[1] is found.tags[2]


@pytest.mark.parametrize(("options", "memories"), [
    ({"transport": "mpi"}, ["rank 1", "rank 2", "rank 3"]), ({}, ["host 0", "host 2", "host 2"])])
def test_ranks_apart_have_only_their_own_part(options: dict[str, Any], memories: list[str]) -> None:
    """A context on two hosts beside a generation that shares one with it."""
    found = place("pp2", "1", [0, 0, 2, 2], **options)
    assert [found.views[rank].memory for rank in (1, 2, 3)] == memories
    assert [(found.views[rank].origin_layer, found.views[rank].layout.num_layers) for rank in (1, 2, 3)] == [
        (0, 2), (2, 2), (0, 4)]
    assert found.tags[0].offset is None


# ---- on GPUs ----


@st.composite
def gpu_cases(draw: st.DrawFn) -> Case:
    """Few GPUs, so that instances often have the same; sometimes all ranks of one share one."""
    case = draw(cases())
    ranks = range(1, case.topology.world_size)
    case.gpu_of = {rank: f"GPU {draw(st.integers(0, draw(st.integers(0, 1))))}" for rank in ranks}
    if draw(st.booleans()):
        case.host_of = [0] * case.topology.world_size
    if draw(st.booleans()):
        case.gpu_of = {rank: f"GPU {group.index_of(rank) % 2}"
                       for group in case.topology.groups for rank in group.ranks}
    case.config = case.config.replace(device="cuda")
    return case


def kin(case: Case, one: Group, other: Group) -> bool:
    """Whether two instances are to have their blocks together."""
    places = [(str(group.shape), case.config.block_size(group.role),
               [(case.host_of[rank], case.gpu_of[rank]) for rank in group.ranks]) for group in (one, other)]
    return (places[0] == places[1] and len({case.host_of[rank] for rank in one.ranks}) == 1
            and case.config.transport != "mpi")


@settings(max_examples=200, deadline=None)
@given(gpu_cases())
def test_on_gpus_every_byte_is_of_one_instance_or_is_scratch(case: Case) -> None:
    """Of a pool's bytes none is left over either: its blocks are dealt out, and one more an instance."""
    found = case.found
    owner = {name: np.zeros(pool.num_bytes, np.int16) for name, pool in found.device_pools.items()}
    for group in case.topology.groups:
        tables = {group.instance_id + 1: list(found.block_ids[group.instance_id]),
                  SCRATCH: [found.scratch[group.instance_id]]}
        for rank in group.ranks:
            view = found.views[rank]
            for who, blocks in tables.items():
                box = Box.of(view.shard, 0, len(blocks) * view.layout.tokens_per_block)
                row = view.row_bytes(box)
                for offset, count in zip(*view.pieces(blocks, box), strict=True):
                    assert row == view.layout.token_bytes, "a rank's part is all that is there"
                    mine = owner[view.memory][offset : offset + count * row]
                    assert len(mine) == count * row and not mine.any(), "somebody else's"
                    mine[:] = who
    assert all(array.all() for array in owner.values())


@settings(max_examples=200, deadline=None)
@given(gpu_cases())
def test_a_ranks_part_lies_on_its_gpu(case: Case) -> None:
    found, spec = case.found, case.spec
    assert sorted(found.views) == sorted(case.gpu_of)
    for group in case.topology.groups:
        blocks = found.block_ids[group.instance_id]
        size = case.config.block_size(group.role)
        assert len(blocks) == -(-case.config.kv_tokens // size)
        assert found.scratch[group.instance_id] not in blocks
        for index, rank in enumerate(group.ranks):
            view = found.views[rank]
            pool = found.device_pools[view.memory]
            assert (view.rank, view.host, view.offset) == (rank, case.host_of[rank], 0)
            assert case.host_of[pool.owner] == case.host_of[rank]
            assert case.gpu_of[pool.owner] == case.gpu_of[rank]
            assert found.views[pool.owner].memory == view.memory
            assert view.shard == shard_of(
                spec.num_layers, spec.num_kv_heads, group.shape.tp, group.shape.pp, index)
            assert view.layout.tokens_per_block == size
            assert view.layout.dtype == case.config.dtype
    assert not found.private_bytes, "what is on a GPU is not on the host"
    used = {rank: view.memory for rank, view in found.views.items()}
    assert set(used.values()) == set(found.device_pools)
    for group in case.topology.groups:
        assert len({used[rank] for rank in group.ranks}) == len(group.ranks), "an allocation a rank"


@settings(max_examples=300, deadline=None)
@given(gpu_cases())
def test_blocks_change_hands_between_equal_instances_on_equal_gpus_alone(case: Case) -> None:
    found, directory = case.found, case.directory
    for one in case.topology.groups:
        for other in case.topology.groups:
            if one is other:
                continue
            pair = one.instance_id, other.instance_id
            assert directory.is_exchange(*pair) == kin(case, one, other)
            together = found.tags[pair[0]] is found.tags[pair[1]]
            assert together == kin(case, one, other)
            assert together == ({found.views[r].memory for r in one.ranks}
                                == {found.views[r].memory for r in other.ranks})
            if together:
                ids = [{*found.block_ids[each], found.scratch[each]} for each in pair]
                assert not ids[0] & ids[1]
        place = found.tags[one.instance_id]
        is_apart = case.config.transport == "mpi" or len({case.host_of[rank] for rank in one.ranks}) > 1
        assert (place.offset is None) == is_apart, "tags that several leaders read are in a window"
        assert place.num_blocks == found.views[one.leader].layout.num_blocks
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for place in {id(tags): tags for tags in found.tags.values()}.values():
        if place.offset is not None:
            [host] = {case.host_of[g.leader] for g in case.topology.groups
                      if found.tags[g.instance_id] is place}
            spans[host].append((place.offset, place.offset + PrefixTags.bytes_needed(place.num_blocks)))
    for host, ranges in spans.items():
        ranges.sort()
        assert all(first[1] <= second[0] for first, second in pairwise(ranges))
        assert ranges[-1][1] <= found.window_bytes[host]


@settings(max_examples=300, deadline=None)
@given(gpu_cases())
def test_on_gpus_too_moving_bytes_agrees_with_the_way_of_every_pair(case: Case) -> None:
    directory = case.directory
    ways = [directory.way(source.instance_id, target.instance_id)
            for source in case.topology.groups if source.role is Role.CONTEXT
            for target in case.topology.groups if target.role is Role.GENERATION]
    assert moves_bytes(case.config, case.topology, case.host_of, case.gpu_of) == any(
        way != SHARED for way in ways)


@settings(max_examples=100, deadline=None)
@given(gpu_cases(), st.randoms(use_true_random=False))
def test_pairs_that_cannot_reach_each_other_use_messages(case: Case, random: Any) -> None:
    """And nobody else, unless they are on two hosts; a pool that both have open is not a matter of reach."""
    ranks = range(1, case.topology.world_size)
    unreachable = [(a, b) for a in ranks for b in ranks if a != b and random.random() < 0.2]
    directory = CacheDirectory(case.found.views, [group.ranks for group in case.topology.groups],
                               use_memory=case.config.transport != "mpi", unreachable=unreachable)
    for source in case.topology.groups:
        for target in case.topology.groups:
            if source is target:
                continue
            way = directory.way(source.instance_id, target.instance_id)
            if kin(case, source, target):
                assert way == SHARED
                continue
            # Whoever has a layer and a head in common passes bytes, but one alone of those with the same.
            apart = set()
            for part in directory.parts(source.instance_id, target.instance_id):
                pair = source.ranks[part.source], target.ranks[part.target]
                if (pair in unreachable or case.host_of[pair[0]] != case.host_of[pair[1]]
                        or case.config.transport == "mpi"):
                    apart.add(pair)
                assert directory.pair_way(*pair) == (MPI if pair in apart else COPY)
            assert way == (MPI if apart else COPY)


def on_gpus(context: str, generation: str, gpus: str) -> Arrangement:
    config = JobConfig(context=context, generation=generation, tokens_per_block=4, kv_tokens=30,
                       device="cuda")
    topology = build_topology(config)
    return arrange(config, topology, [0] * topology.world_size, model_spec(),
                   {rank: f"GPU {gpu}" for rank, gpu in enumerate(gpus, 1)})


def test_on_one_gpu_two_instances_share_an_allocation() -> None:
    found = on_gpus("1", "1", "aa")
    [(name, pool)] = found.device_pools.items()
    assert pool.owner == 1 and name == "GPU a of host 0, allocated by rank 1"
    assert found.block_ids == {0: range(8), 1: range(9, 17)}
    assert found.scratch == {0: 8, 1: 17}
    assert {view.layout.num_blocks for view in found.views.values()} == {18}
    assert found.window_bytes == {0: 4096}, "the tags alone"


def test_each_place_of_instances_on_the_same_gpus_is_one_allocation() -> None:
    found = on_gpus("tp2", "tp2", "abab")
    assert [found.views[rank].memory for rank in (1, 2)] == [found.views[rank].memory for rank in (3, 4)]
    assert sorted(pool.owner for pool in found.device_pools.values()) == [1, 2]
    assert found.tags[0] is found.tags[1]
    crossed = on_gpus("tp2", "tp2", "abba")
    assert sorted(pool.owner for pool in crossed.device_pools.values()) == [1, 2, 3, 4]


def test_without_gpus_nothing_is_on_one() -> None:
    found = place("1", "1", [0] * 3)
    assert (found.device_pools, found.scratch) == ({}, {})
