"""A server under real mpirun, with the public clients of what it speaks, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.http as httpclient
from inprocess import save_tiny_model
from mpirun import MpiJob, find_mpirun, job_environment
from serving import ServedJob, save_byte_tokenizer
from serving_job import ServingJob

ROOT = Path(__file__).resolve().parent.parent.parent
REPOSITORY = ROOT / "examples" / "model_repository"
PROMPT, ANSWER = "Machine learning is", " a process of adapting to new information"
SECONDS = 30.0
LONG = {"prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServingJob]:
    """The guide's own set-up: one context and one generation rank, by a model repository."""
    folder = tmp_path_factory.mktemp("served")
    with ServingJob(3, folder, "--model-repository", str(REPOSITORY)) as job:
        yield job
        job.send_signal(signal.SIGINT, 0)
        result = job.finish(SECONDS)
        assert result.returncode == 130, result.text
        assert "Traceback" not in result.stderr, result.text
        assert not job.has_addresses
        result.assert_clean()


def tensors(module: Any, text: str, max_tokens: int, **others: Any) -> list[Any]:
    """The inputs that the guide's client sends."""
    found = []
    for name, kind, value in (("text_input", "BYTES", np.array([[text]], object)),
                              ("max_tokens", "INT32", np.array([[max_tokens]], np.int32)),
                              *((name, "BOOL", np.array([[value]])) for name, value in others.items())):
        found.append(module.InferInput(name, [1, 1], kind))
        found[-1].set_data_from_numpy(value)
    return found


# ---- the guide's client, and its kin ----


@pytest.mark.parametrize("stream", [False, True])
def test_the_guides_client(server: ServingJob, stream: bool) -> None:
    answers: list[Any] = []
    with grpcclient.InferenceServerClient(server.grpc) as client:
        client.start_stream(callback=lambda result, error: answers.append(error or result))
        client.async_stream_infer("ensemble", tensors(
            grpcclient, PROMPT, 8, stream=stream), request_id="1", enable_empty_final_response=True)
        client.stop_stream()
    text = "".join(answer.as_numpy("text_output")[0].decode() for answer in answers)
    assert len(answers) == (8 if stream else 1)
    assert text.startswith(ANSWER)
    last = answers[-1].get_response()
    assert last.id == "1" and last.parameters["triton_final_response"].bool_param


@pytest.mark.openmpi_only
def test_kserve_over_http(server: ServingJob) -> None:
    with httpclient.InferenceServerClient(server.http.removeprefix("http://")) as client:
        assert client.is_server_ready() and client.is_model_ready("ensemble")
        names = [model["name"] for model in client.get_model_repository_index()]
        assert names == ["ensemble", "preprocessing", "disaggregated_serving_bls", "postprocessing",
                         "context", "generation"]
        result = client.infer("ensemble", tensors(httpclient, PROMPT, 8))
        assert result.as_numpy("text_output")[0].decode().startswith(ANSWER)


# ---- OpenAI's ----


@pytest.mark.openmpi_only
def test_openais_client(server: ServingJob) -> None:
    client = openai.OpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list()
    whole = client.completions.create(model=model.id, prompt=PROMPT, max_tokens=8, temperature=0)
    assert whole.choices[0].text.startswith(ANSWER)
    assert whole.usage is not None and whole.usage.completion_tokens == 8
    pieces = client.completions.create(
        model=model.id, prompt=PROMPT, max_tokens=8, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    chat = client.chat.completions.create(
        model=model.id, messages=[{"role": "user", "content": "Name a person."}], max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": {
            "type": "object", "properties": {"name": {"type": "string", "maxLength": 20}},
            "required": ["name"], "additionalProperties": False}}})
    assert set(json.loads(chat.choices[0].message.content or "")) == {"name"}
    with pytest.raises(openai.BadRequestError, match="context length"):
        client.completions.create(model=model.id, prompt=[1] * 9000, max_tokens=8)


def test_a_client_that_leaves_frees_both_sides_within_a_second(server: ServingJob) -> None:
    def leave_at(after: float) -> None:
        with httpx.Client() as client, client.stream(
                "POST", f"{server.http}/v1/completions", json=LONG, timeout=SECONDS) as response:
            threading.Timer(after, client.close).start()
            for _ in response.iter_raw():
                time.sleep(after)
                break

    leaving = [threading.Thread(target=leave_at, args=(0.1 * i,)) for i in range(8)]
    for thread in leaving:
        thread.start()
    for thread in leaving:
        thread.join()
    end = time.monotonic() + 1.0
    while server.metric("disagg_mpi_open_requests") or server.metric("disagg_mpi_kv_blocks_used"):
        assert time.monotonic() < end, "not freed within a second"
        time.sleep(0.02)


@pytest.mark.openmpi_only
def test_metrics_and_health(server: ServingJob) -> None:
    before = server.metric("disagg_mpi_generated_tokens_total")
    httpx.post(f"{server.http}/v1/completions", json={"prompt": PROMPT, "max_tokens": 5}, timeout=SECONDS)
    assert server.metric("disagg_mpi_generated_tokens_total") == before + 5
    assert server.metric("disagg_mpi_handovers_total") > 0
    assert server.metric("nv_inference_request_success", model="ensemble") > 0
    assert server.metric("nv_trt_llm_kv_cache_block_metrics", kv_cache_block_type="max", model="context") > 0
    assert httpx.get(f"{server.http}/health").json() == {"status": "ok"}


# ---- its ends ----


@pytest.mark.openmpi_only
def test_launch_lets_open_requests_end(model: Path, tmp_path: Path) -> None:
    """The guide's line as typed, and one Ctrl-C at it."""
    address = tmp_path / "address"
    words = ["--world_size", "3", "--tensorrt_llm_model_name", "context,generation", "--multi-model",
             "--disable-spawn-processes", "--http_port", "0", "--grpc_port", "0", "--metrics_port", "0", "--",
             "--address-file", str(address)]
    folder = Path(find_mpirun()).parent
    env = {**job_environment(), "OMP_NUM_THREADS": "1",
           "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    line = [sys.executable, str(ROOT / "scripts" / "launch_triton_server.py"), *words]
    with subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True) as script:
        try:
            end = time.monotonic() + 60
            while not address.exists():
                assert script.poll() is None and time.monotonic() < end
                time.sleep(0.05)
            base = address.read_text().splitlines()[0].removeprefix("http=")
            body = {**LONG, "max_tokens": 60}
            with httpx.stream("POST", f"{base}/v1/completions", json=body, timeout=SECONDS) as response:
                lines = response.iter_lines()
                next(lines)
                script.send_signal(signal.SIGINT)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]" and len(rest) == 60
            assert script.wait(SECONDS) == 130
        finally:
            script.kill()
        stderr = script.stderr.read() if script.stderr else ""
    assert "ending: 1 open requests have 10 s" in stderr, stderr
    assert re.search(r"\+ .*mpirun.* serve --model-repository", stderr), stderr
    assert not address.exists()


def test_a_rank_that_dies_ends_streams_and_server(model: Path, tmp_path: Path) -> None:
    with ServingJob(3, tmp_path) as job:
        with pytest.raises(httpx.HTTPError), httpx.stream(
                "POST", f"{job.http}/v1/completions", json=LONG, timeout=SECONDS) as response:
            for number, _ in enumerate(response.iter_lines()):
                if number == 5:
                    job.send_signal(signal.SIGKILL, 2)
        result = job.finish(SECONDS)
    assert result.returncode not in (0, 130), result.text
    result.assert_clean()


@pytest.mark.openmpi_only
def test_copies_with_participant_and_device_ids(tmp_path: Path) -> None:
    """The last section of the guide: two copies of each model, on two ranks each (tp2, and here pp2 too)."""
    model = save_tiny_model(tmp_path / "tiny", eos_token_id=0)
    tokenizer = save_byte_tokenizer(model)
    repository = tmp_path / "repository"
    shutil.copytree(REPOSITORY, repository)
    for name, stages, ranks in (("context", 1, "1,2;3,4"), ("generation", 2, "5,6;7,8")):
        file = repository / name / "config.pbtxt"
        text = re.sub(r"count: \d+", "count: 2", file.read_text())
        for key, value in (("participant_ids", ranks), ("gpu_device_ids", "0,1;2,3"),
                           ("pipeline_parallel_size", stages)):
            text += f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}\n'
        file.write_text(text)
    scored = {"prompt": "hello", "max_tokens": 8, "temperature": 0, "echo": True, "logprobs": 2}
    guided = {"prompt": ["hello"] * 4, "max_tokens": 8, "guided_regex": "[0-9]{3}", "seed": 1}
    with contextlib.closing(ServedJob(model, tokenizer)) as alone:
        (own,) = httpx.post(f"{alone.listen()}/v1/completions", json=scored).json()["choices"]
    options = ("--model-repository", str(repository), "--model", str(model), "--kv-tokens", "1024")
    with ServingJob(9, tmp_path, *options) as job:
        found = [httpx.post(f"{job.http}/v1/completions", json=body, timeout=SECONDS).json()["choices"]
                 for body in (scored, guided)]
        for role, rank in (("context", 1), ("context", 3), ("generation", 5), ("generation", 7)):
            assert job.metric("disagg_mpi_kv_blocks_total", role=role, rank=str(rank))
        job.send_signal(signal.SIGINT, 0)
        job.finish(SECONDS).assert_clean()
    (choice,) = found[0]
    assert choice["text"] == own["text"]
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx(
        own["logprobs"]["token_logprobs"][1:], rel=1e-4)
    assert all(re.fullmatch("[0-9]{3}", choice["text"]) for choice in found[1]), found[1]


@pytest.mark.openmpi_only
def test_too_few_ranks_and_a_repository_that_is_none(tmp_path: Path) -> None:
    for num_ranks, repository, text in ((2, REPOSITORY, "mpirun -n 3"), (3, tmp_path, str(tmp_path))):
        with MpiJob(num_ranks, ["-m", "disagg_mpi", "serve", "--model-repository", str(repository)]) as job:
            result = job.finish(SECONDS)
        assert result.returncode == 2, result.text
        assert result.stderr.count("Error: ") == 1 and text in result.stderr, result.text
