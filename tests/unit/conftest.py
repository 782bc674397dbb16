"""What the unit tests share: a tiny random model, made once a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from inprocess import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")


@pytest.fixture
def jobs(tiny_llama: Path) -> Iterator[Any]:
    """``jobs(*roles, **options)`` makes an :class:`inprocess.Job` of the tiny model; closed at the end."""
    from inprocess import Job

    from disagg_mpi.topology import Role

    made: list[Job] = []

    def make(*roles: Role, shared: bool = True, **options: Any) -> Job:
        made.append(Job(tiny_llama, roles or (Role.CONTEXT, Role.GENERATION), shared=shared, **options))
        return made[-1]

    yield make
    for job in made:
        job.close()


@pytest.fixture
def serve(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """``serve(*roles, **options)`` makes a :class:`serving.ServedJob`; closed at the end."""
    from serving import ServedJob, save_byte_tokenizer

    tokenizer = save_byte_tokenizer(tmp_path_factory.mktemp("ascii"))
    made: list[ServedJob] = []

    def make(*roles: Any, **options: Any) -> ServedJob:
        made.append(ServedJob(tiny_llama, tokenizer, *roles, **options))
        return made[-1]

    yield make
    for served in made:
        served.close()


@pytest.fixture
def kserve(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Any]:
    """``kserve(**options)`` makes a :class:`kserving.KserveJob` of the tiny model; closed at the end."""
    import kserving

    made: list[kserving.KserveJob] = []

    def make(**options: Any) -> kserving.KserveJob:
        model = request.getfixturevalue("tiny_llama")
        made.append(kserving.KserveJob(model, tmp_path / "tokenizer", **options))
        return made[-1]

    yield make
    for job in made:
        job.close()


@pytest.fixture(scope="session")
def undisturbed(tiny_llama: Path) -> Iterator[Any]:
    from inprocess import Undisturbed

    alone = Undisturbed(tiny_llama)
    yield alone
    alone.close()
