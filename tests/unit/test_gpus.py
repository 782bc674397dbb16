"""What the driver shows, through a double of its library, and what the variable pretends."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disagg_mpi import gpus
from disagg_mpi.errors import ConfigError
from disagg_mpi.gpus import EMULATED, Gpu, emulated_gpus, visible_gpus


class Driver:
    """``libcuda.so.1`` with devices of these names and sizes; strict about the order of calls.

    Handles are not indices, so that one is not taken for the other.
    """

    def __init__(self, *devices: tuple[bytes, bytes, int], init: int = 0, count: int = 0) -> None:
        """``init`` and ``count``: the errors that these calls give."""
        self._devices = devices
        self._init, self._count = init, count
        self._is_ready = False

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        self._is_ready = self._init == 0
        return self._init

    def cuDeviceGetCount(self, count: Any) -> int:
        assert self._is_ready
        count._obj.value = len(self._devices)
        return self._count

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = 40 + index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, device: Any) -> int:
        found = self._devices[device.value - 40][0]
        assert size == len(name) > len(found)
        name.value = found
        return 0

    def cuDeviceGetUuid_v2(self, uuid: Any, device: Any) -> int:
        ctypes.memmove(uuid, self._devices[device.value - 40][1], 16)
        return 0

    def cuDeviceTotalMem_v2(self, size: Any, device: Any) -> int:
        assert type(size._obj) is ctypes.c_size_t, "more than 4 GiB must have room"
        size._obj.value = self._devices[device.value - 40][2]
        return 0


def seen(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> list[Gpu]:
    def load(name: str) -> Driver:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError("libcuda.so.1: cannot open shared object file")
        return driver

    monkeypatch.setattr(ctypes, "CDLL", load)
    return visible_gpus()


def test_the_drivers_devices_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    uuids = bytes(range(16)), bytes(range(200, 216))
    driver = Driver((b"NVIDIA H200", uuids[0], 150_000_000_000), (b"Caf\xe9", uuids[1], 2**33 + 1))
    assert seen(monkeypatch, driver) == [
        Gpu(0, "NVIDIA H200", uuids[0].hex(), 150_000_000_000),
        Gpu(1, "Caf\ufffd", uuids[1].hex(), 2**33 + 1)]


@pytest.mark.parametrize("driver", [None, Driver(), Driver((b"a", bytes(16), 1), init=100),
                                    Driver((b"a", bytes(16), 1), count=3)],
                         ids=["no driver", "no device", "cuInit fails", "the count fails"])
def test_where_there_is_none_none_is_seen(monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> None:
    assert seen(monkeypatch, driver) == []


def test_the_driver_is_asked_anew_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(monkeypatch, None) == []
    assert len(seen(monkeypatch, Driver((b"a", bytes(16), 1)))) == 1


def test_two_are_pretended_unless_the_variable_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(EMULATED, raising=False)
    assert [(gpu.index, gpu.total_bytes) for gpu in emulated_gpus()] == [(0, 2**33), (1, 2**33)]
    monkeypatch.setenv(EMULATED, "1x512MiB")
    assert [gpu.total_bytes for gpu in emulated_gpus()] == [2**29]


@given(st.integers(1, 99), st.integers(1, 9999), st.sampled_from([("MiB", 2**20), ("GiB", 2**30)]))
def test_any_number_of_any_size_can_be_pretended(count: int, size: int, unit: tuple[str, int]) -> None:
    found = emulated_gpus({EMULATED: f"{count}x{size}{unit[0]}"})
    assert [gpu.index for gpu in found] == list(range(count))
    assert {gpu.total_bytes for gpu in found} == {size * unit[1]}
    assert len({gpu.uuid for gpu in found}) == count


@pytest.mark.parametrize("text", ["", "2", "x8GiB", "0x8GiB", "2x0GiB", "2x8", "2x8GB", "2x8.5GiB",
                                  "2 x 8GiB", "2x8GiB\n", "100x1GiB", "-1x8GiB", "2x8gib"])
def test_what_pretends_nothing_is_said_with_what_would(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        emulated_gpus({EMULATED: text})
    message = str(caught.value)
    assert EMULATED in message and repr(text) in message
    example = message.rpartition(" ")[2]
    assert len(emulated_gpus({EMULATED: example})) == 2, "what is given as an example works"


def test_a_hint_asks_the_kernel_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_KERNELS_LIST", str(tmp_path / "gpus"))
    assert not gpus.host_has_gpus()
    (tmp_path / "gpus").mkdir()
    assert not gpus.host_has_gpus()
    (tmp_path / "gpus" / "0000:01:00.0").mkdir()
    assert gpus.host_has_gpus()
