"""A rank that fails within an instance of several: the others wait for it in MPI, and end all the same.

One job of a pipeline that computes contexts and a tensor-parallel pair that generates, both busy. Whichever
rank fails, and whether it raises or is killed, the job ends within seconds, says who it was, and leaves
nothing.
"""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from mpirun import JobResult, MpiJob

SCRIPT = str(Path(__file__).parent / "scripts" / "groups.py")
LABELS = {1: "rank 1 · context 0 · leader", 2: "rank 2 · context 0 · follower",
          3: "rank 3 · generation 0 · leader", 4: "rank 4 · generation 0 · follower"}
SECONDS = 10.0
# Four ranks that load torch on two cores.
START_SECONDS = 120.0

pytestmark = [pytest.mark.jobs, pytest.mark.openmpi_only]


@pytest.fixture(scope="module")
def config(tiny_llama: Path) -> str:
    layout: dict[str, Any] = {"context": "pp2", "generation": "tp2", "transport": "mpi"}
    return json.dumps({**layout, "model": str(tiny_llama), "max_num_tokens": 64, "threads": 1})


def end(config: str, act: Any, *arguments: str, terminal: bool = False) -> JobResult:
    """Start the job, let ``act`` do something to it when it is busy, and wait for the end."""
    with MpiJob(5, [SCRIPT, config, *arguments], terminal=terminal) as job:
        job.wait_for("answered" if act else "ready", timeout=START_SECONDS)
        if act:
            act(job)
        result = job.finish(SECONDS + 5)
    result.assert_clean()
    assert result.seconds < SECONDS, result.text
    return result


@pytest.mark.parametrize("rank", LABELS)
def test_a_rank_that_raises_is_named_once(rank: int, config: str) -> None:
    result = end(config, None, str(rank))
    assert result.returncode == 1, result.text
    assert re.findall(r"^\[(rank .*)\]\nTraceback", result.stderr, re.M) == [LABELS[rank]]
    assert result.stderr.count("ValueError: raised on purpose") == 1


@pytest.mark.parametrize("rank", [2, 4])
def test_a_follower_that_is_killed(rank: int, config: str) -> None:
    result = end(config, lambda job: job.send_signal(signal.SIGKILL, rank))
    assert result.returncode == 137, result.text
    assert f"process rank {rank} " in result.stderr  # what mpirun says; there is nobody to say more
    assert "Traceback" not in result.stderr


def test_ctrl_c(config: str) -> None:
    result = end(config, lambda job: job.press_ctrl_c(), terminal=True)
    assert result.returncode in (1, 130), result.text
    assert "Traceback" not in result.stderr, result.text
