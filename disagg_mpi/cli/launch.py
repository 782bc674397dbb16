"""``python -m disagg_mpi launch -n 3 -- run …``: compose the mpirun line, show it, run it.

The child is ``mpirun`` in a session of its own, so that this process alone decides what a Ctrl-C
means: one asks mpirun to stop the job, a second one kills it. Nothing outlives us: mpirun is told
to end when we die, and when mpirun itself is killed, its orphaned ranks come to us (we are their
subreaper) and are killed here. stdin and stdout are mpirun's own; only stderr passes through a
filter that takes out one notice.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import click

from disagg_mpi.cli.relay import MARK_VARIABLE, SignalRelay
from disagg_mpi.comm.cores import count_cores
from disagg_mpi.comm.environment import LauncherContext, launcher_context
from disagg_mpi.comm.installs import Family, MpiInstall, detect_mpi
from disagg_mpi.errors import DisaggError, MpiError, UsageError
from disagg_mpi.job import mps as mps_service
from disagg_mpi.job.mpirun import LaunchLine, compose, python_command, ucx_folder_for

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

# MPICH's Hydra hands a SIGINT on to ranks that then sit in a receive (8 s until they were gone);
# SIGTERM ends them at once. Open MPI takes 0.3 s for either.
_SIGINT_AS: dict[Family, signal.Signals] = {"mpich": signal.SIGTERM, "intel": signal.SIGTERM}

# How soon the end of mpirun is noticed while orphaned ranks keep its stderr open.
_ORPHAN_CHECK_SECONDS = 0.2


@click.command("launch")
@click.option("-n", "--num-ranks", type=click.IntRange(min=1),
              help="Size of the MPI world; `layout` prints how many a job needs. "
                   "[default: inside a Slurm job its number of tasks]")
@click.option("--mpirun-arg", "mpirun_args", multiple=True, metavar="ARG",
              help="One more argument for mpirun itself; may be repeated.")
@click.option("--mps/--no-mps", default=False,
              help="Run NVIDIA's MPS on this host for the time of the job. Worth it where several ranks "
                   "share a GPU: without it they take turns, with it they compute side by side. Does "
                   "nothing for ranks with a GPU each. [default: off]")
@click.option("--dry-run", is_flag=True, help="Print the line and start nothing.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def launch(num_ranks: int | None, mpirun_args: tuple[str, ...], mps: bool, dry_run: bool,
           command: tuple[str, ...]) -> None:
    """Run COMMAND as a job of N ranks, with the mpirun that belongs to this Python.

    COMMAND (after --) is a command of disagg_mpi such as `run --prompt hi`, a script `app.py …`, or
    `python …` as it is.
    """
    with contextlib.ExitStack() as stack:
        try:
            install = detect_mpi()
            context = launcher_context()

            def line_with(rank_environment: Mapping[str, str]) -> LaunchLine:
                return compose(install, num_ranks or _tasks_of(context), python_command(command), context,
                               cores=count_cores(), extra_args=mpirun_args,
                               ucx_folder=ucx_folder_for(install, command), rank_environment=rank_environment)

            line = line_with({})  # whatever is wrong shows before anything is started
            if mps and dry_run:
                click.echo("# --mps: the daemon is started before this line, which then names its folders",
                           err=True)
            elif mps:
                line = line_with(_start_mps(stack))
        except DisaggError as error:
            click.echo(f"Error: {error}", err=True)
            sys.exit(error.exit_code)
        if dry_run:
            click.echo(line.text)
            return
        tell_line(line)
        code = run_line(line, sigint_as=sigint_of(install))
    sys.exit(code)


def _start_mps(stack: contextlib.ExitStack) -> dict[str, str]:
    """What ranks must know of a daemon that ends with ``stack``; nothing, with a word, if there is none."""
    started = mps_service.start()
    if isinstance(started, str):
        click.echo(f"# MPS: {started}", err=True)
        return {}
    stack.callback(started.close)
    click.echo("# MPS: runs on this host until the job ends; ranks that share a GPU compute side by side",
               err=True)
    return started.environment


def _tasks_of(context: LauncherContext) -> int:
    """The Slurm job's number of tasks. Raises :class:`UsageError` where there is none."""
    if context.slurm is None or context.slurm.num_tasks is None:
        raise UsageError("how many ranks? give -n N, which `python -m disagg_mpi layout` tells; it can be "
                         "left out only inside a Slurm job with --ntasks")
    return context.slurm.num_tasks


def tell_line(line: LaunchLine) -> None:
    """Say what will run, and why it is so."""
    for note in line.notes:
        click.echo(f"# {note}", err=True)
    click.echo(f"+ {line.text}", err=True)


def sigint_of(install: MpiInstall) -> signal.Signals:
    """What the mpirun of ``install`` is to be sent for a Ctrl-C."""
    return _SIGINT_AS.get(install.family, signal.SIGINT)


def run_line(line: LaunchLine, sigint_as: signal.Signals = signal.SIGINT) -> int:
    """Run ``line`` until it ends; its exit code, or 128 + the signal that ended it.

    Call it from the main thread: signals are handled there, and the child ends with that thread.
    """
    prctl = _prctl()
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    not_ours = _children()

    def end_with_parent() -> None:
        # SIGTERM, not SIGKILL: mpirun then takes its ranks with it, on all hosts.
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

    with SignalRelay(sigint_as) as relay:
        try:
            # A new session rather than a new process group: a background group may not read the
            # terminal, and rank 0 may want to. preexec_fn is safe: this process has no threads.
            child = subprocess.Popen(
                line.argv, env=os.environ | line.env | {MARK_VARIABLE: relay.mark}, stderr=subprocess.PIPE,
                start_new_session=True, preexec_fn=end_with_parent)
        except OSError as error:
            click.echo(f"Error: cannot start {line.argv[0]}: {error.strerror}", err=True)
            return MpiError.exit_code
        try:
            relay.connect(child)
            _copy_stderr(child)
            code = child.wait()
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
    if code != 0:
        _kill_orphans(not_ours)
    return code if code >= 0 else 128 - code


def _copy_stderr(child: subprocess.Popen[bytes]) -> None:
    """Copy until mpirun's stderr ends, or mpirun is gone and nothing more comes.

    The second, because a rank that outlives mpirun may hold the pipe open too.
    """
    assert child.stderr is not None
    notices = NoticeFilter()
    target = sys.stderr.buffer
    with child.stderr as source:
        while True:
            readable, _, _ = select.select([source], [], [], _ORPHAN_CHECK_SECONDS)
            if not readable:
                if child.poll() is not None:
                    break
                continue
            data = os.read(source.fileno(), 1 << 16)
            if not data:
                break
            target.write(notices.feed(data))
            target.flush()
        target.write(notices.close())
        target.flush()


class NoticeFilter:
    """Takes mpirun's notice about a usage error out of its stderr; everything else passes at once.

    A rank that ends with exit code 2 has printed one line that says what to type; Open MPI then
    adds a box of six lines that says less. There is no option against it: prterun 3 prints it even
    with prte_execute_quiet=1 and knows no --quiet, and with `--runtime-options
    error-nonzero-status=0` the exit code is 0. Boxes about any other exit code, a signal or
    MPI_Abort stay.
    """

    _RULE = b"-" * 74
    _OPENINGS = (
        b"prterun detected that one or more processes exited with non-zero",
        b"mpirun detected that one or more processes exited with non-zero",
        b"mpiexec detected that one or more processes exited with non-zero",
        b"Primary job  terminated normally",  # Open MPI 4 prints two boxes
    )
    _MAX_LINES = 12

    def __init__(self) -> None:
        self._held: list[bytes] = []
        self._partial = b""
        self._inside_line = False

    def feed(self, data: bytes) -> bytes:
        """What of ``data``, and of what was held back before, may be shown now."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        shown = b"".join(self._take(line + b"\n") for line in lines)
        # An unfinished line waits only while it could belong to a notice: progress bars must not.
        if self._partial and not (
                self._RULE.startswith(self._partial) or self._continues(self._partial)):
            shown += b"".join(self._held) + self._partial
            self._held, self._partial, self._inside_line = [], b"", True
        return shown

    def close(self) -> bytes:
        """What is still held back at the end of the stream."""
        shown = b"".join(self._held) + self._partial
        self._held, self._partial = [], b""
        return shown

    def _take(self, line: bytes) -> bytes:
        if self._inside_line:
            self._inside_line = False
            return line
        is_rule = line.rstrip() == self._RULE
        if len(self._held) > 1 and is_rule:  # the box is complete
            box, self._held = b"".join(self._held) + line, []
            return b"" if self._is_noise(box) else box
        if not is_rule and self._continues(line):
            self._held.append(line)
            return b""
        # Neither a notice nor the middle of one; a rule may be the first line of the next.
        shown = b"".join(self._held)
        self._held = [line] if is_rule else []
        return shown if is_rule else shown + line

    def _continues(self, line: bytes) -> bool:
        """Whether ``line``, perhaps unfinished, goes on with the box that is held back."""
        if len(self._held) == 1:
            return any(line.startswith(text) or text.startswith(line) for text in self._OPENINGS)
        return 1 < len(self._held) < self._MAX_LINES

    @staticmethod
    def _is_noise(box: bytes) -> bool:
        exit_code = str(UsageError.exit_code).encode()
        return b"Primary job" in box or re.search(
            rb"^\s*Exit code:\s+" + exit_code + rb"\s*$", box, re.MULTILINE) is not None


# ---- nobody is left behind -----------------------------------------------------------------------


def _prctl() -> Callable[[int, int], object]:
    """``prctl(2)``; does nothing where there is none. Looked up before any fork."""
    if sys.platform != "linux":
        return lambda option, value: None
    function = ctypes.CDLL(None).prctl
    return lambda option, value: function(option, value, 0, 0, 0)


def _kill_orphans(not_ours: set[int]) -> None:
    """Kill and reap every child but ``not_ours``: ranks that a killed mpirun left to us.

    Killing one hands its own children to us, so this goes on until there are none.
    """
    while orphans := _children() - not_ours:
        for pid in orphans:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children() -> set[int]:
    """Process ids of this process's children."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # pid (name) state parent …; the name may hold anything.
            fields = entry.read_text(errors="replace").rpartition(")")[2].split()
            if int(fields[1]) == os.getpid():
                found.add(int(entry.parent.name))
    return found
