"""The command line as a new user types it, rightly and wrongly: real mpirun, the real model."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mpirun import MpiJob, mpi_family, run_job

ROOT = Path(__file__).resolve().parent.parent.parent
MODULE = ["-m", "disagg_mpi"]
PROMPT = "Machine learning is"
ANSWER = " a process of adapting to new information"

pytestmark = pytest.mark.model


def run(*arguments: str, num_ranks: int = 3, timeout: float = 120, env: dict | None = None):
    return run_job(num_ranks, [*MODULE, *arguments], timeout=timeout, env=env)


def our_lines(text: str) -> list[str]:
    """stderr without what mpirun itself adds when a process leaves with a code."""
    return [line for line in text.splitlines() if re.match(r"\w+Error: ", line)]


def by_hand(*arguments: str, timeout: float = 120, **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *MODULE, *arguments], text=True, capture_output=True,
                          timeout=timeout, check=False, **kwargs)


# ---- rightly ----


def test_run_streams_the_answer_and_says_where_the_time_went(model: Path) -> None:
    job = run("run", "--prompt", PROMPT, "--max-tokens", "16", "--check")
    assert job.returncode == 0, job.text
    assert PROMPT + ANSWER in job.stdout
    for row in ("queue", "context", "hand-over", "first token", "second token", "each next token", "total"):
        assert re.search(rf"^  {row}\s+[\d.]+ (s|ms|µs)", job.stdout, re.M), row
    assert "0 bytes moved (shared)" in job.stdout
    assert "integrity: no block and no transfer is left over" in job.stderr
    job.assert_clean()


def test_hand_over_by_messages_reports_bytes_and_rate(model: Path) -> None:
    job = run("run", "--prompt", PROMPT, "--transport", "mpi", "--max-tokens", "4", "--check")
    assert job.returncode == 0, job.text
    assert re.search(r"hand-over .* MiB moved, [\d.]+ GB/s \(mpi\)", job.stdout), job.text


def test_launch_composes_the_line_and_passes_the_code_on(model: Path) -> None:
    done = by_hand("launch", "-n", "2", "--", "run", "--aggregated", "1", "--quiet", "--prompt", PROMPT,
                   "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert PROMPT + ANSWER[:20] in done.stdout
    assert "mpirun -n 2" in done.stderr
    done = by_hand("launch", "-n", "2", "--", "run", "--prompt", "x")
    assert done.returncode == 2
    assert done.stderr.count("WorldTooSmallError: 2 ranks, this layout needs 3 = ") == 1
    assert "prterun" not in done.stderr


@pytest.mark.openmpi_only
def test_json_chat_n_and_sampling(model: Path) -> None:
    job = run("run", "--json", "--chat", "--prompt", "Name a colour.", "--temperature", "0.9", "--seed", "3",
              "-k", "2", "--max-tokens", "8", "--logprobs", "2", "--top-p", "0.95")
    assert job.returncode == 0, job.text
    (line,) = job.stdout.splitlines()
    data = json.loads(line)
    assert len(data["choices"]) == 2
    assert data["usage"]["completion_tokens"] == sum(len(c["token_ids"]) for c in data["choices"])
    assert len(data["logprobs"]) == len(data["token_ids"])


@pytest.mark.openmpi_only
def test_everything_from_a_config_file(model: Path, tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text(f'model = "{model}"\ncontext = 1\ngeneration = 2\n[sampling]\nmax_tokens = 6\n'
                      f'[run]\nprompt = ["{PROMPT}", "Water boils at"]\n')
    job = run("run", "--config", str(config), num_ranks=4)
    assert job.returncode == 0, job.text
    assert PROMPT + " a process of adapting to new" in job.stdout
    assert "Water boils at" in job.stdout


def batch_file(path: Path, count: int, max_tokens: int) -> None:
    path.write_text("".join(json.dumps(
        {"id": f"q{n}", "prompt": f"Question {n}: what is {n} plus {n}? Answer:", "max_tokens": max_tokens,
         "ignore_eos": True}) + "\n" for n in range(count)))


@pytest.mark.openmpi_only
def test_batch_reports_bad_lines_and_resumes_without_repeating(model: Path, tmp_path: Path) -> None:
    questions, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    batch_file(questions, 4, 4)
    with questions.open("a") as file:
        file.write('not json\n{"id": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}\n'
                   '{"id": "t", "prompt_token_ids": [1, 2, 3], "max_tokens": 3}\n'
                   '{"id": "q1", "prompt": "x"}\n'
                   '{"id": "z", "prompt": "x", "temprature": 1}\n{"id": "long", "prompt_token_ids": ['
                   + "5, " * 9000 + "5]}\n")
    job = run("run", "--input", str(questions), "--output", str(answers), "--check")
    assert job.returncode == 1, job.text
    found = {data["id"]: data for data in map(json.loads, answers.read_text().splitlines())}
    good = {name for name, data in found.items() if "error" not in data}
    assert good == {"q0", "q1", "q2", "q3", "m", "t"}
    assert found["5"]["line"] == 5
    assert "used on line 2" in found["q1 (line 8)"]["error"]
    assert "temprature" in found["z"]["error"]
    assert "8192" in found["long"]["error"]
    assert "line 5: not valid JSON" in job.stderr
    first = answers.read_text()
    with answers.open("a") as file:
        file.write('{"id": "q0", "text": "cut o')
    job = run("run", "--input", str(questions), "--output", str(answers))
    assert "6 were done before" in job.stderr, job.text
    lines = answers.read_text().splitlines()
    assert sorted(lines)[:6] and len(lines) == 10
    for line in first.splitlines():
        if '"error"' not in line:
            assert line in lines


def test_killed_batch_goes_on_where_it_stopped(model: Path, tmp_path: Path) -> None:
    questions, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    batch_file(questions, 300, 24)
    arguments = [*MODULE, "run", "--input", str(questions), "--output", str(answers)]
    with MpiJob(3, arguments) as job:
        while not answers.exists() or answers.read_text().count("\n") < 10:
            assert job.process.poll() is None
            time.sleep(0.05)
        job.send_signal(signal.SIGKILL, rank=2)
        result = job.finish(10)
    assert result.returncode != 0
    result.assert_clean()
    done = answers.read_text().count("\n")
    assert 10 <= done < 300
    questions.write_text("".join(questions.read_text().splitlines(keepends=True)[: done + 5]))
    again = run_job(3, arguments, timeout=240)
    assert again.returncode == 0, again.text
    assert int(re.search(r"(\d+) were done before", again.stderr)[1]) > 0
    ids = [json.loads(line)["id"] for line in answers.read_text().splitlines()]
    assert len(ids) == len(set(ids))
    assert {f"q{n}" for n in range(done + 5)} <= set(ids)


def test_ctrl_c_ends_a_batch_and_keeps_what_is_done(model: Path, tmp_path: Path) -> None:
    questions, answers = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    batch_file(questions, 300, 24)
    with MpiJob(3, [*MODULE, "run", "--input", str(questions), "--output", str(answers)],
                terminal=True) as job:
        while not answers.exists() or answers.read_text().count("\n") < 3:
            assert job.process.poll() is None
            time.sleep(0.05)
        job.press_ctrl_c()
        result = job.finish(10)
    assert result.returncode != 0
    assert "Traceback" not in result.stderr, result.text
    result.assert_clean()
    for line in answers.read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_that_is_killed_ends_the_job(rank: int, model: Path) -> None:
    with MpiJob(3, [*MODULE, "run", "--prompt", PROMPT, "--max-tokens", "4000", "--ignore-eos"]) as job:
        job.wait_for(ANSWER[:12])
        job.send_signal(signal.SIGKILL, rank=rank)
        result = job.finish(10)
    assert result.returncode != 0
    result.assert_clean()


def test_deadline_is_end_to_end(model: Path) -> None:
    started = time.monotonic()
    job = run("run", "--prompt", PROMPT, "--max-tokens", "4000", "--ignore-eos", "--deadline", "2", "--check")
    assert job.returncode == 1, job.text
    assert "the deadline passed before it was done" in job.stdout
    assert "integrity: no block and no transfer is left over" in job.stderr
    assert time.monotonic() - started < 60


# ---- without MPI ----


def test_layout_prints_the_rank_map_and_memory(model: Path) -> None:
    done = by_hand("layout", "--context", "2", "--generation", "1")
    assert done.returncode == 0
    assert "4 = 1 orchestrator + 2 context + 1 generation" in done.stdout
    assert "LlamaForCausalLM" in done.stdout
    assert json.loads(by_hand("layout", "--aggregated", "3", "--json").stdout)["world_size"] == 4


def test_fetch_prints_the_directory_last(model: Path) -> None:
    done = by_hand("fetch")
    assert done.returncode == 0
    assert Path(done.stdout.splitlines()[-1]) == model


def test_import_and_help_start_neither_mpi_nor_torch() -> None:
    code = ("import sys, disagg_mpi; disagg_mpi.JobConfig; from disagg_mpi.cli.main import cli; "
            "print([m for m in ('mpi4py.MPI', 'torch', 'transformers') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    for command in ([], ["run"], ["launch"], ["layout"], ["doctor"], ["fetch"]):
        done = by_hand(*command, "--help")
        assert done.returncode == 0 and "Usage: python -m disagg_mpi" in done.stdout


def test_doctor_alone() -> None:
    done = by_hand("doctor")
    assert done.returncode in (0, 1), done.stderr
    assert mpi_family() in done.stdout.lower().replace(" ", "")


# ---- wrongly: one clear line from rank 0 ----


@pytest.mark.parametrize(("arguments", "num_ranks", "kind", "words"), [
    (["--prompt", "x"], 2, "WorldTooSmallError", ["2 ranks", "needs 3 = 1 orchestrator", "mpirun -n 3"]),
    (["--prompt", "x"], 4, "WorldTooLargeError", ["4 ranks", "mpirun -n 3"]),
    (["--prompt", "x", "--model", "/no/such/model"], 3, "ModelError", ["/no/such/model"]),
    (["--prompt", ""], 3, "ConfigError", ["prompt is empty"]),
    ([], 3, "ConfigError", ["--prompt"]),
    (["--prompt", "x", "--context", "two"], 3, "ConfigError", ["two", "2xtp3,tp1pp2"]),
    (["--prompt", "x", "--local-context", "two"], 3, "ConfigError", ["two", "--help"]),
    (["--prompt", "x", "--context-participant-ids", "2", "--generation-participant-ids", "2"], 3,
     "LayoutError", ["rank 2 is named by context 0 and by generation 0"]),
    (["--prompt", "x", "--generation", "0"], 3, "ConfigError", ["no generation instance"]),
    (["--prompt", "x", "--temperature", "-1"], 3, "ConfigError", ["temperature is -1"]),
    (["--prompt", "x", "--kv-tokens", "99999999"], 3, "ConfigError", ["GiB", "--kv-tokens"]),
    (["--input", "/no/such.jsonl", "--output", "/tmp/x"], 3, "InputError", ["/no/such.jsonl"]),
    (["--input", __file__, "--output", "/no/such/out.jsonl"], 3, "InputError", ["/no/such"]),
])
def test_usage_errors_are_one_line_and_code_2(
    arguments: list[str], num_ranks: int, kind: str, words: list[str]
) -> None:
    job = run("run", *arguments, num_ranks=num_ranks, timeout=60)
    assert job.returncode == 2, job.text
    (line,) = our_lines(job.stderr)
    assert line.startswith(kind)
    for word in words:
        assert word in line, line
    assert "Traceback" not in job.stderr
    assert job.seconds < 30
    job.assert_clean(in_mpi_init=True)


@pytest.mark.openmpi_only
@pytest.mark.parametrize("text", [
    "\x00\x01garbage = [", "contxt = 1", "context = 'many'", "[sampling]\ntop_p = 7", "sampling = 3"])
def test_garbage_in_a_config_file(text: str, tmp_path: Path) -> None:
    config = tmp_path / "job.toml"
    config.write_text(text)
    job = run("run", "--config", str(config), "--prompt", "x", timeout=60)
    assert job.returncode == 2, job.text
    assert len(our_lines(job.stderr)) == 1, job.text
    assert str(config) in job.stderr or "top_p" in job.stderr


@pytest.mark.openmpi_only
def test_truncated_and_unknown_models(model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in model.iterdir():
        (cut / file.name).symlink_to(file)
    weights = cut / "model.safetensors"
    weights.unlink()
    with (model / "model.safetensors").open("rb") as source:
        weights.write_bytes(source.read(5_000_000))
    job = run("run", "--prompt", "x", "--model", str(cut), timeout=60)
    assert job.returncode == 2 and "model.safetensors" in our_lines(job.stderr)[0], job.text
    weights.unlink()
    weights.symlink_to(model / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (cut / "config.json").unlink()
    (cut / "config.json").write_text(json.dumps({**config, "model_type": "sorcery"}))
    job = run("run", "--prompt", "x", "--model", str(cut), timeout=60)
    assert job.returncode == 2 and "sorcery" in our_lines(job.stderr)[0], job.text


@pytest.mark.openmpi_only
def test_prompt_past_the_context_length_is_a_result_with_an_error(model: Path) -> None:
    job = run("run", "--json", "--prompt", "word " * 9000)
    assert job.returncode == 1, job.text
    assert "context length of 8192" in json.loads(job.stdout)["error"]


def test_no_mpirun_around_it_says_how_to_start(model: Path) -> None:
    done = by_hand("run", "--prompt", "x")
    assert done.returncode == 2
    assert len(our_lines(done.stderr)) == 1
    assert "mpirun -n 3" in done.stderr and "launch -n 3" in done.stderr


def test_full_disk_under_the_output(model: Path, tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    questions = tmp_path / "in.jsonl"
    batch_file(questions, 3, 2)
    job = run("run", "--input", str(questions), "--output", "/dev/full")
    assert job.returncode in (1, 2), job.text
    assert "No space left" in job.stderr and "Traceback" not in job.stderr
    job.assert_clean()
