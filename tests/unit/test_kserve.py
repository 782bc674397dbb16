"""KServe v2 as its clients see it: tritonclient's own, over gRPC and HTTP, against a job in this process."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import socket
import threading
from collections.abc import Callable
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as grpcaio
import tritonclient.http as httpclient
from kserving import (
    PATIENCE,
    TOKENS_PER_BLOCK,
    KserveJob,
    arrays,
    grpc_inputs,
    http_inputs,
    is_final,
    stream,
    text_of,
    wait_until,
)
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from disagg_mpi.errors import ConfigError
from disagg_mpi.frontend.kserve.rpc import make_grpc_server

Start = Callable[..., KserveJob]

# Long enough that nobody sees its end: a cancel has to.
LONG = {"max_tokens": 200, "stream": True}


def generate(job: KserveJob, path: str = "generate", **body: Any) -> httpx.Response:
    return httpx.post(f"http://{job.servers.http_url}/v2/models/ensemble/{path}", json=body, timeout=PATIENCE)


def events_of(body: str) -> list[Any]:
    return [json.loads(line.removeprefix("data: ")) for line in body.split("\n\n") if line]


def raw_request(identity: str, tensors: dict[str, Any], model: str = "ensemble") -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, id=identity)
    for tensor in grpc_inputs(tensors):
        request.inputs.append(tensor._get_tensor())
        request.raw_input_contents.append(tensor._get_content())
    return request


def raw_stream(job: KserveJob, *requests: Any) -> list[Any]:
    """The stream's messages themselves: tritonclient does not show the id of an error."""
    with grpc.insecure_channel(job.servers.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        return list(stub.ModelStreamInfer(iter(requests), timeout=PATIENCE))


# ---- the guide's client ----


def test_the_guides_client_streams(kserve: Start) -> None:
    job = kserve()
    tensors = arrays("Machine learning is", 16, stream=True, beam_width=1, temperature=1.0,
                     num_return_sequences=1, exclude_input_in_output=False)
    results = stream(job.servers.grpc_url, ("", tensors), outputs=["text_output"])
    expected = job.answer("Machine learning is", max_tokens=16)
    assert text_of(results) == expected.text
    assert [is_final(result) for result in results] == [False] * 15 + [True], "one message a token"
    assert all(result.as_numpy("text_output").shape == (1,) for result in results)
    assert all(result.as_numpy("batch_index") is None for result in results)
    job.assert_free()


@pytest.mark.parametrize("exclude", [None, False, True])
def test_without_stream_one_reply_has_all_and_begins_with_the_prompt(kserve: Start, exclude: Any) -> None:
    job = kserve()
    tensors = arrays("Machine", exclude_input_in_output=exclude)
    (result,) = stream(job.servers.grpc_url, ("a", tensors))
    assert text_of([result]) == ("" if exclude else "Machine") + job.answer("Machine", max_tokens=8).text
    assert is_final(result)
    assert result.get_response().id == "a"


def test_a_batch_of_several_sequences_says_whose_each_reply_is(kserve: Start) -> None:
    job = kserve()
    prompts = ["one", "another"]
    tensors = arrays(prompts, 6, stream=True, num_return_sequences=2, top_p=1.0, seed=7)
    results = stream(job.servers.grpc_url, ("b", tensors))
    for row, prompt in enumerate(prompts):
        expected = job.answer(prompt, max_tokens=6, n=2, temperature=1.0, seed=7)
        for choice in expected.choices:
            own = [result for result in results if result.as_numpy("batch_index").tolist() == [[row]]
                   and result.as_numpy("sequence_index").tolist() == [[choice.index]]]
            assert text_of(own) == choice.text
    assert [is_final(result) for result in results] == [False] * (len(results) - 1) + [True]
    job.assert_free()


def test_requests_of_one_stream_are_answered_by_id_and_errors_end_none_but_their_own(kserve: Start) -> None:
    job = kserve()
    prompts = {str(number): f"prompt {number}" for number in range(6)}
    requests = [raw_request(identity, arrays(prompt, 10, stream=True))
                for identity, prompt in prompts.items()]
    requests.insert(2, raw_request("no max_tokens", arrays(max_tokens=None)))
    requests.insert(4, raw_request("no model", arrays(), model="nothing"))
    requests.insert(5, raw_request("too long", arrays(max_tokens=1000, stream=True)))
    messages = raw_stream(job, *requests)
    errors = {each.infer_response.id: each.error_message for each in messages if each.error_message}
    assert set(errors) == {"no max_tokens", "no model", "too long"}
    assert "max_tokens" in errors["no max_tokens"]
    assert "unknown model" in errors["no model"]
    assert "context length" in errors["too long"]
    for identity, prompt in prompts.items():
        own = [each.infer_response for each in messages if each.infer_response.id == identity]
        text = b"".join(each.raw_output_contents[0][4:] for each in own).decode()
        assert text == job.answer(prompt, max_tokens=10).text
        finals = [each.parameters["triton_final_response"].bool_param for each in own]
        assert finals == [False] * 9 + [True]
    job.assert_free()


def test_the_asyncio_client_streams(kserve: Start) -> None:
    job = kserve()

    async def run() -> list[Any]:
        async def requests() -> Any:
            yield {"model_name": "ensemble", "inputs": grpc_inputs(arrays("async", 5, stream=True))}

        async with grpcaio.InferenceServerClient(job.servers.grpc_url) as client:
            return [item async for item in client.stream_infer(requests())]

    items = job.servers.run(run())
    assert [error for _, error in items] == [None] * 5
    assert text_of([result for result, _ in items]) == job.answer("async", max_tokens=5).text


# ---- one reply ----


def test_unary_calls_answer_a_batch_stacked(kserve: Start) -> None:
    job = kserve()
    tensors = arrays(["one", "another"], 5, exclude_input_in_output=True, return_log_probs=True)
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        result = client.infer("ensemble", grpc_inputs(tensors), request_id="x")
    texts = [job.answer(prompt, max_tokens=5).text for prompt in ("one", "another")]
    assert [text.decode() for text in result.as_numpy("text_output")] == texts
    assert result.as_numpy("batch_index").tolist() == [[0], [1]]
    assert result.as_numpy("output_log_probs").shape == (2, 1, 5)
    assert result.get_response().id == "x"


def test_stream_needs_a_call_with_many_replies(kserve: Start) -> None:
    job = kserve()
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="ModelStreamInfer") as error:
            client.infer("ensemble", grpc_inputs(arrays(stream=True)))
        assert error.value.status() == "StatusCode.INVALID_ARGUMENT"
    assert generate(job, text_input="a", max_tokens=2, stream=True).status_code == 400


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False, None])
@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_http_infer_in_json_and_binary(kserve: Start, binary_in: bool, binary_out: bool | None,
                                       compression: str | None) -> None:
    job = kserve()
    outputs = None if binary_out is None else [
        httpclient.InferRequestedOutput("text_output", binary_data=binary_out)]
    with httpclient.InferenceServerClient(job.servers.http_url) as client:
        result = client.infer(
            "ensemble", http_inputs(arrays("Machine é"), binary_data=binary_in), request_id="7",
            outputs=outputs, request_compression_algorithm=compression)
    (text,) = result.as_numpy("text_output")
    text = text if isinstance(text, str) else text.decode()
    assert text.startswith("Machine é")
    assert result.get_response()["id"] == "7"


def test_generate_and_generate_stream(kserve: Start) -> None:
    job = kserve()
    head = {"model_name": "ensemble", "model_version": "1", "sequence_id": 0, "sequence_start": False,
            "sequence_end": False}
    expected = job.answer("Machine", max_tokens=6).text
    # Empty words are how clients say that they have none; unknown fields are not looked at.
    whole = generate(job, text_input="Machine", max_tokens=6, bad_words="", stop_words="", foo={"a": [1]})
    assert (whole.status_code, whole.json()) == (200, {**head, "text_output": "Machine" + expected})
    streamed = generate(job, "generate_stream", text_input="Machine", max_tokens=6, stream=True)
    assert streamed.headers["content-type"].startswith("text/event-stream")
    events = events_of(streamed.text)
    assert len(events) == 6
    assert "".join(event.pop("text_output") for event in events) == expected
    assert all(event == head for event in events)
    once = generate(job, "generate_stream", text_input="Machine", max_tokens=6, exclude_input_in_output=True)
    assert [event["text_output"] for event in events_of(once.text)] == [expected]


# ---- what the tensors ask for ----


def test_log_probs_come_with_their_tokens(kserve: Start) -> None:
    job = kserve()
    results = stream(job.servers.grpc_url, ("a", arrays(stream=True, return_log_probs=True)))
    expected = [each.logprob for each in job.answer("Machine", max_tokens=8, logprobs=0).choices[0].logprobs]
    own = [result.as_numpy("output_log_probs") for result in results]
    assert all(each.shape == (1, 1, 1) for each in own)
    np.testing.assert_allclose(np.concatenate(own).ravel(), expected, rtol=1e-5)
    np.testing.assert_allclose([result.as_numpy("cum_log_probs").item() for result in results],
                               np.cumsum(expected), rtol=1e-5)


@pytest.mark.parametrize("streamed", [True, False])
def test_logits_and_perf_metrics_come_at_the_end(kserve: Start, streamed: bool) -> None:
    job = kserve()
    results = stream(job.servers.grpc_url, ("a", arrays(
        "Machine", 8, stream=streamed, return_generation_logits=True, return_perf_metrics=True,
        num_return_sequences=2)))
    expected = job.answer("Machine", max_tokens=8)
    last = [result for result in results if result.as_numpy("generation_logits") is not None]
    assert len(last) == 2
    assert len(results) == (16 if streamed else 2)
    assert [is_final(result) for result in results] == [False] * (len(results) - 1) + [True]
    for result in last:
        logits = result.as_numpy("generation_logits")
        assert logits.shape[:3] == (1, 1, 8)
        assert logits[0, 0].argmax(-1).tolist() == expected.token_ids, "greedy"
        times = [result.as_numpy(f"{name}_time_ns").item() for name in (
            "arrival", "first_scheduled", "first_token", "last_token")]
        assert times == sorted(times)
        blocks = {name: result.as_numpy(f"kv_cache_{name}_blocks").item()
                  for name in ("alloc_total", "alloc_new", "reused")}
        assert blocks["alloc_total"] == -(-(len("Machine") + 7) // TOKENS_PER_BLOCK)
        assert blocks["alloc_new"] + blocks["reused"] == blocks["alloc_total"]
    job.assert_free()


def test_context_logits_have_a_row_for_each_token_of_the_prompt(kserve: Start) -> None:
    job = kserve()
    (result,) = stream(job.servers.grpc_url, ("a", arrays("Machine", 1, return_context_logits=True)))
    logits = result.as_numpy("context_logits")
    assert logits.shape == (1, len("Machine"), job.orchestrator.limits.vocab_size)
    assert logits[0, -1].argmax() == job.answer("Machine", max_tokens=1).token_ids[0], "greedy"
    job.assert_free()


@pytest.mark.parametrize(("kind", "guide", "pattern"), [
    ("json_schema", '{"enum": [1234]}', "1234"),
    ("regex", "[0-9]{3}", "[0-9]{3}"),
    ("choice", '["yes", "no"]', "yes|no"),
    ("ebnf_grammar", 'root ::= "a" [bc]', "a[bc]"),
])
def test_an_output_is_what_its_guide_says(kserve: Start, kind: str, guide: str, pattern: str) -> None:
    job = kserve(eos=(0,))
    (result,) = stream(job.servers.grpc_url, ("a", arrays(
        "Machine", 20, exclude_input_in_output=True, guided_decoding_guide_type=kind,
        guided_decoding_guide=guide)))
    assert re.fullmatch(pattern, text_of([result])), text_of([result])


def test_a_guide_that_is_none_is_the_clients_mistake(kserve: Start) -> None:
    job = kserve(eos=(0,))
    answer = generate(job, text_input="a", max_tokens=5, guided_decoding_guide_type="regex",
                      guided_decoding_guide="(")
    assert answer.status_code == 400 and "guided is no valid grammar" in answer.json()["error"]
    job.assert_free()


def test_bad_words_never_come_and_biased_ones_do(kserve: Start) -> None:
    job = kserve()
    text = job.answer("Machine", max_tokens=8).text
    other = generate(job, text_input="Machine", max_tokens=8, bad_words=[text[2]],
                     exclude_input_in_output=True).json()["text_output"]
    assert text[2] not in other and other[:2] == text[:2]
    biased = generate(job, text_input="Machine", max_tokens=8, embedding_bias_words=["x"],
                      embedding_bias_weights=[100.0], exclude_input_in_output=True).json()["text_output"]
    assert biased == "x" * 8


def test_stop_words_end_id_and_seed(kserve: Start) -> None:
    job = kserve()
    whole = job.answer("Machine", max_tokens=12)
    stop = whole.text[4:6]
    found = generate(job, text_input="Machine", max_tokens=12, stop_words=["", stop],
                     exclude_input_in_output=True).json()["text_output"]
    assert found == whole.text[: whole.text.index(stop)]
    end = whole.token_ids[3]
    found = generate(job, text_input="Machine", max_tokens=12, end_id=end,
                     exclude_input_in_output=True).json()["text_output"]
    assert found == job.answer("Machine", max_tokens=12, stop_token_ids=(end,)).text
    sampled = {"text_input": "Machine", "max_tokens": 12, "top_k": 50, "temperature": 2.0}
    first, second, other = (generate(job, **sampled, seed=seed).json()["text_output"] for seed in (5, 5, 6))
    assert first == second != other


def test_only_outputs_that_were_asked_for_come(kserve: Start) -> None:
    job = kserve()
    results = stream(job.servers.grpc_url, ("a", arrays(stream=True, return_log_probs=True)),
                     outputs=["cum_log_probs"])
    assert [[output.name for output in result.get_response().outputs] for result in results] == [
        ["cum_log_probs"]] * 8
    (error,) = stream(job.servers.grpc_url, ("a", arrays()), outputs=["nothing"])
    assert "unexpected inference output 'nothing'" in str(error)


# ---- models ----


def test_what_clients_ask_of_models_over_grpc(kserve: Start) -> None:
    job = kserve()
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("ensemble", "1")
        assert not client.is_model_ready("nothing") and not client.is_model_ready("ensemble", "2")
        assert "statistics" in client.get_server_metadata().extensions
        metadata = client.get_model_metadata("ensemble")
        shapes = {tensor.name: (tensor.datatype, list(tensor.shape)) for tensor in metadata.inputs}
        assert shapes["text_input"] == ("BYTES", [-1, 1])
        assert shapes["stop_words"] == ("BYTES", [-1, -1])
        config = client.get_model_config("ensemble").config
        assert config.model_transaction_policy.decoupled
        steps = [step.model_name for step in config.ensemble_scheduling.step]
        assert steps == ["preprocessing", "disaggregated_serving_bls", "postprocessing"]
        names = {model.name for model in client.get_model_repository_index().models}
        assert names == {*steps, "ensemble", "context", "generation"}
        for name in names:
            assert client.get_model_config(name).config.name == name
        with pytest.raises(InferenceServerException, match="unknown model") as error:
            client.get_model_metadata("nothing")
        assert error.value.status() == "StatusCode.NOT_FOUND"
        with pytest.raises(InferenceServerException, match="version 2"):
            client.infer("ensemble", grpc_inputs(arrays()), model_version="2")
        with pytest.raises(InferenceServerException, match="send text_input to: ensemble"):
            client.infer("context", grpc_inputs(arrays()))


def test_what_clients_ask_of_models_over_http(kserve: Start) -> None:
    job = kserve()
    with httpclient.InferenceServerClient(job.servers.http_url) as client:
        assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("ensemble", "1")
        assert not client.is_model_ready("nothing")
        assert client.get_server_metadata()["name"] == "disagg_mpi"
        assert client.get_model_metadata("ensemble")["inputs"][0] == {
            "name": "text_input", "datatype": "BYTES", "shape": [-1, 1]}
        config = client.get_model_config("ensemble")
        assert config["input"][0]["dims"] == [1]
        assert config["ensemble_scheduling"]["step"][1]["model_name"] == "disaggregated_serving_bls"
        assert config["model_transaction_policy"] == {"decoupled": True}
        assert {"name": "context", "version": "1", "state": "READY", "reason": ""} in (
            client.get_model_repository_index())
        with pytest.raises(InferenceServerException, match="unknown model") as error:
            client.get_model_config("nothing")
        assert error.value.status() == "404"


def test_statistics_grow_on_the_ensemble_and_all_that_it_passes_through(kserve: Start) -> None:
    job = kserve()
    for _ in range(3):
        stream(job.servers.grpc_url, ("a", arrays(["a", "b"], stream=True)))
    stream(job.servers.grpc_url, ("a", arrays(beam_width=4)))
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        found = {each.name: each for each in client.get_inference_statistics().model_stats}
        (alone,) = client.get_inference_statistics("ensemble").model_stats
    assert set(found) == {model.name for model in job.servers.models}
    assert alone == found["ensemble"]
    for each in found.values():
        assert (each.inference_count, each.execution_count) == (6, 3)
        assert each.inference_stats.queue.count == each.inference_stats.success.count == 3
        assert each.last_inference > 0
    assert found["ensemble"].inference_stats.fail.count == 1
    assert found["ensemble"].inference_stats.success.ns > found["context"].inference_stats.success.ns > 0
    with httpclient.InferenceServerClient(job.servers.http_url) as client:
        (over_http,) = client.get_inference_statistics("ensemble")["model_stats"]
    assert over_http["inference_stats"]["queue"]["count"] == 3


def test_a_job_that_makes_no_progress_is_not_ready(kserve: Start) -> None:
    job = kserve(why_not_ready=lambda: "rank 3 is silent")
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        assert client.is_server_live()
        assert not client.is_server_ready() and not client.is_model_ready("ensemble")
        states = {(each.state, each.reason) for each in client.get_model_repository_index().models}
        assert states == {("UNAVAILABLE", "rank 3 is silent")}
    answer = httpx.get(f"http://{job.servers.http_url}/v2/health/ready")
    assert (answer.status_code, answer.json()) == (503, {"error": "rank 3 is silent"})
    assert httpx.get(f"http://{job.servers.http_url}/v2/health/live").status_code == 200


@pytest.mark.parametrize("ask", [
    lambda client: client.load_model("ensemble"),
    lambda client: client.unload_model("ensemble"),
    lambda client: client.get_system_shared_memory_status(),
    lambda client: client.register_system_shared_memory("a", "/a", 4),
    lambda client: client.unregister_cuda_shared_memory("a"),
    lambda client: client.get_trace_settings(),
    lambda client: client.get_log_settings(),
], ids=["load", "unload", "status", "register", "unregister", "trace", "log"])
def test_what_does_not_apply_is_refused_with_a_sentence(kserve: Start, ask: Callable[[Any], Any]) -> None:
    job = kserve()
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        with pytest.raises(InferenceServerException) as error:
            ask(client)
        assert error.value.status() == "StatusCode.UNIMPLEMENTED"
        assert len(error.value.message().split()) > 5
    with (httpclient.InferenceServerClient(job.servers.http_url) as client,
          pytest.raises(InferenceServerException) as error):
        ask(client)
    assert error.value.status() == "400"


@pytest.mark.parametrize(("shared", "classes", "text"), [
    ("input", 0, "input 'text_input' lies in shared memory"),
    ("output", 0, "output 'text_output' lies in shared memory"),
    (None, 2, "output 'text_output' is text or numbers, not classes"),
])
@pytest.mark.parametrize("library", [grpcclient, httpclient], ids=["gRPC", "HTTP"])
def test_a_tensor_is_neither_in_shared_memory_nor_classes(
        kserve: Start, library: Any, shared: str | None, classes: int, text: str) -> None:
    job = kserve()
    url, inputs = ((job.servers.grpc_url, grpc_inputs) if library is grpcclient
                   else (job.servers.http_url, http_inputs))
    tensors = inputs(arrays("Machine"))
    output = library.InferRequestedOutput("text_output", class_count=classes)
    if shared is not None:
        {"input": tensors[0], "output": output}[shared].set_shared_memory("region", 64)
    with library.InferenceServerClient(url) as client, pytest.raises(InferenceServerException, match=text):
        client.infer("ensemble", tensors, outputs=[output])
    job.assert_free()


@pytest.mark.parametrize("asked", [0, None, False])
def test_no_classes_are_not_refused(kserve: Start, asked: Any) -> None:
    job = kserve()
    answer = httpx.post(f"http://{job.servers.http_url}/v2/models/ensemble/infer", json={
        "inputs": [{"name": "text_input", "datatype": "BYTES", "shape": [1, 1], "data": ["Machine"]},
                   {"name": "max_tokens", "datatype": "INT32", "shape": [1, 1], "data": [2]}],
        "outputs": [{"name": "text_output", "parameters": {"classification": asked}}]})
    assert answer.status_code == 200, answer.text


# ---- clients that leave ----


@pytest.mark.parametrize("is_paused", [True, False], ids=["before the first token", "in generation"])
@pytest.mark.parametrize("num_rows", [1, 3])
def test_a_cancelled_stream_frees_both_sides(kserve: Start, is_paused: bool, num_rows: int) -> None:
    job = kserve(max_batch_size=2)  # with three rows one of them waits in the queue
    arrived = threading.Event()
    client = grpcclient.InferenceServerClient(job.servers.grpc_url)
    if is_paused:
        job.job.pause()
    client.start_stream(callback=lambda result, error: arrived.set())
    client.async_stream_infer("ensemble", grpc_inputs(arrays(["a", "b", "c"][:num_rows], **LONG)))
    if is_paused:
        wait_until(lambda: job.orchestrator.num_open == num_rows)
    else:
        assert arrived.wait(PATIENCE)
    client.stop_stream(cancel_requests=True)
    client.close()
    job.job.resume()
    job.assert_free(1.0)
    assert text_of(stream(job.servers.grpc_url, ("a", arrays(stream=True)))), "others are served"


def test_a_cancelled_unary_call_frees_both_sides(kserve: Start) -> None:
    job = kserve()
    job.job.pause()
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        call = client.async_infer("ensemble", grpc_inputs(arrays(max_tokens=200)), lambda result, error: None)
        wait_until(lambda: job.orchestrator.num_open == 1)
        call.cancel()
        job.job.resume()
        job.assert_free(1.0)


@pytest.mark.parametrize("is_paused", [True, False], ids=["before the first token", "in generation"])
@pytest.mark.parametrize("path", ["generate", "generate_stream"])
def test_a_connection_that_is_lost_frees_both_sides(kserve: Start, path: str, is_paused: bool) -> None:
    job = kserve()
    body = json.dumps({"text_input": "a", "max_tokens": 200, "stream": path == "generate_stream"}).encode()
    if is_paused:
        job.job.pause()
    with socket.create_connection(("127.0.0.1", job.servers.http_port)) as connection:
        connection.sendall(b"POST /v2/models/ensemble/%s HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
                           % (path.encode(), len(body)) + body)
        wait_until(lambda: job.orchestrator.num_open == 1)
        if not is_paused and path == "generate_stream":
            assert connection.recv(12) == b"HTTP/1.1 200"
    job.job.resume()
    job.assert_free(1.0)


def test_a_cancelled_asyncio_stream_frees_both_sides(kserve: Start) -> None:
    job = kserve()

    async def run() -> None:
        async def requests() -> Any:
            yield {"model_name": "ensemble", "inputs": grpc_inputs(arrays(**LONG))}
            await asyncio.sleep(PATIENCE)

        async with grpcaio.InferenceServerClient(job.servers.grpc_url) as client:
            answers = client.stream_infer(requests())
            async for _ in answers:
                break
            answers.cancel()

    job.servers.run(run())
    job.assert_free(1.0)


# ---- limits and failures ----


def test_more_than_may_be_open_is_refused_and_the_rest_goes_on(kserve: Start) -> None:
    job = kserve(limits={"max_open_requests": 2})
    job.job.pause()
    opened: list[Any] = []
    held, url = arrays(["a", "b"], stream=True), job.servers.grpc_url
    holder = threading.Thread(target=lambda: opened.extend(stream(url, ("a", held))))
    holder.start()
    wait_until(lambda: job.orchestrator.num_open == 2)
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="try again") as error:
            client.infer("ensemble", grpc_inputs(arrays()))
        assert error.value.status() == "StatusCode.UNAVAILABLE"
    answer = generate(job, text_input="a", max_tokens=2)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    (refused,) = stream(job.servers.grpc_url, ("c", arrays()))
    assert "try again" in str(refused)
    job.job.resume()
    holder.join(PATIENCE)
    assert len(opened) == 16
    assert generate(job, text_input="a", max_tokens=2).status_code == 200
    answer = generate(job, text_input="a", max_tokens=2, num_return_sequences=3)
    assert answer.status_code == 400, "it could never be served"


def test_prompts_sequences_and_bodies_have_limits(kserve: Start) -> None:
    job = kserve(limits={"max_prompt_tokens": 10, "max_n": 2, "max_body_bytes": 4096})
    answer = generate(job, text_input="a" * 11, max_tokens=2)
    assert (answer.status_code, answer.json()) == (
        400, {"error": "the prompt has 11 tokens; this server takes 10 at most"})
    answer = generate(job, text_input="a", max_tokens=2, num_return_sequences=3)
    assert answer.status_code == 400 and "num_return_sequences" in answer.json()["error"]
    assert generate(job, text_input="a" * 5000, max_tokens=2).status_code == 413
    url = f"http://{job.servers.http_url}/v2/models/ensemble/generate"
    bomb = gzip.compress(b" " * 10**6)
    assert len(bomb) < 4096
    assert httpx.post(url, content=bomb, headers={"content-encoding": "gzip"}).status_code == 413
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        with pytest.raises(InferenceServerException) as error:
            client.infer("ensemble", grpc_inputs(arrays("a" * 5000)))
        assert error.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
    assert generate(job, text_input="a" * 10, max_tokens=2).status_code == 200


def test_a_key_is_asked_for_but_by_health(kserve: Start) -> None:
    job = kserve(api_key="secret")
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        assert client.is_server_live() and client.is_server_ready()
        for headers in (None, {"authorization": "Bearer secre"}, {"authorization": "secret"}):
            with pytest.raises(InferenceServerException) as error:
                client.infer("ensemble", grpc_inputs(arrays()), headers=headers)
            assert error.value.status() == "StatusCode.UNAUTHENTICATED"
        good = {"authorization": "Bearer secret"}
        assert client.infer("ensemble", grpc_inputs(arrays()), headers=good).as_numpy("text_output").size
    with pytest.raises(grpc.RpcError) as refused:
        raw_stream(job, raw_request("a", arrays()))
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    job.assert_free()


def test_an_exception_in_a_request_is_its_error_and_the_stream_stays_open(
        kserve: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    job = kserve()
    submit = job.orchestrator.submit

    def sometimes(request: Any, **options: Any) -> Any:
        if request.id == "bad":
            raise ValueError("a mistake of ours")
        return submit(request, **options)

    monkeypatch.setattr(job.orchestrator, "submit", sometimes)
    messages = raw_stream(
        job, *(raw_request(identity, arrays(stream=True)) for identity in ("a", "bad", "b")))
    errors = [(each.infer_response.id, each.error_message) for each in messages if each.error_message]
    assert errors == [("bad", "ValueError: a mistake of ours")]
    assert len(messages) == 17
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="a mistake of ours") as error:
            client.infer("ensemble", grpc_inputs(arrays()), request_id="bad")
        assert error.value.status() == "StatusCode.INTERNAL"


def test_a_timeout_ends_the_request(kserve: Start) -> None:
    job = kserve()
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        with pytest.raises(InferenceServerException, match="deadline") as error:
            client.infer("ensemble", grpc_inputs(arrays(max_tokens=200)), timeout=5_000)  # microseconds
        assert error.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    job.assert_free()


def test_a_job_that_has_ended_is_unavailable(kserve: Start) -> None:
    job = kserve()
    job.orchestrator.close()
    with grpcclient.InferenceServerClient(job.servers.grpc_url) as client:
        with pytest.raises(InferenceServerException) as error:
            client.infer("ensemble", grpc_inputs(arrays()))
        assert error.value.status() == "StatusCode.UNAVAILABLE"
    assert generate(job, text_input="a", max_tokens=2).status_code == 503


def test_a_job_that_ends_ends_its_streams_with_an_error(kserve: Start) -> None:
    job = kserve()
    job.job.pause()
    answers: list[Any] = []
    url = job.servers.grpc_url
    client = threading.Thread(target=lambda: answers.extend(stream(url, ("a", arrays(**LONG)))))
    client.start()
    wait_until(lambda: job.orchestrator.num_open == 1)
    job.job.resume()
    job.orchestrator.close()
    client.join(PATIENCE)
    assert isinstance(answers[-1], InferenceServerException)


def test_a_port_that_is_taken_is_named(kserve: Start) -> None:
    job = kserve()
    servers = job.servers
    port = servers.grpc.port
    other = make_grpc_server(servers.gate, servers.models, servers.statistics, "127.0.0.1", port)
    with pytest.raises(ConfigError, match=f"{port}.*--grpc-port"):
        servers.run(other.start())
