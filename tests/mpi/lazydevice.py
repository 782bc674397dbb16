"""A device that, as a GPU may, does nothing of what it was given before it is asked several times: on CPU
tensors, whatever looks at bytes too early finds the old ones."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from disagg_mpi.transfer.cuda import gather, kernels, packed

_current = threading.local()


class LazyLane:
    """In place of :class:`~disagg_mpi.transfer.cuda.lanes.Lane`."""

    def __init__(self, _device: object) -> None:
        self._works: list[Callable[[], object]] = []
        self._num_done = 0

    @contextlib.contextmanager
    def use(self) -> Iterator[None]:
        _current.lane = self
        yield
        _current.lane = None

    def put(self, work: Callable[[], object]) -> None:
        self._works.append(work)

    def mark(self, *_kept: object) -> LazyMark:
        return LazyMark(self, len(self._works))

    def do(self, end: int) -> None:
        """In order: everything before comes first."""
        while self._num_done < end:
            self._works[self._num_done]()
            self._num_done += 1


class LazyMark:
    def __init__(self, lane: LazyLane, end: int) -> None:
        self._lane, self._end, self._left = lane, end, random.Random(end).randint(0, 4)

    def is_reached(self) -> bool:
        if self._left:
            self._left -= 1
            return False
        self._lane.do(self._end)
        return True


def be_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on new transports of :mod:`disagg_mpi.transfer.cuda` work on such a device."""

    def later(real: Any) -> Any:
        return lambda *args, **options: _current.lane.put(lambda: real(*args, **options))

    monkeypatch.setattr(packed, "Lane", LazyLane)
    monkeypatch.setattr(gather, "Lane", LazyLane)
    monkeypatch.setattr(kernels.Copy, "run", later(kernels.Copy.run))
    monkeypatch.setattr(packed._Moving, "_move_host", later(packed._Moving._move_host))
