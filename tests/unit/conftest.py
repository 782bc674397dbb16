"""What the unit tests share: a tiny random model, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from inprocess import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama")
