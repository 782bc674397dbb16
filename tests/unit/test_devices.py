"""Which rank gets which GPU, and how much fits on it: everyone has one of its own while there are enough."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from handover import model_spec
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from inprocess import replace

from disagg_mpi.config import JobConfig
from disagg_mpi.errors import ConfigError, LayoutError
from disagg_mpi.gpus import Gpu, torch_takes_gpus
from disagg_mpi.job.arrangement import arrange
from disagg_mpi.job.devices import (
    RUNTIME_BYTES,
    STAGING_BYTES,
    DevicePlace,
    activation_bytes,
    describe,
    place_ranks,
    plan_pools,
    token_bytes,
    uses_of,
    wants_gpus,
    weight_bytes,
)
from disagg_mpi.model.checkpoint import ModelSpec
from disagg_mpi.topology import Topology, build_topology
from disagg_mpi.transfer.partition import shard_of

GIB = 2**30
SHAPES = ["tp1", "tp2", "tp4", "pp2", "tp2pp2"]


def gpus(names: str, size: int = 8 * GIB) -> list[Gpu]:
    """A GPU for each letter, which is its uuid."""
    return [Gpu(index, "H200", name, size) for index, name in enumerate(names)]


def make(*, hosts: Sequence[int] = (), sees: str | Mapping[int, str] = "ab",
         **options: Any) -> tuple[Topology, dict[int, DevicePlace]]:
    """``sees``: the GPUs that all ranks see, or some of them; ``hosts``: each rank's, rank 0's too."""
    topology = build_topology(JobConfig(device="cuda", **options))
    size = topology.world_size
    host_of = [hosts.index(host) for host in hosts] or [0] * size
    given_ = sees if isinstance(sees, Mapping) else dict.fromkeys(range(1, size), sees)
    seen = {rank: gpus(given_[rank]) if rank else [] for rank in range(size)}
    return topology, place_ranks(topology, host_of, [f"node{host}" for host in host_of], seen)


def letters(places: Mapping[int, DevicePlace]) -> str:
    """The GPU of each rank, in order."""
    return "".join(places[rank].gpu.uuid for rank in sorted(places))


# ---- places ----


@pytest.mark.parametrize(("options", "expected"), [
    ({}, "ab"),
    ({"sees": "a"}, "aa"),
    ({"sees": "abcd"}, "ab"),
    ({"context": 3, "generation": 2}, "ababa"),
    ({"context": "tp2", "generation": "tp2"}, "abab"),
    ({"context": "tp2", "generation": "tp2", "sees": "abcd"}, "abcd"),
    ({"context_device_ids": "1", "generation_device_ids": "1"}, "bb"),
    ({"context": "tp2", "context_device_ids": "1,0", "generation_device_ids": "1"}, "bab"),
    # Who is not told takes what the others left.
    ({"generation_device_ids": "0"}, "ba"),
    ({"context_device_ids": "0"}, "ab"),
    ({"context": 2, "generation_device_ids": "2", "sees": "abc"}, "abc"),
    ({"context": 2, "generation_device_ids": "0", "sees": "abc"}, "bca"),
    # A launcher shows each rank its own GPUs.
    ({"sees": {1: "a", 2: "b"}}, "ab"),
    ({"sees": {1: "a", 2: "ab"}}, "ab"),
    ({"sees": {1: "ab", 2: "b"}}, "ab"),
    ({"sees": {1: "b", 2: "ab"}, "generation_device_ids": "1"}, "bb"),
    # A host's turns are its own.
    ({"hosts": [0, 0, 1], "sees": "ab"}, "aa"),
    ({"hosts": [0, 0, 1, 1, 1], "context": 2, "generation": 2}, "aaba"),
])
def test_everyone_has_a_gpu(options: dict[str, Any], expected: str) -> None:
    _, places = make(**options)
    assert letters(places) == expected


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_nobody_shares_while_a_gpu_of_the_host_is_free(data: st.DataObject) -> None:
    options = {role: ",".join(data.draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3)))
               for role in ("context", "generation")}
    size = build_topology(JobConfig(**options)).world_size
    hosts = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    number = {host: data.draw(st.integers(1, 6)) for host in set(hosts)}
    sees = {rank: "abcdef"[: number[hosts[rank]]] for rank in range(size)}
    _, places = make(hosts=hosts, sees=sees, **options)
    assert sorted(places) == list(range(1, size))
    on = Counter((place.host, place.gpu.uuid) for place in places.values())
    for rank, place in places.items():
        assert place.rank == rank and place.host == hosts.index(hosts[rank])
        assert place.num_sharing == on[place.host, place.gpu.uuid]
    for host in {hosts[rank] for rank in places}:
        counts = [on[hosts.index(host), letter] for letter in "abcdef"[: number[host]]]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("options", [
    {"generation_device_ids": "2"},
    {"context": "tp2,tp2", "context_device_ids": "0,1;1,7"},
    {"context": 3, "context_device_ids": "0;1;2"},
    {"context": 2, "context_device_ids": "9;9", "generation": 2, "generation_device_ids": "8;8"},
    {"context_device_ids": "1", "sees": {1: "a", 2: "ab"}},
    {"context": 2, "context_device_ids": "1;1", "sees": {1: "ab", 2: "b", 3: "ab"}},
    {"context": "tp2pp2", "context_device_ids": "0,1,2,3", "sees": "abc"},
])
def test_a_device_that_is_not_there_is_said_with_what_is(options: dict[str, Any]) -> None:
    """Typing what the error says gives a job in the end: each error is of one role."""
    for _ in range(2):
        with pytest.raises(LayoutError) as caught:
            make(**options)
        message = str(caught.value)
        named = re.search(r"names device (\d+), but rank (\d+) on host node0 sees .*: (.*)", message)
        assert named is not None
        assert f"device {named[1]} is not there" in message
        assert re.search(rf"rank +{named[2]} .*device {named[1]} is not there", message), message
        assert "0 (H200)" in named[3]
        advice = dict(re.findall(r'--(\w+)-device-ids "([^"]*)"', message))
        assert len(advice) == 1
        options = {**options, **{f"{role}_device_ids": ids for role, ids in advice.items()}}
        try:
            make(**options)
            return
        except LayoutError:
            continue
    raise AssertionError("what is to be typed does not help")


def test_a_rank_that_sees_no_gpu_is_shown_in_the_map() -> None:
    with pytest.raises(LayoutError) as caught:
        make(sees={1: "a", 2: "", 3: "a"}, context="tp2", hosts=[0, 0, 1, 0])
    message = str(caught.value)
    assert message.startswith("context 0 is to compute on a GPU, and rank 2 on host node2 sees none")
    assert re.search(r"rank +2 .*no GPU on node2", message)
    assert not re.search(r"rank +[13] .*no GPU", message)
    assert "CUDA_VISIBLE_DEVICES" in message and message.endswith("--device cpu")


@pytest.mark.parametrize(("device", "sees", "expected"), [
    ("auto", {1: "a", 2: "a"}, True), ("auto", {1: "a", 2: ""}, False), ("cuda", {1: "", 2: ""}, True),
    ("emulated", {1: "a", 2: "a"}, True), ("cpu", {1: "a", 2: "a"}, False)])
def test_auto_takes_gpus_if_everyone_has_one(device: Any, sees: dict[int, str], expected: bool) -> None:
    config = JobConfig(device=device)
    seen = {0: [], **{rank: gpus(names) for rank, names in sees.items()}}
    assert wants_gpus(config, build_topology(config), seen) == expected


def test_places_in_words() -> None:
    def said(**options: Any) -> str:
        topology, places = make(**options)
        names = [f"node{host}" for host in options.get("hosts", [0] * topology.world_size)]
        return describe(places, names)

    assert said() == "rank 1 on GPU 0 (H200); rank 2 on GPU 1 (H200)"
    assert said(sees="a") == "ranks 1, 2 on GPU 0 (H200), which 2 ranks share"
    assert said(hosts=[0, 0, 2]) == "rank 1 on GPU 0 of node0 (H200); rank 2 on GPU 0 of node2 (H200)"


# ---- how much fits ----

SPEC = replace(model_spec(num_layers=4, num_kv_heads=4, head_dim=8), dtype="bfloat16",
               parameter_bytes=2**30, hidden_size=64, vocab_size=1000)


def plan(spec: ModelSpec = SPEC, *, free: int | Mapping[int, int] = 8 * GIB, hosts: Sequence[int] = (),
         sees: str | Mapping[int, str] = "ab", **options: Any) -> Plan:
    config = JobConfig(device="cuda", **options)
    topology, places = make(hosts=hosts, sees=sees, **options)
    each = free if isinstance(free, Mapping) else dict.fromkeys(places, free)
    return Plan(config, spec, topology, places, each, hosts or [0] * topology.world_size)


class Plan:
    """The sums of a job, before anything is allocated."""

    def __init__(self, config: JobConfig, spec: ModelSpec, topology: Topology,
                 places: Mapping[int, DevicePlace], free: Mapping[int, int], hosts: Sequence[int]) -> None:
        self.config, self.spec, self.topology = config, spec, topology
        self.places, self.free, self.hosts = places, free, hosts
        self.uses = uses_of(config, topology, spec, places, free, [f"node{host}" for host in hosts])

    @property
    def tokens(self) -> int:
        return plan_pools(self.config, self.uses)

    def overflow(self, tokens: int) -> int:
        """Bytes beyond what may be used, of the fullest GPU, with the pools that a job would make: counted
        allocation by allocation. Negative: so many are left."""
        host_of = [self.hosts.index(host) for host in self.hosts]
        gpu_of = {rank: place.gpu.uuid for rank, place in self.places.items()}
        found = arrange(self.config.replace(kv_tokens=tokens), self.topology, host_of, self.spec, gpu_of)
        needed: dict[tuple[int, str], int] = defaultdict(int)
        for pool in found.device_pools.values():
            needed[host_of[pool.owner], gpu_of[pool.owner]] += pool.num_bytes
        slices = set()
        free: dict[tuple[int, str], int] = {}
        for group in self.topology.groups:
            for index, rank in enumerate(group.ranks):
                key = host_of[rank], gpu_of[rank]
                free[key] = min(self.free[rank], free.get(key, 2**62))
                needed[key] += RUNTIME_BYTES + activation_bytes(self.config, self.spec)
                spans_hosts = len({place.host for place in self.places.values()}) > 1
                if spans_hosts or self.config.transport == "mpi":
                    needed[key] += STAGING_BYTES  # messages go
                if (key, str(group.shape), index) not in slices:
                    slices.add((key, str(group.shape), index))
                    needed[key] += weight_bytes(self.config, self.spec, group.shape.tp, group.shape.pp)
        return max(count - int(free[key] * self.config.gpu_memory) for key, count in needed.items())


@st.composite
def plans(draw: st.DrawFn, same_blocks: bool) -> Plan:
    size = draw(st.sampled_from([1, 16, 32, 128, 2048]))
    options: dict[str, Any] = {
        role: ",".join(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=2)))
        for role in ("context", "generation")}
    if not same_blocks:
        options["generation_tokens_per_block"] = draw(st.sampled_from([1, 24, 32, 100, 4096]))
    ranks = build_topology(JobConfig(**options)).world_size
    hosts = draw(st.lists(st.integers(0, 1), min_size=ranks, max_size=ranks))
    spec = replace(SPEC, parameter_bytes=draw(st.integers(1, 4)) * 2**28,
                   num_layers=draw(st.integers(3, 40)), head_dim=draw(st.sampled_from([8, 64, 128])))
    free = {rank: draw(st.integers(6, 200)) * GIB for rank in range(1, ranks)}
    return plan(spec, free=free, hosts=hosts, sees="abcd"[: draw(st.integers(1, 4))], tokens_per_block=size,
                gpu_memory=draw(st.sampled_from([0.5, 0.9, 1.0])),
                kv_dtype=draw(st.sampled_from(["bf16", "fp32"])),
                transport=draw(st.sampled_from(["auto", "mpi"])), **options)


@given(plans(same_blocks=True))
@settings(max_examples=200, deadline=None)
def test_the_pools_fit_and_with_a_block_more_they_would_not(case: Plan) -> None:
    try:
        tokens = case.tokens
    except ConfigError:
        assert case.overflow(case.config.block_size("context")) > 0
        assume(False)
    assert tokens % case.config.tokens_per_block == 0
    assert case.overflow(tokens) <= 0
    assert case.overflow(tokens + 1) > 0


@given(plans(same_blocks=False))
@settings(max_examples=100, deadline=None)
def test_the_pools_fit_with_other_blocks_in_generation_too(case: Plan) -> None:
    try:
        tokens = case.tokens
    except ConfigError:
        assume(False)
    assert tokens > 0 and case.overflow(tokens) <= 0


@given(plans(same_blocks=True), st.integers(1, 2**24))
@settings(max_examples=100, deadline=None)
def test_what_is_asked_for_is_taken_or_refused_with_a_number_that_fits(case: Plan, asked: int) -> None:
    case.config = case.config.replace(kv_tokens=asked)
    try:
        assert case.tokens == asked
        assert case.overflow(asked) <= 0
    except ConfigError as error:
        assert case.overflow(asked) > 0
        advice = re.search(r"give --kv-tokens (\d+)$", str(error))
        if advice is None:
            assert case.overflow(1) > 0
        else:
            case.config = case.config.replace(kv_tokens=int(advice[1]))
            assert case.tokens == int(advice[1])
            assert case.overflow(case.tokens) <= 0


def test_the_sum_counts_equal_slices_once() -> None:
    """tp2 twice on two GPUs: each has one slice of the weights, two ranks' workspace, and two pools."""
    weights = weight_bytes(JobConfig(device="cuda"), SPEC, 2, 1)
    assert weights == 2**29
    for case in (plan(context="tp2", generation="tp2"), plan(aggregated="2xtp2")):
        each = RUNTIME_BYTES + activation_bytes(case.config, SPEC)
        shard = shard_of(4, 4, 2, 1, 0)
        token = token_bytes(case.config, SPEC, shard)
        assert [(use.ranks, use.weights, use.runtime, use.bytes_per_token) for use in case.uses] == [
            (ranks, weights, 2 * each, 2 * token) for ranks in ((1, 3), (2, 4))]
    # Other slices are others: halves of tp2, or of tp1 and pp2.
    [use] = plan(context="tp2", sees="a", generation="tp1").uses
    assert use.weights == 2 * 2**29 + 2**30
    [use] = plan(context="tp2", sees="a", generation="pp2").uses
    assert use.weights == 2 * 2**29 + 2 * weight_bytes(JobConfig(device="cuda"), SPEC, 1, 2)


def test_the_first_and_the_last_stage_have_the_embedding_too() -> None:
    config, embedding = JobConfig(device="cuda"), 2 * SPEC.vocab_size * SPEC.hidden_size
    layers = SPEC.parameter_bytes - embedding
    assert weight_bytes(config, SPEC, 1, 4) == layers // 4 + embedding
    assert weight_bytes(config, SPEC, 2, 4) == (layers // 4 + embedding) // 2


def test_the_type_that_is_computed_with_counts() -> None:
    config = JobConfig(device="cuda")
    assert weight_bytes(config.replace(dtype="fp32"), SPEC, 1, 1) == 2 * SPEC.parameter_bytes
    fp32 = replace(SPEC, dtype="float32")
    assert weight_bytes(config, fp32, 1, 1) == SPEC.parameter_bytes // 2
    shard = shard_of(4, 4, 1, 1, 0)
    assert token_bytes(config, SPEC, shard) == 2 * 4 * 4 * 8 * 2
    assert token_bytes(config.replace(kv_dtype="fp32"), SPEC, shard) == 2 * 4 * 4 * 8 * 4


def test_of_ranks_that_share_a_gpu_the_least_free_counts() -> None:
    [use] = plan(sees="a", free={1: 5 * GIB, 2: 4 * GIB}).uses
    assert use.free == 4 * GIB


def test_the_error_adds_up() -> None:
    case = plan(sees="a", kv_tokens=10**8)
    with pytest.raises(ConfigError) as caught:
        assert case.tokens
    text = str(caught.value)
    assert text.startswith("GPU 0 of node0 (ranks 1, 2): ")
    *parts, total, free = (float(number) for number in re.findall(r"([\d.]+) GiB(?! a rank)", text))
    assert sum(parts) == pytest.approx(total, abs=0.02) and total > free == 8.0
    assert len(parts) == 3 and "90% may be used (--gpu-memory)" in text
    with pytest.raises(ConfigError) as caught:
        plan_pools(case.config.replace(gpu_memory=1.0), case.uses)
    assert "may be used" not in str(caught.value)


def test_where_not_even_a_block_fits_other_layouts_are_named() -> None:
    with pytest.raises(ConfigError, match=r"of its own .*--context-device-ids.*smaller model.*tp2") as caught:
        assert plan(sees="a", free=3 * GIB).tokens
    assert "--kv-tokens" not in str(caught.value)


def test_the_fullest_gpu_decides() -> None:
    alone = plan(sees="ab").tokens
    assert plan(sees="a").tokens < alone
    assert plan(sees="ab", free={1: 100 * GIB, 2: 8 * GIB}).tokens == alone
    assert plan(sees="ab", free={1: 8 * GIB, 2: 100 * GIB}).tokens == alone


@pytest.mark.parametrize(("version", "takes"), [
    ("2.11.0+cu130", True), ("2.11.0", True), ("2.13.0+cpu", False)])
def test_auto_takes_no_gpus_for_a_torch_without_cuda(
        monkeypatch: pytest.MonkeyPatch, version: str, takes: bool) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    assert torch_takes_gpus() is takes
