"""Every command of the README runs as it stands there (``make …`` by CI), and its library example works."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mpirun import find_mpirun, job_environment

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line for language, block in BLOCKS if not language for line in block.splitlines()
            if line.startswith(("python -m disagg_mpi", "mpirun "))]

pytestmark = [pytest.mark.model, pytest.mark.openmpi_only]


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str, model: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "Water boils at", "max_tokens": 4}) + "\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    # The names that a user's shell would find in the activated environment.
    folders = f"{Path(sys.executable).parent}{os.pathsep}{Path(find_mpirun()).parent}"
    env = {**job_environment(), "PATH": f"{folders}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=tmp_path, env=env, text=True, capture_output=True,
                          timeout=180, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert done.stdout.strip() or (tmp_path / "results.jsonl").read_text()


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
