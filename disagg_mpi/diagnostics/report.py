"""What is known of one host, and what the user should know of it: plain data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import msgspec

from disagg_mpi.comm.environment import LauncherContext
from disagg_mpi.comm.installs import MpiInstall


class Finding(msgspec.Struct, frozen=True):
    """Something the user should know."""

    level: Literal["stop", "slow", "warning", "note"]
    """``stop``: a job would not start, or not end. ``slow``: it would run, at a fraction of the speed."""
    text: str
    remedy: str = ""


class SharedMemory(msgspec.Struct, frozen=True):
    """/dev/shm, in bytes."""

    total: int
    free: int


class MachineReport(msgspec.Struct, frozen=True):
    """One host and its software, seen without MPI."""

    hostname: str
    boot_id: str | None
    """By which the running kernel names itself: the same in every container of a machine."""
    python: str
    cores: int
    memory_total: int | None
    memory_available: int | None
    shared_memory: SharedMemory | None
    mpi: MpiInstall | None
    versions: dict[str, str | None]
    """mpi4py, torch, transformers …; ``None``: not installed."""
    gpus: list[str]
    settings: dict[str, str]
    """What a rank sets before MPI starts."""
    kept: dict[str, str]
    """Of the same kind, but set by the user and left alone."""
    launcher: LauncherContext
    findings: list[Finding]


def would_stop(findings: Iterable[Finding]) -> bool:
    return any(finding.level == "stop" for finding in findings)
