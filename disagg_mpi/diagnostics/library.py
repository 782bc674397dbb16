"""What the MPI library says, or shows, about itself."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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


def _mpi_library() -> ctypes.CDLL | None:
    """The MPI library that mpi4py has loaded (privately, so it is found by its mapping)."""
    with contextlib.suppress(OSError):
        match = re.search(r"\s(/\S*/libmpi(?:ch)?\.so\S*)$", Path("/proc/self/maps").read_text(),
                          re.MULTILINE)
        return ctypes.CDLL(match.group(1)) if match else None
    return None


def cuda_aware() -> bool | None:
    """Whether device pointers may be given to MPI, as far as the library tells."""
    library = _mpi_library()
    if library is None or not hasattr(library, "MPIX_Query_cuda_support"):
        return None
    return bool(library.MPIX_Query_cuda_support())


def transports(env: Mapping[str, str]) -> dict[str, str]:
    """What moves the bytes: chosen where the library shows it, else what was asked for."""
    found = {}
    library = _mpi_library()
    with contextlib.suppress(ValueError):  # ValueError: no such symbol, so not Open MPI
        if library is not None:
            # A component structure: version numbers and fixed-size names, of which the names of the
            # project, the kind and the component are wanted. There is no official way to ask.
            raw = bytes((ctypes.c_char * 200).in_dll(library, "mca_pml_base_selected_component"))
            names = re.findall(rb"[a-z][a-z0-9_]+", raw)
            if b"pml" in names[:-1]:
                found["pml chosen"] = names[names.index(b"pml") + 1].decode()
    keys = ("OMPI_MCA_pml", "OMPI_MCA_btl", "OMPI_MCA_mtl", "OMPI_MCA_smsc", "OMPI_MCA_osc",
            "UCX_TLS", "UCX_NET_DEVICES", "FI_PROVIDER", "I_MPI_FABRICS",
            "MPIR_CVAR_CH4_NETMOD", "MPICH_CH4_NETMOD")
    return found | {key: env[key] for key in keys if key in env}
