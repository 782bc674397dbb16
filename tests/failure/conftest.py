"""Makes ``tests/mpirun.py`` and ``tests/unit/inprocess.py`` importable; a tiny model; a marker."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "unit")]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "jobs: starts real jobs under mpirun (seconds each)")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that two ranks can share."""
    from inprocess import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", max_position_embeddings=4096)
