"""Whatever is sent to the KServe servers is answered or refused: never INTERNAL, never 500, never a hang, and
a stream beside it notices nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kserving import PATIENCE, KserveJob, arrays, is_final, stream, text_of
from tritonclient.grpc import service_pb2, service_pb2_grpc

from disagg_mpi.frontend.kserve.ensemble import INPUT_OF, OUTPUT_NAMES

# What a client's own mistake is called; RESOURCE_EXHAUSTED: a message beyond the limit.
REFUSALS = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.RESOURCE_EXHAUSTED}
STATUSES = {200, 400, 404, 405, 413}
QUICK = settings(deadline=None, max_examples=60)

names = st.sampled_from([*INPUT_OF, "foo"])
datatypes = st.sampled_from(["BYTES", "BOOL", "INT32", "INT64", "UINT64", "FP16", "FP32", "FP64", "BF16", ""])
shapes = st.one_of(st.just([1, 1]), st.lists(st.integers(-2, 3), max_size=3),
                   st.just([2**31, 2**31]), st.just([2**62]))
data = st.one_of(st.binary(max_size=12), st.just(b"\1\0\0\0a"), st.just(b"\3\0\0\0"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(
        max_size=4), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner,
                                                                                 max_size=2), max_leaves=6)


@pytest.fixture(scope="module")
def job(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KserveJob]:
    made = KserveJob(tiny_llama, tmp_path_factory.mktemp("tokenizer"), limits={"max_body_bytes": 4096})
    yield made
    made.assert_free()
    made.close()


@st.composite
def messages(draw: Any) -> Any:
    """A request of which some parts are good."""
    request = service_pb2.ModelInferRequest(
        model_name=draw(st.sampled_from(["ensemble", "ensemble", "ensemble", "context", "nothing", ""])),
        model_version=draw(st.sampled_from(["", "", "1", "2"])), id=draw(st.text(
            st.characters(exclude_categories=["Cs"]), max_size=3)))
    tensors = [("text_input", "BYTES", [1, 1], b"\1\0\0\0a"), ("max_tokens", "INT32", [1, 1], b"\2\0\0\0")]
    tensors = draw(st.sampled_from([tensors, tensors, tensors[:1], []]))
    tensors = tensors + draw(st.lists(st.tuples(names, datatypes, shapes, data), max_size=3))
    form = draw(st.sampled_from(["raw", "raw", "typed", "both", "short"]))
    for name, datatype, shape, content in tensors:
        given = request.inputs.add(name=name, datatype=datatype, shape=shape)
        if form in ("typed", "both"):
            given.contents.bytes_contents.append(content)
            given.contents.int_contents.extend(content)
        if form != "typed":
            request.raw_input_contents.append(content)
    if form == "short" and tensors:
        del request.raw_input_contents[-1]
    for name in draw(st.lists(st.sampled_from([*sorted(OUTPUT_NAMES)[:3], "foo"]), max_size=2)):
        request.outputs.add(name=name)
    if draw(st.booleans()):
        request.parameters["timeout"].int64_param = draw(st.integers(-1, 10**9))
    return request


def test_unary_calls_over_grpc(job: KserveJob) -> None:
    with grpc.insecure_channel(job.servers.grpc_url) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer

        @QUICK
        @given(messages())
        def run(request: Any) -> None:
            try:
                assert infer(request, timeout=PATIENCE).model_name == "ensemble"
            except grpc.RpcError as error:
                assert error.code() in REFUSALS | {grpc.StatusCode.DEADLINE_EXCEEDED}, error
                assert error.details()

        run()


def test_streams_over_grpc_are_answered_message_by_message(job: KserveJob) -> None:
    with grpc.insecure_channel(job.servers.grpc_url) as channel:
        infer = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer

        @QUICK
        @given(st.lists(messages(), max_size=4))
        def run(requests: list[Any]) -> None:
            answers = list(infer(iter(requests), timeout=PATIENCE))
            finals = [each for each in answers
                      if each.infer_response.parameters["triton_final_response"].bool_param]
            assert sorted(each.infer_response.id for each in finals) == sorted(each.id for each in requests)
            assert not any("Error: " in each.error_message[:20] for each in answers), "a fault of ours"

        run()


def test_bytes_that_are_no_message(job: KserveJob) -> None:
    with grpc.insecure_channel(job.servers.grpc_url) as channel:
        path = "/inference.GRPCInferenceService/"
        unary = channel.unary_unary(f"{path}ModelInfer")
        streamed = channel.stream_stream(f"{path}ModelStreamInfer")

        @QUICK
        @given(st.binary(max_size=40))
        def run(garbage: bytes) -> None:
            with pytest.raises(grpc.RpcError) as error:
                unary(garbage, timeout=PATIENCE)
            assert error.value.code() in REFUSALS
            (answer,) = streamed(iter([garbage]), timeout=PATIENCE)
            assert service_pb2.ModelStreamInferResponse.FromString(answer).error_message

        run()


def test_bodies_over_http(job: KserveJob) -> None:
    good = {"text_input": "a", "max_tokens": 2}
    tensor = st.fixed_dictionaries({}, optional={
        "name": names, "datatype": datatypes, "shape": shapes, "data": json_values,
        "parameters": st.dictionaries(st.just("binary_data_size"), json_values, max_size=1)})
    bodies = st.one_of(
        json_values,
        st.dictionaries(names, json_values, max_size=3).map(lambda more: {**good, **more}),
        st.fixed_dictionaries({"inputs": st.lists(tensor, max_size=3)}, optional={
            "id": json_values, "parameters": json_values, "outputs": json_values}))
    paths = st.sampled_from(["infer", "generate", "generate_stream"])
    with httpx.Client(base_url=f"http://{job.servers.http_url}/v2/models/", timeout=PATIENCE) as client:

        @QUICK
        @given(paths, bodies)
        def json_bodies(path: str, body: Any) -> None:
            answer = client.post(f"ensemble/{path}", json=body)
            assert answer.status_code in STATUSES, answer.text
            assert answer.text

        @QUICK
        @given(paths, st.binary(max_size=60), st.sampled_from(["identity", "gzip", "deflate", "br"]),
               st.one_of(st.none(), st.sampled_from(["0", "2", "-1", "9" * 400, "a"])))
        def other_bodies(path: str, body: bytes, encoding: str, length: str | None) -> None:
            headers = {"content-encoding": encoding}
            if length is not None:
                headers["inference-header-content-length"] = length
            assert client.post(f"ensemble/{path}", content=body, headers=headers).status_code in STATUSES

        json_bodies()
        other_bodies()


def test_a_stream_beside_all_that_is_undisturbed(job: KserveJob) -> None:
    expected = job.answer("undisturbed", max_tokens=40).text
    url = f"http://{job.servers.http_url}/v2/models/ensemble/"
    with httpx.Client(base_url=url, timeout=PATIENCE) as client:
        for _ in range(5):
            client.post("generate", json={"text_input": 7, "max_tokens": "a"})
            results = stream(job.servers.grpc_url, ("bad", arrays(beam_width=3)),
                             ("good", arrays("undisturbed", 40, stream=True)), ("none", {}))
            good = [result for result in results if not isinstance(result, Exception)]
            assert text_of(good) == expected
            assert is_final(good[-1])
            assert len(results) == 42
