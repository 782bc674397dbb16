"""The tests' own runner of jobs: a launcher that did not start is started again, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import mpirun
import pytest


@pytest.mark.parametrize(("text", "num_starts"), [
    (mpirun._LAUNCHER_FAILED, 2),
    ("some other failure", 1),
])
def test_only_a_launcher_that_failed_is_started_again(
    text: str, num_starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script stands in for mpirun: it fails the first time, and notes each start."""
    starts, script = tmp_path / "starts", tmp_path / "mpirun"
    script.write_text(f'#!/bin/sh\necho >> {starts}\n[ $(wc -l < {starts}) -gt 1 ] && exit 0\n'
                      f'echo "{text}" >&2\nexit 213\n')
    script.chmod(0o755)
    monkeypatch.setattr(mpirun, "find_mpirun", lambda: str(script))
    result = mpirun.run_job(2, ["-c", ""], timeout=20)
    assert len(starts.read_text().splitlines()) == num_starts
    assert result.returncode == (0 if num_starts == 2 else 213)
