"""Composes the ``mpirun`` line for a job: pure, nothing is started here.

``cli.launch`` shows the line and runs it. Only what ``mpirun`` itself must know is in it; what a
rank can set for itself is in ``comm.environment``, so both a composed and a hand-written line work
alike.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from disagg_mpi.comm import ucx
from disagg_mpi.comm.environment import LauncherContext, ucx_folder
from disagg_mpi.comm.installs import FAMILY_NAMES, MpiInstall
from disagg_mpi.errors import MpiError, UsageError


class LaunchLine(msgspec.Struct, frozen=True):
    """One command: its arguments, and what it adds to the environment."""

    argv: tuple[str, ...]
    env: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    """Why something is there (or not), one line each, for the user."""

    @property
    def text(self) -> str:
        """The line as a user could paste it into a shell."""
        words = [f"{key}={shlex.quote(value)}" for key, value in self.env.items()]
        return " ".join([*(["env", *words] if words else []), shlex.join(self.argv)])


def compose(install: MpiInstall, num_ranks: int, command: Sequence[str],
            context: LauncherContext, *, cores: int, extra_args: Sequence[str] = (),
            oversubscribe: bool = False, environ: Mapping[str, str] | None = None,
            uid: int | None = None, ucx_folder: Path | None = None,
            rank_environment: Mapping[str, str] | None = None) -> LaunchLine:
    """The line that starts ``command`` as ``num_ranks`` ranks.

    ``cores`` are those of one host, as ``comm.cores`` counts them. More ranks than
    that share them; ``oversubscribe`` lets them share also where it does not look so. ``extra_args``
    go to ``mpirun`` as they are, last, so that they win. ``environ`` and ``uid`` default to this
    process. ``ucx_folder``: of the UCX that ranks are to have in place of the MPI wheel's.
    ``rank_environment``: variables for the ranks, on all hosts.
    """
    if num_ranks < 1:
        raise UsageError(f"{num_ranks} ranks were asked for; give -n 1 or more")
    if context.is_rank:
        raise UsageError(
            f"this process was itself started by {context.launcher} (as rank {context.rank} of "
            f"{context.world_size}); leave launch out: python -m disagg_mpi …")
    if install.mpirun is None:
        raise MpiError(
            f"found {install.name} but no mpirun of it; start the job with the cluster's own "
            f"launcher, such as srun -n {num_ranks} python -m disagg_mpi …")
    env = os.environ if environ is None else environ
    user = os.getuid() if uid is None else uid
    added: dict[str, str] = {}
    notes: list[str] = []
    arrange = {"openmpi": _openmpi, "intel": _intel}.get(install.family)
    if arrange is not None:
        added, notes = arrange(install, num_ranks, context, cores, oversubscribe, env, user)
    elif install.family == "unknown":
        notes.append(
            f"{install.mpirun} is {FAMILY_NAMES['unknown']}: nothing was added to its line")
    if context.slurm is not None:
        notes.append(f"inside Slurm job {context.slurm.job_id}: mpirun takes its hosts and tasks")
    own_args: list[str] = []
    if rank_environment:
        own_args += _rank_args(install, rank_environment)
        if not own_args:  # an mpirun whose options we do not know: its ranks here inherit them
            added |= rank_environment
    if ucx_folder is not None:
        # For the ranks alone: mpirun itself has no use for another UCX.
        own_args += _rank_args(install, ucx.line_environment(install.family, ucx_folder, env))
        notes.append(f"device memory in messages: ranks load UCX from {ucx_folder} in place of the MPI "
                     "wheel's (DISAGG_MPI_UCX=0 leaves it)")
    argv = (install.mpirun, *own_args, "-n", str(num_ranks), *extra_args, *command)
    # What the user has set stays; PATH and HOME were already derived from what is set.
    additions = {key: value for key, value in added.items()
                 if key in ("PATH", "HOME") or key not in env}
    return LaunchLine(argv, additions, tuple(notes))


def python_command(words: Sequence[str],
                   is_file: Callable[[str], bool] = os.path.isfile) -> tuple[str, ...]:
    """The command behind ``launch … --``.

    ``run --prompt hi`` is a command of ours, ``app.py …`` a script for this Python, ``python …``
    and any other path to a program stay as they are.
    """
    if not words:
        raise UsageError("nothing to launch; give a command after --, such as -- run --prompt hi")
    first = words[0]
    name = os.path.basename(first)
    if name.endswith(".py"):
        return (sys.executable, *words)
    if name.startswith("python"):
        return (sys.executable if first in ("python", "python3") else first, *words[1:])
    if os.sep in first and is_file(first):
        is_program = os.access(first, os.X_OK)
        return tuple(words) if is_program else (sys.executable, *words)
    return (sys.executable, "-m", "disagg_mpi", *words)


def ucx_folder_for(install: MpiInstall, command: Sequence[str],
                   environ: Mapping[str, str] | None = None) -> Path | None:
    """Of the UCX that the ranks of ``command`` are to have in place of the MPI wheel's, if any."""
    env = os.environ if environ is None else environ
    return ucx_folder(install, env, ucx.wants_cuda(command, env))


def _rank_args(install: MpiInstall, variables: Mapping[str, str]) -> list[str]:
    """What gives ``variables`` to the ranks, on all hosts; nothing for an mpirun that we do not know."""
    if install.family == "openmpi":
        return [word for key, value in variables.items() for word in ("-x", f"{key}={value}")]
    if install.family in ("mpich", "intel"):
        return [word for key, value in variables.items() for word in ("-genv", key, value)]
    return []


_Arranged = tuple[dict[str, str], list[str]]


def _openmpi(install: MpiInstall, num_ranks: int, context: LauncherContext, cores: int,
             oversubscribe: bool, env: Mapping[str, str], user: int) -> _Arranged:
    added: dict[str, str] = {}
    notes: list[str] = []
    if user == 0:
        added |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    if not env.get("HOME"):
        # Without it opal_init gives up: "Unable to get the user home directory".
        added["HOME"] = "/root" if user == 0 and os.path.isdir("/root") else "/tmp"
    slurm = context.slurm
    slots = cores if slurm is None else slurm.num_tasks
    are_more = slots is not None and num_ranks > slots
    if oversubscribe or are_more:
        added["PRTE_MCA_rmaps_default_mapping_policy"] = "slot:oversubscribe"
        added["PRTE_MCA_hwloc_default_binding_policy"] = "none"
        where = f"{slots} cores"
        if slurm is not None:
            where = f"the {slots} tasks of Slurm job {slurm.job_id}"
        if are_more:
            notes.append(f"{num_ranks} ranks on {where}: they share, and are not bound")
    elif slurm is not None:
        # Which cores a task has is Slurm's to say; bound to one of them, a rank's threads would share it.
        added["PRTE_MCA_hwloc_default_binding_policy"] = "none"
    elif num_ranks <= 2:
        # Open MPI binds one or two ranks to one core each, and all their compute threads with them;
        # from three ranks on it binds to packages, which is what we want.
        added["PRTE_MCA_hwloc_default_binding_policy"] = "none"
    return added, notes


def _intel(install: MpiInstall, num_ranks: int, context: LauncherContext, cores: int,
           oversubscribe: bool, env: Mapping[str, str], user: int) -> _Arranged:
    added: dict[str, str] = {}
    # mpirun is a script that looks its own programs up on PATH.
    folder = str(Path(install.mpirun or "").parent)
    if folder not in env.get("PATH", "").split(os.pathsep):
        added["PATH"] = os.pathsep.join([folder, env.get("PATH", os.defpath)])
    if oversubscribe or num_ranks > cores:
        added["I_MPI_PIN"] = "off"
    return added, []
