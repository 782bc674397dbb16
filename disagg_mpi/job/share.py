"""Context ranks held to a share of their GPU's processors, under NVIDIA's MPS.

CUDA asks for it once, when it is loaded, which UCX does when MPI starts. So a rank's role is taken from what
the launcher says of it, and what is set lasts as long as the process, for every job in it.
"""

from __future__ import annotations

import os
import sys

from disagg_mpi.comm.environment import launcher_context
from disagg_mpi.config import JobConfig
from disagg_mpi.errors import ConfigError
from disagg_mpi.job import mps
from disagg_mpi.topology import Role, Topology

_limited: tuple[float, frozenset[int]] | None = None
"""The share that an earlier job of this process has set, and for which ranks."""


def limit_processors(config: JobConfig, topology: Topology) -> None:
    """Hold this process to its share, before MPI starts.

    Raises :class:`ConfigError`, on all ranks alike, if MPI is there and began with other shares.
    """
    global _limited
    if config.device == "cpu":
        return
    ranks = frozenset(rank for group in topology.groups if group.role is Role.CONTEXT for rank in group.ranks)
    wanted = (config.context_gpu_share, ranks) if config.context_gpu_share < 1 and ranks else None
    if wanted == _limited:
        return
    if _limited is not None:
        raise ConfigError(
            f"an earlier job of this process held ranks {', '.join(map(str, sorted(_limited[1])))} to "
            f"context_gpu_share {_limited[0]:g}, which lasts as long as the process: give this one the same, "
            "or a process of its own")
    if "mpi4py.MPI" in sys.modules:
        raise ConfigError(
            f"context_gpu_share is {config.context_gpu_share:g}, which CUDA must learn before it is loaded, "
            "and MPI loads it: import mpi4py.MPI after the first launch(), or leave context_gpu_share at 1 "
            f"and set {mps.PERCENTAGE} for the context ranks")
    _limited = wanted
    if launcher_context().rank in ranks:
        os.environ.setdefault(mps.PERCENTAGE, f"{100 * config.context_gpu_share:g}")


def why_unlimited() -> str:
    """For rank 0, which is never limited: why context ranks are not held to a share, if so."""
    if not mps.seems_to_run():
        return "there is no MPS here, which launch --mps starts"
    if mps.PERCENTAGE in os.environ:
        return f"{mps.PERCENTAGE} is set for all ranks"
    if launcher_context().rank is None:
        return f"this launcher does not say which rank a process is; set {mps.PERCENTAGE} for context ranks"
    return ""
