"""``python -m disagg_mpi doctor``: look at this machine; under mpirun, measure the job too.

Measuring is in ``diagnostics``; here is only the order of things and the rendering. Rank 0 alone
prints. Exit code 0: fine (slow, warnings and notes included), 1: something would stop a job.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import click
import msgspec

from disagg_mpi.comm import environment
from disagg_mpi.diagnostics import (
    SLOW_RATIO,
    DoctorReport,
    Finding,
    MachineReport,
    inspect_machine,
    launcher_finding,
    mismatch_finding,
    run_doctor,
    world,
    would_stop,
)


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor(as_json: bool) -> None:
    """Say whether this machine is ready, and under mpirun measure every pair of ranks."""
    machine = inspect_machine()
    report: MachineReport | DoctorReport | None = machine
    if machine.launcher.is_rank and machine.versions["mpi4py"]:
        environment.apply()
        report = _measure(machine)
    if report is None:
        return
    click.echo(msgspec.json.format(msgspec.json.encode(report)).decode() if as_json
               else "\n".join(render(report)))
    sys.exit(1 if would_stop(report.findings) else 0)


def _measure(machine: MachineReport) -> MachineReport | DoctorReport | None:
    finding = launcher_finding(machine)
    if finding is None:
        comm = world()
        finding = mismatch_finding(machine.launcher, comm.size)
        if finding is None:
            return run_doctor(comm, machine)
    # No common world: one of the processes speaks, as well as the launcher lets them know which.
    # The others end with 0, because mpirun kills all at the first one that does not.
    if machine.launcher.rank not in (0, None):
        return None
    return msgspec.structs.replace(machine, findings=[finding, *machine.findings])


# ---- rendering -----------------------------------------------------------------------------------


def render(report: MachineReport | DoctorReport) -> Iterator[str]:
    """The report as lines of text."""
    if isinstance(report, DoctorReport):
        yield from _rows(_machine_rows(report.machine))
        yield ""
        yield from _rows(_job_rows(report))
        yield ""
        yield from _pair_table(report)
    else:
        yield from _rows(_machine_rows(report))
    yield ""
    yield from _findings(report.findings)


def _rows(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for name, value in rows:
        yield f"{name:<14}{value}"


def _machine_rows(machine: MachineReport) -> Iterator[tuple[str, str]]:
    mpi = machine.mpi
    yield "host", machine.hostname
    yield "python", machine.python
    yield "MPI", f"{mpi.name}, {mpi.mpirun or 'no mpirun'}" if mpi else "none"
    for name, version in machine.versions.items():
        yield name, version or "not installed"
    sharing = "share them" if machine.cores < 3 else "have one each"
    yield "cores", f"{machine.cores}; 3 ranks {sharing}"
    if machine.memory_total is not None and machine.memory_available is not None:
        yield "memory", (f"{machine.memory_available / 2**30:.1f} GiB free of "
                         f"{machine.memory_total / 2**30:.1f} GiB")
    memory = machine.shared_memory
    if memory is not None:
        yield "/dev/shm", f"{memory.free // 2**20} MiB free of {memory.total // 2**20} MiB"
    yield "GPUs", ", ".join(machine.gpus) or "none"
    yield "started by", _launcher_text(machine)
    yield "we set", " ".join(f"{k}={v}" for k, v in machine.settings.items()) or "nothing"
    if machine.kept:
        yield "you set", " ".join(f"{k}={v}" for k, v in machine.kept.items())


def _launcher_text(machine: MachineReport) -> str:
    context = machine.launcher
    text = "hand; mpirun -n 3 python -m disagg_mpi doctor measures a job"
    if context.is_rank:
        text = f"{context.launcher}, {context.world_size or 'an unknown number of'} ranks"
    if context.slurm is not None:
        text += f", in Slurm job {context.slurm.job_id}"
    return text


def _job_rows(report: DoctorReport) -> Iterator[tuple[str, str]]:
    yield "library", f"{report.library.split(',')[0]} (MPI {report.standard})"
    yield "threads", f"{report.thread_required} asked, {report.thread_provided} provided"
    yield "TAG_UB", str(report.tag_ub)
    for host, ranks in report.hosts.items():
        yield "ranks", f"{_ranges(ranks)} on {host} ({report.cores[host]} cores)"
    yield "transports", (" ".join(f"{k}={v}" for k, v in report.transports.items())
                         or "the library's choice")
    yield "CUDA-aware", {True: "yes", False: "no", None: "cannot be asked"}[report.cuda_aware]
    yield "a rank dies", _survival_text(report)
    for host, rate in report.memcpy_gbps.items():
        yield "memcpy", f"{rate:.1f} GB/s on {host}"
    if report.idle is not None:
        yield "idle rank", (f"{report.idle.cpu_share:.1%} of a core, ".replace("%", " %")
                            + f"woken after {report.idle.wake_us / 1000:.1f} ms")
    yield from _handover_rows(report)


def _handover_rows(report: DoctorReport) -> Iterator[tuple[str, str]]:
    """How KV-cache would pass between two of these ranks, unless --transport says otherwise."""
    name = "hand-over"
    for host, ranks in report.hosts.items():
        if len(ranks) > 1:
            yield name, f"{_ranges(ranks)} on {host}: one shared pool (0 bytes)"
            name = ""
    rates = [pair.gbps for pair in report.pairs if not pair.same_host]
    if rates:
        yield name, (f"between hosts: MPI messages, pieces while computed ({min(rates):.1f} to "
                     f"{max(rates):.1f} GB/s)")


def _survival_text(report: DoctorReport) -> str:
    if not report.has_ulfm:
        return "the job ends"
    if not report.ulfm_enabled:
        return "the job ends; mpirun --with-ft ulfm … lets the others go on"
    return "the others go on (ULFM)"


def _ranges(ranks: list[int]) -> str:
    """``0-3 7``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _pair_table(report: DoctorReport) -> Iterator[str]:
    if not report.pairs:
        yield "one rank: no pair to measure"
        return
    yield "  pair        8 B   idle, there   64 MiB   share of"
    yield "            one way    and back      GB/s     memcpy"
    for pair in report.pairs:
        where = "" if pair.same_host else "  (two hosts)"
        slow = "  <-- SLOW" if pair.is_slow else ""
        yield (f"{f'{pair.a}-{pair.b}':>6}{pair.latency_us:>9.1f} µs{pair.wake_us:>9.0f} µs"
               f"{pair.gbps:>10.1f}{pair.ratio:>11.2f}{where}{slow}")
    yield f"(below {SLOW_RATIO:.1f} of a memcpy on one host is slow)"


def _findings(findings: list[Finding]) -> Iterator[str]:
    if not findings:
        yield "Nothing to complain about."
    order = ("stop", "slow", "warning", "note")
    for finding in sorted(findings, key=lambda finding: order.index(finding.level)):
        yield f"{finding.level.upper()}: {finding.text}"
        if finding.remedy:
            yield f"  -> {finding.remedy}"
    if would_stop(findings):
        yield "A job would not run here as things are."
