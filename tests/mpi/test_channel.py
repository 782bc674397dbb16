"""Control messages and bells between real ranks."""

from __future__ import annotations

import random
import statistics
import time
import uuid
from typing import TYPE_CHECKING, Any

import pytest

from disagg_mpi.comm.messages import IntegrityCheck, IntegrityReport
from disagg_mpi.comm.waiting import Doorbell

if TYPE_CHECKING:
    from mpi4py import MPI

LARGE = 8 * 2**20


def large_message(rank: int) -> IntegrityReport:
    """A message of 8 MiB, which every rank can make for itself."""
    return IntegrityReport(0, rank, [random.Random(rank).randbytes(LARGE // 2).hex()])


@pytest.mark.mpi(min_size=2)
def test_every_rank_reaches_every_rank_in_order(post: Any, agree: Any) -> None:
    count = 200
    for token in range(count):
        for rank in range(post.size):  # itself too
            post.channel.send(rank, IntegrityReport(token, rank, [f"from {post.rank}"]))
    received = post.receive(count * post.size)
    expected = {source: [IntegrityReport(token, post.rank, [f"from {source}"])
                         for token in range(count)] for source in range(post.size)}
    agree([f"messages from {source}" for source, messages in expected.items()
           if [message for sender, message in received if sender == source] != messages])


@pytest.mark.mpi(min_size=2)
def test_many_messages_wait_for_a_receiver_that_does_not_look(
    world: MPI.Intracomm, post: Any, agree: Any
) -> None:
    count = 3000
    problems = []
    if post.rank > 0:
        for token in range(count):
            post.channel.send(0, IntegrityCheck(token))
    world.Barrier()
    if post.rank == 0:
        received = post.receive(count * (post.size - 1))
        problems = [f"tokens of {rank}" for rank in range(1, post.size)
                    if [m.token for source, m in received if source == rank] != list(range(count))]
    elif not post.channel.flush(10.0) or post.channel.num_pending:
        problems = ["sends are left"]
    agree(problems)


@pytest.mark.mpi(min_size=2)
def test_large_messages_cross(post: Any, agree: Any) -> None:
    """All at once in a ring: nobody waits for a receiver that is itself sending."""
    post.channel.send((post.rank + 1) % post.size, large_message(post.rank))
    before = (post.rank - 1) % post.size
    received = post.receive(1)
    problems = [] if received == [(before, large_message(before))] else ["not what was sent"]
    if not post.channel.flush(10.0) or post.channel.num_pending:
        problems.append("sends are left")
    agree(problems)


@pytest.mark.mpi(min_size=2)
def test_flush_says_whether_every_send_is_complete(
    world: MPI.Intracomm, post: Any, agree: Any
) -> None:
    problems = []
    if post.rank == 0:
        post.channel.send(1, large_message(0))
        if post.channel.flush(0.05) or post.channel.num_pending != 1:
            problems.append("complete although nobody receives")
    world.Barrier()
    if post.rank == 0:
        if not post.channel.flush(10.0) or post.channel.num_pending:
            problems.append("not complete although it was received")
    elif post.rank == 1:
        post.receive(1)
    agree(problems)


# ---- the bell ----


@pytest.mark.mpi(min_size=2)
def test_a_sleeping_rank_is_woken_long_before_its_time_is_up(
    world: MPI.Intracomm, post: Any, agree: Any
) -> None:
    problems = []
    world.Barrier()
    if post.rank == 0:
        time.sleep(0.2)
        for rank in range(1, post.size):
            post.channel.send(rank, IntegrityCheck(rank))
    else:
        start = time.monotonic()
        rang = post.doorbell.wait(20.0)
        slept = time.monotonic() - start
        if not rang or not 0.1 < slept < 5.0:
            problems.append(f"rang: {rang}, after {slept:.3f} s")
        if post.receive(1) != [(0, IntegrityCheck(post.rank))]:
            problems.append("another message")
    agree(problems)


@pytest.mark.mpi(min_size=2)
def test_a_missing_bell_is_no_error(world: MPI.Intracomm, post: Any, agree: Any) -> None:
    post.doorbell.ring(post.size + 7)  # nobody's
    world.Barrier()
    if post.rank == 1:
        post.doorbell.close()
    world.Barrier()
    problems = []
    if post.rank == 0:
        post.channel.send(1, IntegrityCheck(1))
        if not post.channel.flush(10.0):
            problems.append("a message needs the bell")
    elif post.rank == 1:
        post.doorbell.ring(0)
        post.doorbell.ring_self()
        if post.receive(1) != [(0, IntegrityCheck(1))]:
            problems.append("a message needs the bell")
    agree(problems)


def test_rings_are_remembered_once_and_never_block() -> None:
    bell = Doorbell(uuid.uuid4().hex, 0, [0], all_local=True)
    assert not bell.wait(0.0)
    for _ in range(1000):  # more than its queue holds
        bell.ring_self()
    assert bell.wait(10.0)
    assert not bell.wait(0.0)
    bell.close()


def test_a_short_sleep_is_short() -> None:
    """A wait in whole milliseconds made the hand-over seven times slower."""
    bell = Doorbell(uuid.uuid4().hex, 0, [0], all_local=True)
    times = []
    for _ in range(50):
        start = time.perf_counter()
        bell.wait(0.00005)
        times.append(time.perf_counter() - start)
    bell.close()
    assert statistics.median(times) < 0.0008
