"""munge, slurmctld and two slurmd on one machine, without systemd: Debian's slurm-wlm, as root.

Everything is in one folder: keys, spools, logs, sockets. A :class:`Cluster` starts the daemons when it is
entered and ends them, with every job, when it is left.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Self

_PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "squeue", "scancel", "sinfo")
_NODES = ("node1", "node2")
_START_SECONDS = 30.0
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
TmpFS={folder}/tmp/%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
MailProg=/bin/true
KillWait=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=4000 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=4000 State=UNKNOWN
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=UNLIMITED State=UP OverSubscribe=YES
"""


def why_not() -> str | None:
    """Why no cluster can be brought up here; ``None`` if one can."""
    if os.geteuid() != 0:
        return "slurmd starts jobs of others, so it needs root"
    missing = [name for name in _PROGRAMS if _find(name) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurm-wlm munge"
    return None


class Cluster:
    """Two nodes; :meth:`run` gives a user's commands what they need to find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        for name in ("state", *(f"{kind}/{node}" for kind in ("spool", "tmp") for node in _NODES)):
            (self.folder / name).mkdir(parents=True)
        ports = _free_ports(3)
        self._config = self.folder / "slurm.conf"
        self._config.write_text(_CONFIG.format(host=socket.gethostname(), folder=self.folder, ports=ports))
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid",
                 "log-file": "munged.log", "seed-file": "munge.seed"}
        self._start("munged", "--foreground", "--force",
                    *(f"--{option}={self.folder / file}" for option, file in files.items()))
        self._wait(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._start("slurmctld", "-D", "-c", "-f", str(self._config))
        for node in _NODES:
            self._start("slurmd", "-D", "-N", node, "-f", str(self._config))
        self._wait(lambda: self.run("sinfo", "-h", "-o", "%D %t").stdout.split() == ["2", "idle"], "slurmd")
        return self

    def __exit__(self, *_: object) -> None:
        self.run("scancel", "--full", "--signal=KILL", "--user=root")
        self.run("scancel", "--user=root")
        end = time.monotonic() + 10
        while self.run("squeue", "-h").stdout.strip() and time.monotonic() < end:
            time.sleep(0.1)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, cwd: Path | None = None,
        timeout: float = 120.0,
    ) -> subprocess.CompletedProcess[str]:
        """A user's command to its end."""
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith(("SLURM_", "OMPI_", "PMI"))}
        return subprocess.run(
            command, env={**clean, "SLURM_CONF": str(self._config), **(env or {})}, cwd=cwd, text=True,
            capture_output=True, timeout=timeout, check=False)

    def state(self, job: str) -> str:
        """``PENDING``, ``RUNNING``, ``COMPLETED``, ``FAILED``, …"""
        text = self.run("scontrol", "show", "job", job).stdout
        found = re.search(r"JobState=(\w+)", text)
        return found[1] if found else "UNKNOWN"

    def exit_code(self, job: str) -> str:
        """``code:signal`` of the batch script."""
        found = re.search(r"ExitCode=(\S+)", self.run("scontrol", "show", "job", job).stdout)
        return found[1] if found else "?"

    def _start(self, program: str, *arguments: str) -> None:
        path = _find(program)
        assert path is not None
        log = (self.folder / f"{program}.out").open("ab")
        with log:
            self._daemons.append(subprocess.Popen(
                [path, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True))

    def _wait(self, condition: object, what: str) -> None:
        end = time.monotonic() + _START_SECONDS
        while not condition():  # type: ignore[operator]
            dead = [daemon for daemon in self._daemons if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                logs = "\n".join(file.read_text(errors="replace")[-2000:]
                                 for file in sorted(self.folder.glob("*.log")))
                raise AssertionError(f"{what} does not come up\n{logs}")
            time.sleep(0.1)


def _find(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


def _free_ports(count: int) -> list[int]:
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()
