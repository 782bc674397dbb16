"""The hand-over's protocol over transports of device memory: the tests of test_transfer.py once more, on CPU
tensors and a device that is late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")

from lazydevice import be_lazy  # noqa: E402 - after the check for torch
from test_transfer import (  # noqa: E402, F401 - two of them are collected here too
    COPY,
    GROUPS,
    MPI,
    Side,
    test_requests_of_all_fates_at_once,
    test_threads_bring_it_while_engines_compute,
)

from disagg_mpi.transfer.cuda.gather import GatherTransport  # noqa: E402
from disagg_mpi.transfer.cuda.packed import HostStagedTransport, PackedTransport  # noqa: E402

if TYPE_CHECKING:
    from mpi4py import MPI as MpiModule

    from disagg_mpi.transfer.layout import CacheView
    from disagg_mpi.transfer.transports import Copies, Transport


class TensorSide(Side):
    """Its memory is the other's, seen as a tensor; chunks are small, and there is room for three."""

    def transports(self, view: CacheView) -> tuple[Transport, Copies | None]:
        pool = torch.from_numpy(self.memory)
        kind = HostStagedTransport if len(self.groups[0].ranks) > 1 else PackedTransport
        return (kind(self.data, pool, view, chunk_bytes=200_000, num_chunks=3),
                None if self.shared is None else GatherTransport(pool, view, {}))


@pytest.fixture
def make_side(
    world: MpiModule.Intracomm, post: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Side]]:
    be_lazy(monkeypatch)
    sides: list[Side] = []

    def make(*args: Any, **options: Any) -> Side:
        sides.append(TensorSide(world, post, *args, **options))
        return sides[-1]

    yield make
    for side in sides:
        side.close()


@pytest.fixture(params=[(groups, way, threaded) for groups in GROUPS for way in (COPY, MPI)
                        for threaded in (False, True)],
                ids=lambda p: f"{p[0]}-by-{p[1]}{'-thread' * p[2]}")
def side(make_side: Callable[..., Side], request: Any) -> Side:
    return make_side(*request.param)
