"""Ownership of blocks: two managers of one pool, hand-overs in between, never a block with two owners."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)
from inprocess import free_ids

from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.transfer.layout import runs_of

SIZES = (12, 9)


class SharedPool(RuleBasedStateMachine):
    """Two instances: each allocates and frees; requests pass from either to the other."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.managers = (BlockManager(range(SIZES[0])),
                         BlockManager(range(SIZES[0], sum(SIZES))))
        self.model: tuple[dict[int, list[int]], dict[int, list[int]]] = ({}, {})
        self.next_id = 0

    @rule(target=requests, side=st.integers(0, 1), count=st.integers(0, 7))
    def allocate(self, side: int, count: int) -> object:
        manager = self.managers[side]
        self.next_id += 1
        if not manager.can_allocate(count):
            with pytest.raises(ValueError, match="free"):
                manager.allocate(self.next_id, count)
            return multiple()
        free = free_ids(manager)
        table = list(manager.allocate(self.next_id, count))
        assert len(table) == count
        assert set(table) <= set(free)
        run = next((start for start in free
                    if all(start + i in free for i in range(count))), None)
        if count and run is not None:
            assert table == list(range(run, run + count)), "the lowest run that fits"
        self.model[side][self.next_id] = table
        return (side, self.next_id)

    @rule(request=consumes(requests))
    def free(self, request: tuple[int, int]) -> None:
        side, owner = request
        self.managers[side].free(owner)
        del self.model[side][owner]

    @rule(request=requests)
    def allocate_twice_is_refused(self, request: tuple[int, int]) -> None:
        with pytest.raises(ValueError, match="already owns"):
            self.managers[request[0]].allocate(request[1], 1)

    @rule(target=requests, request=consumes(requests), room=st.integers(0, 3))
    def hand_over(self, request: tuple[int, int], room: int) -> object:
        """As the transceiver does it: take the first blocks, give reserved ones and the rest back."""
        side, owner = request
        context, generation = self.managers[side], self.managers[1 - side]
        source = list(context.table(owner))
        self.next_id += 1
        reserved_count = max(0, len(source) + room - 1)
        if not generation.can_allocate(reserved_count):
            return request
        reserved = list(generation.allocate(self.next_id, reserved_count))
        count = min(len(source), len(reserved))
        generation.exchange(self.next_id, source[:count])
        context.free_exchanged(owner, reserved[:count] + source[count:])
        del self.model[side][owner]
        self.model[1 - side][self.next_id] = source[:count] + reserved[count:]
        return (1 - side, self.next_id)

    @precondition(lambda self: self.model[0] or self.model[1])
    @rule(request=requests)
    def tables_are_what_was_given(self, request: tuple[int, int]) -> None:
        side, owner = request
        assert list(self.managers[side].table(owner)) == self.model[side][owner]

    @invariant()
    def every_block_has_one_owner(self) -> None:
        seen: list[int] = []
        for side, manager in enumerate(self.managers):
            assert manager.check() == []
            assert manager.num_blocks == SIZES[side]
            assert set(manager.owners) == set(self.model[side])
            owned = [block for table in self.model[side].values() for block in table]
            assert manager.num_free == SIZES[side] - len(owned) == len(free_ids(manager))
            seen += free_ids(manager) + owned
        assert sorted(seen) == list(range(sum(SIZES)))


TestSharedPool = SharedPool.TestCase
TestSharedPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_blocks_lie_together_where_they_can_and_low() -> None:
    manager = BlockManager(range(10))
    assert manager.allocate(1, 3) == [0, 1, 2]
    assert manager.allocate(2, 2) == [3, 4]
    assert manager.allocate(3, 3) == [5, 6, 7]
    manager.free(1)
    assert manager.allocate(4, 4) != list(range(4))
    assert manager.num_free == 1
    manager.free(3)
    assert manager.allocate(5, 2) == [3 + 2, 3 + 3]


def test_scattered_blocks_are_few_runs() -> None:
    manager = BlockManager(range(9))
    for owner in range(9):
        manager.allocate(owner, 1)
    for owner in (0, 1, 2, 4, 6, 7):
        manager.free(owner)
    table = manager.allocate(100, 6)
    assert sorted(table) == [0, 1, 2, 4, 6, 7]
    assert len(runs_of(table)) == 3


def test_mistakes_are_refused() -> None:
    manager = BlockManager(range(4))
    manager.allocate(1, 2)
    with pytest.raises(ValueError, match="3 blocks asked for, 2 free"):
        manager.allocate(2, 3)
    manager.free(1)
    with pytest.raises(KeyError):
        manager.free(1)
    manager.allocate(3, 2)
    with pytest.raises(ValueError, match="2 blocks were taken, 1 given"):
        manager.free_exchanged(3, [0])
    manager = BlockManager(range(4))
    manager.allocate(1, 1)
    with pytest.raises(ValueError, match="block 2 is free already"):
        manager.free_exchanged(1, [2])


def test_the_books_name_what_is_wrong() -> None:
    manager = BlockManager(range(6))
    first = manager.allocate(1, 2)
    manager.allocate(2, 2)
    manager.exchange(2, first[:1])
    assert any("block 0 is owned by 1 and 2" in problem for problem in manager.check())
    manager = BlockManager(range(3))
    manager.allocate(1, 1)
    manager._map[0] = 1
    problems = " ".join(manager.check())
    assert "marked free" in problems
    assert "2 blocks counted as free, 3 marked so" in problems


def test_a_pool_that_does_not_start_at_zero() -> None:
    manager = BlockManager(range(100, 104))
    assert manager.num_blocks == manager.num_free == 4
    assert manager.allocate(1, 3) == [100, 101, 102]
    assert BlockManager([]).num_blocks == 0
