"""The hand-over of a prompt of Llama-3-8B's shape between two ranks, on one GPU or two, each way; no engine.

    mpirun -n 2 python benchmarks/gpu_handover.py                    64, 16 and 512 MiB, both ranks on GPU 0
    mpirun -n 2 python benchmarks/gpu_handover.py --gpus 0,1         each on one of its own
    mpirun -n 2 python benchmarks/gpu_handover.py --busy             once more while the source computes
    mpirun -n 2 python benchmarks/gpu_handover.py --variants         and the kernel's tile sizes
    mpirun -n 2 python benchmarks/gpu_handover.py --device cpu --size 16MiB       a smoke test anywhere

Blocks of 16 tokens lie at random places on both sides. After each way every byte is compared with what it
should be, which the target computes by itself: an element of the source's pool is its index times a constant.
Times are the target's, from asking until the bytes are in place, medians of 9 after 2; beside them is a
copy of as many contiguous bytes, within the device or from the other one, by its own clock. Needs torch,
mpi4py, numpy, msgspec and click.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # as it lies here, installed or not

from disagg_mpi.comm import environment, ucx  # noqa: E402 - after its path

parser = argparse.ArgumentParser()
parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
parser.add_argument("--gpus", default="0,0", help="of the source and of the target")
parser.add_argument("--size", default="64MiB,16MiB,512MiB", help="KV-cache to hand over, in MiB, by commas")
parser.add_argument("--chunk", default="", help="other sizes of packed messages, in MiB, by commas")
parser.add_argument("--busy", action="store_true", help="again, while the source runs matrix products")
parser.add_argument("--variants", action="store_true", help="time the kernel's variants too")
parser.add_argument("--rounds", type=int, default=9)
parser.add_argument("--context-first", action="store_true", help="use the GPU before MPI starts")
parser.add_argument("--force", action="store_true", help="device memory in messages, whatever MPI says")
options = parser.parse_args()
if options.device == "cuda":
    # Two ranks of one host stand in for two hosts: MPICH must not take its own way between them.
    os.environ.setdefault("MPIR_CVAR_NOLOCAL", "1")
environment.apply(num_threads=1, wants_cuda=options.device == "cuda")

import torch  # noqa: E402 - after its environment
from common import size_of, table, time_of  # noqa: E402

if options.context_first:
    _rank = environment.launcher_context().rank or 0
    torch.zeros(1, device=f"cuda:{options.gpus.split(',')[_rank]}")

from mpi4py import MPI  # noqa: E402

from disagg_mpi.transfer.cuda import kernels  # noqa: E402
from disagg_mpi.transfer.cuda.gather import GatherTransport  # noqa: E402
from disagg_mpi.transfer.cuda.memory import Shared, allocate, device_name, share, unshare  # noqa: E402
from disagg_mpi.transfer.cuda.packed import HostStagedTransport, PackedTransport  # noqa: E402
from disagg_mpi.transfer.layout import Box, CacheView, KvLayout  # noqa: E402
from disagg_mpi.transfer.partition import KvShard  # noqa: E402

SOURCE, TARGET = 0, 1
MIB = 2**20
NUM_LAYERS, NUM_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16  # Llama-3-8B
BLOCK_BYTES = 2 * NUM_LAYERS * BLOCK * NUM_HEADS * HEAD_DIM * 2
_FACTOR = 0x9E3779B97F4A7C15 - 2**64  # odd, so that no two elements are equal
_WARM, _GO = 2, 1
_IN_A_ROW = 5
_TAG = 5


def mebibytes(text: str) -> list[int]:
    return [int(word.lower().removesuffix("mib")) * MIB for word in text.split(",") if word]


class Bench:
    """This rank's pool and transports; construction is collective."""

    def __init__(self, largest: int) -> None:
        self.world = MPI.COMM_WORLD
        self.rank = self.world.rank
        self.device = torch.device("cpu")
        if options.device == "cuda":
            self.device = torch.device("cuda", int(options.gpus.split(",")[self.rank]))
            torch.cuda.set_device(self.device)
        # Twice the room, so that the blocks are scattered.
        layout = KvLayout(NUM_LAYERS, NUM_HEADS, HEAD_DIM, BLOCK, 2 * -(-largest // BLOCK_BYTES), "bf16")
        shard = KvShard(0, NUM_LAYERS, 0, NUM_HEADS)
        self.views = [CacheView(rank, 0, f"pool {rank}", 0, layout, 0, 0, shard) for rank in (SOURCE, TARGET)]
        self.view = self.views[self.rank]
        self.pool = allocate(layout.pool_bytes, self.device)
        self.elements = self.pool.view(torch.int64).view(layout.num_planes, layout.num_blocks, -1)
        if self.rank == SOURCE:
            self.pool.view(torch.int64).copy_(
                torch.arange(self.pool.numel() // 8, device=self.device)).mul_(_FACTOR)
        self.synchronize()
        self.devices: list[str] = self.world.allgather(device_name(self.device))
        self.is_apart = len(set(self.devices)) > 1
        before, start = self.free_bytes(), time.perf_counter()
        self.shared: Shared = share(
            self.world, {self.view.memory: self.pool}, ["pool 0"] if self.rank == TARGET else [], self.device)
        self.open_seconds, self.open_bytes = time.perf_counter() - start, before - self.free_bytes()

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def tables(self, num_bytes: int) -> tuple[list[int], list[int]]:
        """Blocks of the source and of the target; equal on both ranks."""
        count = num_bytes // BLOCK_BYTES
        everything = range(self.view.layout.num_blocks)
        return random.Random(1).sample(everything, count), random.Random(2).sample(everything, count)

    def box(self, num_bytes: int) -> Box:
        return Box.of(self.view.shard, 0, num_bytes // BLOCK_BYTES * BLOCK)

    def check(self, pool: torch.Tensor, sources: list[int], targets: list[int]) -> str:
        """Whether the source's blocks lie in ``targets`` of a pool, and nothing lies elsewhere in ours."""
        planes, blocks, size = self.elements.shape
        elements = pool.view(torch.int64).view(planes, blocks, size)
        index = torch.tensor(targets, device=self.device)
        first = torch.tensor(sources, device=self.device) * size
        within = torch.arange(size, device=self.device)
        for plane in range(planes):
            wanted = (plane * blocks * size + first[:, None] + within) * _FACTOR
            if not torch.equal(elements[plane, index], wanted):
                return "WRONG"
        if pool is self.pool:
            others = torch.ones(blocks, dtype=torch.bool, device=self.device)
            others[index] = False
            if any(bool(plane[others].any()) for plane in elements):
                return "WRONG: more was written"
        return "equal"

    def clear(self) -> None:
        if self.rank == TARGET:
            self.pool.zero_()
        self.synchronize()


class Busy:
    """Matrix products on this rank's device until it is left; a few at a time, as a forward is."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.num_products = 0

    def __enter__(self) -> Busy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        side = 4096 if self._device.type == "cuda" else 256
        dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
        left, right = (torch.randn(side, side, device=self._device).to(dtype) for _ in range(2))
        while not self._is_over.is_set():
            for _ in range(8):
                left @ right
            self.num_products += 8
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)


# ---- the ways ------------------------------------------------------------------------------------


def until_done(transfer: Any) -> None:
    while not transfer.done(100):
        pass


def measure(bench: Bench, num_bytes: int, ask: Callable[[], Any], answer: Callable[[], Any]) -> list[float]:
    """Times of ``ask`` at the target; each time the source gets a message and does ``answer``."""
    times = []
    for _ in range(_WARM + options.rounds):
        if bench.rank == SOURCE:
            bench.world.recv(source=TARGET, tag=_TAG)
            answer()
            continue
        start = time.perf_counter()
        bench.world.send(_GO, dest=SOURCE, tag=_TAG)
        ask()
        times.append(time.perf_counter() - start)
    bench.world.Barrier()
    return times[_WARM:]


def alone(bench: Bench, work: Callable[[], Any]) -> float:
    """Seconds of ``work`` on the device, by its own clock: of a few in a row, so that the host's part of one
    is hidden by the one before; median. Of some MiB it measures the device's cache."""
    times = []
    for _ in range(_WARM + options.rounds):
        bench.synchronize()
        if bench.device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            work()
            first.record()
            for _ in range(_IN_A_ROW):
                work()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) / 1e3 / _IN_A_ROW)
        else:
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
    return statistics.median(times[_WARM:])


def copy_once(bench: Bench, num_bytes: int) -> Callable[[], None]:
    """Of contiguous bytes: from the source's pool where that is another device's, else within this one."""
    source, target = (torch.ones(num_bytes, dtype=torch.uint8, device=bench.device) for _ in range(2))
    if bench.is_apart and bench.shared:
        source = bench.shared["pool 0"][:num_bytes]

    def work() -> None:
        target.copy_(source)

    return work


def gather_once(bench: Bench, num_bytes: int, variant: tuple[int, int] | None = None) -> Callable[[], None]:
    """The kernel alone: cells are made and uploaded before."""
    source, target = bench.views
    box = bench.box(num_bytes)
    cells = kernels.cells_between(source, bench.tables(num_bytes)[0], target, bench.tables(num_bytes)[1], box)
    planes = (kernels.pool_planes(bench.shared["pool 0"], source, box),
              kernels.pool_planes(bench.pool, target, box))
    chosen = (kernels.TILE_BYTES, kernels.NUM_WARPS) if variant is None else variant
    copy = kernels.Copy(*planes, cells.tokens, 2 * box.num_layers, target.row_bytes(box), chosen)
    return lambda: copy.run(cells)


def run_size(bench: Bench, num_bytes: int, is_aware: bool) -> list[list[str]]:
    """The rows of one size; collective. At the target: way, time, bandwidth, share of a copy, bytes."""
    sources, targets = bench.tables(num_bytes)
    box = bench.box(num_bytes)
    rows: list[list[str]] = []
    ceiling = alone(bench, copy_once(bench, num_bytes)) if bench.rank == TARGET else 0.0
    bench.world.Barrier()

    def add(name: str, seconds: float, found: str, moved: int = num_bytes) -> None:
        speed = f"{moved / seconds / 1e9:,.1f}" if moved else ""
        share_of = f"{ceiling / seconds:.2f}" if moved else ""
        rows.append([size_of(num_bytes), name, time_of(seconds), speed, share_of, size_of(moved), found])

    add(f"{'peer' if bench.is_apart and bench.shared else 'device'} copy of contiguous bytes, on the device",
        ceiling or 1.0, "")

    def exchange(time_it: bool = True) -> None:
        """The table comes, the bytes stay."""
        times = []
        for _ in range(_WARM + options.rounds):
            if bench.rank == SOURCE:
                bench.world.recv(source=TARGET, tag=_TAG)
                bench.world.send(sources, dest=TARGET, tag=_TAG)
            else:
                start = time.perf_counter()
                bench.world.send(_GO, dest=SOURCE, tag=_TAG)
                taken = bench.world.recv(source=SOURCE, tag=_TAG)
                times.append(time.perf_counter() - start)
        if bench.rank == TARGET:
            add("block ids change hands in one opened pool", statistics.median(times[_WARM:]),
                bench.check(bench.shared["pool 0"], sources, taken), 0)

    is_open = not bench.world.bcast(dict(bench.shared.failures), root=TARGET)
    if is_open:
        exchange()
        bench.clear()
        transport = GatherTransport(bench.pool, bench.view, bench.shared)
        times = measure(bench, num_bytes,
                        lambda: until_done(transport.receive(bench.views[SOURCE], sources, targets, box)),
                        lambda: None)
        if bench.rank == TARGET:
            found = bench.check(bench.pool, sources, targets)
            add("gather through the opened pool", statistics.median(times), found)
            add("the same, the kernel alone, on the device", alone(bench, gather_once(bench, num_bytes)),
                found)
    kinds: list[tuple[str, type[PackedTransport], dict[str, int]]] = []
    if is_aware:
        kinds += [("packed messages of device memory", PackedTransport, {})]
        kinds += [(f"the same, {size_of(chunk)} a message", PackedTransport, {"chunk_bytes": chunk})
                  for chunk in mebibytes(options.chunk)]
    kinds += [("through pinned host memory", HostStagedTransport, {})]
    for name, kind, how in kinds:
        bench.clear()
        comm = bench.world.Dup()
        end = kind(comm, bench.pool, bench.view, **how)
        times = measure(bench, num_bytes,
                        lambda end=end: until_done(end.receive(SOURCE, 1, targets, box)),  # type: ignore[misc]
                        lambda end=end: until_done(end.send(TARGET, 1, sources, box)))  # type: ignore[misc]
        if bench.rank == TARGET:
            add(name, statistics.median(times), bench.check(bench.pool, sources, targets))
        end.close()
        comm.Free()
    if is_aware:
        rows += plain_message(bench, num_bytes, ceiling)
    return rows


def plain_message(bench: Bench, num_bytes: int, ceiling: float) -> list[list[str]]:
    """One MPI message of as many contiguous bytes of device memory, in and out of the pools' own starts."""
    buffer = [MPI.buffer.fromaddress(bench.pool.data_ptr(), num_bytes), num_bytes, MPI.BYTE]
    times = measure(bench, num_bytes, lambda: bench.world.Recv(buffer, source=SOURCE),
                    lambda: bench.world.Send(buffer, dest=TARGET))
    if bench.rank == SOURCE:
        return []
    seconds = statistics.median(times)
    return [[size_of(num_bytes), "one MPI message of contiguous device memory", time_of(seconds),
             f"{num_bytes / seconds / 1e9:,.1f}", f"{ceiling / seconds:.2f}", size_of(num_bytes), ""]]


def tune(bench: Bench, num_bytes: int) -> str:
    found = kernels.best_variant(lambda variant: alone(bench, gather_once(bench, num_bytes, variant)))
    rows = [[size_of(size), warps, time_of(seconds), f"{num_bytes / seconds / 1e9:,.1f}"]
            for (size, warps), seconds in found]
    return table(f"The kernel's variants, {size_of(num_bytes)}", ["tile", "warps", "time", "GB/s"], rows)


def describe(bench: Bench, is_aware: bool) -> Iterator[str]:
    name = "CPU"
    if bench.device.type == "cuda":
        name = torch.cuda.get_device_name(bench.device)
    library = " ".join(MPI.Get_library_version().split()[:3])
    where = "two devices" if bench.is_apart else "one device"
    yield f"{name}, {where}; torch {torch.__version__}; {library}; device memory in messages: {is_aware}"
    if bench.shared.failures:
        yield f"pool of the source not opened: {bench.shared.failures['pool 0']}"
    else:
        yield (f"opened a pool of {size_of(bench.pool.numel())} in {time_of(bench.open_seconds)}, which took "
               f"{size_of(max(bench.open_bytes, 0))} of device memory")


def main() -> None:
    sizes = mebibytes(options.size)
    bench = Bench(max(sizes))
    if bench.world.size != 2:
        sys.exit("two ranks: mpirun -n 2 python benchmarks/gpu_handover.py")
    # On the CPU any MPI takes the staging memory.
    is_aware = options.force or bench.device.type == "cpu" or all(bench.world.allgather(ucx.cuda_aware()))
    if bench.rank == TARGET:
        print("\n".join(describe(bench, is_aware)), flush=True)
    columns: Sequence[str] = ["KV-cache", "way", "time", "GB/s", "of a copy", "bytes moved", "checked"]
    wrong = False
    for is_busy in [False, True] if options.busy else [False]:
        rows = []
        with Busy(bench.device) if is_busy and bench.rank == SOURCE else threading.Lock():
            for num_bytes in sizes:
                rows += run_size(bench, num_bytes, is_aware)
        if bench.rank == TARGET:
            title = "Hand-over between two ranks" + (", the source computes" if is_busy else "")
            print(table(title, columns, rows), flush=True)
            wrong = wrong or any("WRONG" in row[-1] for row in rows)
    if options.variants and bench.rank == TARGET and bench.shared:
        print(tune(bench, max(sizes)), flush=True)
    unshare(bench.world, bench.shared)
    if bench.world.allreduce(int(wrong)):
        sys.exit("bytes are wrong")


if __name__ == "__main__":
    try:
        main()
    except Exception:
        traceback.print_exc()
        MPI.COMM_WORLD.Abort(1)  # the other rank waits
