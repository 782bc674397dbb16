"""Real jobs on TensorRT-LLM's double: the whole start, both phases in different processes, and the end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import httpx
import pytest
import trtllm_double as library
from inprocess import save_ascii_tokenizer
from mpirun import ROOT, run_job
from serving_job import ServingJob

PROMPTS = [[5, 9, 100, 3], [64, 1, 1, 42, 17], [8]]


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """Options of a job with an engine for each role."""
    words = ["--engine", "tensorrt_llm", "--model", str(save_ascii_tokenizer(tmp_path / "model"))]
    for role in ("context", "generation", "aggregated"):
        words += [f"--{role}-engine-dir", str(library.save_engine(tmp_path / role))]
    return words


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """Where ranks find the double, and where it puts its cache."""
    (tmp_path / "kv").mkdir()
    return {"TRTLLM_DOUBLE_DIR": str(tmp_path / "kv"), "PYTHONPATH": os.pathsep.join(
        map(str, (ROOT, ROOT / "tests" / "unit", ROOT / "tests" / "jobs" / "trtllm_stub")))}


def wide(job: list[str], role: str, folder: Path, tp: int, pp: int) -> list[str]:
    """The options with an engine of another shape for ``role``."""
    return [*job, f"--{role}-engine-dir", str(library.save_engine(folder / "wide" / role, tp=tp, pp=pp))]


@pytest.mark.parametrize(("num_ranks", "shapes"), [
    (3, []), (5, ["--context", "tp2", "--generation", "2"]), (2, ["--aggregated", "1"])],
    ids=["1+1", "tp2+2", "aggregated"])
def test_tokens_of_a_file_of_prompts(
        num_ranks: int, shapes: list[str], job: list[str], env: dict[str, str], tmp_path: Path) -> None:
    if "tp2" in shapes:
        job = wide(job, "context", tmp_path, 2, 1)
    questions, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    questions.write_text("".join(json.dumps(
        {"id": str(number), "prompt_token_ids": prompt, "max_tokens": 9, "ignore_eos": True}) + "\n"
        for number, prompt in enumerate(PROMPTS * 4)))
    done = run_job(num_ranks, ["-m", "disagg_mpi", "run", *job, *shapes, "--check",
                               "--input", str(questions), "--output", str(answers)], timeout=90, env=env)
    assert done.returncode == 0, done.text
    found = {int(line["id"]): line["token_ids"]
             for line in map(json.loads, answers.read_text().splitlines())}
    assert found == {number: library.text_of(prompt, 9) for number, prompt in enumerate(PROMPTS * 4)}
    assert "integrity: no block and no transfer is left over" in done.stderr
    assert "TensorRT-LLM on " in done.stderr
    assert not list(Path(env["TRTLLM_DOUBLE_DIR"]).iterdir())
    done.assert_clean()


@pytest.mark.openmpi_only
def test_a_server_streams_text_token_by_token(job: list[str], env: dict[str, str], tmp_path: Path) -> None:
    with ServingJob(3, tmp_path, *job, "--check", env=env) as server:
        with httpx.stream("POST", f"{server.http}/v1/completions", timeout=30, json={
                "prompt": PROMPTS[0], "max_tokens": 6, "stream": True, "ignore_eos": True}) as answer:
            chunks = [json.loads(line[6:]) for line in answer.iter_lines()
                      if line.startswith("data: {")]
        refused = httpx.post(f"{server.http}/v1/completions", timeout=30, json={
            "prompt": PROMPTS[0], "max_tokens": 6, "logit_bias": {"3": 1}})
        server.send_signal(signal.SIGINT, 0)
        done = server.finish(30)
    assert done.returncode == 130 and "Traceback" not in done.stderr, done.text
    assert "checked: nothing is left over" in done.stderr
    done.assert_clean()
    assert len(chunks) >= 3 and chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert refused.status_code == 400 and "logit_bias is not to be had" in refused.text


@pytest.mark.openmpi_only
def test_what_cannot_start_is_said_once(job: list[str], env: dict[str, str], tmp_path: Path) -> None:
    def fault(*more: str, num_ranks: int = 3, **changes: str) -> str:
        done = run_job(num_ranks, ["-m", "disagg_mpi", "run", "--prompt", "x", *job, *more], timeout=60,
                       env={**env, **changes})
        assert done.returncode == 2, done.text
        assert "Traceback" not in done.stderr and done.stderr.count("Error: ") == 1, done.text
        return done.stderr

    without = fault(PYTHONPATH=str(ROOT))
    assert "tensorrt_llm.bindings.executor cannot be imported here" in without
    assert "pip install 'disagg_mpi[tensorrt_llm]'" in without
    assert "found nothing there" in fault("--context-engine-dir", str(tmp_path / "none"))
    assert "give --context tp2pp1" in fault(*wide([], "context", tmp_path, 2, 1))
    assert "transport means nothing to engine tensorrt_llm" in fault("--transport", "mpi")
