"""What of CUDA the engine uses: memory, a queue, marks in it, captured work. One for a rank, made at its
start.

:class:`HostDevice` does the same on the processor, at once: the engine for GPUs is tested with it where there
is no GPU, and ``--device emulated`` runs whole jobs so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch


class Mark(Protocol):
    """A point in the queue."""

    def wait(self) -> None:
        """Sleep until all that was queued before it is done."""
        ...


Results = tuple[torch.Tensor, ...]

Work = Callable[[], Results]

Recorder = Callable[[Work], tuple[Callable[[], None], Results]]
"""Records a work: what replays it, and the tensors that hold its results afterwards."""


class Device(Protocol):
    """Where a rank computes."""

    place: torch.device
    is_cuda: bool
    overlaps: bool
    """Whether a kernel may begin before the one before it has ended (programmatic dependent launch)."""

    def free_bytes(self) -> int: ...

    def host_empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """Host memory from and to which copies need not be waited for."""
        ...

    def mark(self) -> Mark:
        """The point where the queue ends now."""
        ...

    def recorder(self) -> Recorder:
        """For works that never run at once: what one of them used, the next may use again."""
        ...

    def aside(self) -> AbstractContextManager[None]:
        """What is queued within does not wait for steps, nor they for it; the end waits until it is done."""
        ...

    def synchronize(self) -> None: ...


OVERLAP_FROM = (9, 0)
"""Compute capability from which launches may overlap: Hopper's."""


class CudaDevice:
    """One GPU."""

    is_cuda = True

    def __init__(self, index: int) -> None:
        self.place = torch.device("cuda", index)
        torch.cuda.set_device(self.place)
        self.overlaps = torch.cuda.get_device_capability(self.place) >= OVERLAP_FROM
        # The host waits for what goes here, so it goes before the rest of a step.
        self._side: Any = torch.cuda.Stream(self.place, priority=-1)  # type: ignore[no-untyped-call]

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.place)[0]

    def host_empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, pin_memory=True)

    def mark(self) -> Mark:
        return _CudaMark()

    def recorder(self) -> Recorder:
        memory: Any = torch.cuda.graph_pool_handle()

        def record(work: Work) -> tuple[Callable[[], None], Results]:
            torch.cuda.synchronize(self.place)
            graph = torch.cuda.CUDAGraph()
            # Other threads (UCX's, NCCL's) may call CUDA meanwhile.
            with torch.cuda.graph(graph, pool=memory, capture_error_mode="thread_local"):
                results = work()
            return graph.replay, results

        return record

    @contextlib.contextmanager
    def aside(self) -> Any:
        with torch.cuda.stream(self._side):
            yield
            done = _CudaMark()
        done.wait()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.place)


class _CudaMark:
    def __init__(self) -> None:
        # Blocking: a waiting thread sleeps, and lets go of the interpreter's lock.
        self._event: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class HostDevice:
    """The processor, doing as a GPU does."""

    is_cuda = False
    overlaps = False

    def __init__(self, free_bytes: int = 2**40) -> None:
        self.place = torch.device("cpu")
        self._free_bytes = free_bytes

    def free_bytes(self) -> int:
        return self._free_bytes

    def host_empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    def mark(self) -> Mark:
        return _Past()

    def recorder(self) -> Recorder:
        def record(work: Work) -> tuple[Callable[[], None], Results]:
            results = work()

            def replay() -> None:
                for kept, new in zip(results, work(), strict=True):
                    kept.copy_(new)

            return replay, results

        return record

    def aside(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext()

    def synchronize(self) -> None:
        """Nothing is queued."""


class _Past:
    def wait(self) -> None:
        """It is past."""
