"""Whatever happens to a rank, the job ends within 10 seconds, says why once, and leaves nothing.

Real jobs of three ranks under the mpirun of the running environment (run this with an environment
for each MPI). ``scripts/die.py`` uses the guards alone: ranks that do not fail are blocked in MPI.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from mpirun import JobResult, MpiJob, mpi_family, run_job

SCRIPT = str(Path(__file__).parent / "scripts" / "die.py")
SECONDS = 10.0

pytestmark = pytest.mark.jobs


def fail(how: str, rank: int = 0) -> JobResult:
    """Run a job that fails by itself, check the rules that hold for every end."""
    result = run_job(3, [SCRIPT, how, str(rank)], timeout=SECONDS + 5)
    check(result, in_mpi_init=how == "before-mpi")
    return result


def check(result: JobResult, *, in_mpi_init: bool = False) -> None:
    result.assert_clean(in_mpi_init=in_mpi_init)
    assert result.seconds < SECONDS, result.text


def kill(number: signal.Signals, rank: int | None, *, how: str = "none") -> JobResult:
    """Send a signal to a rank, or to mpirun, of a job that is blocked in MPI."""
    with MpiJob(3, [SCRIPT, how]) as job:
        job.wait_for("ready", times=3)
        time.sleep(0.3)  # now they are where they will wait
        job.send_signal(number, rank)
        result = job.finish(SECONDS + 5)
    check(result)
    return result


def test_clean_job_ends_without_a_word() -> None:
    result = fail("clean")
    assert result.returncode == 0, result.text
    assert "rank" not in result.stderr


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_exception_names_its_rank_once(rank: int) -> None:
    result = fail("raise", rank)
    assert result.returncode == 1, result.text
    assert result.stderr.count(f"[rank {rank} · test]\nTraceback") == 1
    assert result.stderr.count("ValueError: raised on purpose") == 1


@pytest.mark.parametrize("how, error", [("fatal", "ValueError"), ("thread", "IndexError")])
def test_caught_and_thread_exceptions_do_too(how: str, error: str) -> None:
    result = fail(how, 1)
    assert result.returncode == 1, result.text
    assert result.stderr.count("[rank 1 · test]\nTraceback") == 1
    assert result.stderr.count(f"{error}: ") == 1


@pytest.mark.parametrize("rank", [0, 1])
def test_exception_before_mpi_starts(rank: int) -> None:
    result = fail("before-mpi", rank)
    assert result.returncode == 1, result.text
    assert result.stderr.count(f"[rank {rank}]\nTraceback") == 1


def test_usage_error_is_one_line() -> None:
    result = fail("usage")
    assert result.returncode == 2, result.text
    assert result.stderr == "WorldTooSmallError: 3 ranks, this layout needs 5\n"


@pytest.mark.parametrize("rank", [0, 1])
def test_usage_error_of_one_rank_ends_the_job(rank: int) -> None:
    result = fail("usage-alone", rank)
    assert result.returncode == 2, result.text
    assert result.stderr.count("WorldTooSmallError: only this rank says so\n") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("rank", [0, 1])
def test_exit_in_the_middle_ends_the_job(rank: int) -> None:
    result = fail("exit", rank)
    assert result.returncode == 3, result.text
    assert result.stderr.count(f"[rank {rank} · test] exits before the end") == 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["late-exit", "late-exit-together"])
def test_exit_code_after_the_job(how: str, rank: int) -> None:
    result = fail(how, rank)
    assert result.returncode == 3, result.text
    assert ("exits with code 3" in result.stderr) == (how == "late-exit")


@pytest.mark.parametrize("how", ["late-raise", "late-raise-together"])
def test_exception_after_the_job(how: str) -> None:
    result = fail(how)
    assert result.returncode == 1, result.text
    assert result.stderr.count("[rank 0 · test]\nTraceback") == 1
    if how == "late-raise-together":
        assert result.stderr.endswith("ValueError: raised on purpose\n"), "mpirun adds nothing"


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_killed_rank_ends_the_job(rank: int) -> None:
    result = kill(signal.SIGKILL, rank)
    assert result.returncode == {"openmpi": 137, "mpich": 9}[mpi_family()], result.text


def test_killed_mpirun_leaves_no_rank() -> None:
    assert kill(signal.SIGKILL, None).returncode == -signal.SIGKILL


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("how", ["sleep", "none"], ids=["rank 0 in Python", "rank 0 in MPI"])
def test_signal_to_mpirun(number: signal.Signals, how: str) -> None:
    result = kill(number, None, how=how)
    assert result.returncode == {"openmpi": 1, "mpich": 130}[mpi_family()], result.text
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("rank, code", [(0, 130), (2, 143)])
def test_sigterm_to_a_rank(rank: int, code: int) -> None:
    result = kill(signal.SIGTERM, rank)
    assert result.returncode == code, result.text
    assert "Traceback" not in result.stderr


def test_ctrl_c_in_a_terminal() -> None:
    with MpiJob(3, [SCRIPT, "sleep"], terminal=True) as job:
        job.wait_for("ready", times=3)
        job.press_ctrl_c()
        result = job.finish(SECONDS)
    check(result)
    assert result.returncode in (1, 130), result.text
    assert "Traceback" not in result.stderr


def test_job_that_hangs_shows_its_stacks() -> None:
    with pytest.raises(AssertionError, match=r"(?s)most recent call first.*die\.py"):
        run_job(3, [SCRIPT, "none"], timeout=3)
