"""Where requests go: the guess of what pools hold, the pure pickers, and local context phases."""

from __future__ import annotations

from collections import OrderedDict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_mpi.orchestrator.prefix_index import PrefixIndex
from disagg_mpi.orchestrator.router import (
    FREE_SHARE_LEEWAY,
    LocalContext,
    hit_tokens,
    pick_context,
    pick_generation,
)
from disagg_mpi.orchestrator.table import InstanceView
from disagg_mpi.request import ExecutorLimits
from disagg_mpi.topology import Role

SIZE = 4
LIMITS = ExecutorLimits(num_blocks=100, tokens_per_block=SIZE, max_batch_size=3, max_num_tokens=64,
                        max_model_len=1000, vocab_size=50, reserved_output=8)


def instances(count: int, role: Role = Role.CONTEXT) -> list[InstanceView]:
    views = [InstanceView(i, role, f"{role} {i}", 10 + i, LIMITS, pool=f"pool {i}") for i in range(count)]
    for view in views:
        view.prefix = PrefixIndex(LIMITS.num_blocks)
    return views


def holds(view: InstanceView, hashes: list[int]) -> None:
    assert view.prefix is not None
    view.prefix.insert(hashes)


# ---- the index ----


def test_the_index_matches_leading_blocks_only() -> None:
    index = PrefixIndex(10)
    assert index.match([1, 2]) == index.match([]) == 0
    index.insert([1, 2, 3])
    assert [index.match(h) for h in ([1, 2, 3, 4], [1, 9, 3], [2, 3])] == [3, 1, 2]


def test_the_index_forgets_the_least_used_and_ends_before_beginnings() -> None:
    index = PrefixIndex(4)
    index.insert([1, 2])
    index.insert([3, 4])
    index.match([1, 2])  # looking is no use
    index.insert([5])
    assert (index.match([1, 2]), index.match([3, 4])) == (1, 2)
    index.insert([1])
    index.insert([6, 7])
    assert (index.match([1]), index.match([3, 4]), index.match([6, 7]), len(index)) == (1, 0, 2, 4)


def test_the_index_holds_the_beginning_of_what_is_too_long() -> None:
    index = PrefixIndex(3)
    index.insert([9])
    index.insert([1, 2, 3, 4, 5])
    assert (index.match([1, 2, 3, 4, 5]), index.match([9])) == (3, 0)
    nothing = PrefixIndex(0)
    nothing.insert([1])
    assert nothing.match([1]) == 0


@given(capacity=st.integers(0, 6),
       paths=st.lists(st.lists(st.integers(0, 1), max_size=5), max_size=25))
def test_the_index_against_a_list(capacity: int, paths: list[list[int]]) -> None:
    """Prompts over two tokens: hashes are chained, so nodes of a tree."""
    index, model = PrefixIndex(capacity), OrderedDict[int, None]()
    for path in paths:
        hashes = [int("1" + "".join(map(str, path[: n + 1])), 2) for n in range(len(path))]
        held = next((n for n, h in enumerate(hashes) if h not in model), len(hashes))
        assert index.match(hashes) == held
        # A node is no older than any that builds on it, so what is held is whole prefixes.
        assert all(h // 2 == 1 or h // 2 in model for h in model)
        index.insert(hashes)
        for h in reversed(hashes):
            model.pop(h, None)
            model[h] = None
        while len(model) > capacity:
            model.popitem(last=False)
        assert len(index) == len(model) <= capacity


# ---- context ----


def test_context_without_prefixes_goes_to_the_least_loaded() -> None:
    views = instances(3)
    views[0].pending_context_tokens, views[1].pending_context_tokens = 5, 3
    assert pick_context(views, 8, [], SIZE) == (views[2], 0)
    views[2].pending_context_tokens = 3
    assert pick_context(views, 8, [], SIZE) == (views[1], 0), "then the lower id"
    views[1].num_requests = 1
    assert pick_context(views, 8, [], SIZE) == (views[2], 0), "but first the fewest requests"
    views[2].prefix = None
    assert pick_context(views, 8, [1, 2], SIZE) == (views[2], 0), "one may reuse nothing"


def test_context_goes_where_the_prefix_is() -> None:
    views = instances(3)
    hashes = list(range(1, 11))
    holds(views[1], hashes[:4])
    holds(views[2], hashes[:6])
    assert pick_context(views, 42, hashes, SIZE) == (views[2], 24)


def test_the_last_token_is_always_computed() -> None:
    (view,) = instances(1)
    holds(view, [1, 2])
    assert [hit_tokens(view, n, [1, 2][:n // SIZE], SIZE) for n in (3, 4, 5, 8, 9)] == [0, 0, 4, 4, 8]


def test_an_overloaded_holder_is_passed_over() -> None:
    views = instances(2)
    hashes = list(range(1, 11))
    holds(views[0], hashes)
    for idle, limit in ((True, 40 / 0.55), (False, 10 + 40 / 0.1)):
        # A queue of limit tokens is what 40 reused ones are worth, for half and for all being busy.
        views[1].pending_context_tokens = 0 if idle else 10
        views[0].pending_context_tokens = int(limit) - 1
        assert pick_context(views, 42, hashes, SIZE) == (views[0], 40)
        views[0].pending_context_tokens = int(limit) + 1
        assert pick_context(views, 42, hashes, SIZE) == (views[1], 0)


def test_a_burst_of_one_prefix_spreads() -> None:
    views = instances(4)
    shared = list(range(1, 101))  # 400 tokens; 40 of each prompt are its own
    for _ in range(200):
        view, held = pick_context(views, 440, shared, SIZE)
        view.pending_context_tokens += 440 - held
        view.num_requests += 1
        holds(view, shared)
    pending = [view.pending_context_tokens for view in views]
    assert sum(pending) == 200 * 40 + 4 * 400, "each has computed it once"
    assert max(pending) - min(pending) <= 40


def test_instances_of_one_pool_share_what_one_has_computed() -> None:
    views = instances(2)
    views[1].prefix = views[0].prefix
    holds(views[0], [1, 2])
    views[0].pending_context_tokens = 1
    assert pick_context(views, 9, [1, 2], SIZE) == (views[1], 8)


# ---- generation ----


def test_generation_needs_blocks_and_a_place() -> None:
    views = instances(3, Role.GENERATION)
    assert pick_generation([], 1) is None
    views[0].free_blocks, views[1].free_blocks = 30, 80
    views[2].num_requests = LIMITS.max_batch_size
    assert pick_generation(views, 20) is views[1], "the largest free share"
    assert pick_generation(views, 90) is None
    views[1].free_blocks = 30
    assert pick_generation(views, 20) is views[0]
    views[0].num_requests = 1
    assert pick_generation(views, 20) is views[1], "fewest requests"


def test_generation_goes_where_blocks_need_not_be_moved_unless_clearly_fuller() -> None:
    views = instances(3, Role.GENERATION)
    holds(views[1], [1, 2, 3])
    holds(views[2], [1, 2])
    enough = LIMITS.num_blocks - int(FREE_SHARE_LEEWAY * LIMITS.num_blocks)
    views[1].free_blocks = enough
    assert pick_generation(views, 5, [1, 2, 3, 4]) is views[1]
    assert pick_generation(views, 5) is views[0]
    assert pick_generation(views, 5, [1, 2, 3, 4], "pool 0") is views[0], "in one pool nothing moves"
    views[1].free_blocks = enough - 1
    assert pick_generation(views, 5, [1, 2, 3, 4]) is views[2]
    views[2].num_requests = LIMITS.max_batch_size
    assert pick_generation(views, 5, [1, 2, 3, 4]) is views[0]


def test_no_pool_is_not_a_pool_in_common() -> None:
    views = instances(2, Role.GENERATION)
    for view in views:
        view.pool, view.prefix = "", None
    views[0].free_blocks -= 1
    assert pick_generation(views, 5, [], None) is views[1]


# ---- local context phases ----


@pytest.mark.parametrize(("threshold", "tokens", "local"), [
    (0, 1, False), (10, 10, True), (10, 11, False), (1000, 900, True)])
def test_a_threshold_holds_whatever_the_load(threshold: int, tokens: int, local: bool) -> None:
    choice = LocalContext(threshold, 64)
    for running in (0, 50):
        assert choice.is_local(tokens, 0, running) is local
    choice.observe_context(100, 1.0)
    choice.observe_handover(9.0)
    assert choice.is_local(tokens, 0, 0) is local


def test_nothing_is_local_before_both_costs_are_known() -> None:
    choice = LocalContext(None, 64)
    assert not choice.is_local(1, 1000, 0)
    choice.observe_context(100, 1.0)
    assert not choice.is_local(1, 1000, 0)
    choice.observe_handover(0.1)
    assert choice.is_local(1, 1000, 0)


def test_local_if_the_delay_it_causes_is_less_than_it_saves() -> None:
    choice = LocalContext(None, 64)
    choice.observe_context(100, 1.0)
    choice.observe_handover(0.1)  # as long as 10 tokens
    assert choice.is_local(60, 0, 0), "an idle instance delays nobody"
    assert choice.is_local(10, 0, 1) and not choice.is_local(11, 0, 1)
    assert choice.is_local(5, 0, 2) and not choice.is_local(6, 0, 2)
    assert choice.is_local(30, 50, 2) and not choice.is_local(31, 50, 2), "a queue there"
    assert choice.is_local(20, 0, 2, context_uncached_tokens=50), "less of it is cached there"
    assert not choice.is_local(20, 0, 2, context_uncached_tokens=49)


def test_a_local_prompt_fits_into_a_step() -> None:
    choice = LocalContext(None, 64)
    choice.observe_context(100, 1.0)
    choice.observe_handover(100.0)
    assert choice.is_local(60, 10**6, 4) and not choice.is_local(61, 10**6, 4)


def test_measured_costs_follow_what_changes() -> None:
    choice = LocalContext(None, 10**6)
    choice.observe_context(100, 10.0)
    choice.observe_handover(1.0)  # as long as 10 tokens
    assert not choice.is_local(100, 0, 1)
    for _ in range(60):
        choice.observe_context(1000, 10.0)
    assert choice.is_local(95, 0, 1) and not choice.is_local(105, 0, 1)
    for _ in range(60):
        choice.observe_handover(2.0)
    assert choice.is_local(195, 0, 1) and not choice.is_local(205, 0, 1)
