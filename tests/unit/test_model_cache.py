"""The cache: directories appear whole or not at all, whoever races or dies."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from disagg_mpi.errors import ModelError
from disagg_mpi.model import cache


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def write_a(directory: Path) -> None:
    (directory / "sub").mkdir()
    (directory / "sub" / "a").write_text("a")


def test_cache_dir_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DISAGG_MPI_CACHE", "/own")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache.cache_dir() == Path("/own")
    monkeypatch.delenv("DISAGG_MPI_CACHE")
    assert cache.cache_dir() == Path("/xdg/disagg_mpi")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache.cache_dir() == Path("/home/me/.cache/disagg_mpi")


def test_builds_once(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    assert cache.build_directory(target, write_a) == target
    assert (target / "sub" / "a").read_text() == "a"

    def never(directory: Path) -> None:
        raise AssertionError("built twice")

    assert cache.build_directory(target, never) == target
    assert names(target.parent) == ["model"]


def test_an_empty_directory_is_not_a_build(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    cache.build_directory(tmp_path / "model", write_a)
    assert names(tmp_path / "model") == ["sub"]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> None:
        write_a(directory)
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        cache.build_directory(tmp_path / "model", fail)
    assert names(tmp_path) == []


def test_of_racing_builders_one_wins_and_the_others_clean_up(tmp_path: Path) -> None:
    num_builders = 4
    barrier = threading.Barrier(num_builders)
    returned: list[int] = []

    def build(number: int) -> None:
        def fill(directory: Path) -> None:
            (directory / "who").write_text(str(number))
            (directory / "who_again").write_text(str(number))
            barrier.wait(timeout=30)  # all have found no target, all rename now

        cache.build_directory(tmp_path / "model", fill)
        returned.append(number)

    threads = [threading.Thread(target=build, args=(n,)) for n in range(num_builders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(returned) == [*range(num_builders)]  # the losers too, without an error
    assert names(tmp_path) == ["model"]
    assert (tmp_path / "model/who").read_text() == (tmp_path / "model/who_again").read_text()


def test_what_a_killed_run_left_is_removed(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from disagg_mpi.model import cache\n"
        "def fill(directory):\n"
        "    (directory / 'big').write_text('x')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cache.build_directory(Path(sys.argv[1]), fill)\n"
    )
    root = Path(cache.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", script, str(tmp_path / "model")]
    assert subprocess.run(command, env=environment, check=False).returncode == -9
    (left,) = names(tmp_path)
    assert left.startswith(".model.tmp-")
    cache.build_directory(tmp_path / "model", write_a)
    assert names(tmp_path) == ["model"]


def test_a_living_owner_keeps_its_directory(tmp_path: Path) -> None:
    mine = tmp_path / cache._temporary_name("model")
    mine.mkdir()
    os.utime(mine, (0, 0))
    cache.build_directory(tmp_path / "model", write_a)
    assert mine.is_dir()


def test_another_hosts_directory_is_removed_only_when_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_owner_host", lambda: "1-elsewhere")
        theirs = tmp_path / cache._temporary_name("model")
    theirs.mkdir()
    (theirs / "big").write_text("x")
    cache.build_directory(tmp_path / "model", write_a)
    assert theirs.is_dir()
    os.utime(theirs / "big", (0, 0))
    os.utime(theirs, (0, 0))
    cache.build_directory(tmp_path / "model", write_a)  # swept even where nothing is built
    assert names(tmp_path) == ["model"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_to_do(tmp_path: Path, code: int) -> None:
    def fill(directory: Path) -> None:
        write_a(directory)
        raise OSError(code, os.strerror(code))

    with pytest.raises(ModelError) as caught:
        cache.build_directory(tmp_path / "model", fill, bytes_needed=12_345)
    message = str(caught.value)
    assert "12.3 kB" in message and "free" in message and "DISAGG_MPI_CACHE=DIR" in message
    assert names(tmp_path) == []


def test_a_disk_too_small_is_reported_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    with pytest.raises(ModelError, match=r"found 1\.0 MB free, this needs 2\.0 GB"):
        cache.build_directory(tmp_path / "model", write_a, bytes_needed=2 * 10**9)
    assert names(tmp_path) == []


def test_a_read_only_cache_says_what_to_do(tmp_path: Path) -> None:
    def fill(directory: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(directory / "a"))

    with pytest.raises(ModelError, match=r"cannot write to .*DISAGG_MPI_CACHE=DIR"):
        cache.build_directory(tmp_path / "model", fill)


def test_a_file_in_the_way_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for target in (tmp_path / "file" / "model", tmp_path / "file" / "models" / "model"):
        with pytest.raises(ModelError, match=r"cannot make the folder .*DISAGG_MPI_CACHE=DIR"):
            cache.build_directory(target, write_a)
