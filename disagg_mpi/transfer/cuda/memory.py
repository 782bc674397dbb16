"""Memory for pools and weights, and how ranks of one host open each other's.

On a GPU it is CUDA IPC as torch does it: a *handle* names one allocation, an opener maps it and sees the same
bytes. Where there is none it is an anonymous file that the others find by process and number. Either way:

* Who allocated it must outlive all that opened it, and keep the tensor: at the end openers drop theirs, all
  meet in a barrier, and then the owner drops it (:func:`unshare`). Nobody else frees anything.
* A handle is opened once: torch counts its openers in a file of the owner's (``/dev/shm/torch_…``), one
  count a handle, so each opener gets a handle of its own.
* Opened memory belongs to the opener's own device here, wherever the bytes are: what the driver maps for a
  context is that context's to use, and the other device need not even be visible to this process.

:func:`share` does all of it, once, at start.
"""

from __future__ import annotations

import mmap
import os
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import torch

from disagg_mpi.transfer.memory import private_memory

if TYPE_CHECKING:
    from mpi4py import MPI

# torch's allocator gives a request of this many bytes, in whole units of 2 MiB, an allocation of its own;
# smaller ones share theirs with others, who would be exported along.
_OWN_BYTES, _UNIT_BYTES = 10 * 2**20, 2 * 2**20


def allocate(num_bytes: int, device: torch.device | str) -> torch.Tensor:
    """``num_bytes`` of zeroed memory that other ranks can open, alone in its allocation and page-aligned."""
    device = torch.device(device)
    if device.type != "cuda":
        return _allocate_file(num_bytes)
    # What the allocator has in reserve may be part of something else.
    torch.cuda.empty_cache()
    whole = -(-max(num_bytes, _OWN_BYTES) // _UNIT_BYTES) * _UNIT_BYTES
    memory = torch.zeros(whole, dtype=torch.uint8, device=device)[:num_bytes]
    torch.cuda.synchronize(device)  # whoever writes it does so in another stream
    return memory


def device_name(device: torch.device | str) -> str:
    """The same for the same GPU in every process, whatever number it has there: its UUID."""
    device = torch.device(device)
    if device.type != "cuda":
        return device.type
    return str(torch.cuda.get_device_properties(device).uuid)


# ---- handles -------------------------------------------------------------------------------------


class _CudaHandle(msgspec.Struct, frozen=True, array_like=True, tag="cuda"):
    device: str
    """UUID of the owner's."""
    allocation: bytes
    num_bytes: int
    offset: int
    counters: bytes
    """Name of the owner's file that counts openers, and which of its counts is this handle's."""
    counter: int


class _FileHandle(msgspec.Struct, frozen=True, array_like=True, tag="file"):
    process: int
    descriptor: int
    num_bytes: int


_decoder = msgspec.msgpack.Decoder(_CudaHandle | _FileHandle)


def export(tensor: torch.Tensor) -> bytes:
    """A handle of the whole allocation that ``tensor`` lies in, for one opener.

    Raises :class:`RuntimeError` where the driver refuses, :class:`ValueError` for memory that cannot be
    opened elsewhere.
    """
    storage = tensor.untyped_storage()
    if tensor.device.type != "cuda":
        file = _files.get(storage.data_ptr())
        if file is None:
            raise ValueError("a CPU tensor that memory.allocate did not make cannot be opened elsewhere")
        return msgspec.msgpack.encode(_FileHandle(os.getpid(), *file))
    # All that has been written is there before anybody is told: openers need not wait for our event.
    torch.cuda.synchronize(tensor.device)
    with torch.cuda.device(tensor.device):
        _, allocation, num_bytes, offset, counters, counter, _, _ = storage._share_cuda_()  # type: ignore[no-untyped-call]
    return msgspec.msgpack.encode(
        _CudaHandle(device_name(tensor.device), allocation, num_bytes, offset, counters, counter))


def open_exported(handle: bytes, device: torch.device | str) -> torch.Tensor:
    """The bytes of the allocation that ``handle`` names, as memory of ``device``.

    Raises :class:`RuntimeError`, :class:`OSError` or :class:`ValueError` where this process cannot map it.
    """
    named = _decoder.decode(handle)
    device = torch.device(device)
    if isinstance(named, _FileHandle):
        return _open_file(named)
    _check_reach(named.device, device)
    with torch.cuda.device(device):
        # The last two would be the owner's event, which export has waited for.
        storage = torch.UntypedStorage._new_shared_cuda(
            torch.cuda.current_device(), named.allocation, named.num_bytes, named.offset, named.counters,
            named.counter, bytes(64), False)
        return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _check_reach(owner: str, device: torch.device) -> None:
    """Raise :class:`ValueError` if both GPUs are seen here and have no path to each other.

    Where the owner's is hidden from this process the driver will say so itself.
    """
    mine = torch.cuda.current_device() if device.index is None else device.index
    for index in range(torch.cuda.device_count()):
        if index != mine and device_name(f"cuda:{index}") == owner:
            if not torch.cuda.can_device_access_peer(mine, index):
                raise ValueError(
                    f"GPU {mine} cannot reach GPU {index} (nvidia-smi topo -p2p r shows who can)")
            return


# Address → (descriptor, bytes) of the files that this process has allocated.
_files: dict[int, tuple[int, int]] = {}


def _allocate_file(num_bytes: int) -> torch.Tensor:
    if sys.platform != "linux":
        return torch.from_numpy(private_memory(num_bytes))[:num_bytes]
    size = max(num_bytes, 1)
    descriptor = os.memfd_create("disagg_mpi-pool")
    os.truncate(descriptor, size)
    memory = np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
    address = memory.ctypes.data
    _files[address] = (descriptor, size)
    weakref.finalize(memory, _forget_file, address, descriptor)
    return torch.from_numpy(memory)[:num_bytes]


def _forget_file(address: int, descriptor: int) -> None:
    del _files[address]
    os.close(descriptor)


def _open_file(named: _FileHandle) -> torch.Tensor:
    descriptor = os.open(f"/proc/{named.process}/fd/{named.descriptor}", os.O_RDWR)
    try:
        return torch.from_numpy(np.frombuffer(mmap.mmap(descriptor, named.num_bytes), dtype=np.uint8))
    finally:
        os.close(descriptor)


# ---- all ranks of a host, together ---------------------------------------------------------------


class Shared(dict[str, torch.Tensor]):
    """Name → tensor; ``failures`` says why a name that was wanted is missing."""

    def __init__(self) -> None:
        super().__init__()
        self.failures: dict[str, str] = {}


class _Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor lies in its allocation; shape, distances and offset in elements."""

    handle: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int


class _Parcel(msgspec.Struct, array_like=True):
    """What one rank lets another one open."""

    handles: list[bytes] = []
    places: dict[str, _Place] = {}
    failures: dict[str, str] = {}


class _Wishes(msgspec.Struct, frozen=True, array_like=True):
    owned: list[str]
    wanted: list[str]


_EXPECTED = (RuntimeError, OSError, ValueError)  # a CUDA error is a RuntimeError


def share(
    comm: MPI.Intracomm, owned: Mapping[str, torch.Tensor], wanted: Sequence[str],
    device: torch.device | str | None = None,
) -> Shared:
    """Open what other ranks own: ``wanted`` by name, as memory of ``device``. Collective over a host's ranks.

    One's own tensors are returned as they are. What cannot be opened (a container without IPC, GPUs that do
    not reach each other) is missing, with the reason in ``failures``: the caller uses messages for it.
    ``device`` is by default that of ``owned``, else the current GPU, else the CPU.

    Raises :class:`ValueError`, on all ranks, if two own the same name.
    """
    exchanged = comm.allgather(msgspec.msgpack.encode(_Wishes(list(owned), list(wanted))))
    wishes = [msgspec.msgpack.decode(one, type=_Wishes) for one in exchanged]
    owners: dict[str, int] = {}
    for rank, theirs in enumerate(wishes):
        for name in theirs.owned:
            if name in owners:
                raise ValueError(f"ranks {owners[name]} and {rank} of this host both own {name!r}")
            owners[name] = rank
    parcels = [
        _Parcel() if rank == comm.rank
        else _parcel({name: owned[name] for name in one.wanted if name in owned})
        for rank, one in enumerate(wishes)]
    received = comm.alltoall([msgspec.msgpack.encode(parcel) for parcel in parcels])
    where = _device_of(owned) if device is None else torch.device(device)
    found = Shared()
    for data in received:
        _open_parcel(msgspec.msgpack.decode(data, type=_Parcel), where, found)
    for name in wanted:
        if name in owned:
            found[name] = owned[name]
        elif name not in owners:
            found.failures[name] = "no rank of this host owns it"
    # Nobody lets go of anything before all have opened it.
    comm.Barrier()
    return found


def unshare(comm: MPI.Intracomm, shared: Shared) -> None:
    """Let go of what was opened, before its owners free it; collective. No transfer may be open, and nobody
    else here may hold any of it still."""
    shared.clear()
    comm.Barrier()
    # Rank 0 has no context, and needs none to say goodbye.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]


def _parcel(tensors: Mapping[str, torch.Tensor]) -> _Parcel:
    """One handle an allocation, however many tensors lie in it."""
    parcel = _Parcel()
    known: dict[int, int] = {}
    for name, tensor in tensors.items():
        address = tensor.untyped_storage().data_ptr()
        try:
            if address not in known:
                parcel.handles.append(export(tensor))
                known[address] = len(parcel.handles) - 1
        except _EXPECTED as error:
            parcel.failures[name] = _first_line(error)
            continue
        parcel.places[name] = _Place(
            known[address], str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), tensor.stride(),
            int(tensor.storage_offset()))
    return parcel


def _open_parcel(parcel: _Parcel, device: torch.device, found: Shared) -> None:
    found.failures |= parcel.failures
    memories: list[torch.Tensor | str] = []
    for handle in parcel.handles:
        try:
            memories.append(open_exported(handle, device))
        except _EXPECTED as error:
            memories.append(_first_line(error))
    for name, place in parcel.places.items():
        memory = memories[place.handle]
        if isinstance(memory, str):
            found.failures[name] = memory
            continue
        dtype = getattr(torch, place.dtype)
        whole = memory[: memory.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
        found[name] = whole.as_strided(place.shape, place.strides, place.offset)


def _device_of(owned: Mapping[str, torch.Tensor]) -> torch.device:
    for tensor in owned.values():
        return tensor.device
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _first_line(error: Any) -> str:
    """CUDA's errors go on with a paragraph of advice."""
    return (str(error) or type(error).__name__).splitlines()[0]
