"""The doctor over a real world: mpirun -n 3 python -m pytest --with-mpi tests/mpi."""

from __future__ import annotations

import msgspec
import pytest

from disagg_mpi.cli.doctor import render
from disagg_mpi.comm.environment import LauncherContext
from disagg_mpi.diagnostics import (
    DoctorReport,
    Place,
    choose_pairs,
    divided_machines,
    inspect_machine,
    mismatch_finding,
    name_hosts,
    run_doctor,
    would_stop,
)


@pytest.mark.mpi(min_size=2)
def test_every_pair_is_measured_and_rank_0_reports() -> None:
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    report = run_doctor(world)
    assert (report is not None) == (world.rank == 0)
    # Rank 0's checks must not leave the others waiting: whatever it finds, all agree on it.
    problem = world.bcast(_problem(report, world.size) if report else None)
    assert problem is None


def _problem(report: DoctorReport, size: int) -> str | None:
    pairs = [(pair.a, pair.b) for pair in report.pairs]
    checks = {
        "all pairs": pairs == choose_pairs(size),
        "figures": all(pair.gbps > 0 and pair.latency_us > 0 and pair.wake_us > 0
                       and pair.ratio > 0 for pair in report.pairs),
        "hosts": sorted(rank for ranks in report.hosts.values() for rank in ranks)
                 == list(range(size)),
        "one machine": report.divided == [],
        "idle": report.idle is not None and report.idle.rank == 1
                and 0 <= report.idle.cpu_share < 0.5 and report.idle.wake_us > 0,
        "threads": report.thread_provided == "multiple",
        "tags": report.tag_ub >= 32767,
        "fine": not would_stop(report.findings),
        "text": any(" 0-1" in line for line in render(report)),
        "idle, in text": any(line.startswith("idle rank ") for line in render(report)),
        "hand-over": any(line.startswith("hand-over ") for line in render(report)),
        "json": msgspec.json.decode(msgspec.json.encode(report), type=DoctorReport) == report,
    }
    return next((name for name, holds in checks.items() if not holds), None)


@pytest.mark.mpi(min_size=2)
def test_a_communicator_of_one_rank_has_no_pair() -> None:
    from mpi4py import MPI

    report = run_doctor(MPI.COMM_SELF)
    assert report is not None
    assert report.pairs == []
    assert report.idle is None
    assert "one rank: no pair to measure" in list(render(report))


def test_hosts_are_ranks_that_share_memory_whatever_their_names() -> None:
    cloned = [Place(0, "node", "a"), Place(1, "node", "b"), Place(0, "node", "a")]
    assert name_hosts(cloned) == {"node": [0, 2], "node (2)": [1]}
    assert divided_machines(cloned) == []
    containers = [Place(0, "c1", "a"), Place(1, "c2", "a"), Place(2, "other", "b")]
    assert divided_machines(containers) == [["c1", "c2"]]


def test_pairs_of_a_large_world_stay_few() -> None:
    assert choose_pairs(3) == [(0, 1), (0, 2), (1, 2)]
    pairs = choose_pairs(200)
    assert len(pairs) < 2 * 200
    assert {rank for pair in pairs for rank in pair} == set(range(200))
    assert all(0 <= a < b < 200 for a, b in pairs)


@pytest.mark.parametrize(("context", "world_size", "stops"), [
    (LauncherContext(), 1, False),
    (LauncherContext("srun", None, 0, 4), 4, False),
    (LauncherContext("srun", None, 0, 4), 1, True),
    (LauncherContext("mpirun", "mpich", 0, 3), 1, True),
    (LauncherContext("pmix", None, 0, None), 1, False),
])
def test_a_world_of_one_under_a_launcher_is_explained(context: LauncherContext, world_size: int,
                                                      stops: bool) -> None:
    finding = mismatch_finding(context, world_size)
    assert (finding is not None) == stops
    if finding and context.launcher == "srun":
        assert "srun --mpi=pmi2" in finding.text


def test_the_machine_is_rendered() -> None:
    lines = list(render(inspect_machine()))
    assert any(line.startswith("MPI ") for line in lines)
