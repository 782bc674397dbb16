"""Paged attention against plain attention over each request alone, and against itself in other blocks."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disagg_mpi.engine.attention import KvPool, StepLayout, paged_attention
from disagg_mpi.errors import ModelError
from disagg_mpi.transfer.layout import CacheView, KvLayout
from disagg_mpi.transfer.partition import KvShard

HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
HEAD_DIM, PER_BLOCK, NUM_BLOCKS = 8, 4, 40
LAYER = SimpleNamespace(layer_idx=1)


def plain(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, scale: float,
          window: int | None) -> torch.Tensor:
    """``[tokens, heads, dim]`` of one request, from the definition, in float64."""
    group = query.shape[1] // key.shape[1]
    q = query.double().transpose(0, 1)
    k, v = (x.double().transpose(0, 1).repeat_interleave(group, 0) for x in (key, value))
    scores = q @ k.transpose(1, 2) * scale
    rows = torch.arange(start, start + query.shape[0])[:, None]
    columns = torch.arange(key.shape[0])[None]
    hidden = columns > rows
    if window is not None:
        hidden |= columns <= rows - window
    return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1)


def own_view(kv_heads: int, dtype: str = "fp32") -> CacheView:
    """A pool of two layers that is all one rank's."""
    return CacheView(1, 0, "own", 0, KvLayout(2, kv_heads, HEAD_DIM, PER_BLOCK, NUM_BLOCKS, dtype), 0, 0,
                     KvShard(0, 2, 0, kv_heads))


def shared_view(kv_heads: int, dtype: str = "fp32") -> CacheView:
    """The same shape amid other layers and heads, with something before it in the memory."""
    layout = KvLayout(5, kv_heads + 3, HEAD_DIM, PER_BLOCK, NUM_BLOCKS, dtype)
    return CacheView(1, 0, "host", 4096, layout, 1, 2, KvShard(3, 2, 4, kv_heads))


def memory_for(view: CacheView) -> bytearray:
    return bytearray(view.offset + view.layout.pool_bytes)


class Requests:
    """Requests with K and V of all their positions, fed to the pool in chunks."""

    def __init__(self, heads: tuple[int, int], lengths: list[int], tables: list[list[int]],
                 dtype: str = "fp32", seed: int = 0,
                 view: Callable[[int, str], CacheView] = own_view) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.view = view(heads[1], dtype)
        self.memory = memory_for(self.view)
        self.pool = KvPool(self.memory, self.view)
        self.tables = tables
        self.data = [[torch.randn(n, h, HEAD_DIM, generator=generator)
                      for h in (heads[0], heads[1], heads[1])] for n in lengths]

    def step(self, chunks: list[tuple[int, int, int]], window: int | None = None,
             scale: float = 0.3) -> list[torch.Tensor]:
        """``chunks``: (request, start, length); the output of each."""
        layout = self.view.layout
        paged = StepLayout(self.pool, [(start, n, layout.token_runs(self.tables[r], start + n))
                                       for r, start, n in chunks])
        query, key, value = (
            torch.cat([self.data[r][i][start : start + n] for r, start, n in chunks])
            .transpose(0, 1).unsqueeze(0) for i in range(3))
        out, weights = paged_attention(LAYER, query, key, value, None, scale, paged=paged,
                                       sliding_window=window)
        assert weights is None
        return list(out[0].split([n for _, _, n in chunks]))

    def expected(self, chunk: tuple[int, int, int], window: int | None = None,
                 scale: float = 0.3) -> torch.Tensor:
        request, start, length = chunk
        query, key, value = self.data[request]
        end = start + length
        return plain(query[start:end], key[:end], value[:end], start, scale, window)


def tables_for(lengths: list[int], order: list[int]) -> list[list[int]]:
    tables, taken = [], 0
    for length in lengths:
        count = -(-length // PER_BLOCK)
        tables.append(order[taken : taken + count])
        taken += count
    return tables


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 3, 6, 100])
@pytest.mark.parametrize("view", [own_view, shared_view])
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=4), scattered=st.booleans(),
       seed=st.integers(0, 10**6))
@settings(deadline=None, max_examples=25)
def test_mixed_batches_equal_plain_attention(
        heads: tuple[int, int], window: int | None, view: Callable[[int, str], CacheView],
        lengths: list[int], scattered: bool, seed: int) -> None:
    random = Random(seed)
    order = list(range(NUM_BLOCKS))
    if scattered:
        random.shuffle(order)
    requests = Requests(heads, lengths, tables_for(lengths, order), view=view)
    done = [0] * len(lengths)
    while any(d < n for d, n in zip(done, lengths, strict=True)):
        chunks = []
        for request, length in enumerate(lengths):
            left = length - done[request]
            size = min(left, random.randint(0, 7))
            if size:
                chunks.append((request, done[request], size))
                done[request] += size
        if not chunks:
            continue
        for chunk, out in zip(chunks, requests.step(chunks, window), strict=True):
            torch.testing.assert_close(out.double(), requests.expected(chunk, window),
                                       atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("view", [own_view, shared_view])
def test_where_the_blocks_lie_does_not_change_a_bit(
        heads: tuple[int, int], window: int | None, view: Callable[[int, str], CacheView]) -> None:
    lengths = [19, 9]
    steps = [[(0, 0, 7), (1, 0, 8)], [(0, 7, 11), (1, 8, 1)], [(0, 18, 1)]]
    outputs = []
    for order in (list(range(NUM_BLOCKS)), list(range(NUM_BLOCKS))[::-1],
                  [7, 8, 3, 30, 31, 2, 19, 4, 11, 5], [33, 34, 35, 36, 37, 1, 2, 3]):
        requests = Requests(heads, lengths, tables_for(lengths, order), view=view)
        outputs.append([out for step in steps for out in requests.step(step, window)])
    for other in outputs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(outputs[0], other, strict=True))


def test_company_in_the_step_does_not_change_a_bit() -> None:
    lengths = [12, 9, 5]
    tables = tables_for(lengths, list(range(NUM_BLOCKS)))
    together = Requests((4, 2), lengths, tables)
    alone = Requests((4, 2), lengths, tables)
    steps = [[(0, 0, 8), (1, 0, 9), (2, 0, 4)], [(0, 8, 4), (2, 4, 1)]]
    for step in steps:
        many = together.step(step)
        for chunk, out in zip(step, many, strict=True):
            assert torch.equal(alone.step([chunk])[0], out)


def test_only_the_steps_own_slots_are_written() -> None:
    requests = Requests((2, 1), [6], [[5, 9]])
    before = [plane.clone() for plane in requests.pool.keys]
    requests.step([(0, 0, 6)])
    changed = (requests.pool.keys[1] != before[1]).any(-1).any(-1).nonzero().flatten().tolist()
    assert changed == [20, 21, 22, 23, 36, 37]
    assert torch.equal(requests.pool.keys[0], before[0])


def test_nothing_of_other_ranks_is_written_or_read() -> None:
    requests = Requests((4, 2), [19, 1], [[5, 9, 2, 3, 11], [1]], view=shared_view)
    layout = requests.view.layout
    memory = np.frombuffer(requests.memory, dtype=np.float32)
    memory[:] = np.nan
    outs = requests.step([(0, 0, 18), (1, 0, 1)]) + requests.step([(0, 18, 1)])
    assert not any(out.isnan().any() for out in outs)
    written = ~np.isnan(memory[1024:].reshape(5, 2, -1, 5, HEAD_DIM))
    slots = [slot for first, count in layout.token_runs(requests.tables[0], 19)
             for slot in range(first, first + count)] + [4]
    expected = np.zeros_like(written)
    for slot in slots:
        expected[4 - 1, :, slot, 4 - 2 : 6 - 2] = True  # LAYER, the shard's second
    assert np.array_equal(written, expected) and np.isnan(memory[:1024]).all()


@pytest.mark.parametrize("view", [own_view, shared_view])
def test_blocks_are_copied_whole_and_nothing_else(view: Callable[[int, str], CacheView]) -> None:
    requests = Requests((4, 2), [1], [[0]], view=view)
    memory = np.frombuffer(requests.memory, dtype=np.float32)
    memory[:] = np.random.default_rng(0).random(len(memory), dtype=np.float32)
    expected = [torch.stack([k, v]).view(2, NUM_BLOCKS, PER_BLOCK, 2, HEAD_DIM).clone()
                for k, v in zip(requests.pool.keys, requests.pool.values, strict=True)]
    before = memory.copy()
    sources, targets = [3, 4, 5, 30, 31, 8], [20, 21, 22, 1, 0, 39]
    requests.pool.copy_blocks(sources, targets)
    for layer, planes in enumerate(expected):
        planes[:, targets] = planes[:, sources]
        assert torch.equal(requests.pool.keys[layer], planes[0].flatten(0, 1))
        assert torch.equal(requests.pool.values[layer], planes[1].flatten(0, 1))
    assert (memory != before).sum() == 2 * 2 * len(targets) * PER_BLOCK * 2 * HEAD_DIM


def test_who_asks_hears_of_each_layer_when_it_is_in_the_pool() -> None:
    requests = Requests((4, 2), [3], [[7]])
    heard: list[tuple[int, bool]] = []
    paged = StepLayout(
        requests.pool, [(0, 3, [(28, 3)])],
        lambda layer: heard.append((layer, bool(requests.pool.values[layer][30].any()))))
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in requests.data[0])
    for layer in range(2):
        paged_attention(SimpleNamespace(layer_idx=layer), q, k, v, None, 0.3, paged=paged)
    assert heard == [(0, True), (1, True)]


def test_a_bf16_cache_is_close() -> None:
    requests = Requests((4, 2), [11], [[0, 1, 2]], dtype="bf16")
    requests.step([(0, 0, 10)])
    out = requests.step([(0, 10, 1)])[0]
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), requests.expected((0, 10, 1)), atol=5e-2, rtol=5e-2)


def test_room_for_the_output_at_the_end_of_a_table_is_not_read() -> None:
    requests = Requests((4, 2), [6], [[3, 4, 5, 6]])
    for plane in (*requests.pool.keys, *requests.pool.values):
        plane.fill_(torch.nan)
    assert all(not out.isnan().any() for out in requests.step([(0, 0, 5)]) + requests.step([(0, 5, 1)]))


@pytest.mark.parametrize("extra", [{"softcap": 30.0}, {"s_aux": torch.zeros(4)}])
def test_what_it_cannot_do_is_refused_not_ignored(extra: dict[str, object]) -> None:
    requests = Requests((4, 2), [2], [[0]])
    paged = StepLayout(requests.pool, [(0, 2, [(0, 2)])])
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in requests.data[0])
    with pytest.raises(ModelError, match="does not pass on"):
        paged_attention(LAYER, q, k, v, None)
    with pytest.raises(ModelError, match="beyond the paged attention"):
        paged_attention(LAYER, q, k, v, None, paged=paged, **extra)
