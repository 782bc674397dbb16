"""A stream of one's own, and marks in it; on the CPU, where all is done at once, neither.

A transport makes its lanes at start and keeps them. Work is put into a lane by any thread, ``with
lane.use()``; a mark is asked, never waited for.
"""

from __future__ import annotations

import contextlib
import threading

import torch

_threads = threading.local()


def enter_thread(device: torch.device) -> None:
    """Make ``device`` the calling thread's, once: MPI's own work on device memory goes by whose thread it is,
    and one that has not used the device yet has none."""
    if device.type == "cuda" and getattr(_threads, "index", None) != device.index:
        torch.cuda.set_device(device)
        torch.cuda.current_stream(device).query()  # the runtime is lazy: only a call like this one does it
        _threads.index = device.index


class Mark:
    """A place in a lane, and what must live until it is reached."""

    def __init__(self, event: torch.cuda.Event | None, *kept: object) -> None:
        self._event = event
        self._kept: tuple[object, ...] = kept

    def is_reached(self) -> bool:
        if self._event is not None and self._event.query():  # type: ignore[no-untyped-call]
            self._event = None
        if self._event is None:
            self._kept = ()
            return True
        return False


class Lane:
    """Work for a device, in order. ``device`` names an index or is the CPU."""

    def __init__(self, device: torch.device) -> None:
        # The highest priority: what a request waits for goes before the next part of a forward.
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    def use(self) -> contextlib.AbstractContextManager[object]:
        """What is started inside goes into this lane, and to its device, whatever thread it is."""
        return contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def mark(self, *kept: object) -> Mark:
        """After all that has been put in so far; ``kept`` is let go of when it is reached."""
        if self._stream is None:
            return Mark(None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return Mark(event, *kept)
