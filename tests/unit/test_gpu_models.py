"""Tiny random models as a device computes them, against transformers' logits: families, shapes, packed steps.

The device is the processor. Ranks of a stage are threads that meet in a barrier for each sum; their slices of
the weights lie in one allocation each, as on GPUs.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import save_tiny_model
from test_parallel_models import (
    HEAD_DIM,
    LAYERS,
    LENGTHS,
    MODELS,
    PER_BLOCK,
    TABLES,
    VOCABULARY,
    Sum,
    check_close,
    reference,
    save_gemma3,
    sequences,
)

from disagg_mpi.comm.messages import Batch, PagedStep
from disagg_mpi.engine.gpu.attention import DevicePool, SdpaAttention, make_attention
from disagg_mpi.engine.gpu.buffers import StepBuffers
from disagg_mpi.engine.gpu.collectives import StagedCollectives
from disagg_mpi.engine.gpu.device import HostDevice
from disagg_mpi.engine.gpu.model import DeviceModel, head_shape
from disagg_mpi.engine.gpu.operations import TorchOperations, make_operations
from disagg_mpi.engine.gpu.tables import SeatTables, StepArrays, arrays_of
from disagg_mpi.engine.gpu.weights import WeightArena
from disagg_mpi.engine.tensor_parallel import ModelShard
from disagg_mpi.engine.weights import DTYPES, ModelPlan, load_model, plan_model
from disagg_mpi.errors import ModelError
from disagg_mpi.model.variants import ensure_dtype
from disagg_mpi.transfer.layout import CacheView, KvLayout
from disagg_mpi.transfer.partition import shard_of

NUM_BLOCKS = 32
# Chunks (request, start, length): of prompts alone, of both kinds, of one token each, of all tokens at once.
STEPS = [[(0, 0, 13)], [(0, 13, 6), (1, 0, 9)], [(1, 9, 7), (0, 19, 1)], [(0, 20, 1), (1, 16, 1)],
         [(0, 21, 1)]]
WHOLE = [[(1, 0, LENGTHS[1]), (0, 0, LENGTHS[0])]]
SHAPES = [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2)]
NINE_HEADS = [(1, 1), (3, 1), (9, 1)]
CASES = [(name, tp, pp) for name in MODELS
         for tp, pp in (NINE_HEADS if name == "llama-9-heads" else SHAPES)]


class Rank:
    """One rank's slice, with weights, pool and arrays of its own."""

    def __init__(self, path: Path, shard: ModelShard, total: Sum, kv_heads: int, dtype: str,
                 kv_dtype: str) -> None:
        device = HostDevice()
        self.plan = plan_model(path, dtype, shard)
        arena = WeightArena(self.plan)
        memory = torch.full((arena.num_bytes,), 0x7F, dtype=torch.uint8)  # what is not filled is seen
        arena.fill_from_files(memory)
        arena.attach(memory, device)
        collectives = StagedCollectives(total.of(shard.tp_rank), shard.tp_rank) if shard.tp > 1 else None
        self.model = DeviceModel(self.plan, shard, collectives, make_operations(device, DTYPES[dtype]))
        kv = shard_of(LAYERS, kv_heads, shard.tp, shard.pp, shard.pp_rank * shard.tp + shard.tp_rank)
        layout = KvLayout(kv.num_layers, kv.num_heads, HEAD_DIM, PER_BLOCK, NUM_BLOCKS + 1, kv_dtype)
        view = CacheView(0, 0, "own", 0, layout, kv.first_layer, kv.first_head, kv)
        self.pool = DevicePool(torch.zeros(layout.pool_bytes, dtype=torch.uint8), view, DTYPES[kv_dtype])
        self.attention = make_attention("auto", device, self.pool, head_shape(self.plan), self.model.dtype,
                                        max_requests=8)
        self._buffers = StepBuffers(device, num_tokens=64, num_chunks=8, num_rows=64, num_pages=64)

    def step(self, arrays: StepArrays, hidden: torch.Tensor | None) -> torch.Tensor:
        """Whole logits of the step's rows, or its hidden states."""
        step = self._buffers.upload(arrays)
        self.attention.begin(step)
        output = self.model(step.token_ids, step.positions, step.rows, self.attention, hidden)
        return self.model.whole(output).float() if self.model.is_last else output


class Ranks:
    """All of an instance."""

    def __init__(self, path: Path, tp: int, pp: int, kv_heads: int, *, dtype: str = "fp32",
                 kv_dtype: str | None = None) -> None:
        sums = [Sum(tp) for _ in range(pp)]
        self.stages = [[Rank(path, ModelShard(tp, rank, pp, stage), sums[stage], kv_heads, dtype,
                             kv_dtype or dtype) for rank in range(tp)] for stage in range(pp)]
        self._threads = ThreadPoolExecutor(tp)

    def step(self, arrays: StepArrays) -> torch.Tensor:
        hidden: torch.Tensor | None = None
        for ranks in self.stages:
            outs = list(self._threads.map(
                lambda rank, given: rank.step(arrays, given), ranks,
                [None if hidden is None else hidden.clone() for _ in ranks]))
            assert all(torch.equal(outs[0], out) for out in outs), "every rank has all of it"
            hidden = outs[0]
        assert hidden is not None and hidden.dtype == torch.float32
        return hidden

    def all_logits(self, steps: Sequence[Sequence[tuple[int, int, int]]], seated: bool) -> list[torch.Tensor]:
        """Of each sequence ``[tokens, vocabulary]``; ``seated``: with block tables that the ranks keep."""
        texts, layout = sequences(), self.stages[0][0].pool.view.layout
        seats = SeatTables(4, 8, PER_BLOCK, NUM_BLOCKS)
        found: list[list[torch.Tensor]] = [[] for _ in texts]
        for number, chunks in enumerate(steps):
            tokens = [token for r, start, length in chunks for token in texts[r][start : start + length]]
            keep = list(range(len(tokens)))
            if seated:
                arrays = seats.arrays(PagedStep(
                    number, [3 - r for r, _, _ in chunks], [start for _, start, _ in chunks],
                    [length for _, _, length in chunks], tokens,
                    [] if number > 1 else [(3 - r, 0, TABLES[r]) for r, _, _ in chunks], [], [], keep))
                if arrays.is_generation:
                    arrays = seats.padded(arrays, 3)
            else:
                arrays = arrays_of(Batch(number, tokens, [
                    (start, length, layout.token_runs(TABLES[r], start + length))
                    for r, start, length in chunks], keep), PER_BLOCK)
            parts = self.step(arrays)[: len(tokens)].split([length for _, _, length in chunks])
            for (request, _, _), part in zip(chunks, parts, strict=True):
                found[request].append(part)
        return [torch.cat(parts) for parts in found]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @cache
    def path(name: str) -> Path:
        kind, changes = MODELS[name]
        folder = tmp_path_factory.mktemp(name)
        if kind == "Gemma3Text":
            return save_gemma3(folder)
        return save_tiny_model(folder, kind, num_hidden_layers=LAYERS, vocab_size=VOCABULARY, **changes)
    return path


def kv_heads(name: str) -> int:
    return int(MODELS[name][1].get("num_key_value_heads", 2))


@pytest.mark.parametrize(("name", "tp", "pp"), CASES)
def test_logits_are_transformers_own(model_path: Any, name: str, tp: int, pp: int) -> None:
    path = model_path(name)
    ranks = Ranks(path, tp, pp, kv_heads(name))
    check_close(ranks.all_logits(STEPS, seated=pp == 1), reference(path), 1e-4)
    if pp == 1:  # over what the steps before have left in the pool
        check_close(ranks.all_logits(STEPS, seated=False), reference(path), 1e-4)
        check_close(ranks.all_logits(WHOLE, seated=True), reference(path), 1e-4)


def test_which_families_go_the_short_way(model_path: Any) -> None:
    short = {name for name in MODELS
             if Ranks(model_path(name), 1, 1, kv_heads(name)).stages[0][0].model._llama is not None}
    assert short == {name for name in MODELS if name.startswith("llama")}


def test_the_long_way_gives_what_the_short_one_does(
        model_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_path("llama-tied-bias")
    short = Ranks(path, 2, 1, 2).all_logits(STEPS, seated=True)
    from disagg_mpi.engine.gpu import model

    monkeypatch.setattr(model.FusedLlama, "fits", staticmethod(lambda _module: False))
    check_close(Ranks(path, 2, 1, 2).all_logits(STEPS, seated=True), short, 1e-5)


@pytest.mark.parametrize("name", ["llama-tied-bias", "mistral-sliding", "qwen3"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_a_kv_cache_in_16_bits_is_close(model_path: Any, name: str, tp: int, pp: int) -> None:
    """With computation in fp32: hidden states between stages are too."""
    path = model_path(name)
    exact = reference(path)
    found = Ranks(path, tp, pp, kv_heads(name), kv_dtype="bf16").all_logits(STEPS, seated=pp == 1)
    for mine, theirs in zip(found, exact, strict=True):
        error = (mine - theirs).abs().mean() / theirs.abs().mean()
        assert 1e-4 < error < 0.05, "rounded, and no more"


@pytest.mark.parametrize("name", ["llama-tied-bias", "qwen3"])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_bf16_is_close(model_path: Any, name: str, tp: int, pp: int, tmp_path: Path,
                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_MPI_CACHE", str(tmp_path))
    path = ensure_dtype(model_path(name), "bf16")
    found = Ranks(path, tp, pp, 2, dtype="bf16").all_logits(STEPS, seated=pp == 1)
    for mine, theirs in zip(found, reference(model_path(name)), strict=True):
        assert (mine - theirs).abs().mean() < 0.1 * theirs.abs().mean()


def test_a_step_that_wants_no_row_gives_none(model_path: Any) -> None:
    for name in ("llama", "qwen3"):
        [[rank]] = Ranks(model_path(name), 1, 1, 2).stages
        arrays = arrays_of(Batch(0, [1, 2, 3], [(0, 3, [(8, 3)])], []), PER_BLOCK)
        assert rank.step(arrays, None).shape == (0, VOCABULARY)


def test_of_a_shared_pool_a_rank_writes_its_own_layers_and_heads(model_path: Any) -> None:
    """Behind an offset, among layers and heads of others; and nothing of a block that is not in the table."""
    [[_], [rank]] = Ranks(model_path("llama"), 1, 2, 2).stages
    layout = KvLayout(LAYERS + 1, 4, HEAD_DIM, PER_BLOCK, 6, "fp32")
    shard = shard_of(LAYERS, 2, 1, 2, 1)
    view = CacheView(0, 0, "host", 512, layout, 0, -1, shard)
    memory = torch.full((512 + layout.pool_bytes,), 1, dtype=torch.uint8)
    pool = DevicePool(memory, view, torch.float32)
    device = HostDevice()
    step = StepBuffers(device, num_tokens=8, num_chunks=8, num_rows=8, num_pages=8).upload(
        arrays_of(Batch(0, [0] * 6, [(0, 6, [(5 * PER_BLOCK, 4), (2 * PER_BLOCK, 2)])], [5]), PER_BLOCK))
    attention = SdpaAttention(pool)
    attention.begin(step)
    rank.model(step.token_ids, step.positions, step.rows, attention, torch.ones(6, 32))
    array = memory.numpy()[512:].reshape(LAYERS + 1, 2, 6, PER_BLOCK, 4, -1)
    written = np.argwhere((array != 1).any(axis=-1))
    slots = {(5, 0), (5, 1), (5, 2), (5, 3), (2, 0), (2, 1)}
    assert {tuple(place) for place in written.tolist()} == {
        (layer, plane, block, within, head) for layer in range(shard.first_layer, shard.end_layer)
        for plane in (0, 1) for block, within in slots for head in (1, 2)}
    assert (memory[:512] == 1).all()


# ---- weights ----


def filled(path: Path, shard: ModelShard = ModelShard()) -> tuple[ModelPlan, WeightArena, torch.Tensor]:  # noqa: B008
    plan = plan_model(path, "fp32", shard)
    arena = WeightArena(plan)
    memory = torch.full((arena.num_bytes + 64,), 0x7F, dtype=torch.uint8)
    arena.fill_from_files(memory)
    assert (memory[arena.num_bytes :] == 0x7F).all(), "no more than it asked for"
    arena.attach(memory, HostDevice())
    return plan, arena, memory


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_weights_are_those_of_the_files(model_path: Any, name: str, tp: int, pp: int) -> None:
    """Every parameter of the slice, at aligned places that do not overlap, tied ones once."""
    tp = tp if name != "llama-9-heads" else 1
    for index in range(tp * pp):
        shard = ModelShard(tp, index % tp, pp, index // tp)
        plan, arena, memory = filled(model_path(name), shard)
        expected = load_model(model_path(name), "fp32", shard, StagedCollectives(Sum(1).of(0), 0)).module
        mine = dict(plan.module.named_parameters(remove_duplicate=False))
        theirs = {key.replace("embed_tokens.inner.", "embed_tokens."): value
                  for key, value in expected.named_parameters(remove_duplicate=False)}
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert torch.equal(value, theirs[key]), key
            assert not value.requires_grad
            assert value.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr(), "in place"
        buffers = {key.replace("embed_tokens.inner.", "embed_tokens."): value
                   for key, value in expected.named_buffers()}
        for key, buffer in plan.module.named_buffers():
            assert torch.equal(buffer, buffers[key]), key
        spans = sorted((place.offset, place.offset + 4 * int(np.prod(place.shape)))
                       for place in arena.places.values())
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert spans[-1][1] <= arena.num_bytes
        for key, place in arena.places.items():
            is_joined = key.split(".")[-2] in ("k_proj", "v_proj", "up_proj") and len(place.shape) == 2
            assert is_joined or place.offset % 256 == 0, key
            assert place.is_parameter == (key in mine)


def test_what_is_multiplied_with_the_same_rows_lies_together(model_path: Any) -> None:
    _, arena, _ = filled(model_path("llama-tied-bias"), ModelShard(2, 1))
    for layer in range(LAYERS):
        for module, names in (("self_attn", "qkv"), ("mlp", ("gate", "up"))):
            places = [arena.places[f"model.layers.{layer}.{module}.{name}_proj.weight"] for name in names]
            for before, after in pairwise(places):
                assert after.offset == before.offset + 4 * int(np.prod(before.shape))


def test_tied_weights_are_held_once(model_path: Any) -> None:
    plan, arena, _ = filled(model_path("llama-tied-bias"))
    module = plan.module
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    untied = filled(model_path("llama"))[1]
    assert ("lm_head.weight" in arena.places) + ("model.embed_tokens.weight" in arena.places) == 1
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= untied.places.keys()


def test_two_ranks_that_attach_one_allocation_hold_the_same(model_path: Any) -> None:
    """The one that fills it, and one that has only planned."""
    first, arena, memory = filled(model_path("qwen3"), ModelShard(2, 1, 2, 0))
    second = plan_model(model_path("qwen3"), "fp32", ModelShard(2, 1, 2, 0))
    other = WeightArena(second)
    assert (other.num_bytes, other.places) == (arena.num_bytes, arena.places)
    other.attach(memory, HostDevice())
    pairs = zip(first.module.named_parameters(), second.module.named_parameters(), strict=True)
    for (name, mine), (same, theirs) in pairs:
        assert name == same and mine.data_ptr() == theirs.data_ptr()


def test_random_weights_are_finite_norms_one_and_the_same_each_time(model_path: Any) -> None:
    plan = plan_model(model_path("llama-tied-bias"), "fp32", ModelShard())
    arena = WeightArena(plan)
    memories = [torch.full((arena.num_bytes,), 0x7F, dtype=torch.uint8) for _ in range(2)]
    for memory in memories:
        arena.fill_randomly(memory)
    arena.attach(memories[0], HostDevice())
    for name, value in plan.module.named_parameters():
        if value.dim() > 1:
            assert 0.005 < float(value.std()) < 0.05, name
        else:
            assert (value == (0.0 if name.endswith("bias") else 1.0)).all(), name
    for place in arena.places.values():
        end = place.offset + 4 * int(np.prod(place.shape))
        assert torch.equal(*(memory[place.offset : end] for memory in memories))


# ---- what attention must know ----


def test_heads_are_the_ranks_own(model_path: Any) -> None:
    shape = head_shape(plan_model(model_path("llama-mqa"), "fp32", ModelShard(2, 1)))
    assert (shape.num_heads, shape.num_kv_heads, shape.head_dim) == (2, 1, HEAD_DIM)
    assert shape.scaling == pytest.approx(HEAD_DIM**-0.5)


class Watched(SdpaAttention):
    """Notes with which windows and scalings layers attend."""

    def __init__(self, pool: DevicePool) -> None:
        super().__init__(pool)
        self.seen: set[tuple[int | None, float | None]] = set()

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
               scaling: float | None = None, window: int | None = None) -> torch.Tensor:
        self.seen.add((window, scaling))
        return super().attend(layer, query, key, value, scaling=scaling, window=window)


@pytest.mark.parametrize("name", MODELS)
def test_what_a_plan_is_made_for_is_what_layers_ask_for(model_path: Any, name: str) -> None:
    """Kernels that are planned before the forward must know all windows of it, and the one scaling."""
    [[rank]] = Ranks(model_path(name), 1, 1, kv_heads(name)).stages
    rank.attention = watched = Watched(rank.pool)
    rank.step(arrays_of(Batch(0, [1, 2, 3], [(0, 3, [(8, 3)])], []), PER_BLOCK), None)
    shape = head_shape(rank.plan)
    assert {window for window, _ in watched.seen} == set(shape.windows)
    assert {scaling for _, scaling in watched.seen} == {shape.scaling}
    assert len(shape.windows) == (2 if name in ("qwen2", "gemma3") else 1)


def test_layers_that_are_not_alike_are_refused(model_path: Any) -> None:
    plan = plan_model(model_path("llama"), "fp32", ModelShard())
    plan.module.model.layers[2].self_attn.scaling = 0.5
    with pytest.raises(ModelError, match=r"other heads than others.*--device cpu"):
        head_shape(plan)


def test_flashinfer_is_refused_where_it_cannot_be(model_path: Any) -> None:
    [[rank]] = Ranks(model_path("llama"), 1, 1, 2).stages
    shape = head_shape(rank.plan)
    with pytest.raises(ModelError, match=r"--attention flashinfer: it needs CUDA"):
        make_attention("flashinfer", HostDevice(), rank.pool, shape, torch.float32, max_requests=8)
    names = [make_attention(name, HostDevice(), rank.pool, shape, torch.float32, max_requests=8).name
             for name in ("auto", "sdpa")]
    assert "it needs CUDA" in names[0] and "slower" not in names[1]


# ---- what lies between the matrices ----


def test_operations_are_what_they_are_called() -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, 16, generator=generator) for _ in range(2))
    weight = torch.randn(16, generator=generator)
    operations = TorchOperations()

    def norm(of: torch.Tensor) -> torch.Tensor:
        return of / (of.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight

    total = x + residual
    torch.testing.assert_close(operations.norm(x, weight, 1e-5), norm(x))
    torch.testing.assert_close(operations.add_norm(x.clone(), residual, weight, 1e-5), norm(total))
    torch.testing.assert_close(residual, total)
    gate, up = x[:, :8], x[:, 8:]
    torch.testing.assert_close(operations.gated(x), gate / (1 + (-gate).exp()) * up)


def test_a_head_is_turned_by_its_position() -> None:
    chooser = random.Random(0)
    angles = torch.tensor([[chooser.uniform(0, 6) for _ in range(4)] for _ in range(10)])
    table = torch.cat([angles.cos(), angles.sin()], dim=-1)
    query, key = torch.randn(3, 16), torch.randn(3, 8)
    before = query.clone(), key.clone()
    positions = torch.tensor([7, 0, 9], dtype=torch.int32)
    TorchOperations().rotate(query, key, positions, table)
    for after, old in ((query, before[0]), (key, before[1])):
        for row, position in enumerate(positions.tolist()):
            for head in range(old.shape[1] // 8):
                for pair in range(4):
                    a, b = (float(old[row, 8 * head + pair + 4 * half]) for half in (0, 1))
                    cos, sin = (float(f(angles[position, pair])) for f in (torch.cos, torch.sin))
                    found = [float(after[row, 8 * head + pair + 4 * half]) for half in (0, 1)]
                    assert found == pytest.approx([a * cos - b * sin, b * cos + a * sin], abs=1e-5)
