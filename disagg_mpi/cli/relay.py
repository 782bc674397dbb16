"""What a Ctrl-C at a launcher becomes: the job's own orderly end.

mpirun answers SIGINT by ending all ranks within half a second (Open MPI, whatever is set), which leaves a
server no time for its open requests and makes mpirun's exit code 1. Rank 0 knows better: sent to it alone,
the signal is the start of the job's end, which takes all ranks with it. So a :class:`SignalRelay` sends it
there where rank 0 is on this host, else to mpirun; a second Ctrl-C kills mpirun, and the ranks with it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Self

from disagg_mpi.comm.environment import launcher_context


class SignalRelay:
    """Passes signals on to a job. In place before its mpirun starts, until it has ended."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, sigint_as: signal.Signals) -> None:
        """``sigint_as``: what mpirun is sent for a SIGINT."""
        self._sigint_as = sigint_as
        self._child: subprocess.Popen[bytes] | None = None
        self._early: list[int] = []
        self._num_interrupts = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in self._NUMBERS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def connect(self, child: subprocess.Popen[bytes]) -> None:
        """``child`` is mpirun; what came before it is passed on now."""
        self._child = child
        while self._early:
            self._handle(self._early.pop(0), None)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._child is None:
            self._early.append(number)
            return
        self._num_interrupts += number == signal.SIGINT
        if self._num_interrupts > 1:
            self._child.kill()
            return
        rank_0 = find_rank_0(self._child.pid)
        if rank_0 is not None:
            with contextlib.suppress(ProcessLookupError):  # it ends already, and mpirun with it
                os.kill(rank_0, signal.SIGINT)
        else:
            self._child.send_signal(self._sigint_as if number == signal.SIGINT else signal.SIGTERM)


def find_rank_0(mpirun: int) -> int | None:
    """The process of rank 0 below ``mpirun``; ``None`` where there is none, or none on this host."""
    for process in _descendants(mpirun):  # outer ones first: a rank's own children inherit its variables
        try:
            words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        except OSError:  # it has ended, or there is no such file system
            continue
        pairs = (word.decode(errors="replace").partition("=") for word in words)
        environ = {name: value for name, _, value in pairs}
        if launcher_context(environ).rank == 0:
            return process
    return None


def _descendants(process: int) -> Iterator[int]:
    """Breadth first."""
    waiting = [process]
    for parent in waiting:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                found = [int(word) for word in children.read_text().split()]
                waiting += found
                yield from found
