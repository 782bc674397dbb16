"""The engine's use of flashinfer, over a double that enforces its signatures and what its arguments mean."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import attend_double
import flashinfer_double
import pytest
import torch
from inprocess import VOCABULARY, save_tiny_model

from disagg_mpi.comm.messages import PagedStep
from disagg_mpi.engine.gpu.attention import (
    DeviceAttention,
    DevicePool,
    FlashInferAttention,
    HeadShape,
    SdpaAttention,
    make_attention,
    ones,
)
from disagg_mpi.engine.gpu.buffers import blank_step
from disagg_mpi.engine.gpu.device import HostDevice
from disagg_mpi.engine.gpu.model import DeviceModel, head_shape
from disagg_mpi.engine.gpu.operations import FlashInferOperations, Operations, TorchOperations
from disagg_mpi.engine.gpu.stage import DeviceStage
from disagg_mpi.engine.gpu.weights import WeightArena
from disagg_mpi.engine.tensor_parallel import ModelShard
from disagg_mpi.engine.weights import plan_model
from disagg_mpi.errors import ModelError
from disagg_mpi.model.variants import ensure_dtype
from disagg_mpi.transfer.layout import CacheView, KvLayout
from disagg_mpi.transfer.partition import KvShard

PAGE, BLOCKS, PER_SEAT = 4, 80, 9


class OnCuda(HostDevice):
    """A processor that says it is a GPU."""

    is_cuda = True


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    common = {"hidden_size": 128, "intermediate_size": 64, "head_dim": 64, "num_attention_heads": 2,
              "num_key_value_heads": 1, "initializer_range": 0.1}
    made = {"llama": save_tiny_model(tmp_path_factory.mktemp("llama"), **common),
            "sliding": save_tiny_model(tmp_path_factory.mktemp("sliding"), "Qwen2", use_sliding_window=True,
                                       sliding_window=6, max_window_layers=1, **common)}
    return {name: ensure_dtype(path, "bf16") for name, path in made.items()}


def make_pool(kv_heads: int = 1, head_dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> DevicePool:
    kind = "bf16" if dtype is torch.bfloat16 else "fp32"
    layout = KvLayout(2, kv_heads, head_dim, PAGE, BLOCKS, kind)
    view = CacheView(0, 0, "own", 0, layout, 0, 0, KvShard(0, 2, 0, kv_heads))
    return DevicePool(torch.zeros(layout.pool_bytes, dtype=torch.uint8), view, dtype)


def make_stage(path: Path, *, flashinfer: bool, captures: bool) -> DeviceStage:
    device = OnCuda()
    plan = plan_model(path, "bf16", ModelShard())
    arena = WeightArena(plan)
    memory = torch.zeros(arena.num_bytes, dtype=torch.uint8)
    arena.fill_from_files(memory)
    arena.attach(memory, device)
    operations: Operations = FlashInferOperations() if flashinfer else TorchOperations()
    pool = make_pool()
    attention: DeviceAttention = SdpaAttention(pool)
    if flashinfer:
        attention = FlashInferAttention(device, pool, head_shape(plan), 4)
    stage = DeviceStage(
        device, DeviceModel(plan, ModelShard(), None, operations), pool, attention, None,
        lambda sources, targets: None, scratch=BLOCKS - 1, max_batch_size=4, max_num_tokens=32,
        max_model_len=64, captures=captures)
    stage.warm_up()
    return stage


def blocks_of(seat: int) -> list[int]:
    """In no order; block 0 is nobody's."""
    return [1 + seat * PER_SEAT + 2 * i % PER_SEAT for i in range(PER_SEAT)]


def logits_of(stage: DeviceStage, prompts: list[list[int]], steps: int) -> list[torch.Tensor]:
    """Rows of every step: prompts in two chunks each, then the same tokens for every stage."""
    rows = []
    starts = [0] * len(prompts)
    for number in range(steps):
        lengths = [min(5, len(p) - s) if s < len(p) else 1 for p, s in zip(prompts, starts, strict=True)]
        tokens = [token for p, s, n in zip(prompts, starts, lengths, strict=True)
                  for token in (p[s : s + n] if s < len(p) else [(7 * s) % VOCABULARY])]
        ends = [sum(lengths[: at + 1]) - 1 for at in range(len(lengths))]
        queued = stage.queue(PagedStep(
            number, list(range(len(prompts))), list(starts), lengths, tokens,
            [] if number else [(seat, 0, blocks_of(seat)) for seat in range(len(prompts))], [], [], ends))
        assert queued.rows is not None
        rows.append(queued.rows.clone())
        starts = [s + n for s, n in zip(starts, lengths, strict=True)]
    return rows


@pytest.mark.parametrize("model", ["llama", "sliding"])
@pytest.mark.parametrize("captures", [False, True])
def test_every_step_is_told_what_it_needs(
        models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, model: str, captures: bool) -> None:
    flashinfer_double.install(monkeypatch)
    prompts = [[5, 9, 2, 7, 3, 4, 1, 8, 6], [11, 3], [2, 4, 6, 8, 1, 3, 5]]
    mine = logits_of(make_stage(models[model], flashinfer=True, captures=captures), prompts, 14)
    theirs = logits_of(make_stage(models[model], flashinfer=False, captures=False), prompts, 14)
    for ours, other in zip(mine, theirs, strict=True):
        assert (ours - other).norm() / other.norm() < 2e-2


def test_queries_may_lie_head_by_head(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of families whose layers are transformers' own may."""
    flashinfer_double.install(monkeypatch)
    stage = make_stage(models["llama"], flashinfer=True, captures=False)
    step = stage._buffers.upload(blank_step(3, 0, BLOCKS * PAGE - PAGE, BLOCKS - 1))
    attention = stage._attention
    query, key, value = (torch.randn(3, heads, 64).bfloat16() for heads in (2, 1, 1))
    apart = query.transpose(0, 1).contiguous().transpose(0, 1)
    assert not apart.is_contiguous()
    found = []
    for each in (query, apart):
        attention.begin(step)
        found.append(attention.attend(0, each, key, value, scaling=0.125))
    assert torch.equal(*found)


@pytest.mark.parametrize("beside", [0, 2])
def test_a_step_may_want_no_logits(
        models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, beside: int) -> None:
    """A part of a long prompt, alone or beside requests whose tokens are not asked for."""
    flashinfer_double.install(monkeypatch)
    stage = make_stage(models["llama"], flashinfer=True, captures=True)
    lengths = [1] * beside + [6]
    queued = stage.queue(PagedStep(
        0, list(range(len(lengths))), [0] * len(lengths), lengths, [3] * sum(lengths),
        [(seat, 0, blocks_of(seat)) for seat in range(len(lengths))], [], [], []))
    assert queued.rows is None and queued.tokens.tolist() == []


def test_captured_steps_read_the_next_requests_tables(
        models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes between the captured ones are padded, and what is padded writes nobody's block."""
    flashinfer_double.install(monkeypatch)
    stage = make_stage(models["llama"], flashinfer=True, captures=True)
    stage._pool.memory.zero_()
    logits_of(stage, [[1, 2, 3]] * 3, 6)
    used = {block for seat in range(3) for block in blocks_of(seat)}
    for plane in (*stage._pool.keys, *stage._pool.values):
        written = set(plane.flatten(1).any(dim=1).nonzero().flatten().tolist())
        assert written <= used | {BLOCKS - 1}


def test_kernels_that_cannot_be_built_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = HeadShape(2, 1, 64, 0.125, [None])
    flashinfer_double.install(monkeypatch, cannot_build={"auto"})
    attention = make_attention("auto", OnCuda(), make_pool(), shape, torch.bfloat16, max_requests=4)
    assert isinstance(attention, FlashInferAttention)
    assert "fa2" in attention.name and "curand_kernel.h" in attention.name
    flashinfer_double.install(monkeypatch, cannot_build={"auto", "fa2"})
    attention = make_attention("auto", OnCuda(), make_pool(), shape, torch.bfloat16, max_requests=4)
    assert isinstance(attention, SdpaAttention) and "cannot be built here" in attention.name
    with pytest.raises(ModelError, match=r"its kernels cannot be built .*give --attention sdpa"):
        make_attention("flashinfer", OnCuda(), make_pool(), shape, torch.bfloat16, max_requests=4)


def test_a_triton_that_cannot_build_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    flashinfer_double.install(monkeypatch)

    class Refuses:
        def __getitem__(self, grid: object) -> object:
            raise NotImplementedError("no C compiler\nFailed to find C compiler")

    monkeypatch.setattr(sys.modules["disagg_mpi.engine.gpu.kernels.attend"], "attend_ones", Refuses())
    shape = HeadShape(2, 1, 64, 0.125, [None])
    attention = make_attention("auto", OnCuda(), make_pool(), shape, torch.bfloat16, max_requests=4)
    assert isinstance(attention, SdpaAttention)
    assert "NotImplementedError of Triton's: Failed to find C compiler" in attention.name


def test_all_kernels_of_generation_are_built_at_the_start(
        models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever number of requests comes, alone or beside a prompt."""
    flashinfer_double.install(monkeypatch)
    launched: set[tuple[int, bool]] = set()
    attend = attend_double.attend_ones

    def note(grid: tuple[int, int, int], *arguments: Any) -> None:
        launched.add((grid[2], arguments[-3]))
        attend(grid, *arguments)

    monkeypatch.setattr(attend_double, "attend_ones", note)
    monkeypatch.setattr(ones, "_PROGRAMS", 8)  # so that few requests are split into as many kinds
    monkeypatch.setattr(ones, "_FEWEST_PARTS", 1)
    make_stage(models["llama"], flashinfer=True, captures=False)
    # Beside a prompt there are three at most.
    assert launched == {(8, True), (4, True), (2, True), (8, False), (4, False)}


@pytest.mark.parametrize(("head_dim", "dtype", "why"), [
    (48, torch.bfloat16, "heads of 48"), (64, torch.float32, "bf16")])
def test_what_it_cannot_do_is_known_beforehand(
        monkeypatch: pytest.MonkeyPatch, head_dim: int, dtype: torch.dtype, why: str) -> None:
    flashinfer_double.install(monkeypatch)
    shape = HeadShape(2, 1, head_dim, 0.1, [None])
    pool = make_pool(head_dim=head_dim, dtype=dtype)
    assert why in make_attention("auto", OnCuda(), pool, shape, dtype, max_requests=4).name
    assert "(" not in make_attention("sdpa", OnCuda(), pool, shape, dtype, max_requests=4).name
    with pytest.raises(ModelError, match=why):
        make_attention("flashinfer", OnCuda(), pool, shape, dtype, max_requests=4)
