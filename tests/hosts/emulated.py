"""Several hosts on one machine, for real jobs that span hosts.

    with EmulatedHosts(["hA", "hB"]) as hosts:
        result = run_on_hosts(hosts, {"hA": 2, "hB": 1}, ["-m", "disagg_mpi", "run", …], timeout=60)

A host is a set of namespaces: network (a veth pair to a bridge), hostname, IPC and mounts (a /dev/shm, an
/etc/hosts and a boot id of its own). It has a TMPDIR of its own too; files and processors are the
machine's. ``mpirun`` starts on the first host and reaches the others through ``agent.sh`` instead of ssh.

The namespaces have no names: a *keeper*, ``cat`` on a pipe from this process, holds each set, and when this
process ends in whatever way the keeper reads the end of its input, ends too, and the kernel takes the
namespaces and their links away. So nothing is left behind, and test runs side by side do not meet.
Daemons and ranks lose their connections with mpirun, and end as they would on real hosts.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
from mpirun import JobResult, MpiJob, find_mpirun, mpi_family

_AGENT = Path(__file__).with_name("agent.sh")
_PROGRAMS = ("ip", "unshare", "nsenter", "mount", "hostname")
# What ranks need and ssh would not pass on; a user names them in the same way.
_FORWARDED = ("PYTHONPATH", "DISAGG_MPI_CACHE", "HF_HUB_OFFLINE")
_GRACE_SECONDS = 5.0


@functools.cache
def why_not() -> str | None:
    """Why hosts cannot be emulated here, or ``None`` if they can."""
    if sys.platform != "linux":
        return "emulated hosts are Linux namespaces"
    if os.geteuid() != 0:
        return "emulated hosts need root, for network namespaces"
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"emulated hosts need {', '.join(missing)} (packages iproute2, util-linux, hostname)"
    if mpi_family() not in ("openmpi", "mpich"):
        return f"how {mpi_family()} takes an agent in place of ssh is not known here"
    try:
        EmulatedHosts(["probe"]).close()
    except OSError as error:
        return f"emulated hosts: {error}"
    return None


class EmulatedHosts:
    """Hosts with these names on one network; :meth:`close` (or the end of this process) ends them.

    ``rate`` limits what each host sends, in tc's words (``1gbit``). ``one_machine`` leaves all of them
    the machine's own boot id: containers, rather than hosts. Raises :class:`OSError` with the words of
    the program that failed.
    """

    def __init__(self, names: Sequence[str], *, rate: str | None = None, one_machine: bool = False) -> None:
        self.names = tuple(names)
        self._folder = Path(tempfile.mkdtemp(prefix="hosts-"))
        self._keepers: dict[str, subprocess.Popen[str]] = {}
        try:
            self._make(rate, one_machine)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> EmulatedHosts:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def enter(self, name: str, command: Sequence[str]) -> list[str]:
        """``command`` as it runs on a host, in the working directory of now."""
        return ["nsenter", f"--target={self._keepers[name].pid}", "--net", "--uts", "--ipc", "--mount", "env",
                f"--chdir={os.getcwd()}", f"TMPDIR={self._folder / name / 'tmp'}",
                f"EMULATED_HOSTS={self._folder}", *command]

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on the hosts now."""
        networks = {_network(self._keepers[name].pid) for name in self.names}
        keepers = {keeper.pid for keeper in self._keepers.values()}
        found = []
        for pid in psutil.pids():
            if pid not in keepers and _network(pid) in networks:
                try:
                    found.append(psutil.Process(pid))
                except psutil.NoSuchProcess:
                    continue
        return found

    def shared_memory(self) -> list[str]:
        """``hA:name`` of every file in any host's /dev/shm."""
        return [f"{name}:{path.name}" for name in self.names
                for path in Path(f"/proc/{self._keepers[name].pid}/root/dev/shm").iterdir()]

    def close(self) -> None:
        for keeper in reversed(self._keepers.values()):
            assert keeper.stdin is not None and keeper.stdout is not None
            keeper.stdin.close()
            keeper.stdout.close()
            keeper.wait()
        self._keepers.clear()
        shutil.rmtree(self._folder, ignore_errors=True)  # where there was no switch to do it

    def _make(self, rate: str | None, one_machine: bool) -> None:
        addresses = {name: f"10.77.0.{number}" for number, name in enumerate(self.names, 1)}
        (self._folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(
            f"{address} {name}\n" for name, address in addresses.items()))
        self._keep("", "--net", "true", at_the_end=f"rm -rf {self._folder}")  # the switch
        self._ip("", "link add br0 type bridge", "link set br0 up")
        for name, address in addresses.items():
            folder = self._folder / name
            (folder / "tmp").mkdir(parents=True)
            (folder / "boot_id").write_text(f"{uuid.uuid4()}\n")
            mounts = ["hostname " + name, "mount -t tmpfs tmpfs /dev/shm",
                      f"mount --bind {self._folder}/hosts /etc/hosts"]
            if not one_machine:
                mounts.append(f"mount --bind {folder}/boot_id /proc/sys/kernel/random/boot_id")
            self._keep(name, "--net --uts --ipc --mount", " && ".join(mounts))
            pid = self._keepers[name].pid
            (folder / "pid").write_text(str(pid))
            port = f"to-{name}"
            self._ip("", f"link add {port} type veth peer name eth0 netns {pid}",
                     f"link set {port} master br0 up")
            self._ip(name, "link set lo up", f"addr add {address}/24 dev eth0", "link set eth0 up")
            if rate is not None:
                self._run(name, f"tc qdisc add dev eth0 root tbf rate {rate} burst 256kb latency 50ms")

    def _keep(self, name: str, namespaces: str, prepare: str, at_the_end: str = "") -> None:
        keep = f"cat; {at_the_end}" if at_the_end else "exec cat"
        keeper = subprocess.Popen(
            ["unshare", *namespaces.split(), "sh", "-c", f"{{ {prepare}; }} && echo ready && {keep}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True)  # Ctrl-C is for the tests, which end it when they have ended
        self._keepers[name] = keeper
        assert keeper.stdout is not None
        line = keeper.stdout.readline().strip()
        if line != "ready":
            raise OSError(line or "unshare failed without a word")

    def _ip(self, name: str, *commands: str) -> None:
        for command in commands:
            self._run(name, f"ip {command}")

    def _run(self, name: str, command: str) -> None:
        """In the network of a host, or of the switch (no name)."""
        done = subprocess.run(["nsenter", f"--target={self._keepers[name].pid}", "--net", *command.split()],
                              capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(f"{command}: {done.stderr.strip()}")


class HostsJob(MpiJob):
    """A job across emulated hosts; ``layout`` says how many ranks each host gets, in order of rank."""

    def __init__(self, hosts: EmulatedHosts, layout: Mapping[str, int], argv: Sequence[str], *,
                 env: Mapping[str, str] | None = None) -> None:
        self._hosts = hosts
        where = ",".join(f"{name}:{count}" for name, count in layout.items())
        names = [name for name in (*_FORWARDED, *(env or {})) if name in {**os.environ, **(env or {})}]
        if mpi_family() == "openmpi":
            # Without "slot", ":oversubscribe" of job_environment() puts every rank on the first host.
            across = ["--prtemca", "plm_ssh_agent", str(_AGENT), "--host", where,
                      "--map-by", "slot:oversubscribe",
                      *(word for name in names for word in ("-x", name))]
        else:
            across = ["-launcher", "ssh", "-launcher-exec", str(_AGENT), "-hosts", where,
                      "-genvlist", ",".join(names)]
        super().__init__(sum(layout.values()), argv, env=env,
                         launcher=hosts.enter(next(iter(layout)), [find_mpirun(), *across]))

    def _tree(self) -> list[psutil.Process]:
        # Daemons of other hosts are nobody's children.
        return self._hosts.processes()

    def finish(self, timeout: float) -> JobResult:
        result = super().finish(timeout)
        end = time.monotonic() + _GRACE_SECONDS
        while (left := [*self._hosts.processes(), *self._hosts.shared_memory()]) and time.monotonic() < end:
            time.sleep(0.05)
        assert not left, f"outlives the job: {left}\n{result.text}"
        return result


def run_on_hosts(hosts: EmulatedHosts, layout: Mapping[str, int], argv: Sequence[str], *, timeout: float,
                 env: Mapping[str, str] | None = None) -> JobResult:
    """Run ``python argv…`` across hosts to its end, whatever its exit code.

    AssertionError if it does not end in time, or leaves a process or a file in any host's /dev/shm.
    """
    with HostsJob(hosts, layout, argv, env=env) as job:
        return job.finish(timeout)


def _network(pid: int) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return None
