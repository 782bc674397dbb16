"""Cancellation in every phase, in real jobs: one terminal result each, nothing left, others not disturbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mpirun import run_job

SCRIPT = Path(__file__).parent / "scripts" / "cancel.py"


@pytest.mark.model
@pytest.mark.parametrize("layout", [
    pytest.param({"aggregated": 2}, id="aggregated"),
    pytest.param({"transport": "shared"}, id="shared"),
    pytest.param({"transport": "mpi"}, id="messages"),  # pytest-mpi skips what is named "mpi"
    # A pool so small that requests wait for one another.
    pytest.param({"transport": "mpi", "kv_tokens": 4096}, id="small-pool"),
])
def test_cancelled_at_any_moment(layout: dict, model: Path) -> None:
    job = run_job(3, [str(SCRIPT), json.dumps({"model": str(model), **layout})], timeout=240)
    assert job.returncode == 0, job.text
    assert "integrity holds" in job.stdout
    job.assert_clean()
