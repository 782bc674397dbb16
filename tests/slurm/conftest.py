"""A Slurm cluster of two nodes on this machine, for as long as the tests run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="session")
def model() -> Path:
    """The default model's directory."""
    from disagg_mpi.model.fetch import fetch_default_model

    return fetch_default_model(progress=False)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found
