"""Ownership of blocks: two managers of one pool, hand-overs in between, never a block with two owners."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
)

from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.prefix import PrefixTags
from disagg_mpi.transfer.layout import runs_of

SIZES = (12, 9)
SIDES = st.integers(0, 1)


def make_tags(num_blocks: int) -> PrefixTags:
    return PrefixTags(np.zeros(PrefixTags.bytes_needed(num_blocks), np.uint8), num_blocks)


class Books:
    """What one manager should do, said in the plainest way."""

    def __init__(self, blocks: Sequence[int]) -> None:
        self.size = len(blocks)
        self.blank = set(blocks)
        self.cached: list[int] = []  # the one used longest ago first
        self.tables: dict[int, list[int]] = {}

    def age(self, block: int) -> int:
        return 0 if block in self.blank else 1 + self.cached.index(block)

    def free(self) -> list[int]:
        return sorted([*self.blank, *self.cached])

    def run(self, count: int, keep: Sequence[int]) -> list[int] | None:
        """The run that has to be chosen: all blank, or the one whose youngest is oldest."""
        usable = [block for block in self.free() if block in self.blank or block not in keep]
        runs = [list(range(start, start + count)) for start in usable]
        runs = [run for run in runs if set(run) <= set(usable)]
        return min(runs, key=lambda run: (max(map(self.age, run)), run), default=None) if count else []

    def evicted(self, count: int, keep: Sequence[int]) -> list[int]:
        """The cached blocks that have to go where there is no run."""
        order = sorted(self.cached, key=lambda block: (block in keep, self.age(block)))
        return order[: max(0, count - len(self.blank))]

    def take(self, table: Sequence[int]) -> None:
        assert len(set(table)) == len(table)
        assert set(table) <= set(self.free())
        self.blank -= set(table)
        self.cached = [block for block in self.cached if block not in table]

    def give(self, blocks: Sequence[int], tags: dict[int, int]) -> None:
        self.blank |= {block for block in blocks if block not in tags}
        self.cached += [block for block in reversed(blocks) if block in tags]


class SharedPool(RuleBasedStateMachine):
    """Two instances: each allocates, tags and frees; requests pass from either to the other."""

    requests = Bundle("requests")

    def __init__(self) -> None:
        super().__init__()
        self.tags = make_tags(sum(SIZES))
        ranges = (range(SIZES[0]), range(SIZES[0], sum(SIZES)))
        self.managers = tuple(BlockManager(blocks, self.tags) for blocks in ranges)
        self.books = tuple(Books(blocks) for blocks in ranges)
        self.tagged: dict[int, int] = {}
        self.next_id = self.next_tag = 0

    def clear(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.tagged.pop(block, None)

    def check_taken(self, side: int, table: Sequence[int], keep: Sequence[int] = ()) -> None:
        """``table`` is the choice of ``allocate``; note it."""
        books, count = self.books[side], len(table)
        run = books.run(count, keep)
        if run is not None:
            assert list(table) == run
        else:
            assert {block for block in table if block in books.cached} == set(books.evicted(count, keep))
        books.take(table)
        self.clear(table)

    @rule(target=requests, side=SIDES, count=st.integers(0, 7), data=st.data())
    def allocate(self, side: int, count: int, data: st.DataObject) -> object:
        manager, books = self.managers[side], self.books[side]
        keep = data.draw(st.lists(st.sampled_from(range(sum(SIZES))), max_size=4, unique=True))
        self.next_id += 1
        if not manager.can_allocate(count):
            with pytest.raises(ValueError, match="free"):
                manager.allocate(self.next_id, count, keep)
            return multiple()
        table = list(manager.allocate(self.next_id, count, keep))
        assert len(table) == count
        self.check_taken(side, table, keep)
        books.tables[self.next_id] = table
        return (side, self.next_id)

    @rule(request=requests, full=st.integers(0, 7))
    def compute(self, request: tuple[int, int], full: int) -> None:
        side, owner = request
        for block in self.books[side].tables[owner][:full]:
            self.next_tag += 1
            self.tags.set(block, self.next_tag)
            self.tagged[block] = self.next_tag

    @rule(target=requests, side=SIDES, count=st.integers(1, 6), data=st.data())
    def adopt(self, side: int, count: int, data: st.DataObject) -> object:
        manager, books = self.managers[side], self.books[side]
        start = data.draw(st.sampled_from(sorted(books.cached) or [0]))
        run = list(range(start, start + data.draw(st.integers(1, 4))))
        if data.draw(st.booleans()):
            run = data.draw(st.permutations(run))
        self.next_id += 1
        table = list(range(run[0], run[0] + count))
        fits = (run == table[: len(run)] and set(run) <= set(books.cached)
                and set(table[len(run):]) <= set(books.free()) - set(books.cached))
        adopted = manager.adopt(self.next_id, count, run)
        if not fits:
            assert adopted is None
            return multiple()
        assert adopted == table
        books.take(table)
        self.clear(table[len(run) :])
        books.tables[self.next_id] = table
        return (side, self.next_id)

    @rule(request=requests, count=st.integers(0, 5))
    def extend(self, request: tuple[int, int], count: int) -> None:
        side, owner = request
        manager, books = self.managers[side], self.books[side]
        table = books.tables[owner]
        new = manager.extend(owner, count)
        if count > len(books.free()):
            assert new is None
            return
        assert new is not None
        assert len(new) == count
        after = list(range(table[-1] + 1, table[-1] + 1 + count)) if table else []
        if after and set(after) <= set(books.free()):
            assert new == after
            books.take(new)
            self.clear(new)
        else:
            self.check_taken(side, new)
        books.tables[owner] = table + new

    @rule(side=SIDES, blocks=st.lists(st.sampled_from(range(sum(SIZES))), max_size=5, unique=True))
    def touch(self, side: int, blocks: list[int]) -> None:
        """A hit may lie anywhere in the pool; each manager knows its own free blocks."""
        self.managers[side].touch(blocks)
        books = self.books[side]
        hit = [block for block in reversed(blocks) if block in books.cached]
        books.cached = [block for block in books.cached if block not in hit] + hit

    @rule(request=consumes(requests))
    def free(self, request: tuple[int, int]) -> None:
        side, owner = request
        self.managers[side].free(owner)
        self.books[side].give(self.books[side].tables.pop(owner), self.tagged)

    @rule(request=requests)
    def a_second_table_is_refused(self, request: tuple[int, int]) -> None:
        side, owner = request
        with pytest.raises(ValueError, match="already owns"):
            self.managers[side].allocate(owner, 1)
        with pytest.raises(ValueError, match="already owns"):
            self.managers[side].adopt(owner, 1, self.books[side].cached[:1])

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
        self.check_taken(1 - side, reserved)
        count = min(len(source), len(reserved))
        generation.exchange(self.next_id, source[:count])
        received = reserved[:count] + source[count:]
        context.free_exchanged(owner, received)
        del self.books[side].tables[owner]
        self.books[side].give(received, self.tagged)
        self.books[1 - side].tables[self.next_id] = source[:count] + reserved[count:]
        return (1 - side, self.next_id)

    @invariant()
    def the_books_agree(self) -> None:
        seen: list[int] = []
        for manager, books in zip(self.managers, self.books, strict=True):
            assert manager.check() == []
            assert {owner: list(manager.table(owner)) for owner in manager.owners} == books.tables
            assert manager.free_ids == books.free()
            assert [block for block in range(sum(SIZES)) if manager.is_cached(block)] == sorted(books.cached)
            assert (manager.num_free, manager.num_cached) == (len(books.free()), len(books.cached))
            assert manager.num_blocks == books.size == len(manager.block_ids)
            seen += manager.block_ids
        assert sorted(seen) == list(range(sum(SIZES)))
        assert {block: self.tags.get(block) for block in range(sum(SIZES))
                if self.tags.get(block)} == self.tagged


TestSharedPool = SharedPool.TestCase
TestSharedPool.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def cached_pool(*requests: int) -> tuple[BlockManager, PrefixTags]:
    """A pool that is full of what requests of so many blocks left, the first one longest ago."""
    tags = make_tags(sum(requests))
    manager = BlockManager(range(sum(requests)), tags)
    for owner, count in enumerate(requests):
        for block in manager.allocate(owner, count):
            tags.set(block, 1000 * (owner + 1) + block)
    for owner in range(len(requests)):
        manager.free(owner)
    assert manager.num_cached == sum(requests)
    return manager, tags


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


def test_the_oldest_request_goes_first_and_of_it_the_last_blocks() -> None:
    manager, tags = cached_pool(4, 4)
    assert manager.allocate(10, 1) == [3]
    assert manager.allocate(11, 1) == [2]
    manager.touch([0, 1])
    assert manager.allocate(12, 1) == [7]
    assert [tags.get(block) for block in (2, 3, 7)] == [0, 0, 0]
    assert manager.num_cached == manager.num_free == 5
    assert tags.get(1) == 1001


def test_blanks_go_before_what_is_worth_keeping() -> None:
    manager, _ = cached_pool(3, 3)
    manager.allocate(10, 2)  # of the oldest request, the last two
    manager.free(10)  # without tags: blank
    assert manager.num_cached == 4
    assert manager.allocate(11, 2) == [1, 2]
    assert manager.num_cached == 4


def test_what_is_about_to_be_copied_goes_last() -> None:
    manager, tags = cached_pool(2, 2, 2)
    assert manager.allocate(10, 2, keep=[0, 1]) == [2, 3]
    manager.free(10)
    assert sorted(manager.allocate(11, 5, keep=[0, 1])) == [1, 2, 3, 4, 5]
    assert tags.get(0) != 0, "the hit's first block is the last that may go"


def test_a_hit_is_taken_in_place() -> None:
    manager, tags = cached_pool(3, 3)
    assert manager.adopt(10, 3, [0, 1]) is None, "what lies behind is worth keeping"
    manager.free(manager.allocate(9, 3, keep=[0, 1, 5]) and 9)  # 2, 3 and 4 are blank now
    assert manager.adopt(10, 5, [0, 1]) == [0, 1, 2, 3, 4]
    assert [tags.get(block) != 0 for block in range(6)] == [True, True, False, False, False, True]
    assert manager.check() == []
    assert manager.adopt(11, 1, [1]) is None, "owned"
    assert manager.adopt(11, 2, [5]) is None, "no room behind"
    assert manager.adopt(11, 1, []) is None
    assert manager.adopt(11, 1, [6]) is None, "not ours"
    manager.free(10)
    assert manager.adopt(11, 1, [2]) is None, "blank"
    assert manager.adopt(11, 2, [1, 0]) is None, "not in order"
    assert manager.adopt(11, 1, [0, 1]) is None, "longer than asked for"


def test_a_request_grows_where_it_lies() -> None:
    manager, tags = cached_pool(2, 6)
    table = manager.allocate(10, 2)
    assert table == [0, 1]
    assert manager.extend(10, 2) == [2, 3]
    assert table == manager.table(10) == [0, 1, 2, 3]
    assert tags.tagged(range(8)) == [False] * 4 + [True] * 4
    assert manager.extend(10, 5) is None
    assert manager.extend(10, 0) == []
    assert manager.table(10) == [0, 1, 2, 3]
    with pytest.raises(KeyError):
        manager.extend(12, 1)


def test_a_request_that_cannot_grow_where_it_lies_grows_elsewhere() -> None:
    manager, tags = cached_pool(2, 1, 5)
    manager.allocate(10, 2)
    assert manager.allocate(11, 1) == [2]
    assert manager.extend(10, 2) == [6, 7]
    assert manager.table(10) == [0, 1, 6, 7]
    assert tags.tagged(range(8)) == [False] * 3 + [True] * 3 + [False] * 2


def test_a_full_pool_stays_in_runs() -> None:
    """Requests come and go for long; the cached blocks they leave do not cut the pool to pieces."""
    num_blocks, lengths = 2000, (3, 40, 75, 20, 110, 9)
    tags = make_tags(num_blocks)
    manager, pieces = BlockManager(range(num_blocks), tags), []
    for owner in range(600):
        if owner >= 12:
            manager.free(owner - 12 if owner % 3 else next(iter(manager.owners)))
        table = manager.allocate(owner, lengths[owner % len(lengths)])
        for block in table:
            tags.set(block, owner + 1)
        pieces.append(len(runs_of(table)))
    assert manager.check() == []
    assert sum(pieces[100:]) <= 1.1 * len(pieces[100:])


def test_blocks_with_a_tag_are_cached_from_the_start() -> None:
    tags = make_tags(4)
    tags.set(2, 5)
    manager = BlockManager(range(1, 4), tags)
    assert (manager.num_free, manager.num_cached) == (3, 1)
    assert manager.is_cached(2)
    assert not manager.is_cached(3)
    assert not manager.is_cached(99)


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
    manager = BlockManager(range(4))
    manager.allocate(1, 2)
    with pytest.raises(ValueError, match="block 0 is free already"):
        manager.free_exchanged(1, [0, 0])
    with pytest.raises(ValueError, match="block 1 is free already"):
        BlockManager([1, 2, 1])


def test_the_books_name_what_is_wrong() -> None:
    manager = BlockManager(range(6))
    first = manager.allocate(1, 2)
    manager.allocate(2, 2)
    manager.exchange(2, first[:1])
    assert any("block 0 is owned by 1 and 2" in problem for problem in manager.check())
    manager = BlockManager(range(3))
    manager.allocate(1, 1)
    manager._used[0] = 0
    problems = " ".join(manager.check())
    assert "block 0 of request 1 is marked free" in problems
    assert "2 blocks counted as blank, 3 marked so" in problems
    assert "3 blocks in all, but 3 free and 1 owned" in problems


def test_the_books_name_what_is_wrong_with_the_cache() -> None:
    manager, tags = cached_pool(3)
    tags.clear([1])
    assert manager.check() == ["block 1 is cached without a tag"]
    manager, tags = cached_pool(3)
    manager.allocate(10, 1)
    manager.free(10)
    tags.set(2, 9)
    assert manager.check() == ["block 2 is blank with a tag"]
    manager, tags = cached_pool(3)
    manager._used[0] = manager._used[1]
    assert manager.check() == ["the order in which the cached blocks were used is not one"]
    manager._used[0] = 0
    problems = manager.check()
    assert {"0 blocks counted as blank, 1 marked so", "3 blocks counted as cached, 2 marked so",
            "block 0 is blank with a tag"} == set(problems)


def test_a_pool_that_does_not_start_at_zero() -> None:
    manager = BlockManager(range(100, 104))
    assert manager.num_blocks == manager.num_free == 4
    assert manager.allocate(1, 3) == [100, 101, 102]
    assert BlockManager([]).num_blocks == 0
    assert BlockManager([]).allocate(1, 0) == []
