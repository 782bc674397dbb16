"""benchmarks/gpu_engine.py on the emulated device: every part runs; its figures mean nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from disagg_mpi.gpus import visible_gpus

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "benchmarks" / "gpu_engine.py")


def run(tmp_path: Path, *words: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "emulated", "--tiny", "--json", str(tmp_path / "found.json"),
         *words], text=True, capture_output=True, timeout=100, check=False)
    return done, json.loads((tmp_path / "found.json").read_text())


def test_generation_steps(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--part", "decode", "--profile")
    assert done.returncode == 0, done.stderr
    assert "No figure below means anything" in done.stdout
    assert "### Generation steps" in done.stdout
    assert [(row["batch"], row["steps"]) for row in found["decode"]] == [
        (1, "replayed"), (4, "replayed"), (1, "whole executor"), (4, "whole executor"),
        (1, "not captured"), (4, "not captured")]
    for row in found["decode"]:
        assert row["seconds"] > 0 and row["floor"] > 0
        assert (row["replay"] is not None) == (row["steps"] == "replayed")
        if row["steps"] == "whole executor":
            continue
        assert row["host"] > 0
        assert {"message", "tables", "upload", "attention's plan", "draws"} <= set(row["host_parts"])
    assert [each["what"] for each in found["profile"]] == [
        "Generation step, batch 1", "Generation step, batch 4"]
    assert "failed" not in found


def test_context_steps(tmp_path: Path) -> None:
    done, found = run(tmp_path, "--part", "prefill")
    assert done.returncode == 0, done.stderr
    assert [row["what"] for row in found["prefill"]] == [
        "one prompt of 64 tokens", "4 prompts of 16, one step", "one prompt of 64, 4 steps of 16"]
    assert found["prefill"][0]["flops"] == found["prefill"][2]["flops"] > found["prefill"][1]["flops"]


def test_a_part_that_takes_too_long_ends_and_is_named(tmp_path: Path) -> None:
    """``all`` starts a process for each part. The limit is too short for torch's import."""
    done, found = run(tmp_path, "--part", "all", "--limit", "1")
    assert done.returncode == 1
    for part in ("startup", "decode", "prefill"):
        assert f"**{part} did not come to its end**" in done.stdout
    assert "Timeout (0:00:01)!" in done.stderr  # and where it was
    assert found["machine"] == "emulated"


@pytest.mark.parametrize("command", [
    (sys.executable, "benchmarks/gpu_engine.py", "--part", "decode"),
    (sys.executable, "benchmarks/gpu_pays.py"),
    (sys.executable, "benchmarks/gpu_all.py"), ("make", "gpu-bench", f"PYTHON={sys.executable}")])
def test_without_a_gpu_they_say_so(command: tuple[str, ...]) -> None:
    if visible_gpus():
        pytest.skip("there is a GPU")
    if shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    done = subprocess.run(command, text=True, capture_output=True, timeout=100, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "found no CUDA device" in done.stderr and "--device emulated --tiny" in done.stderr


def test_all_of_it_on_two_gpus_shares_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_all

    lines = [" ".join(step.words) for step in gpu_all.steps(
        ["handover", "pays"], None, None, emulated=False, gpus=["0", "1"])]
    assert len(lines) == 3 and all("--gpus 0,1" in line for line in lines)
    assert not any("--mps" in line for line in lines) and "--tp 2" in lines[-1]
