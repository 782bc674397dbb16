"""An instance's follower at work for its leader: its part of each step, in order, until told to stop.

Runs in the worker's only thread from the job's start to its end (a progress thread may move bytes beside
it). It knows no requests: a step says which tokens and which slots of the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from disagg_mpi.comm.channel import Channel
from disagg_mpi.comm.group import GroupLink
from disagg_mpi.comm.messages import Batch, CopyBlocks, PagedStep, Shutdown
from disagg_mpi.comm.waiting import Waiter
from disagg_mpi.transfer.progress import ProgressThread


class Stage(Protocol):
    """What is needed of an engine's stage: the processor's takes batches, the GPU's either."""

    def serve(self, step: Any) -> None: ...

    def copy_blocks(self, sources: Sequence[int], targets: Sequence[int]) -> None: ...


class FollowerService:
    """Serves one instance's leader. ``run`` returns when the leader says so."""

    def __init__(
        self,
        stage: Stage | None,
        channel: Channel,
        waiter: Waiter,
        link: GroupLink,
        progress: ProgressThread | None,
    ) -> None:
        """``stage`` is ``None`` for an executor that computes nothing."""
        self._stage = stage
        self._channel = channel
        self._waiter = waiter
        self._link = link
        self._progress = progress
        self.stopping = False

    def start(self) -> None:
        """Every rank of the job is ready."""
        if self._progress is not None:
            self._progress.start()

    def run(self) -> None:
        while not self.stopping:
            if self.turn():
                self._waiter.worked()
            else:
                self._link.progress()
                self._waiter.idle(transferring=self._link.is_sending)

    def turn(self) -> bool:
        """Do what has come; whether there was anything."""
        messages = self._channel.poll()
        for _, message in messages:
            if isinstance(message, Shutdown):
                self.stopping = True
            elif isinstance(message, Batch | PagedStep) and self._stage is not None:
                self._stage.serve(message)
            elif isinstance(message, CopyBlocks) and self._stage is not None:
                self._stage.copy_blocks(message.sources, message.targets)
            else:
                raise TypeError(f"an instance's follower takes no {type(message).__name__}")
        return bool(messages)

    def close(self) -> None:
        """Give the thread back."""
        if self._progress is not None:
            self._progress.stop()
