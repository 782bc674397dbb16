"""Two real ranks on one GPU hand over each way; every byte is compared by the benchmark that does it."""

from __future__ import annotations

from pathlib import Path

import pytest
from mpirun import ROOT, job_environment, run_job

SCRIPT = str(ROOT / "benchmarks" / "gpu_handover.py")
DEVICE_WAYS = ["block ids change hands", "gather through the opened pool", "through pinned host memory"]


def check(stdout: str, ways: list[str]) -> None:
    for way in ways:
        [row] = [line for line in stdout.splitlines() if way in line]
        assert row.endswith("| equal |"), row


@pytest.mark.parametrize("extra", [[], ["--busy"]], ids=["idle", "busy"])
def test_by_a_hand_written_mpirun(extra: list[str]) -> None:
    result = run_job(2, [SCRIPT, "--size", "16MiB", "--rounds", "2", *extra], timeout=120)
    assert result.returncode == 0, result.text
    if not extra:
        check(result.stdout, DEVICE_WAYS)


def test_device_memory_in_messages_by_the_launcher() -> None:
    """What pip alone provides: an MPI wheel and libucx."""
    import subprocess
    import sys

    pytest.importorskip("libucx", reason="pip install libucx-cu13")
    done = subprocess.run(
        [sys.executable, "-m", "disagg_mpi", "launch", "-n", "2", "--", str(Path(SCRIPT)), "--device", "cuda",
         "--size", "16MiB", "--rounds", "2", "--chunk", "1"],
        env=job_environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    check(done.stdout, [*DEVICE_WAYS, "packed messages of device memory", "1.0 MiB a message"])
