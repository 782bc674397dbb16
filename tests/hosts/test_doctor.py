"""The doctor across hosts: which way KV-cache would go, and what to do where the way is slow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from emulated import EmulatedHosts, run_on_hosts

DOCTOR = ["-m", "disagg_mpi", "doctor"]


def test_hosts_pairs_and_ways(two_hosts: EmulatedHosts) -> None:
    result = run_on_hosts(two_hosts, {"hA": 2, "hB": 1}, DOCTOR, timeout=60)
    assert result.returncode == 0, result.text
    for line in ("0-1 on hA", "2 on hB", "0-1 on hA: one shared pool (0 bytes)",
                 "between hosts: MPI messages, pieces while computed"):
        assert line in result.stdout, result.text
    assert result.stdout.count("(two hosts)") == 2
    assert "are one machine" not in result.stdout
    assert "Error" not in result.stderr


def test_containers_of_one_machine_are_told_to_be_one_host(emulate: Callable[..., EmulatedHosts]) -> None:
    hosts = emulate("c1", "c2", one_machine=True)
    result = run_on_hosts(hosts, {"c1": 1, "c2": 1}, DOCTOR, timeout=60)
    assert result.returncode == 0, result.text
    assert "\nSLOW: c1, c2 are one machine, but their ranks cannot share memory" in result.stdout, result.text


def test_a_slow_network_is_named(emulate: Callable[..., EmulatedHosts]) -> None:
    try:
        hosts = emulate("hA", "hB", rate="2gbit")
    except OSError as error:
        pytest.skip(f"this kernel cannot limit a link: {error}")
    result = run_on_hosts(hosts, {"hA": 1, "hB": 1}, DOCTOR, timeout=60)
    assert result.returncode == 0, result.text
    assert "\nSLOW: 1 pair(s) (0-1) of two hosts below 0.8 GB/s" in result.stdout, result.text
