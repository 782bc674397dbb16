"""Packed messages between real ranks, on CPU tensors: any box, any chunks, many at once, both ways."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from lazydevice import be_lazy  # noqa: E402 - after the check for torch
from test_transports import copy_box, filled, finish, random_case  # noqa: E402 - after the check for torch

from disagg_mpi.errors import IntegrityError  # noqa: E402
from disagg_mpi.transfer.cuda.packed import HostStagedTransport, PackedTransport  # noqa: E402
from disagg_mpi.transfer.layout import Box, CacheView, KvLayout  # noqa: E402
from disagg_mpi.transfer.partition import KvShard  # noqa: E402

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)
KINDS = [PackedTransport, HostStagedTransport]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_bytes", [1, 700, 2**20])
@pytest.mark.parametrize("first_seed", range(0, 60, 15))
@pytest.mark.parametrize("lazy", [False, True], ids=["", "lazy"])
def test_any_box_comes_to_its_place(
    world: MPI.Intracomm, agree: Callable[[list[str]], None], kind: type[PackedTransport], chunk_bytes: int,
    first_seed: int, lazy: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fifteen transfers at once, the receives begun in another order than the sends; a chunk is at least a
    row; and on a device that does nothing before it is asked."""
    if lazy:
        be_lazy(monkeypatch)
    problems, open_transfers, checks, ends = [], [], [], []
    comm = world.Dup()
    seeds = list(range(first_seed, first_seed + 15))
    if comm.rank == 1:
        random.Random(first_seed).shuffle(seeds)
    for seed in seeds:
        box, views, tables = random_case(seed)
        if comm.rank < 2:
            memory = filled(views[comm.rank], 2 * seed + comm.rank)
            end = kind(comm, torch.from_numpy(memory), views[comm.rank], chunk_bytes=chunk_bytes,
                       num_chunks=2)
            ends.append(end)
            start = end.send if comm.rank == 0 else end.receive
            open_transfers.append(start(1 - comm.rank, seed, tables[comm.rank], box))
            checks.append((seed, memory, box, views, tables))
    finish(open_transfers)
    for seed, memory, box, views, tables in checks:
        wanted = filled(views[comm.rank], 2 * seed + comm.rank)
        if comm.rank == 1:
            copy_box(filled(views[0], 2 * seed), views[0], tables[0], wanted, views[1], tables[1], box)
        if not (memory == wanted).all():
            problems.append(f"case {seed} {box}: {(memory != wanted).sum()} bytes are wrong")
    for end in ends:
        problems += [] if all(arena.is_free for arena in end._arenas.values()) else ["room is still taken"]
        end.close()
    agree(problems)
    comm.Free()


class Ring:
    """One transport a rank; each sends to the next ranks and receives from those before, all at once.

    Blocks 0 to 19 are sent, 20 to 39 received; every transfer is one block, so that all can be told apart.
    """

    view = CacheView(0, 0, "pool", 0, KvLayout(3, 2, 8, 4, 40, "fp32"), 0, 0, KvShard(0, 3, 0, 2))

    def __init__(self, comm: MPI.Intracomm, kind: type[PackedTransport], **options: int) -> None:
        self.comm = comm
        self.memory = np.random.default_rng(comm.rank).integers(
            0, 256, self.view.layout.pool_bytes, dtype=np.uint8)
        self.transport = kind(comm, torch.from_numpy(self.memory), self.view, **options)

    def blocks(self, memory: Any) -> Any:
        return memory.reshape(6, 40, -1)

    def sent_by(self, rank: int) -> Any:
        memory = np.random.default_rng(rank).integers(0, 256, self.memory.size, dtype=np.uint8)
        return self.blocks(memory)[:, :20]

    def exchange(self, order: Callable[[list[Any]], None]) -> list[str]:
        """Ten transfers to each of two ranks and as many from two others."""
        box = Box.of(self.view.shard, 0, 4)
        starts: list[Any] = []
        comm, sources = self.comm, {}
        for number, step in itertools.product(range(10), (1, 2)):
            to, source = (comm.rank + step) % comm.size, (comm.rank - step) % comm.size
            block = 2 * number + step - 1
            sources[20 + block] = (source, block)
            if to != comm.rank:
                starts.append((self.transport.send, to, block, [block], box))
            if source != comm.rank:
                starts.append((self.transport.receive, source, block, [20 + block], box))
        order(starts)
        finish([start(*arguments) for start, *arguments in starts])
        return [f"block {block} is not {source}'s" for block, (source, sent) in sources.items()
                if source != comm.rank and not np.array_equal(
                    self.blocks(self.memory)[:, block], self.sent_by(source)[:, sent])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(6))
def test_little_room_never_stalls(
    world: MPI.Intracomm, agree: Callable[[list[str]], None], kind: type[PackedTransport], seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All ranks send and receive at once, with room for one chunk each way, in any order of begin."""
    if seed % 2:
        be_lazy(monkeypatch)
    comm = world.Dup()
    ring = Ring(comm, kind, chunk_bytes=256, num_chunks=1)
    problems = ring.exchange(random.Random(100 * seed + comm.rank).shuffle)
    agree(problems)
    comm.Free()


@pytest.mark.parametrize("kind", KINDS)
def test_all_pairs_meet_at_the_start(
    world: MPI.Intracomm, agree: Callable[[list[str]], None], kind: type[PackedTransport]
) -> None:
    """Each with each; the last to come overwrites the first block, which is empty everywhere."""
    comm = world.Dup()
    ring = Ring(comm, kind)
    ring.memory[:] = 0
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    pairs = [(rank, Box.of(ring.view.shard, 0, 4)) for rank in others]
    comm.Barrier()
    ring.transport.connect(pairs, pairs)
    agree([] if len(ring.transport._arenas) == 2 and not ring.memory.any() else ["not both ways"])
    ring.transport.close()
    comm.Free()


def test_either_kind_talks_to_the_other(
    world: MPI.Intracomm, agree: Callable[[list[str]], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal chunks are enough: a rank whose MPI takes no device memory among others whose does."""
    be_lazy(monkeypatch)
    comm = world.Dup()
    ring = Ring(comm, KINDS[comm.rank % 2], chunk_bytes=300, num_chunks=2)
    agree(ring.exchange(lambda starts: None))
    comm.Free()


def test_a_transfer_of_nothing_is_done_at_once(
    world: MPI.Intracomm, agree: Callable[[list[str]], None]
) -> None:
    ring = Ring(world, PackedTransport)
    box = Box.of(ring.view.shard, 2, 2)
    agree([] if ring.transport.receive(1, 0, [3], box).done() else ["not done"])


def test_one_look_ends_soon(world: MPI.Intracomm, agree: Callable[[list[str]], None]) -> None:
    """Nobody sends: a thousand looks take a millisecond or so, not a second."""
    comm = world.Dup()
    ring = Ring(comm, PackedTransport)
    problems = []
    if comm.rank == 0:
        transfer = ring.transport.receive(1, 0, [30], Box.of(ring.view.shard, 0, 4))
        start = time.monotonic()
        if transfer.done(10**6):
            problems.append("done")
        if time.monotonic() - start > 0.5:
            problems.append("it took long")
    agree(problems)
    comm.Free()


def test_another_size_is_an_error(world: MPI.Intracomm, agree: Callable[[list[str]], None]) -> None:
    """One side's chunks are twice the other's."""
    comm = world.Dup()
    ring = Ring(comm, PackedTransport, chunk_bytes=256 if comm.rank else 512)
    box = Box.of(ring.view.shard, 0, 4)
    problems = []
    if comm.rank == 1:
        comm.Send(bytearray(512), dest=0, tag=3)
    elif comm.rank == 0:
        transfer = ring.transport.receive(1, 3, [30], Box(0, 1, 0, 1, 0, 4))
        try:
            while not transfer.done():
                pass
            problems.append("taken")
        except IntegrityError as error:
            if "rank 1 sent 512 bytes, 256 expected" not in str(error):
                problems.append(str(error))
    assert box.num_tokens == 4
    agree(problems)


@pytest.mark.parametrize("kind", KINDS)
def test_a_box_of_another_rank_is_refused_before_anything_is_sent(
    world: MPI.Intracomm, agree: Callable[[list[str]], None], kind: type[PackedTransport]
) -> None:
    view = CacheView(0, 0, "private", 0, KvLayout(2, 1, 8, 4, 4, "fp32"), 2, 1, KvShard(2, 2, 1, 1))
    end = kind(world, torch.zeros(view.layout.pool_bytes, dtype=torch.uint8), view)
    problems = []
    for box in (Box(0, 2, 1, 2, 0, 4), Box(2, 4, 0, 1, 0, 4), Box(2, 4, 1, 2, 0, 17)):
        for start in (end.send, end.receive):
            try:
                start(0, 1, [0, 1, 2, 3], box)
                problems.append(f"{box} was taken")
            except ValueError:
                pass
    agree(problems)
