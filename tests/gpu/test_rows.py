"""The kernel on a real device: the unit tests' cases, and what only a device can show."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cudacase import Case

from disagg_mpi.transfer.cuda import kernels, memory
from disagg_mpi.transfer.cuda.gather import GatherTransport
from disagg_mpi.transfer.layout import CacheView, KvLayout
from disagg_mpi.transfer.partition import KvShard
from disagg_mpi.transfer.transports import Transfer

CUDA = "cuda:0"


def finish(transfer: Transfer) -> None:
    while not transfer.done():
        pass


def test_the_kernel_runs_here() -> None:
    assert kernels._has_kernel(torch.device(CUDA)), "no triton: torch's indexing would be used"


@pytest.mark.parametrize("seed", range(60))
def test_a_box_is_gathered(seed: int) -> None:
    case = Case(seed, 90)
    pool = case.tensor(1, CUDA)
    transport = GatherTransport(pool, case.views[1], {case.views[0].memory: case.tensor(0, CUDA)})
    torch.cuda.synchronize()  # the pools were filled on another stream
    finish(transport.receive(case.views[0], case.tables[0], case.tables[1], case.box))
    assert np.array_equal(pool.cpu().numpy(), case.handed_over())


@pytest.mark.parametrize("seed", range(20))
def test_torch_does_the_same(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_has_kernel", lambda device: False)
    test_a_box_is_gathered(seed)


def test_a_pool_may_exceed_32_bits() -> None:
    """2.5 GiB a plane: slots, planes and elements are beyond 2**31 bytes, and the last block is copied."""
    layout = KvLayout(1, 8, 128, 16, 80_000, "bf16")
    view = CacheView(0, 0, "pool", 0, layout, 0, 0, KvShard(0, 1, 0, 8))
    if torch.cuda.mem_get_info(0)[0] < layout.pool_bytes + 2**30:
        pytest.skip(f"needs {layout.pool_bytes / 2**30:.0f} GiB of device memory")
    pool = memory.allocate(layout.pool_bytes, CUDA)
    blocks = pool.view(2, layout.num_blocks, -1)
    blocks[:, 79_999] = torch.randint(1, 256, blocks[:, 0].shape, dtype=torch.uint8, device=CUDA)
    kernels.copy_blocks(pool, view, [79_999, 5], [79_998, 40_000])
    assert torch.equal(blocks[:, 79_998], blocks[:, 79_999])
    assert blocks.any(dim=2).sum() == 4


def test_blocks_are_copied_in_the_stream_that_is_given() -> None:
    layout = KvLayout(2, 2, 8, 4, 8, "bf16")
    view = CacheView(0, 0, "pool", 0, layout, 0, 0, KvShard(0, 2, 0, 2))
    pool = torch.randint(0, 256, (layout.pool_bytes,), dtype=torch.uint8, device=CUDA)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    kernels.copy_blocks(pool, view, [1, 2], [6, 7], stream)
    stream.synchronize()
    blocks = pool.view(4, 8, -1)
    assert torch.equal(blocks[:, [1, 2]], blocks[:, [6, 7]])


def test_a_pool_is_alone_in_its_allocation() -> None:
    """What is exported is the pool and nothing else."""
    for num_bytes in (1000, 50 * 2**20):
        pool = memory.allocate(num_bytes, CUDA)
        assert pool.shape == (num_bytes,) and pool.data_ptr() % 512 == 0
        assert memory._decoder.decode(memory.export(pool)).offset == 0
