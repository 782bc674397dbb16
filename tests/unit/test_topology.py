"""Rank arithmetic, the world's size, and the ``layout`` command that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from inprocess import save_tiny_model

from disagg_mpi.cli.layout import as_data, layout, render
from disagg_mpi.config import Instance, JobConfig
from disagg_mpi.errors import ConfigError, LayoutError, ModelError, WorldTooLargeError, WorldTooSmallError
from disagg_mpi.job.plan import MemoryPlan, plan_memory
from disagg_mpi.model.checkpoint import ModelSpec, read_model_spec
from disagg_mpi.topology import Role, build_topology

SHAPES = st.builds(Instance, tp=st.integers(1, 4), pp=st.integers(1, 3))
MANY = st.lists(SHAPES, min_size=1, max_size=5).map(tuple)


@given(MANY, MANY)
def test_every_rank_has_one_place(context: tuple[Instance, ...],
                                  generation: tuple[Instance, ...]) -> None:
    topology = build_topology(JobConfig(context=context, generation=generation))
    ranks = [rank for group in topology.groups for rank in group.ranks]
    assert ranks == list(range(1, topology.world_size))
    assert topology.group_of(0) is None
    assert [g.role for g in topology.groups] == (
        [Role.CONTEXT] * len(context) + [Role.GENERATION] * len(generation))
    for position, group in enumerate(topology.groups):
        assert group.instance_id == position
        assert len(group.ranks) == group.shape.tp * group.shape.pp
        assert group.leader == min(group.ranks)
        assert all(topology.group_of(rank) is group for rank in group.ranks)
    assert topology.sum_text().startswith(f"{topology.world_size} = 1 orchestrator + ")
    assert sum(int(term.split()[0]) for term in topology.sum_text().split(" = ")[1].split(" + ")) \
        == topology.world_size


def test_labels_say_rank_instance_and_part() -> None:
    topology = build_topology(JobConfig(context=1, generation=(Instance(), Instance(tp=2))))
    assert [topology.label(rank) for rank in range(5)] == [
        "rank 0 · orchestrator", "rank 1 · context 0 · leader", "rank 2 · generation 0 · leader",
        "rank 3 · generation 1 · leader", "rank 4 · generation 1 · follower"]


def test_a_world_that_is_too_small_is_told_the_sum_and_what_to_run() -> None:
    topology = build_topology(JobConfig(context=2, generation=2))
    with pytest.raises(WorldTooSmallError) as caught:
        topology.check_world(3)
    lines = str(caught.value).splitlines()
    assert lines[0] == ("3 ranks, this layout needs 5 = 1 orchestrator + 2 context + 2 generation; "
                        "run mpirun -n 5 …")
    assert [line.split()[1] for line in lines[1:]] == ["0", "1", "2", "3", "4"]
    mark = "<-- not in this world of 3 ranks"
    assert [line.endswith(mark) for line in lines[1:]] == [False] * 3 + [True] * 2
    assert caught.value.exit_code == 2


def test_a_single_rank_is_told_how_ranks_are_started() -> None:
    with pytest.raises(WorldTooSmallError, match=r"^1 rank, .*launch -n 3 -- .*doctor"):
        build_topology(JobConfig()).check_world(1)


def test_a_world_that_is_too_large_is_told_what_to_do_with_the_rest() -> None:
    with pytest.raises(WorldTooLargeError, match=r"5 ranks, .*needs 2 = 1 orchestrator \+ 1 aggregated;"
                                                 r" run mpirun -n 2 …, or give the other 3"):
        build_topology(JobConfig(aggregated=1)).check_world(5)


def test_the_right_world_is_silent() -> None:
    build_topology(JobConfig()).check_world(3)


def test_roles_say_which_phases_they_do() -> None:
    assert [(r.does_context, r.does_generation) for r in Role] == [
        (True, False), (False, True), (True, True)]


SPEC = ModelSpec("LlamaForCausalLM", "llama", 2, 32, 4, 2, 8, 128, 256, "float32", (), 1000)


def test_memory_of_a_pool() -> None:
    plan = plan_memory(JobConfig(kv_tokens=100, tokens_per_block=32), SPEC)
    assert plan.blocks_per_instance == 4
    assert plan.pool_bytes == 4 * 32 * (2 * 2) * (2 * 8) * 4
    half = plan_memory(JobConfig(kv_tokens=100, tokens_per_block=32, kv_dtype="bf16"), SPEC)
    assert half.pool_bytes * 2 == plan.pool_bytes


def test_memory_that_is_not_there_is_refused_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg_mpi.job.plan.available_bytes", lambda: 2 * 2**30)
    huge = MemoryPlan(SPEC, "fp32", 32, 2**26)
    with pytest.raises(ConfigError, match=r"2 engine ranks .* available: give --kv-tokens \d+") as caught:
        huge.check_memory(2, 2 * huge.pool_bytes)
    advised = MemoryPlan(SPEC, "fp32", 32, int(str(caught.value).rsplit(" ", 1)[1]))
    advised.check_memory(2, 2 * advised.pool_bytes)
    with pytest.raises(ConfigError, match="use fewer ranks"):
        huge.check_memory(8, 8 * huge.pool_bytes)


def test_memory_is_not_guessed_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg_mpi.job.plan.available_bytes", lambda: None)
    plan = MemoryPlan(SPEC, "fp32", 32, 2**40)
    plan.check_memory(2, 2 * plan.pool_bytes)


def test_layout_shows_ranks_and_sizes(tiny_llama: Path) -> None:
    result = CliRunner().invoke(layout, ["--model", str(tiny_llama), "--context", "2", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.output)
    assert data["world_size"] == 4
    assert data["sum"] == "4 = 1 orchestrator + 2 context + 1 generation"
    assert [rank["role"] for rank in data["ranks"]] == [
        "orchestrator", "context 0 · leader", "context 1 · leader", "generation 0 · leader"]
    spec = read_model_spec(tiny_llama)
    assert data["memory"]["weights_bytes_per_host"] == spec.parameter_bytes
    assert data["memory"]["bytes_per_token"] == 2 * 2 * 2 * 8 * 4


@pytest.mark.parametrize("options", [
    [], ["--aggregated", "2"], ["--transport", "mpi"], ["--transport", "shared"]])
def test_layout_for_reading(tiny_llama: Path, options: list[str]) -> None:
    result = CliRunner().invoke(layout, ["--model", str(tiny_llama), *options])
    assert result.exit_code == 0, result.output
    assert "KV pool" in result.output
    assert result.output.count("rank ") >= 3
    assert ("hand-over" in result.output) == ("--aggregated" not in options)


def test_layout_of_a_model_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_MPI_CACHE", str(tmp_path))
    result = CliRunner().invoke(layout, [])
    assert result.exit_code == 0
    assert "fetch gets it" in result.output
    result = CliRunner().invoke(layout, ["--model", "some/hub-id"])
    assert isinstance(result.exception, ModelError)


def test_followers_and_leaders_are_shown() -> None:
    config = JobConfig(context=(Instance(tp=2),), context_device_ids="4,5")
    topology = build_topology(config)
    text = render(config, topology, None)
    assert re.search(r"rank 1   ▶ context 0 \(leader\)   stage 0/1 · tp 0/2   device 4$", text, re.M)
    assert re.search(r"rank 2   ▶ context 0 +stage 0/1 · tp 1/2   device 5$", text, re.M)
    assert re.search(r"rank 3   ◀ generation 0$", text, re.M)
    ranks = as_data(config, topology, None)["ranks"]
    assert ranks[2] == {"rank": 2, "role": "context 0 · follower", "pp_rank": 0, "tp_rank": 1, "device_id": 5}
    assert len(ranks) == 4


def test_layout_shares_the_pool_out(tiny_llama: Path) -> None:
    arguments = ["--model", str(tiny_llama), "--context", "tp4", "--generation", "pp2", "--json"]
    data = json.loads(CliRunner().invoke(layout, arguments).output)
    whole = data["memory"]["pool_bytes_per_instance"]
    # Two KV heads on four ranks: each has one, which a neighbour has too.
    assert [rank.get("pool_bytes", 0) * 2 / whole for rank in data["ranks"]] == [0, 1, 1, 1, 1, 1, 1]
    assert data["instances"][1] == {"name": "generation 0", "shape": "tp1pp2", "ranks": [5, 6]}


@pytest.mark.parametrize(("options", "text"), [
    (["--context", "tp3"], "context 0 is tp3: 4 heads and 2 KV heads .* tp can be 1, 2 or 4"),
    (["--aggregated", "pp3"], "aggregated 0 is tp1pp3: 2 layers .* pp can be 2 at most")])
def test_layout_refuses_what_the_model_cannot_be_divided_into(
    tiny_llama: Path, options: list[str], text: str
) -> None:
    error = CliRunner().invoke(layout, ["--model", str(tiny_llama), *options]).exception
    assert isinstance(error, LayoutError)
    assert re.match(text, str(error))


@pytest.mark.parametrize(("options", "same_host"), [
    ({}, "one shared pool: the block table moves, the bytes stay"),
    ({"generation_tokens_per_block": 64}, "copied within the shared window"),
    ({"generation_tokens_per_block": 32}, "one shared pool"),
    ({"transport": "mpi"}, "MPI messages")])
def test_layout_says_how_a_hand_over_goes(options: dict[str, Any], same_host: str) -> None:
    config = JobConfig(**options)
    text = render(config, build_topology(config), plan_memory(config, SPEC))
    assert f"same host: {same_host}" in text
    assert "other host: MPI messages" in text
    assert ("generation: blocks of 64" in text) == ("generation_tokens_per_block" in options
                                                    and config.block_size("generation") == 64)


def test_the_models_shape_is_read_from_its_files(tmp_path: Path) -> None:
    spec = read_model_spec(save_tiny_model(tmp_path / "m"))
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (2, 2, 8, 128)
