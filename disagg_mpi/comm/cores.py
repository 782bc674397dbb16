"""Cores that a process may keep busy, asked of the kernel. Pure but for what it reads; nothing is kept."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def count_cores(read: Callable[[str], str] | None = None, cpus: set[int] | None = None) -> int:
    """Cores that this process may keep busy: its affinity, in physical cores, within its quota.

    Physical ones, because Open MPI counts its slots so and hyper-threads do not speed a GEMM up.
    A container's quota counts too: threads beyond it are only throttled. ``read`` and ``cpus`` are
    for tests.
    """
    read = read or _read
    if cpus is None:
        cpus = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if cpus is None:
        return os.cpu_count() or 1
    siblings = {
        read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip() or str(cpu)
        for cpu in cpus
    }
    cores = len(siblings)
    quota = _cpu_quota(read)
    return max(1, min(cores, round(quota)) if quota else cores)


def _cpu_quota(read: Callable[[str], str]) -> float | None:
    limit, _, period = read("/sys/fs/cgroup/cpu.max").partition(" ")
    if not limit:
        limit = read("/sys/fs/cgroup/cpu/cpu.cfs_quota_us")
        period = read("/sys/fs/cgroup/cpu/cpu.cfs_period_us")
    try:
        return int(limit) / int(period) if int(limit) > 0 else None
    except (ValueError, ZeroDivisionError):
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError):
        return ""
