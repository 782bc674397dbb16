"""Jobs that fail: a tiny model for them."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model that two ranks can share."""
    from inprocess import save_tiny_model

    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "llama", max_position_embeddings=4096)
