"""The guide's launch line: which mpirun it means, and what it says and refuses before that runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from disagg_mpi.cli import launch_triton
from disagg_mpi.cli.options import job_keys
from disagg_mpi.comm.environment import LauncherContext
from disagg_mpi.comm.installs import MpiInstall
from disagg_mpi.job.mpirun import LaunchLine

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "model_repository"
GUIDE = ["--world_size", "3", "--tensorrt_llm_model_name", "context,generation", "--multi-model",
         "--disable-spawn-processes"]
SERVE = ["-m", "disagg_mpi", "serve", "--model-repository", str(EXAMPLE)]
PORTS = ["--http-port", "8000", "--grpc-port", "8001", "--metrics-port", "8002"]


class Started:
    """Stands in for mpirun: what would have been started."""

    def __init__(self) -> None:
        self.lines: list[LaunchLine] = []
        self.code = 0

    def __call__(self, line: LaunchLine, **_: Any) -> int:
        self.lines.append(line)
        subprocess.run(["sh", "-c", "echo its output; echo its errors >&2"], check=True)
        os.write(2, b"passed on\n")
        return self.code


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    mpirun = Started()
    monkeypatch.setattr(launch_triton, "run_line", mpirun)
    monkeypatch.setattr(launch_triton, "detect_mpi", lambda: MpiInstall("openmpi", "5.0.11", "/bin/mpirun"))
    monkeypatch.setattr(launch_triton, "launcher_context", lambda: LauncherContext())
    monkeypatch.setattr(launch_triton, "count_cores", lambda: 8)
    monkeypatch.delenv("PRTE_MCA_rmaps_default_mapping_policy", raising=False)
    return mpirun


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["launch_triton_server.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        launch_triton.main(EXAMPLE)
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_the_guides_line(
        started: Started, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, *GUIDE) == 0
    (line,) = started.lines
    assert line.argv == ("/bin/mpirun", "-n", "3", sys.executable, *SERVE, *PORTS)
    said = capfd.readouterr().err
    assert "3 = 1 orchestrator + 1 context + 1 generation ranks" in said
    assert "+ " + line.text in said
    assert "# --multi-model: context and generation are always served together" in said
    assert "# --disable-spawn-processes: all ranks always start at once" in said
    assert "--force" not in said


def test_every_flag_is_taken(
        started: Started, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    started.code = 7
    assert run(monkeypatch, *GUIDE, f"--model_repo={EXAMPLE}", "--grpc_port", "1", "--http_port=2",
               "--metrics-port", "0", "--oversubscribe", "-f", "--tritonserver", "x", "--exit_timeout", "3",
               "--multimodal_gpu0_cuda_mem_pool_bytes", "30", "--trtllm_llmapi_launch", "--host", "::1",
               "--", "--dtype", "bf16", "--api-key", "k") == 7
    (line,) = started.lines
    assert line.argv[4:] == (*SERVE, "--http-port", "2", "--grpc-port", "1", "--metrics-port", "0",
                             "--host", "::1", "--dtype", "bf16", "--api-key", "k")
    assert line.env["PRTE_MCA_rmaps_default_mapping_policy"] == "slot:oversubscribe"
    said = capfd.readouterr().err
    for flag in ("--force", "--tritonserver", "--exit_timeout", "--multimodal_gpu0_cuda_mem_pool_bytes",
                 "--trtllm_llmapi_launch"):
        assert f"# {flag}: " in said


def test_the_world_is_what_the_repository_needs(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch) == 0
    assert started.lines[0].argv[:3] == ("/bin/mpirun", "-n", "3")
    assert "PRTE_MCA_rmaps_default_mapping_policy" not in started.lines[0].env


def test_options_for_serve_may_change_the_ranks(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = ["--api-key", "k", "--context", "pp2", "--context-participant-ids", "1,2",
             "--context-device-ids", "0,0", "--generation-participant-ids", "3"]
    assert run(monkeypatch, "--world_size", "4", "--", *shape) == 0
    assert started.lines[0].argv[2] == "4"
    assert started.lines[0].argv[-len(shape):] == tuple(shape)


def test_the_log_takes_all_that_the_job_prints(
        started: Started, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
        tmp_path: Path) -> None:
    started.code = 3
    log = tmp_path / "triton_log.txt"
    log.write_text("before\n")
    assert run(monkeypatch, *GUIDE, "--log", "--log-file", str(log)) == 3
    assert sorted(log.read_text().splitlines()) == ["before", "its errors", "its output", "passed on"]
    said = capfd.readouterr()
    assert said.out == ""
    assert f"goes to {log}" in said.err
    assert said.err.endswith(f"the job ended with exit code 3; see {log}\n")


def test_dry_run_prints_the_line_alone(
        started: Started, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, *GUIDE, "--dry-run") == 0
    assert not started.lines
    said = capfd.readouterr()
    assert said.out.endswith(" ".join(["serve", "--model-repository", str(EXAMPLE), *PORTS]) + "\n")
    assert said.err == ""


@pytest.mark.parametrize(("arguments", "message"), [
    (["--world_size", "2"], r"--world_size is 2, but .* needs 3 = 1 orchestrator \+ 1 context \+ 1 generat"
                            "ion; write --world_size 3"),
    (["--world_size", "1"], "rank 1 .*not in a world of 1"),
    (["--world_size", "5"], "nobody's"),
    (["--world_size", "0"], "world_size.*0"),
    (["--tensorrt_llm_model_name", "tensorrt_llm"], "write --tensorrt_llm_model_name context,generation"),
    (["--no-mpi"], "one MPI job; leave it out"),
    (["--bogus"], "No such option.*--bogus"),
    (["--http_port", "70000"], "70000"),
    (["--model_repo", "/no/such"], "found no such folder"),
    (["--", "--context", "2"], "participant_ids of context/config.pbtxt has 1 group"),
    (["--", "--context"], "--context"),
    (["--log", "--log-file", "/no/such/folder/log"], "--log-file /no/such/folder/log cannot be written"),
])
def test_what_cannot_be_starts_nothing(
        started: Started, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
        arguments: list[str], message: str) -> None:
    assert run(monkeypatch, *arguments) == 2
    assert not started.lines
    said = capfd.readouterr().err
    assert re.search(message, said), said
    assert "Traceback" not in said


def test_the_script_says_how_to_set_the_project_up(tmp_path: Path) -> None:
    script = ROOT / "scripts" / "launch_triton_server.py"
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-S", "-I", str(script)], cwd=tmp_path, env=env, text=True,
                          capture_output=True, timeout=30, check=False)
    assert done.returncode == 1
    assert "make install" in done.stderr and "Traceback" not in done.stderr


def test_what_file_and_options_say_of_a_job(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text('model = "m"\nkv_tokens = 5\n[serve]\nhttp_port = 1\n[sampling]\nseed = 1\n')
    assert job_keys({"config_file": file, "kv_tokens": 7, "prefix_cache": False, "threads": None,
                     "http_port": 3}) == {"model": "m", "kv_tokens": 7, "prefix_cache": False}
    assert job_keys({"config_file": None, "model": None}) == {}
