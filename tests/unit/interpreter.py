"""Tests of Triton kernels without a GPU: a test file runs itself once more, in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this is the second run."""

in_the_first_run = pytest.mark.skipif(INTERPRETS, reason="of the run without Triton's interpreter")


def run_again(file: str) -> None:
    """Skips where there is no Triton."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file],
        env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=Path(__file__).parents[2], capture_output=True,
        text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
