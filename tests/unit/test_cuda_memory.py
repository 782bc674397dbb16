"""Pools and handles in one process; tests/mpi opens them in others."""

from __future__ import annotations

import contextlib
import gc
import os
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from disagg_mpi.transfer.cuda import memory


def test_memory_is_zeroed_and_aligned() -> None:
    pool = memory.allocate(1000, "cpu")
    assert pool.dtype == torch.uint8 and pool.shape == (1000,)
    assert not pool.any() and pool.data_ptr() % 4096 == 0
    assert memory.allocate(0, "cpu").shape == (0,)


def test_a_handle_opens_the_same_bytes() -> None:
    pool = memory.allocate(1000, "cpu")
    opened = memory.open_exported(memory.export(pool), "cpu")
    assert opened.data_ptr() != pool.data_ptr()
    opened[10] = 7
    assert pool[10] == 7


def test_nothing_is_left_when_the_tensor_is_gone() -> None:
    before = len(os.listdir("/proc/self/fd"))
    pool = memory.allocate(1000, "cpu")
    handle = memory.export(pool[5:])
    opened = memory.open_exported(handle, "cpu")
    del pool
    gc.collect()
    assert opened.numel() == 1000, "who has it open keeps it"
    assert not memory._files
    del opened
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(OSError):
        memory.open_exported(handle, "cpu")


class FakeCuda:
    """What torch.cuda says of two GPUs."""

    reaches = True

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda mine, other: self.reaches)
        monkeypatch.setattr(torch.cuda, "get_device_properties",
                            lambda device: SimpleNamespace(uuid=f"GPU-{torch.device(device).index}"))


def test_a_gpu_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    cuda.reaches = False
    with pytest.raises(ValueError, match="GPU 0 cannot reach GPU 1"):
        memory._check_reach("GPU-1", torch.device("cuda"))
    memory._check_reach("GPU-0", torch.device("cuda"))
    memory._check_reach("a GPU that is hidden here", torch.device("cuda:1"))
    cuda.reaches = True
    memory._check_reach("GPU-1", torch.device("cuda:0"))


def test_a_handle_of_a_gpu_survives_the_message() -> None:
    handle = memory._CudaHandle("GPU-1", b"c" + bytes(range(64)), 2**33, 512, b"/torch_1_2_3", 9)
    assert memory._decoder.decode(msgspec.msgpack.encode(handle)) == handle


def test_what_is_no_handle_is_refused() -> None:
    for data in (b"", b"\x93", msgspec.msgpack.encode(["other", 1])):
        with pytest.raises((msgspec.DecodeError, msgspec.ValidationError)):
            memory.open_exported(data, "cpu")


def test_the_first_line_of_an_error() -> None:
    error: Any = RuntimeError("CUDA error\nmore")
    assert memory._first_line(error) == "CUDA error"
    assert memory._first_line(OSError()) == "OSError"


class FakeStorage:
    """What torch's storage of a GPU gives for its handle; every call is counted as one more opener."""

    counter = 0

    def _share_cuda_(self) -> tuple[Any, ...]:
        self.counter += 1
        return 3, b"c" + bytes(64), 2**21, 512, b"/torch_1_2_3", self.counter, bytes(64), True

    def data_ptr(self) -> int:
        return 4096


def test_a_gpu_tensor_goes_through_torchs_own_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of their arguments, the opener's own device, and no event to wait for."""
    FakeCuda(monkeypatch)
    calls: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", calls.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    storage = torch.arange(8, dtype=torch.uint8).untyped_storage()

    def new_shared_cuda(*arguments: Any) -> torch.UntypedStorage:
        calls.append(arguments)
        return storage

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared_cuda", new_shared_cuda)
    exported = FakeStorage()
    tensor: Any = SimpleNamespace(device=torch.device("cuda:1"), untyped_storage=lambda: exported)
    handles = [memory.export(tensor) for _ in range(2)]
    assert calls == [torch.device("cuda:1")] * 2, "all that was written is there"
    assert [memory._decoder.decode(handle).counter for handle in handles] == [1, 2], "one an opener"
    opened = memory.open_exported(handles[1], "cuda:0")
    assert opened.tolist() == list(range(8))
    # torch.multiprocessing.reductions.rebuild_cuda_tensor calls it so.
    assert calls[-1] == (0, b"c" + bytes(64), 2**21, 512, b"/torch_1_2_3", 2, bytes(64), False)
