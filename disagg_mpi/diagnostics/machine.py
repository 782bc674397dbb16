"""One host and its software, seen by one process that starts no MPI."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

from disagg_mpi.comm import environment, installs
from disagg_mpi.comm.cores import count_cores
from disagg_mpi.comm.installs import MpiInstall
from disagg_mpi.diagnostics.report import Finding, MachineReport, SharedMemory
from disagg_mpi.diagnostics.traps import TRAPS
from disagg_mpi.errors import MpiError
from disagg_mpi.gpus import visible_gpus

_PACKAGES = ("mpi4py", "numpy", "msgspec", "torch", "transformers")


def inspect_machine(environ: Mapping[str, str] | None = None) -> MachineReport:
    """Look at this host, its software and its environment. Starts no MPI, imports no torch.

    ``environ`` is the one before :func:`disagg_mpi.comm.environment.apply`.
    """
    env = os.environ if environ is None else environ
    context = environment.launcher_context(env)
    findings: list[Finding] = []
    install: MpiInstall | None = None
    try:
        install = installs.detect_mpi()
    except MpiError as error:
        # Under a cluster's srun there need not be any mpirun: the library alone is enough.
        level: Literal["stop", "note"] = "note" if context.launcher == "srun" else "stop"
        findings.append(Finding(level, str(error)))
    folder = environment.ucx_folder(install, env)
    settings = environment.process_environment(install, env, folder)
    report = MachineReport(
        hostname=platform.node(),
        boot_id=_boot_id(),
        python=f"{platform.python_version()} ({sys.executable})",
        cores=count_cores(),
        memory_total=_meminfo("MemTotal"),
        memory_available=_meminfo("MemAvailable"),
        shared_memory=_shared_memory(),
        mpi=install,
        versions={name: _version(name) for name in _PACKAGES},
        gpus=[f"{gpu.name} ({gpu.total_bytes / 2**30:.0f} GiB)" for gpu in visible_gpus()],
        settings=settings,
        kept={key: env[key] for key in environment.process_environment(install, _unset(env), folder)
              if key in env},
        launcher=context,
        findings=[],
    )
    findings += [finding for trap in TRAPS for finding in trap(report, env)]
    return msgspec.structs.replace(report, findings=findings)


def _unset(env: Mapping[str, str]) -> dict[str, str]:
    """``env`` without what we might set: asking with it tells all that we would set."""
    ours = ("OMPI_MCA_mpi_yield_when_idle", "OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_osc",
            "OMPI_MCA_smsc", "OMPI_MCA_btl_sm_eager_limit", "OMPI_MCA_btl_sm_max_send_size",
            "I_MPI_WAIT_MODE")
    return {key: value for key, value in env.items() if key not in ours}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _boot_id() -> str | None:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() or None
    return None


def _meminfo(key: str) -> int | None:
    with contextlib.suppress(OSError):
        match = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(match.group(1)) * 1024 if match else None
    return None


def _shared_memory() -> SharedMemory | None:
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return None
    return SharedMemory(total=usage.total, free=usage.free)
