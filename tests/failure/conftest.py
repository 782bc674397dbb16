"""Makes ``tests/mpirun.py`` importable, and knows the marker of tests that start real jobs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "jobs: starts real jobs under mpirun (seconds each)")
