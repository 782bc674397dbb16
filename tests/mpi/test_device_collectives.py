"""Sums and joins over the ranks of a stage, through torch.distributed as on GPUs, with gloo for NCCL."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest

torch = pytest.importorskip("torch")

from disagg_mpi.engine.gpu.collectives import NcclCollectives, StagedCollectives  # noqa: E402

if TYPE_CHECKING:
    from mpi4py import MPI

pytestmark = pytest.mark.mpi(min_size=2)

VOCABULARY = 131  # does not divide evenly


class Link:
    """What the ranks of a stage have besides: a sum on the host, and the first one's word."""

    def __init__(self, world: MPI.Intracomm) -> None:
        self._world = world

    def all_reduce(self, array: Any) -> None:
        from mpi4py import MPI

        self._world.Allreduce(MPI.IN_PLACE, [array, MPI.FLOAT])

    def told(self, text: str) -> str:
        return self._world.bcast(text)


@pytest.fixture(params=["torch.distributed", "staged"])
def collectives(world: MPI.Intracomm, request: pytest.FixtureRequest) -> Iterator[Any]:
    link = Link(world)
    made: Any = StagedCollectives(link, world.rank)
    if request.param != "staged":
        made = NcclCollectives(world.rank, world.size, link.told, torch.device("cpu"), backend="gloo")
    yield made
    made.close()


def parts(world: MPI.Intracomm, rows: int, widths: list[int], dtype: Any) -> list[Any]:
    """What each rank has, known to all; small whole numbers, whose sums are exact in any type."""
    generator = torch.Generator().manual_seed(rows)
    return [torch.randint(-20, 20, (rows, width), generator=generator).to(dtype) for width in widths]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sum_is_that_of_all_ranks_in_its_type(
        world: MPI.Intracomm, collectives: Any, agree: Callable[[list[str]], None], dtype: str) -> None:
    problems = []
    for rows in (1, 7, 300):
        all_parts = parts(world, rows, [24] * world.size, getattr(torch, dtype))
        mine = all_parts[world.rank]
        # As a product may come: with gaps between its rows.
        for given in (mine.clone(), torch.cat([mine, mine], dim=1)[:, :24]):
            found = collectives.summed(given)
            if found.dtype is not mine.dtype or not torch.equal(found, sum(all_parts[1:], all_parts[0])):
                problems.append(f"{rows} rows of {dtype}, contiguous: {given.is_contiguous()}")
    agree(problems)


def test_columns_of_any_width_are_joined_in_order(
        world: MPI.Intracomm, collectives: Any, agree: Callable[[list[str]], None]) -> None:
    problems = []
    size = world.size
    for widths in ([VOCABULARY * (rank + 1) // size - VOCABULARY * rank // size for rank in range(size)],
                   [1, *[9] * (size - 1)], [5] * size):
        for rows in (0, 1, 6):
            all_parts = parts(world, rows, widths, torch.float32)
            found = collectives.joined(all_parts[world.rank].clone(), widths)
            if not torch.equal(found, torch.cat(all_parts, dim=1)):
                problems.append(f"{rows} rows, {widths}")
    agree(problems)


def test_a_stage_can_meet_again(world: MPI.Intracomm, agree: Callable[[list[str]], None]) -> None:
    """A process may run one job after the other."""
    problems = []
    link = Link(world)
    for number in range(2):
        made = NcclCollectives(world.rank, world.size, link.told, torch.device("cpu"), backend="gloo")
        if made.summed(torch.full((2,), number + 1.0)).tolist() != [(number + 1.0) * world.size] * 2:
            problems.append(f"the sum of meeting {number}")
        made.close()
    agree(problems)
