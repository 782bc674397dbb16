"""benchmarks/gpu_pays.py in real jobs on the emulated device; its figures mean nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.openmpi_only

SCRIPT = str(Path(__file__).parents[2] / "benchmarks" / "gpu_pays.py")


def run(tmp_path: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "emulated", "--tiny", "--json", str(tmp_path / "found.json"),
         *words], text=True, capture_output=True, timeout=200, check=False)
    return done, json.loads((tmp_path / "found.json").read_text())


def test_streams_while_prompts_arrive(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--layouts", "aggregated,disaggregated", "--mps", "off", "--rates", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "No figure below means anything" in done.stdout
    one, other = found["pays"]
    assert (one["layout"], other["layout"]) == ("aggregated, chunks of 64", "disaggregated")
    for each in found["pays"]:
        assert each["load"] == "2 streams, 8 prompts/s"
        assert 0 < each["itl_p50"] <= each["itl_p90"] <= each["itl_p99"] <= each["itl_max"]
        assert each["ttft_p50"] > 0 and each["quiet_itl_p50"] > 0 and each["tokens_per_second"] > 0
        assert each["num_prompts"] > 0 and each["num_failed"] == 0
    assert one["num_prompts"] == other["num_prompts"]  # the same seed
    (verdict,) = found["verdicts"]
    assert f"* {verdict}" in done.stdout
    assert verdict.startswith("disaggregated against aggregated, chunks of 64, 2 streams, 8 prompts/s: ITL")
    assert "pay" in verdict.rpartition(": ")[2]


def test_instances_on_gpus_of_their_own(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--layouts", "two,disaggregated", "--rates", "8", "--gpus", "0,1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [each["layout"] for each in found["pays"]] == ["two aggregated, chunks of 64", "disaggregated"]
    assert all(each["num_failed"] == 0 and each["num_prompts"] for each in found["pays"])
    assert "GPUs 0,1, instances of 1" in done.stdout
    odd = subprocess.run([sys.executable, SCRIPT, "--gpus", "0,1,2"], text=True, capture_output=True,
                         check=False)
    assert odd.returncode == 2 and "3 GPUs are not an even number of instances" in odd.stderr


def test_a_trace_and_mps_that_is_not_there(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(
        json.dumps({"timestamp": 100 * n, "input_length": 50 * n, "output_length": n}) for n in range(1, 6)))
    done, found = run(tmp_path, "--layouts", "disaggregated", "--mps", "on", "--trace", str(trace),
                      "--speed", "2", "--max-prompt", "200", "--ttft-slo", "60", "--itl-slo", "60",
                      "--requests", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    (each,) = found["pays"]
    assert each["layout"] == "disaggregated, MPS (asked for, did not run)"
    assert each["load"] == "4 requests of trace.jsonl, x2"
    assert (each["num_prompts"], each["num_late"], each["attainment"]) == (4, 0, 1.0)
    assert "within both limits" in done.stdout


def test_a_job_that_takes_too_long_is_named_and_ended(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--layouts", "aggregated", "--limit", "1")
    assert done.returncode == 1
    assert "aggregated, chunks of 64: " in found["failed"][0]["error"]
    assert "2 streams, 2 prompts/s: nothing was measured" in done.stdout


def test_what_ends_it_ends_its_job(tmp_path: Path) -> None:
    """Nothing goes on in a GPU's memory behind a benchmark that was stopped."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--device", "emulated", "--tiny", "--layouts", "aggregated", "--seconds",
         "60"], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    while "ready after" not in process.stdout.readline():
        assert process.poll() is None
    ours = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    assert len(ours) >= 3  # the launcher, mpirun, two ranks
    process.terminate()
    process.communicate(timeout=60)
    left = [psutil.Process(pid) for pid in ours if psutil.pid_exists(pid)]
    assert not psutil.wait_procs(left, timeout=20)[1]
