"""The engine on a real GPU: kernels against torch's own, captured steps against plain, jobs against one."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inprocess import VOCABULARY, save_tiny_model
from mpirun import run_job

from disagg_mpi.comm.messages import PagedStep
from disagg_mpi.engine.gpu.attention import DeviceAttention, DevicePool, HeadShape, SdpaAttention
from disagg_mpi.engine.gpu.buffers import StepBuffers
from disagg_mpi.engine.gpu.device import CudaDevice, Device
from disagg_mpi.engine.gpu.model import DeviceModel, head_shape
from disagg_mpi.engine.gpu.operations import FlashInferOperations, Operations, TorchOperations
from disagg_mpi.engine.gpu.products import AllProducts
from disagg_mpi.engine.gpu.sampler import draw
from disagg_mpi.engine.gpu.stage import DeviceStage
from disagg_mpi.engine.gpu.tables import SeatTables, StepArrays
from disagg_mpi.engine.gpu.weights import WeightArena
from disagg_mpi.engine.tensor_parallel import ModelShard
from disagg_mpi.engine.weights import plan_model
from disagg_mpi.model.variants import ensure_dtype
from disagg_mpi.transfer.layout import CacheView, KvLayout
from disagg_mpi.transfer.partition import KvShard

PAGE, BLOCKS, LAYERS = 16, 64, 2
HEADS = {"heads 8 over 2": (8, 2), "heads 9 over 3": (9, 3)}


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice(0)


def make_pool(device: Device, kv_heads: int, head_dim: int) -> DevicePool:
    layout = KvLayout(LAYERS, kv_heads, head_dim, PAGE, BLOCKS, "bf16")
    view = CacheView(0, 0, "own", 0, layout, 0, 0, KvShard(0, LAYERS, 0, kv_heads))
    memory = torch.randn(layout.pool_bytes // 2, device=device.place).to(torch.bfloat16).view(torch.uint8)
    return DevicePool(memory.flatten(), view, torch.bfloat16)


def a_step(lengths: list[tuple[int, int]], captured_size: int | None = None) -> StepArrays:
    """Chunks (start, length) on scattered blocks; drawn, all of them."""
    tables = SeatTables(len(lengths), BLOCKS, PAGE, BLOCKS - 1)
    blocks = random.Random(0).sample(range(BLOCKS - 1), BLOCKS - 1)
    step = PagedStep(0, [], [], [], [], [], list(range(len(lengths))), [], [])
    for seat, (start, length) in enumerate(lengths):
        step.seats.append(seat)
        step.starts.append(start)
        step.lengths.append(length)
        step.token_ids.extend([1] * length)
        count = -(-(start + length) // PAGE)
        step.tables.append((seat, 0, [blocks.pop() for _ in range(count)]))
    arrays = tables.arrays(step)
    return arrays if captured_size is None else tables.padded(arrays, captured_size)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("lengths", "captured"), [
    ([(0, 40), (16, 17), (30, 1)], None), ([(77, 1), (16, 1), (0, 1), (31, 1)], 8), ([(200, 1)], 1)])
def test_flashinfer_attends_as_torch_does(
        device: CudaDevice, heads: str, head_dim: int, lengths: list[tuple[int, int]],
        captured: int | None) -> None:
    flashinfer = pytest.importorskip("flashinfer", reason="pip install flashinfer-python")
    assert flashinfer is not None
    from disagg_mpi.engine.gpu.attention import FlashInferAttention

    num_heads, kv_heads = HEADS[heads]
    pool, other = (make_pool(device, kv_heads, head_dim) for _ in range(2))
    other.memory.copy_(pool.memory)
    arrays = a_step(lengths, captured)
    buffers = StepBuffers(device, num_tokens=128, num_chunks=16, num_rows=16, num_pages=BLOCKS + 16)
    step = buffers.upload(arrays)
    shape = HeadShape(num_heads, kv_heads, head_dim, head_dim ** -0.5, [None])
    ours: DeviceAttention = FlashInferAttention(device, pool, shape, 64)
    query, key, value = (torch.randn(arrays.num_tokens, n, head_dim, device=device.place,
                                     dtype=torch.bfloat16) for n in (num_heads, kv_heads, kv_heads))
    results = []
    for attention in (ours, SdpaAttention(other)):
        attention.begin(step)
        results.append(attention.attend(1, query, key, value, scaling=shape.scaling)[: len(
            query) if captured is None else len(lengths)])
    error = (results[0].float() - results[1].float()).norm() / results[1].float().norm()
    assert error < 1e-2
    written = arrays.slots[: arrays.num_tokens if captured is None else len(lengths)]
    for plane in ("keys", "values"):
        mine, theirs = (getattr(each, plane)[1].flatten(0, 1)[written] for each in (pool, other))
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("contexts", [[77, 16, 0, 31], [500], [3] * 40], ids=str)
def test_generation_turns_and_writes_its_keys(
        device: CudaDevice, heads: str, dim: int, contexts: list[int]) -> None:
    """In one launch what rotation, copies into the pool and attention do."""
    pytest.importorskip("flashinfer", reason="pip install flashinfer-python")
    from disagg_mpi.engine.gpu.attention import FlashInferAttention

    num_heads, kv_heads = HEADS[heads]
    pool, other = (make_pool(device, kv_heads, dim) for _ in range(2))
    other.memory.copy_(pool.memory)
    arrays = a_step([(context, 1) for context in contexts])
    buffers = StepBuffers(device, num_tokens=128, num_chunks=64, num_rows=64, num_pages=BLOCKS + 64)
    step = buffers.upload(arrays)
    shape = HeadShape(num_heads, kv_heads, dim, 0.125, [None])
    rotary = torch.rand(512, dim, device=device.place)
    ahead = torch.empty(2**22, dtype=torch.uint8, device=device.place)
    qkv = torch.randn(len(contexts), (num_heads + 2 * kv_heads) * dim, device=device.place).bfloat16()
    ours, theirs = FlashInferAttention(device, pool, shape, 64), SdpaAttention(other)
    ours.begin(step)
    assert ours.unturned is not None
    mine = [ours.unturned(1, qkv, rotary, ahead) for _ in range(3)][-1]  # its counters are as before
    theirs.begin(step)
    query, key, value = torch.split(qkv.clone(), [num_heads * dim, kv_heads * dim, kv_heads * dim], dim=-1)
    TorchOperations().rotate(query, key, step.positions, rotary)
    expected = theirs.attend(1, *(x.reshape(len(x), -1, dim) for x in (query, key, value)),
                             scaling=shape.scaling).flatten(1)
    assert (mine.float() - expected.float()).norm() / expected.float().norm() < 1e-2
    for plane in ("keys", "values"):
        written, right = (getattr(each, plane)[1].flatten(0, 1)[arrays.slots].float()
                          for each in (pool, other))
        assert (written - right).abs().max() <= 2**-7 * right.abs().max()


def test_operations_are_those_of_torch(device: CudaDevice) -> None:
    pytest.importorskip("flashinfer", reason="pip install flashinfer-python")
    results: list[list[torch.Tensor]] = []
    for operations in (FlashInferOperations(), TorchOperations()):
        torch.manual_seed(0)
        x, residual = (torch.randn(33, 256, device=device.place).bfloat16() for _ in range(2))
        weight = torch.rand(256, device=device.place).bfloat16()
        table = torch.rand(64, 64, device=device.place)
        positions = torch.randint(0, 64, (33,), device=device.place, dtype=torch.int32)
        made = [operations.norm(x, weight, 1e-5).clone()]
        made += [operations.add_norm(x.clone(), residual, weight, 1e-5).clone(), residual]
        made.append(operations.gated(x))
        qkv = torch.randn(33, 384, device=device.place).bfloat16()
        query, key, _ = torch.split(qkv, [256, 64, 64], dim=-1)
        operations.rotate(query, key, positions, table)
        results.append([*made, qkv])
    for mine, theirs in zip(*results, strict=True):
        assert (mine.float() - theirs.float()).norm() / theirs.float().norm() < 1e-2


def make_stage(path: Path, device: Device, operations: Operations, *, flashinfer: bool,
               captures: bool) -> DeviceStage:
    plan = plan_model(path, "bf16", ModelShard())
    arena = WeightArena(plan)
    memory = torch.zeros(arena.num_bytes, dtype=torch.uint8, device=device.place)
    arena.fill_from_files(memory)
    arena.attach(memory, device)
    shape = head_shape(plan)
    pool = make_pool(device, shape.num_kv_heads, shape.head_dim)
    attention: DeviceAttention = SdpaAttention(pool)
    if flashinfer:
        from disagg_mpi.engine.gpu.attention import FlashInferAttention

        attention = FlashInferAttention(device, pool, shape, 64)
    stage = DeviceStage(
        device, DeviceModel(plan, ModelShard(), None, operations), pool, attention, None,
        lambda sources, targets: None, scratch=BLOCKS - 1, max_batch_size=8, max_num_tokens=64,
        max_model_len=256, captures=captures)
    stage.warm_up()
    return stage


def decode(stage: DeviceStage, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy, each step launched from the promised tokens of the one before."""
    per_seat = 8
    step = PagedStep(0, [], [], [], [], [], [], [], [])
    for seat, prompt in enumerate(prompts):
        step.seats.append(seat)
        step.starts.append(0)
        step.lengths.append(len(prompt))
        step.token_ids.extend(prompt)
        step.tables.append((seat, 0, list(range(seat * per_seat, (seat + 1) * per_seat))))
        step.drawn.append(seat)
    queued = [stage.queue(step)]
    ones = [1] * len(prompts)
    queued += [stage.queue(PagedStep(
        number, step.seats, [len(prompt) + number - 1 for prompt in prompts], ones, [-1] * len(prompts), [],
        step.drawn, [], [])) for number in range(1, num_tokens)]
    for one in queued:
        one.mark.wait()
    return np.array([one.tokens.tolist() for one in queued]).T.tolist()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = save_tiny_model(
        tmp_path_factory.mktemp("model"), hidden_size=512, intermediate_size=1024, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, initializer_range=0.2)
    return ensure_dtype(path, "bf16")


def test_captured_and_plain_steps_give_the_same_tokens(device: CudaDevice, model_path: Path) -> None:
    pytest.importorskip("flashinfer", reason="pip install flashinfer-python")
    chooser = random.Random(1)
    prompts = [[chooser.randrange(VOCABULARY) for _ in range(length)] for length in (5, 17, 9)]
    captured = make_stage(model_path, device, FlashInferOperations(), flashinfer=True, captures=True)
    plain = make_stage(model_path, device, TorchOperations(), flashinfer=False, captures=False)
    mine, theirs = decode(captured, prompts, 24), decode(plain, prompts, 24)
    # Random weights have near-ties: the first tokens at least must agree, and most of all.
    assert [tokens[:4] for tokens in mine] == [tokens[:4] for tokens in theirs]
    assert np.mean(np.array(mine) == np.array(theirs)) > 0.5
    assert decode(captured, prompts, 24) == mine


def test_one_request_alone(device: CudaDevice, model_path: Path) -> None:
    """Its layers take five launches each, and agree with torch's operations."""
    pytest.importorskip("flashinfer", reason="pip install flashinfer-python")
    stage = make_stage(model_path, device, FlashInferOperations(), flashinfer=True, captures=True)
    plain = make_stage(model_path, device, TorchOperations(), flashinfer=False, captures=False)
    assert stage.model._llama is not None and stage.model._llama.products is not None
    assert stage.model.sizes == [1, 16, 32, 64, 128]
    prompt = [3, 14, 15, 92, 65, 35]
    mine, theirs = decode(stage, [prompt], 24), decode(plain, [prompt], 24)
    assert mine[0][:4] == theirs[0][:4]
    assert np.mean(np.array(mine) == np.array(theirs)) > 0.5
    assert decode(stage, [prompt], 24) == mine


@pytest.mark.parametrize("num_rows", [1, 2, 8, 17, 33, 64, 100, 128])
@pytest.mark.parametrize(("hidden_size", "inner_size"), [(512, 1024), (1024, 8448)])
def test_products_of_generation_steps(
        device: CudaDevice, num_rows: int, hidden_size: int, inner_size: int) -> None:
    pytest.importorskip("triton", reason="it comes with torch for CUDA")
    torch.manual_seed(0)

    def linear(columns: int, rows: int) -> torch.nn.Linear:
        made = torch.nn.Linear(columns, rows, bias=False, device=device.place, dtype=torch.bfloat16)
        return made.requires_grad_(False)

    layer = (linear(hidden_size, 768), linear(hidden_size, hidden_size),
             linear(hidden_size, 2 * inner_size), linear(inner_size, hidden_size))
    head = linear(hidden_size, 1000)
    assert AllProducts.fit([layer], head)
    products = AllProducts([layer], 1e-5).of(num_rows)
    assert products is not None
    hidden = torch.randn(num_rows, hidden_size, device=device.place, dtype=torch.bfloat16)
    norm = torch.rand(hidden_size, device=device.place, dtype=torch.bfloat16)
    for _ in range(2):  # what is kept between launches is left as it was
        normed = F.rms_norm(hidden.float(), (hidden_size,), norm.float(), 1e-5)
        gate, up = (normed @ layer[2].weight.float().T).chunk(2, -1)
        added = hidden.float() + (F.silu(gate) * up) @ layer[3].weight.float().T
        logits = F.rms_norm(added, (hidden_size,), norm.float(), 1e-5) @ head.weight.float().T
        gated = products.gated(hidden, norm, layer[2])
        torch.testing.assert_close(gated.float(), F.silu(gate) * up, rtol=0.02, atol=0.02)
        products.add(gated, layer[3], hidden)
        torch.testing.assert_close(hidden.float(), added, rtol=0.02, atol=0.03)
        room = torch.empty(num_rows, 1000, device=device.place, dtype=torch.bfloat16)
        found = products.logits(hidden, norm, head, room)
        assert found is room
        torch.testing.assert_close(found.float(), logits, rtol=0.02, atol=0.03)
        query = F.rms_norm(hidden.float(), (hidden_size,), norm.float(), 1e-5) @ layer[0].weight.float().T
        torch.testing.assert_close(
            products.normed(hidden, norm, layer[0]).float(), query, rtol=0.02, atol=0.03)


def test_a_draw_is_the_processors(device: CudaDevice) -> None:
    torch.manual_seed(0)
    logits = torch.randn(16, 1000) * 3
    parameters = (torch.full((16,), 0.8, dtype=torch.float64), torch.tensor([0, 5] * 8),
                  torch.tensor([1.0, 0.9] * 8, dtype=torch.float64), torch.rand(16, dtype=torch.float64))
    there = draw(logits.to(device.place), *(each.to(device.place) for each in parameters))
    assert torch.equal(there.cpu(), draw(logits, *parameters))


SCRIPT = """
import json, sys
import disagg_mpi as dm
job = json.loads(sys.argv[1])
with dm.launch(dm.JobConfig(**job)) as orchestrator:
    if orchestrator is not None:
        params = dm.SamplingParams(max_tokens=24)
        found = [list(r.token_ids) for r in orchestrator.generate(
            [dm.Request(prompt_token_ids=[7 * i % 100 for i in range(n)], sampling=params)
             for n in (5, 40, 17)])]
        print(json.dumps(found))
        orchestrator.check_integrity()
"""


@pytest.mark.parametrize("options", [
    pytest.param({"context": 1, "generation": 1, "context_device_ids": "0", "generation_device_ids": "0"},
                 id="exchange"),
    pytest.param({"context": 1, "generation": 1, "generation_tokens_per_block": 16,
                  "context_device_ids": "0", "generation_device_ids": "0"}, id="gather"),
    pytest.param({"context": 1, "generation": 1, "transport": "mpi", "context_device_ids": "0",
                  "generation_device_ids": "0"}, id="messages"),
])
def test_a_job_gives_the_tokens_of_one_instance(
        model_path: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    script = tmp_path / "job.py"
    script.write_text(SCRIPT)
    said = []
    for config in ({"aggregated": 1}, options):
        job = {"model": str(model_path), "device": "cuda", "kv_tokens": 4096, "max_batch_size": 8, **config}
        size = 2 if "aggregated" in config else 3
        result = run_job(size, [str(script), json.dumps(job)], timeout=240)
        assert result.returncode == 0, result.text
        said.append(result.stdout.splitlines()[-1])
    assert said[0] == said[1]
