"""Real jobs: the default model, fetched once, and the way to start one."""

from __future__ import annotations

from pathlib import Path

import pytest
from mpirun import mpi_family


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.jobs)


@pytest.fixture(scope="session")
def model() -> Path:
    """The default model's directory."""
    from disagg_mpi.model.fetch import fetch_default_model

    return fetch_default_model(progress=False)


@pytest.fixture(scope="session")
def family() -> str:
    return mpi_family()
