"""`launch --mps`: scripts stand in for NVIDIA's control daemon and for mpirun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import assert_gone
from test_mpirun import INTEL, MPICH, OPENMPI, USER

from disagg_mpi.comm.environment import LauncherContext
from disagg_mpi.comm.installs import MpiInstall
from disagg_mpi.job import mps
from disagg_mpi.job.mpirun import compose

ROOT = Path(__file__).parents[2]

# As the real one: -d leaves a daemon behind and returns; without arguments it takes commands from stdin. What
# `daemon` is told to do in CALLS' folder by a file of that name, it does.
CONTROL = """#!{python}
import os, subprocess, sys, time
from pathlib import Path
here = Path({here!r})
pipe = Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
words = sys.argv[1:] or sys.stdin.read().split()
with open(here / "calls", "a") as calls:
    print(*words, *map(os.environ.get, ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY",
                                       "CUDA_VISIBLE_DEVICES")), file=calls)
if words == ["-d"]:
    if (here / "broken").exists():
        sys.exit("no device for the daemon")
    daemon = subprocess.Popen(["sleep", "300"], start_new_session=True, stdout=sys.stdout)
    (pipe / "pid").write_text(str(daemon.pid))
    (here / "daemon").write_text(str(daemon.pid))
elif words == ["get_server_list"]:
    sys.exit(not (pipe / "pid").exists())
elif words == ["quit"] and not (here / "deaf").exists():
    os.kill(int((pipe / "pid").read_text()), 15)
"""

# Ends as its first word says; tells what the ranks would get.
MPIRUN = """#!{python}
import os, signal, sys, time
words = sys.argv[1:]
signal.signal(signal.SIGINT, lambda *_: sys.exit(5))  # before a line that says it is there
print(os.getpid(), *[word for word in words if word.startswith("CUDA_MPS_")], flush=True)
if words[-1] == "stay":
    time.sleep(60)
sys.exit(int(words[-1]))
"""

LAUNCH = """
import sys
from disagg_mpi.cli import launch
from disagg_mpi.comm.installs import MpiInstall
launch.detect_mpi = lambda: MpiInstall("openmpi", "5.0.11", {mpirun!r}, "openmpi")
launch.launch(sys.argv[1:], prog_name="launch")
"""


def program(path: Path, text: str, **values: str) -> Path:
    path.write_text(text.format(python=sys.executable, **values))
    path.chmod(0o755)
    return path


class Stage:
    """A folder with the stand-ins, and what they say."""

    def __init__(self, folder: Path, with_control: bool = True) -> None:
        self.folder = folder
        (folder / "bin").mkdir()
        self.mpirun = program(folder / "mpirun", MPIRUN)
        if with_control:
            program(folder / "bin" / mps.PROGRAM, CONTROL, here=str(folder))
        self.environ = {**os.environ, "PATH": f"{folder / 'bin'}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "3",
                        "TMPDIR": str(folder)}
        self.environ.pop(mps.PIPES, None)

    def launch(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCH.format(mpirun=str(self.mpirun)), "-n", "1", *words], cwd=ROOT,
            env=self.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    @property
    def calls(self) -> list[list[str]]:
        return [line.split() for line in (self.folder / "calls").read_text().splitlines()]

    @property
    def daemon(self) -> int:
        return int((self.folder / "daemon").read_text())

    def assert_ended(self) -> None:
        """The daemon was asked to quit, and neither it nor its folder is there any more."""
        own = Path(self.calls[0][1]).parent
        end = time.monotonic() + 20
        while own.exists() and time.monotonic() < end:
            time.sleep(0.02)
        assert not own.exists()
        assert [call[0] for call in self.calls] == ["-d", "get_server_list", "quit"]
        assert_gone(self.daemon)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    made = Stage(tmp_path)
    yield made
    if (tmp_path / "daemon").exists():
        assert_gone(made.daemon)


def test_the_ranks_are_told_its_folders_and_it_ends_with_the_job(stage: Stage) -> None:
    process = stage.launch("--mps", "--", "python", "0")
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    assert "# MPS: runs on this host until the job ends" in stderr
    _, *told = stdout.split()
    (pipe, log) = stage.calls[0][1:3]
    assert told == [f"CUDA_MPS_PIPE_DIRECTORY={pipe}", f"CUDA_MPS_LOG_DIRECTORY={log}"]
    assert {tuple(call[1:3]) for call in stage.calls} == {(pipe, log)}
    # Ranks count GPUs as it shows them: were it to hide some, ids would be taken twice.
    assert {call[3] for call in stage.calls} == {"None"}
    stage.assert_ended()


def test_it_ends_with_a_job_that_fails(stage: Stage) -> None:
    process = stage.launch("--mps", "--", "python", "7")
    process.communicate(timeout=30)
    assert process.returncode == 7
    stage.assert_ended()


def interrupt(process: subprocess.Popen[str], mpirun: int) -> None:
    process.send_signal(signal.SIGINT)


def kill_mpirun(process: subprocess.Popen[str], mpirun: int) -> None:
    os.kill(mpirun, signal.SIGKILL)


def kill_launch(process: subprocess.Popen[str], mpirun: int) -> None:
    process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
@pytest.mark.parametrize(("end", "code"), [(interrupt, 5), (kill_mpirun, 137), (kill_launch, -9)])
def test_it_ends_with_a_job_that_is_ended(
    stage: Stage, end: Callable[[subprocess.Popen[str], int], None], code: int
) -> None:
    process = stage.launch("--mps", "--", "python", "stay")
    assert process.stdout is not None
    mpirun = int(process.stdout.readline().split()[0])
    end(process, mpirun)
    process.communicate(timeout=30)
    assert process.returncode == code
    assert_gone(mpirun)
    stage.assert_ended()


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_a_daemon_that_does_not_go_is_killed(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    (stage.folder / "deaf").touch()
    process = stage.launch("--mps", "--", "python", "0")
    process.communicate(timeout=40)
    assert process.returncode == 0
    stage.assert_ended()


def test_without_it_none_is_started(stage: Stage) -> None:
    process = stage.launch("--", "python", "0")
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "MPS" not in stderr + stdout
    assert not (stage.folder / "calls").exists()


def test_a_dry_run_starts_none(stage: Stage) -> None:
    process = stage.launch("--mps", "--dry-run", "--", "python", "0")
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert stdout.strip().endswith("-n 1 " + sys.executable + " 0")
    assert "# --mps: the daemon is started before this line" in stderr
    assert not (stage.folder / "calls").exists()


def test_where_the_program_is_missing_the_job_goes_on_without(tmp_path: Path) -> None:
    process = Stage(tmp_path, with_control=False).launch("--mps", "--", "python", "0")
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "# MPS: found no nvidia-cuda-mps-control on PATH" in stderr
    assert len(stdout.split()) == 1


def test_where_it_does_not_start_the_job_goes_on_without(stage: Stage) -> None:
    (stage.folder / "broken").touch()
    process = stage.launch("--mps", "--", "python", "0")
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0
    assert ("# MPS: nvidia-cuda-mps-control did not start: exit code 1: no device for the daemon; ranks that "
            "share a GPU take turns on it") in stderr
    assert len(stdout.split()) == 1
    assert not list(stage.folder.glob("mps-*"))


def test_one_that_the_user_runs_is_used(stage: Stage) -> None:
    found = mps.start(stage.environ | {mps.PIPES: "/tmp/nvidia-mps"})
    assert isinstance(found, str)
    assert "CUDA_MPS_PIPE_DIRECTORY is set" in found


@pytest.mark.parametrize(("install", "words"), [
    (OPENMPI, ("-x", "NAME=value", "-n", "2")), (MPICH, ("-genv", "NAME", "value", "-n", "2")),
    (INTEL, ("-genv", "NAME", "value", "-n", "2")),
    (MpiInstall("unknown", "", "/bin/mpirun", None), ("-n", "2"))])
def test_variables_for_the_ranks(install: MpiInstall, words: tuple[str, ...]) -> None:
    line = compose(install, 2, ("app",), LauncherContext(), cores=8, environ=USER, uid=1000,
                   rank_environment={"NAME": "value"})
    assert line.argv[1:-1] == words
    assert ("NAME" in line.env) == (install.family == "unknown")


def test_a_daemon_is_looked_for_where_cuda_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(mps, "_DEFAULT_PIPES", tmp_path / "nvidia-mps")
    assert not mps.seems_to_run({})
    assert mps.seems_to_run({mps.PIPES: "/elsewhere"})
    (tmp_path / "nvidia-mps").mkdir()
    assert mps.seems_to_run({})
