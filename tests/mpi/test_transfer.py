"""The hand-over between real ranks: bytes of pools, then the protocol over both ways."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from disagg_mpi.job.plan import available_bytes
from disagg_mpi.transfer.layout import KvLayout
from disagg_mpi.transfer.memory import SharedPool, private_pool
from disagg_mpi.transfer.progress import ProgressThread
from disagg_mpi.transfer.transceiver import SHARED, Pulled, Released, Transceiver
from disagg_mpi.transfer.transports import MpiTransport, Pool, Transfer

if TYPE_CHECKING:
    from mpi4py import MPI

DEADLINE = 30.0
SMALL = KvLayout(num_layers=3, num_kv_heads=2, head_dim=16, tokens_per_block=8, num_blocks=0,
                 dtype="bf16")
# Of the default model: a block is 720 KiB, so every message goes by rendezvous.
LARGE = KvLayout(num_layers=30, num_kv_heads=3, head_dim=64, tokens_per_block=16, num_blocks=0,
                 dtype="fp32")


def with_blocks(layout: KvLayout, num_blocks: int) -> KvLayout:
    return KvLayout(layout.num_layers, layout.num_kv_heads, layout.head_dim, layout.tokens_per_block,
                    num_blocks, layout.dtype)


def slots(layout: KvLayout, pool: Pool) -> npt.NDArray[np.uint8]:
    """The pool as [plane, block, token, byte]: where bytes lie, said in another way than ``pieces``."""
    return pool.reshape(layout.num_planes, layout.num_blocks, layout.tokens_per_block,
                        layout.token_bytes)


def tokens_of(layout: KvLayout, pool: Pool, blocks: list[int], num_tokens: int) -> bytes:
    gathered = slots(layout, pool)[:, blocks]
    return gathered.reshape(layout.num_planes, -1, layout.token_bytes)[:, :num_tokens].tobytes()


def fill(pool: Pool, seed: int) -> None:
    pool[:] = np.random.default_rng(seed).integers(0, 256, len(pool), dtype=np.uint8)


def finish(*transfers: Transfer, seconds: float = DEADLINE) -> bool:
    end = time.monotonic() + seconds
    open_ones = list(transfers)
    while open_ones and time.monotonic() < end:
        # No sleep(0) here: MPI yields by itself, and on busy cores MPICH then moves 0.1 GB/s, not 1.4.
        open_ones = [transfer for transfer in open_ones if not transfer.done()]
    return not open_ones


def address(pool: Pool) -> int:
    return int(pool.__array_interface__["data"][0])


# ---- the bytes ----


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["eager", "rendezvous"])
def test_scattered_blocks_arrive_byte_for_byte(
    world: MPI.Intracomm, post: Any, agree: Any, shape: KvLayout
) -> None:
    """Every rank to every other, several in flight for each pair, the last tag sent first."""
    tags, longest = 3, 4
    half = (world.size - 1) * tags * longest
    layout = with_blocks(shape, 2 * half)
    pool = private_pool(layout.pool_bytes)
    fill(pool, world.rank)
    before = pool.copy()
    # Sent from the lower half of a pool, received into the upper half.
    order = random.Random(world.rank)
    lower, upper = order.sample(range(half), half), order.sample(range(half, 2 * half), half)

    def tokens(source: int, rank: int, tag: int) -> int:
        return random.Random(f"{source} {rank} {tag}").randint(1, longest * layout.tokens_per_block)

    transport = MpiTransport(post.comm, pool, layout)
    others = [rank for rank in range(world.size) if rank != world.rank]
    sent, received, transfers = {}, {}, []
    for rank in others:
        for tag in range(tags):
            count = tokens(rank, world.rank, tag)
            table = received[rank, tag] = [upper.pop() for _ in range(layout.blocks_for(count))]
            transfers.append(transport.receive(rank, tag, table, count))
    for rank in others:
        for tag in reversed(range(tags)):
            count = tokens(world.rank, rank, tag)
            table = sent[rank, tag] = [lower.pop() for _ in range(layout.blocks_for(count))]
            transfers.append(transport.send(rank, tag, table, count))
    problems = [] if finish(*transfers) else ["not done in time"]
    transport.close()

    tables = world.allgather(sent)
    expected = before
    for (source, tag), blocks in received.items():
        theirs = np.empty_like(pool)
        fill(theirs, source)
        count = tokens(source, world.rank, tag)
        if tokens_of(layout, pool, blocks, count) != tokens_of(
                layout, theirs, tables[source][world.rank, tag], count):
            problems.append(f"from {source}, tag {tag}")
        for index in range(count):
            block, token = blocks[index // layout.tokens_per_block], index % layout.tokens_per_block
            slots(layout, expected)[:, block, token] = slots(layout, pool)[:, block, token]
    if not np.array_equal(pool, expected):
        problems.append("bytes beside them changed")
    agree(problems)


@pytest.mark.mpi(min_size=2)
def test_a_payload_over_2_gib(world: MPI.Intracomm, post: Any, agree: Any) -> None:
    """Counts of bytes that do not fit into 31 bits, from rank 0 to rank 1.

    Rank 0 sends each of its few blocks many times, which halves the memory and the time: it takes 1 to
    10 s on a virtual machine, and all but 0.3 s of that is the first touch of rank 1's pages.
    """
    num_blocks, num_sources = 530, 16
    layout = KvLayout(num_layers=8, num_kv_heads=8, head_dim=128, tokens_per_block=64,
                      num_blocks=num_blocks, dtype="fp32")  # 4 MiB a block
    if not all(world.allgather((available_bytes() or 0) > 1.5 * layout.pool_bytes)):
        pytest.skip(f"needs {1.5 * layout.pool_bytes / 2**30:.1f} GiB of memory")
    num_tokens = num_blocks * layout.tokens_per_block - 5
    assert layout.kv_bytes(num_tokens) > 2**31
    chooser = random.Random(0)
    source = [chooser.randrange(num_sources) for _ in range(num_blocks)]
    target = chooser.sample(range(num_blocks), num_blocks)
    problems: list[str] = []
    if world.rank < 2:
        # Both sides hold what is sent; only rank 1 has room for all of it.
        small = with_blocks(layout, num_sources)
        sources = private_pool(small.pool_bytes)
        fill(sources, 0)
        if world.rank == 0:
            transport = MpiTransport(post.comm, sources, small)
            transfer = transport.send(1, 0, source, num_tokens)
        else:
            pool = private_pool(layout.pool_bytes)
            transport = MpiTransport(post.comm, pool, layout)
            transfer = transport.receive(0, 0, target, num_tokens)
        if not finish(transfer, seconds=90.0):
            problems.append("not done in time")
        elif world.rank == 1:
            shape = (-1, layout.token_bytes)
            for plane in range(layout.num_planes):
                here = slots(layout, pool)[plane, target].reshape(shape)[:num_tokens]
                there = slots(small, sources)[plane, source].reshape(shape)[:num_tokens]
                if not np.array_equal(here, there):
                    problems.append(f"plane {plane}")
        transport.close()
    agree(problems)


def test_private_pools_are_page_aligned() -> None:
    assert address(private_pool(5 * 2**20)) % 4096 == 0
    assert len(private_pool(12345)) == 12345


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("num_bytes", [0, 12345, 5 * 2**20])
def test_a_shared_pool_is_the_same_bytes_for_all(
    world: MPI.Intracomm, agree: Any, num_bytes: int
) -> None:
    shared = SharedPool(world, num_bytes)
    problems = []
    if len(shared.pool) != num_bytes:
        problems.append(f"{len(shared.pool)} bytes")
    if num_bytes and address(shared.pool) % 4096:
        problems.append(f"at {address(shared.pool):#x}")
    if num_bytes:
        shared.pool[world.rank :: 1000] = world.rank + 1
        world.Barrier()
        problems += [f"bytes of {rank}" for rank in range(world.size)
                     if not (shared.pool[rank::1000] == rank + 1).all()]
    agree(problems)
    shared.close()


# ---- the protocol ----


class Side:
    """What an engine rank has of the hand-over: pool, books, transceiver and, if asked for, its thread.

    Rank ``r`` owns the blocks ``r * per_rank …`` of a shared pool, or all of its own.
    """

    def __init__(self, world: MPI.Intracomm, post: Any, way: str, threaded: bool) -> None:
        self.world, self.post, self.threaded = world, post, threaded
        per_rank = 64
        self.layout = with_blocks(SMALL, per_rank * world.size)
        self.shared = SharedPool(world, self.layout.pool_bytes) if way == SHARED else None
        self.pool = self.shared.pool if self.shared else private_pool(self.layout.pool_bytes)
        first = per_rank * world.rank if self.shared else 0
        self.free = random.Random(world.rank).sample(range(first, first + per_rank), per_rank)
        self.owned: dict[int, list[int]] = {}
        self.data = world.Dup()
        self.transport = MpiTransport(self.data, self.pool, self.layout)
        self.transceiver = Transceiver(
            world.rank, post.channel, self.transport, self.layout,
            pool="host" if self.shared else f"rank {world.rank}", use_shared=self.shared is not None)
        self.woken = threading.Event()
        self.thread: ProgressThread | None = None
        self.pulled: dict[int, Pulled] = {}
        self.released: dict[int, Released] = {}

    def start(self) -> None:
        """From here on this rank answers."""
        if self.threaded and self.thread is None:
            self.thread = ProgressThread(self.transceiver, self.post.doorbell, self.woken.set)

    def allocate(self, request_id: int, num_tokens: int) -> list[int]:
        table = self.owned[request_id] = [
            self.free.pop() for _ in range(self.layout.blocks_for(num_tokens))]
        return table

    def offer(self, request_id: int, num_tokens: int) -> bytes:
        table = self.allocate(request_id, num_tokens)
        content = np.random.default_rng(request_id).integers(
            0, 256, slots(self.layout, self.pool)[:, table].shape, dtype=np.uint8)
        slots(self.layout, self.pool)[:, table] = content
        return self.transceiver.offer(request_id, table, num_tokens)

    def holds(self, request_id: int, source_id: int, num_tokens: int) -> bool:
        """Whether our blocks have what the other rank's offer of ``source_id`` had."""
        layout, table = self.layout, self.owned[request_id]
        content = np.random.default_rng(source_id).integers(
            0, 256, slots(layout, self.pool)[:, table].shape, dtype=np.uint8)
        content = content.reshape(layout.num_planes, -1, layout.token_bytes)[:, :num_tokens]
        return tokens_of(layout, self.pool, table, num_tokens) == content.tobytes()

    def take(self) -> None:
        """What an engine does with the events."""
        for event in self.transceiver.progress():
            if isinstance(event, Pulled):
                self.pulled[event.request_id] = event
                if event.taken is not None:
                    self.owned[event.request_id] = event.taken
            else:
                self.released[event.request_id] = event
                blocks = self.owned.pop(event.request_id)
                self.free += blocks if event.exchanged is None else event.exchanged

    def until(self, done: Callable[[], bool]) -> bool:
        end = time.monotonic() + DEADLINE
        while not done():
            if time.monotonic() > end:
                return False
            if self.threaded:
                self.woken.wait(0.01)
                self.woken.clear()
            else:
                time.sleep(0)
            self.take()
        return True

    def problems(self) -> list[str]:
        """At the end: nothing open, and every block of the pool has one owner; collective."""
        found = []
        if self.transceiver.num_open:
            found.append(f"{self.transceiver.num_open} are open")
        blocks = self.free + [block for table in self.owned.values() for block in table]
        lists = self.world.allgather(blocks) if self.shared else [blocks]
        everything = sorted(block for theirs in lists for block in theirs)
        if everything != list(range(64 * len(lists))):
            found.append("blocks are lost or owned twice")
        return found

    def close(self) -> None:
        if self.thread is not None:
            self.thread.stop()
        self.world.Barrier()
        self.transport.close()
        self.data.Free()
        if self.shared is not None:
            self.shared.close()


@pytest.fixture(params=[(SHARED, False), (SHARED, True), ("mpi", False), ("mpi", True)],
                ids=["shared", "shared-thread", "mpi", "mpi-thread"])
def side(world: MPI.Intracomm, post: Any, request: Any) -> Iterator[Side]:
    made = Side(world, post, *request.param)
    yield made
    made.close()


@pytest.mark.mpi(min_size=2)
def test_every_rank_hands_over_to_the_next(world: MPI.Intracomm, side: Side, agree: Any) -> None:
    """Context and generation at once on every rank: several requests, all in flight together."""
    count = 6
    to, source = (world.rank + 1) % world.size, (world.rank - 1) % world.size
    tokens = [random.Random(index).randint(1, 5 * SMALL.tokens_per_block) for index in range(count)]
    side.start()
    ids = [2**62 + 100 * world.rank + index for index in range(count)]
    states = [side.offer(ids[index], tokens[index]) for index in range(count)]
    got = world.sendrecv(list(zip(ids, states, strict=True)), dest=to, source=source)
    for index, (source_id, state) in enumerate(got):
        side.transceiver.pull(index, source_id, state, side.allocate(index, tokens[index]))
    problems = []
    if not side.until(lambda: len(side.pulled) == count and len(side.released) == count):
        problems.append(f"{len(side.pulled)} pulled, {len(side.released)} released of {count}")
    for index, pulled in side.pulled.items():
        if not side.holds(index, got[index][0], tokens[index]):
            problems.append(f"bytes of request {index}")
        moved = 0 if side.shared else SMALL.kv_bytes(tokens[index])
        if pulled.abandoned or pulled.bytes_moved != moved or (
                pulled.transport != (SHARED if side.shared else "mpi")):
            problems.append(str(pulled))
    world.Barrier()
    agree(problems + side.problems())


@pytest.mark.mpi(min_size=2)
def test_a_pull_is_abandoned_while_its_bytes_are_awaited(
    world: MPI.Intracomm, side: Side, agree: Any
) -> None:
    """Rank 0's context does not answer before rank 1 has given the request up, and starts another."""
    problems, tokens = [], 3 * SMALL.tokens_per_block
    if world.rank == 0:
        world.send([side.offer(request_id, tokens) for request_id in (10, 11)], dest=1)
    elif world.rank == 1:
        side.start()
        states = world.recv(source=0)
        for index, state in enumerate(states):
            side.transceiver.pull(index, 10 + index, state, side.allocate(index, tokens))
        if not side.transceiver.abandon(0) or side.transceiver.abandon(99):
            problems.append("abandon did not say what was open")
        # In a shared pool it was over at once; abandoning still counts until that has been taken.
        side.take()
        if bool(side.pulled) != bool(side.shared):
            problems.append(f"over too early or too late: {side.pulled}")
    world.Barrier()
    side.start()
    if world.rank == 0 and not side.until(lambda: len(side.released) == 2):
        problems.append("an offer is left")
    if world.rank == 1:
        if not side.until(lambda: len(side.pulled) == 2):
            problems.append("a pull is left")
        elif [side.pulled[i].abandoned for i in (0, 1)] != [True, False]:
            problems.append(str(side.pulled))
        elif not side.holds(1, 11, tokens):
            problems.append("bytes of the one that went on")
    world.Barrier()
    agree(problems + side.problems())


@pytest.mark.mpi(min_size=2)
def test_offers_end_without_a_pull(world: MPI.Intracomm, side: Side, agree: Any) -> None:
    problems = []
    side.start()
    if world.rank == 0:
        states = [side.offer(request_id, 20) for request_id in (20, 21)]
        world.send(states, dest=1)
        side.transceiver.drop(20)  # nobody will pull it
        if not side.until(lambda: len(side.released) == 2):
            problems.append(f"only {sorted(side.released)} ended")
    elif world.rank == 1:
        side.transceiver.refuse(21, world.recv(source=0)[1])
    world.Barrier()
    agree(problems + side.problems())
