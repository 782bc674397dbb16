"""disagg_mpi: disaggregated LLM serving as a single ``mpirun``.

Importing this package starts neither MPI nor torch; names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from disagg_mpi.config import Instance, JobConfig
    from disagg_mpi.errors import (
        ConfigError,
        DisaggError,
        InputError,
        IntegrityError,
        JobFailed,
        LayoutError,
        ModelError,
        MpiError,
        RequestError,
        UsageError,
        WorldSizeError,
        WorldTooLargeError,
        WorldTooSmallError,
    )
    from disagg_mpi.executor.base import Executor
    from disagg_mpi.job.launch import launch, launch_executors
    from disagg_mpi.orchestrator.handle import RequestHandle
    from disagg_mpi.orchestrator.orchestrator import Orchestrator
    from disagg_mpi.request import (
        ContextPhaseParams,
        ExecutorRequest,
        Guided,
        Request,
        RequestType,
        Response,
        Result,
        SamplingParams,
        TokenEvent,
    )

__version__ = "0.1.0"

_HOMES = {
    "disagg_mpi.config": ("Instance", "JobConfig"),
    "disagg_mpi.errors": (
        "ConfigError", "DisaggError", "InputError", "IntegrityError",
        "JobFailed", "LayoutError", "ModelError", "MpiError", "RequestError",
        "UsageError", "WorldSizeError", "WorldTooLargeError", "WorldTooSmallError",
    ),
    "disagg_mpi.executor.base": ("Executor",),
    "disagg_mpi.job.launch": ("launch", "launch_executors"),
    "disagg_mpi.orchestrator.handle": ("RequestHandle",),
    "disagg_mpi.orchestrator.orchestrator": ("Orchestrator",),
    "disagg_mpi.request": (
        "ContextPhaseParams", "ExecutorRequest", "Guided", "Request", "RequestType", "Response", "Result",
        "SamplingParams", "TokenEvent",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(["__version__", *_HOME_OF])


def __getattr__(name: str) -> Any:
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'disagg_mpi' has no attribute {name!r}")
    return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return list(__all__)
