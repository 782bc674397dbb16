"""The hand-over between real ranks: instances of one or two of them, each way, with and without threads."""

from __future__ import annotations

import random
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from disagg_mpi.config import JobConfig
from disagg_mpi.job.arrangement import arrange
from disagg_mpi.model.checkpoint import ModelSpec
from disagg_mpi.prefix import PrefixTags
from disagg_mpi.shapes import Instance
from disagg_mpi.topology import Group, Role, Topology
from disagg_mpi.transfer import offers
from disagg_mpi.transfer.directory import COPY, MPI, SHARED, CacheDirectory
from disagg_mpi.transfer.layout import CacheView
from disagg_mpi.transfer.memory import SharedMemory, private_memory
from disagg_mpi.transfer.mover import Mover
from disagg_mpi.transfer.offers import Released
from disagg_mpi.transfer.progress import ProgressThread
from disagg_mpi.transfer.pulls import Pulled
from disagg_mpi.transfer.transceiver import Transceiver
from disagg_mpi.transfer.transports import Copies, CopyTransport, MpiTransport, Pool, Transport

if TYPE_CHECKING:
    from mpi4py import MPI as MpiModule

DEADLINE = 30.0
PER_BLOCK = 8
SPEC = ModelSpec(
    architecture="", model_type="", num_layers=4, hidden_size=0, num_heads=4, num_kv_heads=2, head_dim=64,
    vocab_size=0, max_position_embeddings=0, dtype="F32", eos_token_ids=(), parameter_bytes=0)
WAYS: dict[str, dict[str, Any]] = {
    SHARED: {}, COPY: {"generation_tokens_per_block": 12},
    MPI: {"transport": "mpi", "generation_tokens_per_block": 12}}
# Context and generation; a rank in neither waits for the others.
GROUPS: dict[str, tuple[tuple[Instance, tuple[int, ...]], tuple[Instance, tuple[int, ...]]]] = {
    "one-one": ((Instance(), (1,)), (Instance(), (2,))),
    "tp2-one": ((Instance(tp=2), (1, 2)), (Instance(), (0,))),
    "one-pp2": ((Instance(), (0,)), (Instance(pp=2), (2, 1)))}


class Request(msgspec.Struct):
    """What both sides know beforehand; who learns the rest is told by message."""

    id: int
    num_tokens: int
    watched: bool
    fate: str
    """``pull``, ``refuse``, ``drop``; or ``abandon``, after its pull has begun."""
    held: int
    """Tokens that generation has already."""
    tables: list[list[int]]
    """Blocks of context and of generation."""


class Side:
    """What a rank has of the hand-over: memory, its part of an instance, and if asked for a thread.

    Construction and ``close`` are collective.
    """

    def __init__(self, world: MpiModule.Intracomm, post: Any, groups: str, way: str, threaded: bool,
                 kv_tokens: int = 1200) -> None:
        self.world, self.post, self.way, self.threaded = world, post, way, threaded
        self.config = JobConfig(tokens_per_block=PER_BLOCK, kv_tokens=kv_tokens, **WAYS[way])
        roles = (Role.CONTEXT, Role.GENERATION)
        self.groups = [Group(index, role, 0, shape, ranks) for index, (role, (shape, ranks)) in
                       enumerate(zip(roles, GROUPS[groups], strict=True))]
        self.arrangement = arrange(self.config, Topology(tuple(self.groups)), [0] * world.size, SPEC)
        self.directory = CacheDirectory(self.arrangement.views, [group.ranks for group in self.groups],
                                        use_memory=way != MPI)
        self.shared = None
        if way == MPI:
            self.memory: Pool = private_memory(self.arrangement.private_bytes.get(world.rank, 0))
        else:
            self.shared = SharedMemory(world, self.arrangement.window_bytes[0])
            self.memory = self.shared.memory
        self.data = world.Dup()
        self.instance = next((g.instance_id for g in self.groups if world.rank in g.ranks), None)
        self.thread: ProgressThread | None = None
        self.woken = threading.Event()
        self.num_wakes = 0
        self.transceiver: Transceiver | None = None
        if self.instance is not None:
            view = self.arrangement.views[world.rank]
            messages, copies = self.transports(view)
            self.transceiver = Transceiver(
                world.rank, self.instance, post.channel, self.directory,
                Mover(self.directory, self.instance, world.rank, post.channel, messages, copies))
        self.pulled: dict[int, Pulled] = {}
        self.released: dict[int, Released] = {}
        self.problems: list[str] = []

    def transports(self, view: CacheView) -> tuple[Transport, Copies | None]:
        """What moves this rank's bytes."""
        return (MpiTransport(self.data, self.memory, view),
                None if self.shared is None else CopyTransport(self.memory, view))

    @property
    def leads(self) -> Role | None:
        """The role of the instance that this rank leads."""
        return next((group.role for group in self.groups if group.leader == self.world.rank), None)

    @property
    def engine(self) -> Transceiver:
        assert self.transceiver is not None
        return self.transceiver

    def start(self) -> None:
        """From here on the thread, if there is one, answers."""
        if self.threaded and self.transceiver is not None:
            self.thread = ProgressThread(self.transceiver, self.post.doorbell, self._wake)
            self.thread.start()

    def _wake(self) -> None:
        self.num_wakes += 1
        self.woken.set()

    # ---- memory ----

    def content(self, request: Request) -> npt.NDArray[np.uint8]:
        """A request's KV-cache of the whole model: ``[layers, 2, tokens, heads, bytes of a head]``."""
        shape = SPEC.num_layers, 2, request.num_tokens, SPEC.num_kv_heads, 4 * SPEC.head_dim
        return np.random.default_rng(request.id).integers(0, 256, shape, dtype=np.uint8)

    def part(self, request: Request, table: list[int]) -> tuple[Any, Any, Any, Any]:
        """Index of this rank's layers and heads of a request's tokens in its array, and that array."""
        view = self.arrangement.views[self.world.rank]
        layout, shard = view.layout, view.shard
        array = self.memory[view.offset : view.offset + layout.pool_bytes].reshape(
            layout.num_layers, 2, layout.num_blocks * layout.tokens_per_block, layout.num_kv_heads,
            layout.head_bytes)
        tokens = np.arange(request.num_tokens)
        slots = np.array(table)[tokens // layout.tokens_per_block] * layout.tokens_per_block
        slots += tokens % layout.tokens_per_block
        layers = slice(shard.first_layer - view.origin_layer, shard.end_layer - view.origin_layer)
        heads = slice(shard.first_head - view.origin_head, shard.end_head - view.origin_head)
        own = self.content(request)[shard.first_layer : shard.end_layer, :, :,
                                    shard.first_head : shard.end_head]
        return array[layers, :, :, heads], slots, own, layout

    def write(self, request: Request, table: list[int], first: int, end: int) -> None:
        array, slots, own, _ = self.part(request, table)
        array[:, :, slots[first:end]] = own[:, :, first:end]

    def holds(self, request: Request, table: list[int]) -> bool:
        array, slots, own, _ = self.part(request, table)
        return bool(np.array_equal(array[:, :, slots], own))

    # ---- time ----

    def take(self) -> None:
        """What an engine does with the events."""
        if self.transceiver is None:
            return
        for event in self.transceiver.progress():
            known: dict[int, Any] = self.pulled if isinstance(event, Pulled) else self.released
            assert event.request_id not in known, "it ends once"
            known[event.request_id] = event

    def until(self, done: Callable[[], bool], turn: Callable[[], None] = lambda: None) -> bool:
        """Whether ``done`` came true in time. An exception is noted: the other ranks wait for this one."""
        try:
            return self._until(done, turn)
        except Exception:
            self.problems.append(traceback.format_exc())
            return False

    def _until(self, done: Callable[[], bool], turn: Callable[[], None]) -> bool:
        end = time.monotonic() + DEADLINE
        while not done():
            if time.monotonic() > end:
                return False
            if self.threaded:
                self.woken.wait(0.005)
                self.woken.clear()
            else:
                time.sleep(0)
            turn()
            self.take()
        return True

    def meet(self) -> None:
        """Wait for all ranks, and answer until they are here."""
        request = self.world.Ibarrier()
        while not self.until(request.Test):
            pass

    def close(self) -> None:
        self.meet()
        if self.thread is not None:
            self.thread.stop()
        self.world.Barrier()
        if self.transceiver is not None:
            self.transceiver.close()
        self.data.Free()
        if self.shared is not None:
            self.shared.close()


@pytest.fixture
def make_side(world: MpiModule.Intracomm, post: Any) -> Iterator[Callable[..., Side]]:
    sides: list[Side] = []

    def make(*args: Any, **options: Any) -> Side:
        sides.append(Side(world, post, *args, **options))
        return sides[-1]

    yield make
    for side in sides:
        side.close()


@pytest.fixture(params=[(groups, way, threaded) for groups in GROUPS for way in WAYS
                        for threaded in (False, True) if way != SHARED or not threaded],
                ids=lambda p: f"{p[0]}-by-{p[1]}{'-thread' * p[2]}")
def side(make_side: Callable[..., Side], request: Any) -> Side:
    return make_side(*request.param)


def make_requests(side: Side, count: int, seed: int) -> list[Request]:
    """The same on every rank: of all lengths and fates, in scattered blocks."""
    chance = random.Random(seed)
    free = [chance.sample(blocks, len(blocks)) for blocks in side.arrangement.block_ids.values()]
    moves = side.way != SHARED
    found = []
    for index in range(count):
        num_tokens = chance.randint(1, 60)
        fate = chance.choice(["pull", "pull", "pull", "abandon", "drop", "refuse"])
        watched = moves and chance.random() < 0.5
        held = chance.choice([0, 0, num_tokens, chance.randint(0, num_tokens)]) if moves else 0
        tables = [[blocks.pop() for _ in range(-(-num_tokens // side.config.block_size(group.role)))]
                  for blocks, group in zip(free, side.groups, strict=True)]
        found.append(Request(2**62 + 1000 * seed + index, num_tokens, watched, fate, held, tables))
    return found


class ContextLeader:
    """Computes the requests one after the other, and tells generation's leader of each."""

    def __init__(self, side: Side, requests: list[Request], chance: random.Random) -> None:
        self.side, self.chance = side, chance
        self.left = [(request, at) for request in requests for at in self._cuts(request)]
        self.at: dict[int, int] = {}

    def _cuts(self, request: Request) -> list[int]:
        return sorted({request.num_tokens, *(self.chance.randint(1, request.num_tokens) for _ in range(3))})

    def turn(self) -> None:
        for _ in range(min(self.chance.randint(0, 2), len(self.left))):
            request, end = self.left.pop(0)
            table, engine = request.tables[0], self.side.engine
            self.side.write(request, table, self.at.get(request.id, 0), end)
            self.at[request.id] = end
            engine.computed(request.id, table, request.num_tokens, end)
            if end == request.num_tokens:
                state = engine.offer(request.id, table, request.num_tokens)
                if request.fate == "drop":
                    engine.drop(request.id)
                self.side.world.send((request.id, state), self.side.groups[1].leader)  # small: gone at once


class GenerationLeader:
    """Watches, pulls, refuses and gives up as each request's fate is."""

    def __init__(self, side: Side, requests: list[Request], chance: random.Random) -> None:
        self.side, self.chance = side, chance
        self.requests = {request.id: request for request in requests}  # of which no word has come
        self.watches = [request for request in requests if request.watched]

    def turn(self) -> None:
        side, engine = self.side, self.side.engine
        if self.watches and self.chance.random() < 0.5:
            self._expect(self.watches.pop(0))
        while side.world.iprobe(source=side.groups[0].leader):
            request_id, state = side.world.recv(source=side.groups[0].leader)
            request = self.requests.pop(request_id)
            if request in self.watches:  # late: its context is over already
                self.watches.remove(request)
                self._expect(request)
            if request.watched:
                if request.fate == "pull":
                    engine.proceed(request_id)
                else:
                    assert engine.abandon(request_id)
                    if request.fate == "refuse":
                        engine.refuse(request_id, state)
            elif request.fate == "refuse":
                engine.refuse(request_id, state)
            elif request.fate != "drop":
                engine.pull(request_id, request_id, state, request.tables[1], request.num_tokens,
                            request.held)
                if request.fate == "abandon":
                    assert engine.abandon(request_id)

    def _expect(self, request: Request) -> None:
        self.side.engine.expect(request.id, request.id, 0, request.tables[1], request.num_tokens,
                                request.held)


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_requests_of_all_fates_at_once(
    world: MpiModule.Intracomm, side: Side, agree: Any, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Many in flight; each ends once on both sides, with its bytes where it was not given up."""
    monkeypatch.setattr(offers, "MIN_PIECE_TOKENS", 4)
    requests = make_requests(side, 12, seed)
    problems = side.problems
    for request in requests:
        if side.instance == 0 and side.leads is None:
            side.write(request, request.tables[0], 0, request.num_tokens)
        if side.instance == 1:
            side.write(request, request.tables[1], 0, request.held)
    world.Barrier()
    side.start()
    chance = random.Random(f"{seed} {world.rank}")
    pulls = [r.id for r in requests if r.watched or r.fate in ("pull", "abandon")]
    if side.leads is Role.CONTEXT:
        context = ContextLeader(side, requests, chance)
        if not side.until(lambda: len(side.released) == len(requests), context.turn):
            problems.append(f"only {len(side.released)} of {len(requests)} are released")
    elif side.leads is Role.GENERATION:
        generation = GenerationLeader(side, requests, chance)
        if not side.until(lambda: len(side.pulled) == len(pulls) and not generation.requests,
                          generation.turn):
            problems.append(f"only {len(side.pulled)} of {len(pulls)} are pulled")
        given_up = {i for i, event in side.pulled.items() if event.abandoned}
        if given_up != {r.id for r in requests if r.id in pulls and r.fate != "pull"}:
            problems.append(f"given up: {given_up}")
        if any(event.way != side.way for event in side.pulled.values()):
            problems.append("another way")
    side.meet()
    taken = world.bcast({i: event.taken for i, event in side.pulled.items()}, side.groups[1].leader)
    given = world.bcast({i: event.exchanged for i, event in side.released.items()}, side.groups[0].leader)
    for request in requests:
        if side.instance == 1 and request.fate == "pull":
            table = taken.get(request.id) or request.tables[1]
            if not side.holds(request, table):
                problems.append(f"bytes of {request}")
        # Blocks change hands one for one, or not at all.
        theirs, ours = request.tables
        if sorted([*(taken.get(request.id) or ours), *(given.get(request.id) or theirs)]) != sorted(
                [*theirs, *ours]):
            problems.append(f"blocks of {request}")
        if (taken.get(request.id) is None) != (given.get(request.id) is None):
            problems.append(f"exchange of {request}")
    if side.transceiver is not None and (side.engine.num_open or side.engine.is_moving):
        problems.append(f"{side.engine.num_open} are open")
    agree(problems)


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("watched", [False, True], ids=["late", "watched"])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("way", [COPY, MPI], ids=["by-copy", "by-messages"])
def test_threads_bring_it_while_engines_compute(
    world: MpiModule.Intracomm, make_side: Any, agree: Any, groups: str, way: str, watched: bool
) -> None:
    """10 MiB, with nobody but the threads calling MPI from when it has begun until it is here."""
    num_tokens = 2500
    side: Side = make_side(groups, way, threaded=True, kv_tokens=num_tokens)
    tables = [list(blocks) for blocks in side.arrangement.block_ids.values()]
    request = Request(7, num_tokens, watched, "pull", 0, tables)
    if side.instance == 0:
        side.write(request, tables[0], 0, num_tokens)
    world.Barrier()
    side.start()
    problems: list[str] = []
    state = b""
    if side.leads is Role.CONTEXT:
        state = side.engine.offer(7, tables[0], num_tokens)
    state = world.bcast(state, side.groups[0].leader)
    if side.leads is Role.GENERATION:
        if watched:
            side.engine.expect(7, 7, 0, tables[1], num_tokens)
            side.engine.proceed(7)
        else:
            side.engine.pull(7, 7, state, tables[1], num_tokens)
    if side.leads is not None:
        # With a thread these calls look at what is over, and leave MPI alone.
        if not side.until(lambda: len(side.pulled) + len(side.released) == 1):
            problems.append("it is never over")
        # The word that it is over may come before a rank has seen its own last send end.
        if not side.until(lambda: not side.engine.is_moving):
            problems.append("bytes are on their way")
        # All may have come before generation was told to go on: then the call itself ends the pull.
        if not side.num_wakes and not (watched and side.leads is Role.GENERATION):
            problems.append("nobody is woken")
    side.meet()
    if side.instance == 1 and not side.holds(request, tables[1]):
        problems.append("other bytes")
    agree(problems + side.problems)


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize("threaded", [False, True], ids=["alone", "thread"])
def test_a_pull_is_abandoned_while_its_bytes_are_awaited(
    world: MpiModule.Intracomm, make_side: Any, agree: Any, threaded: bool
) -> None:
    """The context does not answer before generation has given the request up, and started another."""
    side: Side = make_side("tp2-one", MPI, threaded)
    requests = [Request(request_id, 24, False, "pull", 0,
                        [[3 * index, 3 * index + 1, 3 * index + 2], [2 * index, 2 * index + 1]])
                for index, request_id in enumerate((10, 11))]
    if side.instance == 0:
        for request in requests:
            side.write(request, request.tables[0], 0, 24)
    world.Barrier()
    states = [b"", b""]
    if side.leads is Role.CONTEXT:
        states = [side.engine.offer(request.id, request.tables[0], 24) for request in requests]
    states = world.bcast(states, side.groups[0].leader)
    problems: list[str] = []
    if side.leads is Role.GENERATION:
        side.start()
        for request, state in zip(requests, states, strict=True):
            side.engine.pull(request.id, request.id, state, request.tables[1], 24)
        if not side.engine.abandon(10) or side.engine.abandon(99):
            problems.append("abandon did not say what was open")
        time.sleep(0.1)
        side.take()
        if side.pulled:
            problems.append(f"over too early: {side.pulled}")
    world.Barrier()
    if side.leads is not Role.GENERATION:
        side.start()
    if side.leads is Role.CONTEXT and not side.until(lambda: len(side.released) == 2):
        problems.append("an offer is left")
    if side.leads is Role.GENERATION:
        if not side.until(lambda: len(side.pulled) == 2):
            problems.append("a pull is left")
        elif [side.pulled[i].abandoned for i in (10, 11)] != [True, False]:
            problems.append(str(side.pulled))
        elif not all(side.holds(request, request.tables[1]) for request in requests):
            problems.append("the bytes of the one given up arrive too, before it is over")
    side.meet()
    agree(problems + side.problems)


# ---- memory ----


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("num_bytes", [0, 12345, 5 * 2**20])
def test_shared_memory_is_the_same_zeroed_bytes_for_all(
    world: MpiModule.Intracomm, agree: Any, num_bytes: int
) -> None:
    """Also where a window has just been full of something else."""
    problems = []
    for value in (1, 2):
        shared = SharedMemory(world, num_bytes)
        memory = shared.memory
        address = memory.__array_interface__["data"][0]
        if len(memory) != num_bytes:
            problems.append(f"{len(memory)} bytes")
        if num_bytes and address % 4096:
            problems.append(f"at {address:#x}")
        if memory.any():
            problems.append("not zeroed")
        world.Barrier()
        memory[world.rank :: 1000] = world.rank + value
        shared.sync()
        world.Barrier()
        shared.sync()
        problems += [f"bytes of {rank}" for rank in range(world.size)
                     if not (memory[rank::1000] == rank + value).all()]
        world.Barrier()
        memory[:] = 0xEE
        world.Barrier()
        shared.close()
    agree(problems)


@pytest.mark.mpi(min_size=2)
def test_tags_are_seen_by_all_ranks_of_a_window(world: MpiModule.Intracomm, agree: Any) -> None:
    num_blocks = 8
    shared = SharedMemory(world, 4096 + PrefixTags.bytes_needed(num_blocks))
    tags = PrefixTags(shared.memory[4096:], num_blocks, shared.sync)
    problems = []
    if world.rank == 1:
        tags.clear([3, 4])
        tags.set(3, 2**64 - 1)
        tags.set(4, 77)
    world.Barrier()
    found = tags.find([2**64 - 1, 77, 5])
    if [tuple(one) for one in found] != [(3, 1), (4, 1)]:
        problems.append(f"found {found}")
    world.Barrier()
    if world.rank == 1:
        tags.clear([4])
        tags.set(4, 77)
    world.Barrier()
    if tags.still(found, [2**64 - 1, 77]) != 1:
        problems.append("block 4 was cleared in between, even if it has the same tag again")
    agree(problems)
    shared.close()


@pytest.mark.mpi(min_size=2)
def test_what_is_copied_under_a_tag_is_what_the_tag_says(world: MpiModule.Intracomm, agree: Any) -> None:
    """Rank 0 writes blocks anew all the time; whoever copies one drops it or has all of its bytes."""
    num_blocks, size, seconds = 4, 2**16, 0.5
    shared = SharedMemory(world, num_blocks * size + PrefixTags.bytes_needed(num_blocks))
    blocks = shared.memory[: num_blocks * size].view(np.uint64).reshape(num_blocks, -1)
    tags = PrefixTags(shared.memory[num_blocks * size :], num_blocks, shared.sync)
    problems: list[str] = []
    good = dropped = value = 0
    world.Barrier()
    end = time.monotonic() + seconds
    while time.monotonic() < end or (good < 1 and world.rank > 0 and time.monotonic() < end + DEADLINE / 2):
        if world.rank == 0:
            value += 1
            block = value % num_blocks
            tags.clear([block])
            blocks[block] = value
            tags.set(block, value)
        else:
            tag = max(tags.get(block) for block in range(num_blocks))
            found = tags.find([tag]) if tag else []
            if not found:
                continue
            copy = blocks[found[0].block].copy()
            if not tags.still(found, [tag]):
                dropped += 1
            elif (copy == tag).all():
                good += 1
            else:
                problems.append(f"tag {tag}: bytes of {set(copy.tolist())}")
    if world.rank > 0 and not good:
        problems.append(f"nothing was ever found, {dropped} were dropped")
    agree(problems[:3])
    shared.close()
