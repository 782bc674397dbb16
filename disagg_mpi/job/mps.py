"""NVIDIA's Multi-Process Service for the time of one job: ranks that share a GPU run on it side by side.

Without it the driver gives a GPU to one process after the other, a slice of time each, so a generation step
waits for whatever piece of a prompt another rank computes. The control daemon must be there before a rank
first touches CUDA, so ``cli.launch`` starts it (:func:`start`), an ordinary process of this user with folders
of its own, and names these to the ranks.

The daemon must also end with the job, however that ends. So it is not ours but a *keeper's*: this file run as
a program, in a session of its own, which starts the daemon and waits for the end of a pipe whose other end
``launch`` holds. That comes when ``launch`` closes it, and when ``launch`` is killed. The keeper adopts what
the daemon leaves behind, so that it can also end what does not answer.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

PROGRAM = "nvidia-cuda-mps-control"
PIPES, LOGS = "CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"

# A client that has it when CUDA is loaded is held to so many hundredths of a GPU's processors.
PERCENTAGE = "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"

# Where CUDA looks for a daemon if nothing names its folder.
_DEFAULT_PIPES = Path("/tmp/nvidia-mps")

# It is up within tenths of a second, or not at all.
_START_SECONDS = 15.0

# How long the daemon may take for its goodbye while clients are still there, and then to be gone.
_QUIT_SECONDS = 10.0
_GONE_SECONDS = 5.0

# The daemon's sockets lie in its folder, and a socket's path has 107 bytes at most.
_LONGEST_FOLDER = 80

_PR_SET_CHILD_SUBREAPER = 36


class Mps:
    """A daemon that runs. :meth:`close` ends it; so does the end of this process."""

    def __init__(self, folder: Path, keeper: subprocess.Popen[str]) -> None:
        self.environment = environment_of(folder)
        """What ranks must have in theirs."""
        self._keeper = keeper

    def close(self) -> None:
        """Returns when it is gone."""
        assert self._keeper.stdin is not None and self._keeper.stdout is not None
        self._keeper.stdin.close()
        self._keeper.stdout.close()
        try:
            self._keeper.wait(_QUIT_SECONDS + 2 * _GONE_SECONDS)
        except subprocess.TimeoutExpired:
            self._keeper.kill()


def environment_of(folder: Path) -> dict[str, str]:
    return {PIPES: str(folder / "pipe"), LOGS: str(folder / "log")}


def seems_to_run(environ: Mapping[str, str] | None = None) -> bool:
    """Whether CUDA would find a daemon's folder."""
    env = os.environ if environ is None else environ
    return bool(env.get(PIPES)) or _DEFAULT_PIPES.exists()


def start(environ: Mapping[str, str] | None = None) -> Mps | str:
    """Start a daemon, or say in a line why there is none."""
    env = os.environ if environ is None else environ
    if env.get(PIPES):
        return f"{PIPES} is set, so its daemon is used as it is and none is started"
    if shutil.which(PROGRAM, path=env.get("PATH")) is None:
        return (f"found no {PROGRAM} on PATH, which comes with NVIDIA's driver; ranks that share a GPU take "
                "turns on it")
    folder = Path(tempfile.mkdtemp(prefix="mps-"))
    if len(str(folder)) > _LONGEST_FOLDER:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="mps-", dir="/tmp"))
    # By the file: in no way may it depend on what this process was started with, nor load much.
    keeper = subprocess.Popen([sys.executable, "-I", __file__, str(folder)], env=dict(env), text=True,
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    mps = Mps(folder, keeper)
    assert keeper.stdout is not None
    is_readable, _, _ = select.select([keeper.stdout], [], [], _START_SECONDS)
    said = keeper.stdout.readline().strip() if is_readable else f"no answer within {_START_SECONDS:g} s"
    if said == "ready":
        return mps
    mps.close()
    return f"{PROGRAM} did not start: {said or 'it said nothing'}; ranks that share a GPU take turns on it"


# ---- the keeper ----------------------------------------------------------------------------------


def _keep(folder: Path) -> None:
    """Run the daemon until the standard input ends; then nothing is left of it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with contextlib.suppress(OSError, AttributeError):  # not Linux, where there is no MPS either
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # The daemon shows clients the GPUs that it sees itself, counted anew: hiding some is left to the ranks.
    env = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    env |= environment_of(folder)
    try:
        for key in (PIPES, LOGS):
            Path(env[key]).mkdir()
        problem = _start_daemon(env)
        print(problem or "ready", flush=True)
        if not problem:
            sys.stdin.read()
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                _ask("quit", env)
    finally:
        _end_children()
        shutil.rmtree(folder, ignore_errors=True)


def _start_daemon(env: Mapping[str, str]) -> str:
    """Empty, or what went wrong."""
    try:
        # Into a file: the daemon keeps what it is given open, and a pipe would not end.
        with open(Path(env[LOGS]) / "start", "w+b") as output:
            code = subprocess.run([PROGRAM, "-d"], env=dict(env), stdin=subprocess.DEVNULL, stdout=output,
                                  stderr=subprocess.STDOUT, timeout=_QUIT_SECONDS, check=False).returncode
            output.seek(0)
            said = output.read().decode(errors="replace").strip().splitlines()
        if code != 0:
            return f"exit code {code}" + (f": {said[-1]}" if said else "")
        asked = _ask("get_server_list", env)
        return "" if asked.returncode == 0 else f"it does not answer: {asked.stdout.strip()}"
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)


def _ask(command: str, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM], env=dict(env), input=f"{command}\n", text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=_QUIT_SECONDS, check=False)


def _end_children() -> None:
    """Wait until all that the daemon was, and what it started, is gone; kill it if that takes too long."""
    end = time.monotonic() + _GONE_SECONDS
    with contextlib.suppress(ChildProcessError):  # there are none any more
        while True:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                time.sleep(0.02)
                if time.monotonic() > end:
                    for child in _children():
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(child, signal.SIGKILL)


def _children() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # pid (name) state parent …; the name may hold anything.
            if int(entry.read_text(errors="replace").rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry.parent.name))
    return found


if __name__ == "__main__":
    _keep(Path(sys.argv[1]))
