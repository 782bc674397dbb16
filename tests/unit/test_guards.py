"""The parts of the guards that need no MPI; ``tests/failure`` has the others, with real jobs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from processes import assert_gone

from disagg_mpi.errors import JobFailed, WorldTooSmallError
from disagg_mpi.job import guards, segments

MAPS = """\
5634f000-5635a000 r--p 00000000 fe:00 123  /usr/bin/python3.11
7f2a0000-7f2b0000 rw-s 00000000 00:19 41   /dev/shm/sm_segment.host.0.de160001.0
7f2b0000-7f2c0000 rw-s 00001000 00:19 41   /dev/shm/sm_segment.host.0.de160001.0
7f2c0000-7f2d0000 rw-s 00000000 00:19 42   /dev/shm/osc_sm.host.de160001.0.3 (deleted)
7f2d0000-7f2e0000 rw-s 00000000 00:19 43   /dev/shm/mpich_shm_7e8b083a_0
7f2e0000-7f2f0000 rw-s 00000000 00:19 44   /dev/shm/psm_0a1b2c3d
7f2f0000-7f300000 rw-s 00000000 00:19 45   /dev/shm/torch_17_1
7f300000-7f310000 rw-p 00000000 00:00 0
7ffd0000-7ffe0000 rw-p 00000000 00:00 0    [stack]
"""


def test_only_segments_of_mpi_that_have_a_name_are_found() -> None:
    assert segments.mapped_segments(MAPS) == [
        "/dev/shm/mpich_shm_7e8b083a_0", "/dev/shm/sm_segment.host.0.de160001.0"]


@pytest.mark.parametrize("error, code", [
    (ValueError(), 1), (KeyboardInterrupt(), 130), (JobFailed(), 1), (WorldTooSmallError(), 2),
    (SystemExit(), 0), (SystemExit(None), 0), (SystemExit(5), 5), (SystemExit("message"), 1)])
def test_exit_codes_are_those_of_python_and_of_our_errors(error: BaseException, code: int) -> None:
    assert guards._code_of(error) == code


# What a process ends with, and prints, in which only before_mpi() was called: as under a launcher
# whose variables say that it is rank 1 of 2, and without one.
LAUNCHED = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


def run(code: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMI", "SLURM_"))}
    program = f"from disagg_mpi.job import guards\nguards.before_mpi()\n{code}"
    return subprocess.run([sys.executable, "-c", program], env=clean | env, timeout=30,
                          capture_output=True, text=True, check=False)


def test_under_a_launcher_an_exception_is_labelled() -> None:
    done = run("raise ValueError('x')", LAUNCHED)
    assert done.returncode == 1
    assert done.stderr.startswith("[rank 1]\nTraceback") and done.stderr.count("Traceback") == 1


def test_under_a_launcher_a_usage_error_is_one_line() -> None:
    done = run("from disagg_mpi.errors import ConfigError; raise ConfigError('x')",
               LAUNCHED | {"OMPI_COMM_WORLD_RANK": "0"})
    assert (done.returncode, done.stderr) == (2, "ConfigError: x\n")


def test_under_a_launcher_an_interrupt_has_no_traceback() -> None:
    done = run("raise KeyboardInterrupt", LAUNCHED)
    assert (done.returncode, done.stderr) == (130, "Interrupted\n")


@pytest.mark.parametrize("env", [LAUNCHED, {}])
@pytest.mark.parametrize("statement, code", [
    ("import sys; sys.exit(3)", 3), ("raise SystemExit(3)", 3), ("pass", 0)])
def test_exits_stay_what_they_are(env: dict[str, str], statement: str, code: int) -> None:
    done = run(statement, env)
    assert (done.returncode, done.stderr) == (code, "")


def test_without_a_launcher_python_is_left_alone() -> None:
    done = run("raise ValueError('x')", {})
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_rank_dies_with_its_launcher() -> None:
    # A parent as short-lived as a killed mpirun, and a rank that would sleep for long.
    rank = ("from disagg_mpi.job import guards; guards.before_mpi(); import os, time; "
            "print(os.getpid(), flush=True); time.sleep(60)")
    parent = ("import subprocess, sys; "
              "child = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=-1); "
              "print(child.stdout.readline().decode(), flush=True)")
    done = subprocess.run([sys.executable, "-c", parent, rank], env={**os.environ, **LAUNCHED},
                          timeout=30, capture_output=True, text=True, check=True)
    assert_gone(int(done.stdout), within=5)


def test_sigusr1_shows_the_stacks_of_all_threads() -> None:
    done = run("import os, signal, threading, time\n"
               "def idle_thread(): time.sleep(1)\n"
               "threading.Thread(target=idle_thread).start()\n"
               "os.kill(os.getpid(), signal.SIGUSR1)", {})
    assert done.returncode == 0
    assert "in idle_thread" in done.stderr and "in <module>" in done.stderr


def test_waiting_for_a_signal_skips_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "_WATCHDOG", "test watchdog")
    seen = threading.Event()

    def watch(reader: socket.socket) -> None:
        if guards._wait_for_signal(reader, {signal.SIGUSR2}, 10.0):
            seen.set()

    previous = signal.signal(signal.SIGUSR2, lambda *_: None)
    other = signal.signal(signal.SIGWINCH, lambda *_: None)
    try:
        assert guards._start_watchdog(watch)
        os.kill(os.getpid(), signal.SIGWINCH)
        assert not seen.wait(0.1)
        os.kill(os.getpid(), signal.SIGUSR2)
        assert seen.wait(5.0)
    finally:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGUSR2, previous)
        signal.signal(signal.SIGWINCH, other)
