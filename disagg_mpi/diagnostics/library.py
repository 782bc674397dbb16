"""What the MPI library says, or shows, about itself."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from disagg_mpi.comm.ucx import chosen_pml, mpi_library


def has_ulfm(mpi: Any) -> bool:
    """Whether a communicator can be revoked, tried on one of this rank alone.

    mpi4py emulates the rest of ULFM where the library has none, so only this call tells.
    """
    probe = mpi.COMM_SELF.Dup()
    try:
        probe.Revoke()
    except (NotImplementedError, mpi.Exception):
        return False
    finally:
        with contextlib.suppress(mpi.Exception):
            probe.Free()
    return True


def transports(env: Mapping[str, str]) -> dict[str, str]:
    """What moves the bytes: chosen where the library shows it, else what was asked for."""
    found = {}
    library = mpi_library()
    pml = None if library is None else chosen_pml(library)
    if pml is not None:
        found["pml chosen"] = pml
    keys = ("OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_mtl", "OMPI_MCA_smsc", "OMPI_MCA_osc",
            "UCX_TLS", "UCX_NET_DEVICES", "UCX_MODULE_DIR", "FI_PROVIDER", "I_MPI_FABRICS",
            "MPIR_CVAR_CH4_NETMOD", "MPICH_CH4_NETMOD")
    return found | {key: env[key] for key in keys if key in env}
