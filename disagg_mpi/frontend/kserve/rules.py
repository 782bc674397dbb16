"""What holds over gRPC and HTTP alike: the extensions, what is refused and why, a timeout's unit."""

from __future__ import annotations

from collections.abc import Container
from typing import Any, Protocol

from disagg_mpi.errors import RequestError

EXTENSIONS = ("binary_tensor_data", "generate", "model_configuration", "model_repository", "parameters",
              "statistics")

NO_LOADING = ("models are loaded when the job starts and stay until it ends; start a job with another "
              "repository instead")
NO_SHARED_MEMORY = "tensors come and go in messages; memory of a client is never opened"
NO_TRACING = "there is no tracing; ModelStatistics and the metrics port say where time goes"
NO_LOG_SETTINGS = "logging is set where the job is started"


class Described(Protocol):
    """An input, or an output that is asked for, as either protocol has it."""

    @property
    def name(self) -> str: ...

    @property
    def parameters(self) -> Container[str]: ...


def check_input(tensor: Described) -> None:
    """Raises :class:`RequestError` for one that lies in shared memory."""
    _refuse_shared_memory("input", tensor)


def check_output(tensor: Described, num_classes: Any) -> None:
    """Raises :class:`RequestError` for one that is to lie in shared memory, or is asked for as classes;
    ``num_classes`` is its parameter ``classification``, 0 or ``None`` where there is none."""
    _refuse_shared_memory("output", tensor)
    if num_classes:
        raise RequestError(f"output '{tensor.name}' is text or numbers, not classes")


def timeout_seconds(value: Any) -> float | None:
    """The parameter ``timeout``, in microseconds on the wire; 0 is none. Raises :class:`RequestError`."""
    if type(value) is not int or value < 0:
        raise RequestError(f"the parameter timeout is {value!r}; it is a whole number of microseconds")
    return value / 1e6 or None


def _refuse_shared_memory(what: str, tensor: Described) -> None:
    if "shared_memory_region" in tensor.parameters:
        raise RequestError(f"{what} '{tensor.name}' lies in shared memory: {NO_SHARED_MEMORY}")
