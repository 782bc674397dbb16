"""A rank of an instance that is not its leader: the library's threads work, it waits for the end."""

from __future__ import annotations

from typing import Any

from disagg_mpi.comm.channel import Channel
from disagg_mpi.comm.group import GroupLink
from disagg_mpi.comm.waiting import Waiter
from disagg_mpi.executor.follower import FollowerService


class TrtllmFollower(FollowerService):
    """Holds the library's executor of this rank until its leader, which ends its own first, says so."""

    def __init__(self, executor: Any, channel: Channel, waiter: Waiter, link: GroupLink) -> None:
        super().__init__(None, channel, waiter, link, None)
        self._executor = executor

    def close(self) -> None:
        super().close()
        self._executor.shutdown()
