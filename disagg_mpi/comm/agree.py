"""Start-up errors: one rank's becomes every rank's, so that all leave and rank 0 can say it once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from disagg_mpi.errors import DisaggError

if TYPE_CHECKING:
    from mpi4py import MPI

T = TypeVar("T")


def together(comm: MPI.Intracomm, action: Callable[[], T]) -> T:
    """Run ``action`` on every rank; collective.

    If it raises a :class:`DisaggError` on any of them, the lowest such rank's error is raised on all.
    Other exceptions are no agreement's business: they end the job where they arise.
    """
    result, error = None, None
    try:
        result = action()
    except DisaggError as caught:
        error = caught
    found = next((e for e in comm.allgather(error) if e is not None), None)
    if found is not None:
        raise found
    return result  # type: ignore[return-value]


def from_root(comm: MPI.Intracomm, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 alone and give its result, or its error, to every rank; collective."""
    result: T | None = None
    error: DisaggError | None = None
    if comm.rank == 0:
        try:
            result = action()
        except DisaggError as caught:
            error = caught
    result, error = comm.bcast((result, error))
    if error is not None:
        raise error
    return result  # type: ignore[return-value]
