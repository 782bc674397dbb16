"""A follower's service loop: the leader's messages in order, until it says stop."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from disagg_mpi.comm.channel import MemoryNetwork
from disagg_mpi.comm.messages import Batch, CopyBlocks, Enqueue, Shutdown
from disagg_mpi.comm.waiting import Doorbell, Waiter
from disagg_mpi.executor.follower import FollowerService

LEADER, FOLLOWER = 1, 2


class Recorder:
    """A stage, a link and a progress thread that note what is wanted of them."""

    is_sending = False

    def __init__(self) -> None:
        self.done: list[Any] = []
        self.looked = threading.Event()

    def serve(self, batch: Batch) -> None:
        self.done.append(batch)

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        self.done.append((sources, targets))

    def progress(self) -> None:
        self.looked.set()

    def stop(self) -> None:
        self.done.append("stopped")


class Follower:
    def __init__(self, bell: Doorbell, *, with_stage: bool = True) -> None:
        self.network = MemoryNetwork()
        parts: Any = Recorder()
        self.parts = parts
        self.service = FollowerService(parts if with_stage else None, self.network.channel(FOLLOWER),
                                       Waiter(bell), parts, parts)
        self.leader = self.network.channel(LEADER)


@pytest.fixture
def bell() -> Iterator[Doorbell]:
    made = Doorbell(uuid.uuid4().hex, 0, [0], True)
    yield made
    made.close()


def batch(number: int) -> Batch:
    return Batch(number, [1, 2], [(0, 2, [(8, 2)])], [1])


def test_work_is_done_in_the_leaders_order(bell: Doorbell) -> None:
    """What is copied is used by the batch behind it."""
    follower = Follower(bell)
    for message in (batch(1), CopyBlocks([3, 4], [5, 6]), batch(2)):
        follower.leader.send(FOLLOWER, message)
    assert follower.service.turn()
    assert follower.parts.done == [batch(1), ([3, 4], [5, 6]), batch(2)]
    assert not follower.service.turn()
    assert not follower.service.stopping


@pytest.mark.parametrize("with_stage", [True, False])
def test_it_runs_until_the_leader_says_stop(bell: Doorbell, with_stage: bool) -> None:
    """Between messages it sees to what it is sending itself."""
    follower = Follower(bell, with_stage=with_stage)
    thread = threading.Thread(target=follower.service.run)
    thread.start()
    assert follower.parts.looked.wait(10)
    for message in ([batch(1)] if with_stage else []) + [Shutdown()]:
        follower.leader.send(FOLLOWER, message)
    bell.ring_self()
    thread.join(10)
    assert not thread.is_alive()
    assert follower.parts.done == ([batch(1)] if with_stage else [])
    follower.service.close()
    assert follower.parts.done[-1] == "stopped"


def test_all_that_came_before_the_stop_is_done(bell: Doorbell) -> None:
    follower = Follower(bell)
    for message in (batch(1), Shutdown()):
        follower.leader.send(FOLLOWER, message)
    follower.service.run()
    assert follower.parts.done == [batch(1)]


@pytest.mark.parametrize(("message", "with_stage"), [
    (Enqueue([]), True), (batch(1), False), (CopyBlocks([], []), False)])
def test_what_a_follower_cannot_do_is_an_error(bell: Doorbell, message: Any, with_stage: bool) -> None:
    follower = Follower(bell, with_stage=with_stage)
    follower.leader.send(FOLLOWER, message)
    with pytest.raises(TypeError, match=f"takes no {type(message).__name__}"):
        follower.service.turn()
