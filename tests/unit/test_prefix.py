"""Names of blocks and the tags of a pool: equal names mean equal prefixes, and no torn block is believed."""

from __future__ import annotations

import hashlib
import itertools
import mmap
import random
import sys
import threading
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_mpi.prefix import BlockHasher, Found, PrefixTags

KEY = b"a job's own"


def make_tags(num_blocks: int) -> PrefixTags:
    return PrefixTags(np.zeros(PrefixTags.bytes_needed(num_blocks), np.uint8), num_blocks)


def filled(tags: Sequence[int]) -> PrefixTags:
    made = make_tags(len(tags))
    for block, tag in enumerate(tags):
        if tag:
            made.set(block, tag)
    return made


@given(st.lists(st.integers(0, 2), max_size=24), st.lists(st.integers(0, 2), max_size=24),
       st.integers(1, 4))
def test_equal_hashes_are_equal_prefixes(one: list[int], other: list[int], size: int) -> None:
    hasher = BlockHasher(KEY, size)
    a, b = hasher.of(one), hasher.of(other)
    assert len(a) == len(one) // size
    assert 0 not in a
    for i, j in itertools.product(range(len(a)), range(len(b))):
        assert (a[i] == b[j]) == (one[: (i + 1) * size] == other[: (j + 1) * size])


@given(st.lists(st.integers(0, 2**31 - 1), max_size=40), st.integers(1, 5), st.data())
def test_hashes_grow_with_the_request(tokens: list[int], size: int, data: st.DataObject) -> None:
    hasher, hashes = BlockHasher(KEY, size), list[int]()
    for length in sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=5))):
        hasher.extend(hashes, tokens[:length])
        assert hashes == hasher.of(tokens[:length])
    hasher.extend(hashes, tokens)
    assert hashes == BlockHasher(KEY, size).of(tuple(tokens))


def test_a_hash_is_what_its_definition_says() -> None:
    def name(previous: bytes, tokens: list[int]) -> bytes:
        data = previous + b"".join(token.to_bytes(4, "little") for token in tokens)
        return hashlib.blake2b(data, key=KEY, digest_size=8).digest()

    first = name(bytes(8), [1, 2])
    second = name(first, [70_000, 4])
    assert BlockHasher(KEY, 2).of([1, 2, 70_000, 4, 5]) == [
        int.from_bytes(first, "little"), int.from_bytes(second, "little")]
    assert BlockHasher(b"another job's", 2).of([1, 2]) != BlockHasher(KEY, 2).of([1, 2])


def test_a_hasher_that_cannot_be() -> None:
    for key in (b"", bytes(65)):
        with pytest.raises(ValueError, match=f"the key has {len(key)} bytes; it must have 1 to 64"):
            BlockHasher(key, 16)
    with pytest.raises(ValueError, match="tokens_per_block is 0"):
        BlockHasher(KEY, 0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=20), st.lists(st.integers(1, 5), max_size=8),
       st.integers(0, 19))
def test_find_gives_the_longest_prefix_in_few_runs(
    held: list[int], wanted: list[int], preferred: int
) -> None:
    """Against a search that tries everything (the tags here are not chained: any order may occur)."""
    tags = filled(held)
    found = tags.find(wanted, prefer=lambda block: block == preferred)
    expected = list(itertools.takewhile(lambda tag: tag in held, wanted))
    assert [held[block] for block, _ in found] == expected
    assert tags.still(found, wanted) == len(found)

    def run_from(block: int, index: int) -> int:
        pairs = zip(held[block:], wanted[index:], strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    index = 0
    while index < len(found):
        lengths = {block: run_from(block, index) for block in range(len(held))}
        longest = max(lengths.values())
        start = found[index].block
        assert lengths[start] == longest
        assert start == preferred or lengths.get(preferred, 0) < longest
        assert [block for block, _ in found[index : index + longest]] == list(range(start, start + longest))
        index += longest


def test_of_many_holders_the_one_that_goes_on_is_found() -> None:
    """A system prompt in every request of the pool; one of them is the conversation's last turn."""
    hashes = list(range(1, 30))
    tags = make_tags(2000)
    for start in range(0, 1000, 10):
        for offset in range(8):
            tags.set(start + offset, hashes[offset])
    for offset, tag in enumerate(hashes):
        tags.set(1500 + offset, tag)
    assert [block for block, _ in tags.find(hashes)] == list(range(1500, 1529))
    found = tags.find(hashes[:8], prefer=lambda block: block == 990)
    assert found[0].block == 990


def test_many_holders_at_the_end_of_the_pool() -> None:
    tags = filled([7] * 50)
    assert [block for block, _ in tags.find([7, 7, 7])][1:] == [
        block + 1 for block, _ in tags.find([7, 7, 7])][:-1]
    assert len(tags.find([7] * 60)) == 60
    assert len(tags.find([7, 8])) == 1
    assert tags.find([]) == []
    assert make_tags(0).find([1]) == []


def test_what_was_cleared_is_not_what_was_found() -> None:
    tags = filled([1, 2, 3, 4])
    found = tags.find([1, 2, 3, 4])
    assert found == [Found(block, 0) for block in range(4)]
    assert tags.get(2) == 3
    tags.clear([2])
    assert tags.get(2) == 0
    assert tags.tagged([1, 2]) == [True, False]
    assert tags.still(found, [1, 2, 3, 4]) == 2
    tags.set(2, 3)
    assert tags.still(found, [1, 2, 3, 4]) == 2, "the same bytes again, but written in between"
    assert tags.find([1, 2, 3, 4])[2] == Found(2, 1)
    assert tags.still([], [1]) == tags.still(found, []) == 0
    assert tags.still(found[:1], [9]) == 0


def test_barriers_lie_where_the_order_matters() -> None:
    """Seen from the barrier: tag cleared before the version rises; nothing set before it."""
    seen: list[tuple[int, int]] = []
    tags = PrefixTags(np.zeros(16, np.uint8), 1, sync=lambda: seen.append(state()))

    def state() -> tuple[int, int]:
        return tags.get(0), int(tags._versions[0])

    tags.set(0, 5)
    tags.clear([0])
    assert seen == [(0, 0), (0, 0), (0, 1)]


def test_memory_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="the tags of 3 blocks need 48 bytes, found 47"):
        PrefixTags(np.zeros(47, np.uint8), 3)
    with pytest.raises(ValueError, match="aligned to 8 bytes"):
        PrefixTags(np.zeros(64, np.uint8)[1:], 3)
    with pytest.raises(ValueError, match="the tag of block 1 is 0"):
        make_tags(2).set(1, 0)


def test_two_views_of_one_memory() -> None:
    memory = np.frombuffer(mmap.mmap(-1, 4096), dtype=np.uint8)
    mine, other = PrefixTags(memory, 10), PrefixTags(memory, 10)
    mine.set(3, 2**64 - 1)
    found = other.find([2**64 - 1])
    assert found == [Found(3, 0)]
    mine.clear([3])
    assert other.still(found, [2**64 - 1]) == 0


def test_no_torn_copy_is_believed() -> None:
    """A writer rewrites blocks all the time; a reader copies what it finds. Hits that hold are whole."""
    num_blocks, width = 4, 64
    memory = np.zeros(PrefixTags.bytes_needed(num_blocks), np.uint8)
    data: npt.NDArray[np.int64] = np.zeros((num_blocks, width), np.int64)
    stop = threading.Event()

    def write() -> None:
        tags, rng = PrefixTags(memory, num_blocks), random.Random(1)
        while not stop.is_set():
            block, tag = rng.randrange(num_blocks), rng.randint(1, 3)
            tags.clear([block])
            for at in range(width):
                data[block, at] = tag
            tags.set(block, tag)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    writer = threading.Thread(target=write)
    writer.start()
    try:
        tags, held, dropped = PrefixTags(memory, num_blocks), 0, 0
        end = time.monotonic() + 20
        while (held < 200 or dropped < 20) and time.monotonic() < end:
            for tag in (1, 2, 3):
                found = tags.find([tag])
                if not found:
                    continue
                copy = [int(data[found[0].block, at]) for at in range(width)]
                if tags.still(found, [tag]):
                    assert copy == [tag] * width
                    held += 1
                else:
                    dropped += 1
    finally:
        stop.set()
        writer.join()
        sys.setswitchinterval(interval)
    assert held >= 200
    assert dropped >= 20
