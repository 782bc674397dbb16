"""A rank's links within its instance, between real ranks: the whole world is one instance."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pytest

from disagg_mpi.comm.group import GroupLink, as_bytes
from disagg_mpi.transfer.progress import ProgressThread

if TYPE_CHECKING:
    from mpi4py import MPI

DEADLINE = 30.0
# A chunk's hidden states: 2 MiB, far more than MPI sends on its own.
TOKENS, HIDDEN = 512, 1024


class NoTransfers:
    """The transceiver of a rank that hands nothing over."""

    has_thread = is_moving = is_urgent = False

    def advance(self) -> bool:
        return False


@pytest.fixture
def make_link(world: MPI.Intracomm, post: Any) -> Iterator[Callable[..., GroupLink]]:
    """``make_link(tp, pp, threaded)``: this rank's link; collective, as is its end."""
    ends: list[Callable[[], None]] = []

    def make(tp: int, pp: int, threaded: bool = False) -> GroupLink:
        comm = world.Dup()
        link = GroupLink(comm, tp, pp, post.doorbell, tuple(range(world.size)))
        ends.extend([comm.Free, link.close])
        if threaded:
            transfers: Any = NoTransfers()
            thread = ProgressThread(transfers, post.doorbell, lambda: None, link)
            thread.start()
            ends.append(thread.stop)
        return link

    yield make
    for end in reversed(ends):
        end()


def hidden(number: int, tokens: int = TOKENS) -> npt.NDArray[np.float32]:
    return np.random.default_rng(number).standard_normal((tokens, HIDDEN), dtype=np.float32)


def is_sent(link: GroupLink) -> bool:
    """Whether all that ``link`` sends has gone, with nobody here calling MPI."""
    end = time.monotonic() + DEADLINE
    while link.is_sending and time.monotonic() < end:
        time.sleep(0.001)
    return not link.is_sending


# ---- sums ----


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("shape", [(1, 7), (1,), (300, 576), (0, 5)])
def test_a_stage_sums_in_place(
    make_link: Any, world: MPI.Intracomm, agree: Any, shape: tuple[int, ...]
) -> None:
    link = make_link(world.size, 1)
    problems = []
    for round_ in range(5):
        parts = [np.random.default_rng([round_, rank]).integers(-99, 99, shape).astype(np.float32)
                 for rank in range(world.size)]
        mine = parts[world.rank].copy()
        link.all_reduce(mine)
        if not np.array_equal(mine, np.sum(parts, axis=0)):
            problems.append(f"round {round_}")
    if (link.tp_rank, link.pp_rank) != (world.rank, 0):
        problems.append("another place")
    agree(problems)


@pytest.mark.mpi(min_size=2)
def test_stages_do_not_sum_with_each_other(make_link: Any, world: MPI.Intracomm, agree: Any) -> None:
    link = make_link(1, world.size)
    mine = np.full(3, world.rank, np.float32)
    link.all_reduce(mine)
    problems = [] if (mine == world.rank).all() else [f"{mine}"]
    if (link.tp_rank, link.pp_rank, link.index) != (0, world.rank, world.rank):
        problems.append("another place")
    agree(problems)


# ---- from stage to stage ----


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("threaded", [False, True], ids=["alone", "thread"])
def test_micro_batches_go_through_all_stages_in_order(
    make_link: Any, world: MPI.Intracomm, agree: Any, threaded: bool
) -> None:
    """Each stage adds 1; sizes differ, nobody keeps what it has sent, and the second stage is slow."""
    link = make_link(1, world.size, threaded)
    sizes = [TOKENS, 1, TOKENS, 3, 64, TOKENS, 1, 1]
    problems = []
    for number, tokens in enumerate(sizes):
        if link.pp_rank == 0:
            states = hidden(number, tokens)
        else:
            states = np.empty((tokens, HIDDEN), np.float32)
            link.receive_hidden(as_bytes(states))
        if link.pp_rank == 1:
            time.sleep(0.02)
        if link.pp_rank < link.pp - 1:
            link.send_hidden(as_bytes(states + 1))
        elif not np.array_equal(states, add(hidden(number, tokens), link.pp - 1)):
            problems.append(f"micro-batch {number}")
    if threaded and not is_sent(link):
        problems.append("the thread does not send")
    agree(problems)


def add(states: npt.NDArray[np.float32], times: int) -> npt.NDArray[np.float32]:
    for _ in range(times):  # rounded each time
        states = states + 1
    return states


@pytest.mark.mpi(min_size=2)
def test_a_sender_goes_on_while_the_receiver_computes(
    make_link: Any, world: MPI.Intracomm, agree: Any
) -> None:
    link = make_link(1, world.size, True)
    problems = []
    world.Barrier()
    if world.rank == 0:
        start = time.monotonic()
        for number in range(3):
            link.send_hidden(as_bytes(hidden(number)))
        took = time.monotonic() - start
        if not link.is_sending:
            problems.append("gone before anybody has taken it")
        world.send(None, dest=1)
        if took > DEADLINE / 2:
            problems.append(f"waited {took:.1f} s")
        if not is_sent(link):
            problems.append("the thread does not send")
    elif world.rank == 1:
        world.recv(source=0)  # only when all are on their way is the first one looked at
        for number in range(3):
            states = np.empty((TOKENS, HIDDEN), np.float32)
            link.receive_hidden(as_bytes(states))
            if not np.array_equal(states, hidden(number)):
                problems.append(f"micro-batch {number}")
    agree(problems)


@pytest.mark.mpi(min_size=2)
def test_without_a_thread_progress_lets_go(make_link: Any, world: MPI.Intracomm, agree: Any) -> None:
    link = make_link(1, world.size)
    problems = []
    woken: list[bool] = []
    link.wake_thread = lambda: woken.append(True)
    if world.rank == 0:
        link.send_hidden(as_bytes(hidden(0)))
        if not link.is_sending or not woken:
            problems.append("nothing is left to a thread")
    world.Barrier()
    end = time.monotonic() + DEADLINE
    if world.rank == 0:
        while link.is_sending and time.monotonic() < end:
            link.progress()
        if link.is_sending:
            problems.append("it is never sent")
    elif world.rank == 1:
        states = np.empty((TOKENS, HIDDEN), np.float32)
        link.receive_hidden(as_bytes(states))
    agree(problems)


@pytest.mark.mpi(min_size=2)
def test_closing_waits_for_what_is_on_its_way(world: MPI.Intracomm, post: Any, agree: Any) -> None:
    comm = world.Dup()
    link = GroupLink(comm, 1, world.size, post.doorbell, tuple(range(world.size)))
    problems = []
    if world.rank == 0:
        link.send_hidden(as_bytes(hidden(0)))
    elif world.rank == 1:
        time.sleep(0.1)
        states = np.empty((TOKENS, HIDDEN), np.float32)
        link.receive_hidden(as_bytes(states))
        if not np.array_equal(states, hidden(0)):
            problems.append("other bytes")
    link.close()
    if link.is_sending:
        problems.append("closed too early")
    agree(problems)
    comm.Free()


# ---- to the leader ----


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("threaded", [False, True], ids=["alone", "thread"])
def test_logits_of_steps_in_flight_reach_the_leader_in_order(
    make_link: Any, world: MPI.Intracomm, agree: Any, threaded: bool
) -> None:
    """Receipts of several steps are open, of many rows and of none; slices come as late as they like."""
    link = make_link(world.size, 1, threaded)
    rows, width = [64, 0, 1, 64], 5000
    problems = []

    def logits(step: int, index: int) -> npt.NDArray[np.float32]:
        return np.random.default_rng([step, index]).standard_normal((rows[step], width), dtype=np.float32)

    if world.rank == 0:
        slices = [{index: np.empty((count, width), np.float32) for index in range(1, world.size)}
                  for count in rows]
        receipts = [link.receive_logits({index: as_bytes(part) for index, part in step.items()})
                    for step in slices]
        if receipts[0].done() or receipts[3].done():
            problems.append("done before anything was sent")
        world.Barrier()
        end = time.monotonic() + DEADLINE
        for receipt in receipts:
            while not receipt.done() and time.monotonic() < end:
                time.sleep(0)
            if not receipt.done():
                problems.append("a step is not over in time")
        for step, parts in enumerate(slices):
            problems += [f"step {step}, slice {index}" for index, part in parts.items()
                         if not np.array_equal(part, logits(step, index))]
        if not link.receive_logits({}).done():
            problems.append("the leader waits for nobody")
    else:
        world.Barrier()
        for step in range(len(rows)):
            time.sleep(0.005 * world.rank)
            link.send_logits(as_bytes(logits(step, world.rank)))
        end = time.monotonic() + DEADLINE
        while link.is_sending and time.monotonic() < end:
            if not threaded:
                link.progress()
    agree(problems)


# ---- all ----


@pytest.mark.mpi(min_size=2)
def test_nobody_leaves_the_barrier_before_all_are_there(
    make_link: Any, world: MPI.Intracomm, agree: Any
) -> None:
    link = make_link(world.size, 1)
    problems = []
    world.Barrier()
    for last in range(world.size):
        if world.rank == last:
            time.sleep(0.1)
        arrived = time.monotonic()
        link.barrier()
        left = time.monotonic()
        latest = max(world.allgather(arrived))  # one clock for all processes of a host
        if left < latest:
            problems.append(f"left {latest - left:.3f} s before rank {last} came")
    agree(problems)


@pytest.mark.mpi(min_size=2)
def test_traffic_of_all_kinds_does_not_mix(make_link: Any, world: MPI.Intracomm, agree: Any) -> None:
    """Hidden states, logits, sums and barriers in one step after the other, with a thread beside."""
    link = make_link(1, world.size, True)
    problems = []
    for step in range(20):
        receipt, slices = None, {}
        if link.index == 0:
            slices = {link.pp - 1: np.empty((2, 1000), np.float32)}
            receipt = link.receive_logits({index: as_bytes(part) for index, part in slices.items()})
            states = hidden(step, 40)
        else:
            states = np.empty((40, HIDDEN), np.float32)
            link.receive_hidden(as_bytes(states))
        link.all_reduce(states)
        if link.pp_rank < link.pp - 1:
            link.send_hidden(as_bytes(states))
        else:
            link.send_logits(as_bytes(np.ascontiguousarray(states[:2, :1000])))
        if step % 7 == 0:
            link.barrier()
        if receipt is not None:
            end = time.monotonic() + DEADLINE
            while not receipt.done() and time.monotonic() < end:
                time.sleep(0)
            if not np.array_equal(slices[link.pp - 1], hidden(step, 40)[:2, :1000]):
                problems.append(f"step {step}")
    agree(problems)


def test_bytes_of_arrays() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert as_bytes(array).tobytes() == array.tobytes()
    as_bytes(array)[:4] = 0xFF
    assert np.isnan(array[0, 0]), "no copy"
    assert as_bytes(np.empty((0, 5), np.float32)).nbytes == 0
