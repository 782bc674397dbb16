"""The exception tree: everything that disagg_mpi raises on purpose is a :class:`DisaggError`.

Each class carries the exit code that the command line uses for it (2: the user asked for something
that cannot be; 1: it could be asked but failed), so that no caller needs a table of its own.
Messages say what was found, what is needed and what to type.
"""

from __future__ import annotations


class DisaggError(Exception):
    """Base of all errors raised on purpose."""

    exit_code = 1


class UsageError(DisaggError):
    """What was asked for cannot be done as asked: nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file, option or argument is wrong."""


class LayoutError(UsageError):
    """Ranks, instances or participant groups do not fit together."""


class WorldSizeError(LayoutError):
    """The MPI world has another size than the layout needs."""


class WorldTooSmallError(WorldSizeError):
    """The MPI world has fewer ranks than the layout needs."""


class WorldTooLargeError(WorldSizeError):
    """The MPI world has more ranks than the layout uses."""


class ModelError(UsageError):
    """A model directory or file is missing, damaged or of an unknown kind."""


class InputError(UsageError):
    """An input file cannot be read, or an output file cannot be written."""


class MpiError(DisaggError):
    """MPI is missing, or does not do what is needed."""

    exit_code = 2


class LauncherMismatchError(MpiError):
    """The launcher and the MPI library speak different dialects: N ranks became N worlds of one.

    Every process of the job raises it, and none of them can tell the others."""


class RequestError(DisaggError):
    """One request cannot be served; the job goes on."""


class UnknownModelError(RequestError):
    """A client names a model or a version that is not served."""


class OverloadedError(RequestError):
    """As many requests are open as may be; the same request can be served later."""


class TooLargeError(RequestError):
    """A request's body is larger than the server takes."""


class DeadlineError(RequestError):
    """A request was not over when its deadline passed."""


class JobFailed(DisaggError):
    """The job cannot go on: a rank failed, or the orchestrator has shut down."""


class IntegrityError(DisaggError):
    """A block or a transfer is owned by nobody, by two, or by somebody who is done."""
