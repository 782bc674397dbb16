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
import socket
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any, Self

from disagg_mpi.comm.environment import launcher_context

MARK_VARIABLE = "DISAGG_MPI_LAUNCHER"
"""Says in a rank's environment which launcher it belongs to."""


class SignalRelay:
    """Passes signals on to a job. In place before its mpirun starts, until it has ended."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, sigint_as: signal.Signals) -> None:
        """``sigint_as``: what mpirun is sent for a SIGINT."""
        self._sigint_as = sigint_as
        self.mark = f"{socket.gethostname()}:{os.getpid()}"
        """What the job must be started with in :data:`MARK_VARIABLE`."""
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
        rank_0 = find_rank_0(self.mark)
        if rank_0 is not None:
            with contextlib.suppress(ProcessLookupError):  # it ends already, and mpirun with it
                os.kill(rank_0, signal.SIGTERM if number == signal.SIGHUP else number)
        else:
            self._child.send_signal(self._sigint_as if number == signal.SIGINT else signal.SIGTERM)


def find_rank_0(mark: str) -> int | None:
    """Rank 0 of the job that has ``mark`` in :data:`MARK_VARIABLE`; ``None`` where this host has none.

    By the mark, not by descent: under Slurm the ranks are children of its daemon, on mpirun's host too.
    """
    found = []
    for environ_file in Path("/proc").glob("[0-9]*/environ"):
        try:
            words = environ_file.read_bytes().split(b"\0")
        except OSError:  # another user's, or it has ended
            continue
        pairs = (word.decode(errors="replace").partition("=") for word in words)
        environ = {name: value for name, _, value in pairs}
        context = launcher_context(environ)  # mpirun's own daemons may be srun's tasks
        if environ.get(MARK_VARIABLE) == mark and (context.launcher, context.rank) == ("mpirun", 0):
            found.append(int(environ_file.parent.name))
    # A rank's own children inherit its variables, and came after it.
    return min(found, default=None)
