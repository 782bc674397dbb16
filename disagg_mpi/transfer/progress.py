"""A thread that keeps bytes moving while the engine computes.

MPI moves bytes only while both sides call it, and a forward of a long chunk takes half a second on a CPU,
so each engine rank whose hand-overs move bytes has this thread: it answers pull requests, moves transfers on,
copies, and wakes the engine's thread when something is over; with pipeline stages it also sees to it that
hidden states leave while the next step is computed. torch releases the GIL in its kernels. It needs
MPI_THREAD_MULTIPLE, and sleeps on a bell of its own; where all hand-overs exchange blocks in one pool there
is nothing to move and no thread.

Started by the job when every rank is ready, stopped by it before the communicators are freed. An
exception in it ends the job, as one in any rank does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from disagg_mpi.comm.group import GroupLink
from disagg_mpi.comm.waiting import Doorbell, Waiter
from disagg_mpi.transfer.transceiver import Transceiver


class ProgressThread:
    """Runs ``transceiver.advance`` until stopped; ``wake`` is called when something is over."""

    def __init__(
        self, transceiver: Transceiver, doorbell: Doorbell, wake: Callable[[], None],
        link: GroupLink | None = None,
    ) -> None:
        self._transceiver = transceiver
        self._doorbell = doorbell
        self._wake = wake
        self._link = link
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="disagg_mpi-handover", daemon=True)

    def start(self) -> None:
        """From now on the thread does what the engine's would."""
        self._transceiver.has_thread = True
        self._transceiver.wake_thread = self._doorbell.ring_self
        if self._link is not None:
            self._link.wake_thread = self._doorbell.ring_self
        self._thread.start()

    def stop(self) -> None:
        """End the thread; hand-overs no longer move."""
        self._stopping = True
        self._doorbell.ring_self()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def _run(self) -> None:
        waiter = Waiter(self._doorbell)
        link = self._link
        while not self._stopping:
            if self._transceiver.advance():
                self._wake()
                waiter.worked()
            if link is not None:
                link.progress()
            waiter.idle(urgent=self._transceiver.is_urgent,
                        transferring=self._transceiver.is_moving or (link is not None and link.is_sending))
