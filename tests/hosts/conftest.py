"""Real jobs across emulated hosts: the hosts, and the default model, fetched once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from emulated import EmulatedHosts, why_not


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.hosts)
            item.add_marker(pytest.mark.jobs)


@pytest.fixture
def emulate() -> Iterator[Callable[..., EmulatedHosts]]:
    """``emulate("hA", "hB", rate="1gbit")``: the test's own, for what two_hosts are not."""
    _skip_unless_possible()
    with ExitStack() as stack:
        def make(*names: str, **options: Any) -> EmulatedHosts:
            return stack.enter_context(EmulatedHosts(names, **options))

        yield make


@pytest.fixture(scope="session")
def two_hosts() -> Iterator[EmulatedHosts]:
    """``hA`` and ``hB``, for all tests of the session."""
    _skip_unless_possible()
    with EmulatedHosts(["hA", "hB"]) as hosts:
        yield hosts


@pytest.fixture(scope="session")
def model() -> Path:
    """The default model's directory."""
    from disagg_mpi.model.fetch import fetch_default_model

    return fetch_default_model(progress=False)


def _skip_unless_possible() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
