"""The GPUs that this process sees, asked of the driver itself: importing torch takes seconds, this does not.

Nothing is kept: the driver is asked when somebody wants to know. For tests and for trying layouts the
variable ``DISAGG_MPI_EMULATED_GPUS`` (``2x8GiB``) pretends that there are some, for ``--device emulated``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
from collections.abc import Mapping
from importlib import metadata

import msgspec

from disagg_mpi.errors import ConfigError

EMULATED = "DISAGG_MPI_EMULATED_GPUS"
_EMULATED_FORM = re.compile(r"([1-9][0-9]?)x([1-9][0-9]{0,3})(MiB|GiB)")
_KERNELS_LIST = "/proc/driver/nvidia/gpus"
_UNITS = {"MiB": 2**20, "GiB": 2**30}


class Gpu(msgspec.Struct, frozen=True):
    """One device; ``index`` counts those that this process sees (``CUDA_VISIBLE_DEVICES``)."""

    index: int
    name: str
    uuid: str
    """Of the physical device: equal in all processes of a host, whatever its index there."""
    total_bytes: int


def host_has_gpus() -> bool:
    """Whether the kernel knows of NVIDIA GPUs: for a hint, without starting the driver."""
    try:
        return bool(os.listdir(_KERNELS_LIST))
    except OSError:
        return False


def torch_takes_gpus() -> bool:
    """As far as its version says, without importing it."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return not metadata.version("torch").endswith("+cpu")
    return False


def visible_gpus() -> list[Gpu]:
    """The CUDA devices; none without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = []
    for index in range(count.value):
        device, size = ctypes.c_int(), ctypes.c_size_t()
        name, uuid = ctypes.create_string_buffer(128), (ctypes.c_ubyte * 16)()
        if (driver.cuDeviceGet(ctypes.byref(device), index) or driver.cuDeviceGetName(name, len(name), device)
                or driver.cuDeviceGetUuid_v2(uuid, device)
                or driver.cuDeviceTotalMem_v2(ctypes.byref(size), device)):
            continue  # it is there, and broken: nvidia-smi says how
        found.append(Gpu(index, name.value.decode(errors="replace"), bytes(uuid).hex(), size.value))
    return found


def emulated_gpus(environ: Mapping[str, str] | None = None) -> list[Gpu]:
    """What :data:`EMULATED` pretends; two of 8 GiB unless it says otherwise. Raises :class:`ConfigError`."""
    text = (os.environ if environ is None else environ).get(EMULATED, "2x8GiB")
    match = _EMULATED_FORM.fullmatch(text)
    if match is None:
        raise ConfigError(f"{EMULATED} is {text!r}; needed is a number of GPUs and their memory, as 2x8GiB")
    size = int(match[2]) * _UNITS[match[3]]
    return [Gpu(index, "emulated", f"emulated-{index}", size) for index in range(int(match[1]))]
