"""Every command of the README runs as it stands there (``make …`` by CI), and its library example works."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpirun import find_mpirun, job_environment

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()
            if line.startswith(("python -m disagg_mpi", "mpirun "))]

SHELL = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]
SERVERS = [line for line in SHELL if " serve" in line or "launch_triton_server" in line]
CLIENTS = [line for line in SHELL if line not in SERVERS]

pytestmark = [pytest.mark.model, pytest.mark.openmpi_only]


def user_environment() -> dict[str, str]:
    """With the names that a user's shell would find in the activated environment."""
    folders = f"{Path(sys.executable).parent}{os.pathsep}{Path(find_mpirun()).parent}"
    return {**job_environment(), "PATH": f"{folders}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Water boils at", "max_tokens": 4}) + "\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=user_environment(), text=True,
                          capture_output=True, timeout=180, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip() or (tmp_path / "results.jsonl").read_text()


@pytest.mark.parametrize("server", SERVERS)
def test_server_and_its_clients(server: str, model: Path) -> None:
    with socket.socket() as probe:
        if probe.connect_ex(("localhost", 8000)) == 0:
            pytest.skip("something on this machine has port 8000, which the README's commands use")
    process = subprocess.Popen(server.split(), cwd=ROOT, env=user_environment(), text=True,
                               stderr=subprocess.PIPE, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while subprocess.run(["curl", "-sf", "localhost:8000/health"], capture_output=True).returncode:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.2)
        for client in CLIENTS:
            done = subprocess.run(client, shell=True, env=user_environment(), text=True, capture_output=True,
                                  timeout=60, check=False)
            assert done.returncode == 0 and "SmolLM2-135M-Instruct" in done.stdout, (client, done.stderr)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.communicate()


def test_library_example(model: Path, tmp_path: Path) -> None:
    (code,) = (block for language, block in BLOCKS if language == "python")
    script = tmp_path / "example.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, "-m", "disagg_mpi", "launch", "-n", "4", "--", str(script)],
                          cwd=ROOT, text=True, capture_output=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert "a process of adapting" in done.stdout


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"\bmake ([\w-]+)", README))
    assert {"run", "test"} <= named <= targets
