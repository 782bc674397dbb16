"""However a job that spans hosts ends, it ends on all of them, within 10 seconds, and leaves nothing.

The ranks of ``tests/failure/scripts/die.py`` have the guards and nothing else, and are blocked in MPI.
"""

from __future__ import annotations

import signal
import time

import pytest
from emulated import EmulatedHosts, HostsJob
from mpirun import ROOT

SCRIPT = str(ROOT / "tests" / "failure" / "scripts" / "die.py")
LAYOUT = {"hA": 2, "hB": 1}


@pytest.mark.parametrize("rank", [0, 1, 2, None], ids=["rank 0", "beside rank 0", "other host", "mpirun"])
def test_killed(two_hosts: EmulatedHosts, rank: int | None) -> None:
    with HostsJob(two_hosts, LAYOUT, [SCRIPT, "none"]) as job:
        job.wait_for("ready", times=3)
        time.sleep(0.3)  # now they are where they will wait
        job.send_signal(signal.SIGKILL, rank)
        result = job.finish(10)
    assert result.returncode != 0, result.text


def test_mpirun_is_told_to_end(two_hosts: EmulatedHosts) -> None:
    with HostsJob(two_hosts, LAYOUT, [SCRIPT, "none"]) as job:
        job.wait_for("ready", times=3)
        job.send_signal(signal.SIGTERM)
        result = job.finish(10)
    assert result.returncode != 0, result.text
    assert "Traceback" not in result.stderr, result.text


@pytest.mark.parametrize("rank", [0, 2])
def test_exception_names_its_rank_once(two_hosts: EmulatedHosts, rank: int) -> None:
    with HostsJob(two_hosts, LAYOUT, [SCRIPT, "raise", str(rank)]) as job:
        result = job.finish(20)
    assert result.returncode == 1, result.text
    assert result.stderr.count(f"[rank {rank} · test]\nTraceback") == 1, result.text
