"""Generation steps, captured once for each batch size and replayed: a step is one launch, not four hundred.

Made with its stage and captured in its warm-up, before the first request, largest first, so that the smaller
ones find their memory in the larger one's. A step takes the next larger size; what is added is nobody's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from disagg_mpi.engine.gpu.device import Device, Results, Work


def graph_sizes(max_batch_size: int) -> list[int]:
    """1, 2, 4, 8, then by eights, then by sixteens from 128 on: a padded row costs little next to the
    weights."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, max_batch_size + 16, 16)]
    below = [size for size in sizes if size < max_batch_size]
    return [*below, max_batch_size]


class StepGraphs:
    """Captured steps by size."""

    def __init__(self, device: Device, sizes: Sequence[int]) -> None:
        self._record = device.recorder()
        self.sizes = sorted(sizes)
        self._captured: dict[int, tuple[Callable[[], None], Results]] = {}

    def capture(self, make: Callable[[int], Work]) -> None:
        """Record every size; ``make(size)`` prepares one and gives its work, which is run once before."""
        for size in reversed(self.sizes):
            work = make(size)
            work()
            self._captured[size] = self._record(work)

    def size_for(self, num_chunks: int) -> int | None:
        """The captured size that such a step runs as."""
        return next((size for size in self.sizes if size >= num_chunks), None) if self._captured else None

    def replay(self, size: int) -> Results:
        """Queue the step of ``size``; what it makes, good until the next replay."""
        run, results = self._captured[size]
        run()
        return results
