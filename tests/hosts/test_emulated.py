"""The emulated hosts themselves: what they keep apart, and that nothing of them stays."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
from emulated import EmulatedHosts, run_on_hosts
from mpirun import ROOT
from processes import assert_gone

WHERE = """
import os, socket
from mpi4py import MPI
world = MPI.COMM_WORLD
host = world.Split_type(MPI.COMM_TYPE_SHARED)
own_tmp = os.path.basename(os.path.dirname(os.environ["TMPDIR"]))
everyone = world.gather(f"{socket.gethostname()} {own_tmp} {host.size}")
if world.rank == 0:
    print(*everyone, sep=", ")
"""

# Makes hosts, says what keeps them, and is killed.
KEEPS_HOSTS = """
import time
from emulated import EmulatedHosts
hosts = EmulatedHosts(["hA", "hB"])
print(hosts._folder, *(keeper.pid for keeper in hosts._keepers.values()), flush=True)
time.sleep(60)
"""


def test_ranks_are_laid_out_in_order_and_share_memory_on_a_host_only(two_hosts: EmulatedHosts) -> None:
    result = run_on_hosts(two_hosts, {"hA": 2, "hB": 1}, ["-c", WHERE], timeout=30)
    assert result.returncode == 0, result.text
    assert result.stdout == "hA hA 2, hA hA 2, hB hB 1\n", result.text


def test_a_job_that_hangs_is_killed_on_every_host(two_hosts: EmulatedHosts) -> None:
    hang = "import faulthandler, signal, time; faulthandler.register(signal.SIGUSR1); time.sleep(60)"
    with pytest.raises(AssertionError, match="did not end within 2 s"):
        run_on_hosts(two_hosts, {"hA": 1, "hB": 1}, ["-c", hang], timeout=2)
    end = time.monotonic() + 5
    while (left := two_hosts.processes()) and time.monotonic() < end:
        time.sleep(0.02)
    assert not left


def test_hosts_end_with_the_process_that_made_them(two_hosts: EmulatedHosts) -> None:
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT / "tests" / "hosts")])
    with subprocess.Popen([sys.executable, "-c", KEEPS_HOSTS], stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "PYTHONPATH": path}) as process:
        assert process.stdout is not None
        folder, *words = process.stdout.readline().split()
        keepers = [int(word) for word in words]
        assert os.path.isdir(folder)
        assert len(keepers) == 3
        process.send_signal(signal.SIGKILL)
    assert_gone(*keepers, within=5)
    assert not os.path.exists(folder)


def test_a_slow_link_is_slow(emulate: Callable[..., EmulatedHosts]) -> None:
    """40 MB at 400 Mbit/s take 0.8 s."""
    try:
        hosts = emulate("hA", "hB", rate="400mbit")
    except OSError as error:
        pytest.skip(f"this kernel cannot limit a link: {error}")
    code = """
import time
from mpi4py import MPI
world, data = MPI.COMM_WORLD, bytearray(40_000_000)
world.Barrier()
start = time.monotonic()
world.Send(data, 1) if world.rank == 0 else world.Recv(data, 0)
world.Barrier()
if world.rank == 0:
    print(time.monotonic() - start)
"""
    result = run_on_hosts(hosts, {"hA": 1, "hB": 1}, ["-c", code], timeout=30)
    assert 0.7 < float(result.stdout) < 3, result.text
