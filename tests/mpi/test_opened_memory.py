"""Memory that ranks of one host open of each other; files stand in for a GPU's allocations."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

torch = pytest.importorskip("torch")

from disagg_mpi.transfer.cuda import memory  # noqa: E402 - after the check for torch
from disagg_mpi.transfer.cuda.gather import GatherTransport  # noqa: E402
from disagg_mpi.transfer.layout import Box, CacheView, KvLayout  # noqa: E402
from disagg_mpi.transfer.partition import KvShard  # noqa: E402

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)


def test_what_one_writes_the_others_read(
    world: MPI.Intracomm, agree: Callable[[list[str]], None]
) -> None:
    """Everybody's pool by everybody, and writing through what was opened."""
    mine = memory.allocate(5000, "cpu")
    names = [f"pool {rank}" for rank in range(world.size)]
    shared = memory.share(world, {names[world.rank]: mine}, names)
    problems = [] if not shared.failures else [str(shared.failures)]
    if shared[names[world.rank]] is not mine:
        problems.append("one's own is another tensor")
    if any(one.shape != (5000,) or one.dtype != torch.uint8 for one in shared.values()):
        problems.append("another shape")
    shared[names[(world.rank + 1) % world.size]][4999] = world.rank + 1
    world.Barrier()
    if mine[4999] != (world.rank - 1) % world.size + 1:
        problems.append(f"my neighbour wrote {mine[4999]}")
    for rank, name in enumerate(names):
        if shared[name][4999] != (rank - 1) % world.size + 1:
            problems.append(f"{name} has {shared[name][4999]}")
    memory.unshare(world, shared)
    agree(problems)


def test_weights_are_held_once(world: MPI.Intracomm, agree: Callable[[list[str]], None]) -> None:
    """Many tensors in one allocation take one handle; some are views with gaps."""
    owned = {}
    if world.rank == 0:
        whole = memory.allocate(1024, "cpu")
        owned = {"embed": whole[:42].view(torch.bfloat16).view(7, 3),
                 "empty": whole[512:512].view(torch.float32).view(0, 4),
                 "norm": whole[512:532].view(torch.float32)}
        owned["norm"][:] = torch.arange(5)
        owned["embed"][:] = torch.arange(21).view(7, 3)
        owned["turned"] = owned["embed"].t()[1:]
    exports = []
    original = memory.export
    memory.export = lambda tensor: exports.append(1) or original(tensor)  # type: ignore[assignment]
    try:
        shared = memory.share(world, owned, ["norm", "turned", "embed", "empty"])
    finally:
        memory.export = original
    problems = [str(shared.failures)] if shared.failures else []
    if len(exports) != (world.size - 1 if world.rank == 0 else 0):
        problems.append(f"{len(exports)} handles")
    if not torch.equal(shared["norm"], torch.arange(5.0)):
        problems.append(f"{shared['norm']}")
    if not torch.equal(shared["turned"].float(), torch.arange(21.0).view(7, 3).t()[1:]):
        problems.append(f"{shared['turned']}")
    if shared["empty"].shape != (0, 4):
        problems.append(f"{shared['empty'].shape}")
    agree(problems)


def test_what_cannot_be_opened_is_a_value(
    world: MPI.Intracomm, agree: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that its owner cannot export, one that an opener cannot map, one that nobody has."""
    owned = {f"good {world.rank}": memory.allocate(64, "cpu")}
    if world.rank == 0:
        owned |= {"not a file": torch.zeros(3), "hidden": memory.allocate(4096, "cpu")}
    original = memory.open_exported

    def refuse(handle: bytes, device: torch.device) -> torch.Tensor:
        opened = original(handle, device)
        if opened.numel() == 4096 and world.rank == 1:
            raise RuntimeError("CUDA error: invalid device context\nand a page of advice")
        return opened

    monkeypatch.setattr(memory, "open_exported", refuse)
    shared = memory.share(world, owned, ["good 0", "good 1", "not a file", "hidden", "nothing"])
    reasons = dict(shared.failures)
    wanted = {"nothing": "no rank of this host owns it"}
    if world.rank == 1:
        wanted["hidden"] = "CUDA error: invalid device context"
    if world.rank != 0:
        wanted["not a file"] = "a CPU tensor that memory.allocate did not make cannot be opened elsewhere"
    problems = [] if reasons == wanted else [f"{reasons}"]
    if set(shared) | set(reasons) != {"good 0", "good 1", "not a file", "hidden", "nothing"}:
        problems.append(f"{sorted(shared)}")
    agree(problems)


def test_two_owners_of_a_name_are_refused_by_all(
    world: MPI.Intracomm, agree: Callable[[list[str]], None]
) -> None:
    problems = ["taken"]
    try:
        memory.share(world, {"pool": memory.allocate(8, "cpu")} if world.rank < 2 else {}, ["pool"])
    except ValueError as error:
        problems = [] if "ranks 0 and 1 of this host both own 'pool'" in str(error) else [str(error)]
    agree(problems)


def test_blocks_are_gathered_out_of_an_opened_pool(
    world: MPI.Intracomm, agree: Callable[[list[str]], None]
) -> None:
    """Other block sizes on the two sides, two heads of three, the middle of a block."""
    shard = KvShard(0, 2, 1, 2)
    views = [CacheView(rank, 0, f"pool {rank}", 16, KvLayout(2, 3, 8, size, 40, "bf16"), 0, 0, shard)
             for rank, size in ((0, 16), (1, 4))]
    tables = [5, 0, 7, 6], list(reversed(range(20)))
    box = Box(0, 2, 1, 3, 9, 61)
    owned = {}
    if world.rank < 2:
        view = views[world.rank]
        owned[view.memory] = memory.allocate(16 + view.layout.pool_bytes, "cpu")
    if world.rank == 0:
        owned["pool 0"][:] = torch.randint(0, 256, owned["pool 0"].shape, dtype=torch.uint8)
    shared = memory.share(world, owned, ["pool 0"])
    world.Barrier()
    problems = []
    if world.rank == 1:
        transfer = GatherTransport(owned["pool 1"], views[1], shared).receive(
            views[0], tables[0], tables[1], box)
        if not transfer.done():
            problems.append("not done")
        rows = [[pool[view.byte_of(layer, plane, table[token // size] * size + token % size, 1):][:32]
                 for layer in range(2) for plane in range(2) for token in range(9, 61)]
                for pool, view, table, size in ((shared["pool 0"], views[0], tables[0], 16),
                                                (owned["pool 1"], views[1], tables[1], 4))]
        if not torch.equal(torch.stack(rows[0]), torch.stack(rows[1])):
            problems.append("bytes are wrong")
        if owned["pool 1"].count_nonzero() > 4 * 52 * 32:
            problems.append("more was written")
    agree(problems)
