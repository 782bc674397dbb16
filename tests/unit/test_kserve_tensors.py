"""The table of the ensemble's tensors and their forms on the wire: pure, without a server or a job."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor

from disagg_mpi.errors import ConfigError, DisaggError, RequestError
from disagg_mpi.frontend.kserve.ensemble import (
    INPUT_OF,
    INPUTS,
    MAX_WORDS,
    OUTPUTS,
    Defaults,
    Prompt,
    Vocabulary,
    read_prompt,
    read_rows,
)
from disagg_mpi.frontend.kserve.models import as_json, default_models
from disagg_mpi.frontend.kserve.replies import Reply, Row, stack
from disagg_mpi.frontend.kserve.rpc_messages import StreamEncoder
from disagg_mpi.frontend.kserve.service import Call
from disagg_mpi.frontend.kserve.tensors import (
    Incoming,
    Outgoing,
    from_contents,
    from_json,
    from_raw,
)
from disagg_mpi.request import Choice, Result, SamplingParams, TokenEvent

VOCABULARY = Vocabulary(lambda text: list(text.encode()), eos_token_id=2)
NUMBERS = {
    "BOOL": (np.bool_, st.booleans()),
    "INT8": (np.int8, st.integers(-2**7, 2**7 - 1)), "UINT8": (np.uint8, st.integers(0, 2**8 - 1)),
    "INT16": (np.int16, st.integers(-2**15, 2**15 - 1)), "UINT16": (np.uint16, st.integers(0, 2**16 - 1)),
    "INT32": (np.int32, st.integers(-2**31, 2**31 - 1)), "UINT32": (np.uint32, st.integers(0, 2**32 - 1)),
    "INT64": (np.int64, st.integers(-2**63, 2**63 - 1)), "UINT64": (np.uint64, st.integers(0, 2**64 - 1)),
    "FP32": (np.float32, st.floats(width=32, allow_nan=False)),
    "FP64": (np.float64, st.floats(allow_nan=False)),
}
FIELDS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents",
    "UINT32": "uint_contents", "UINT64": "uint64_contents", "FP32": "fp32_contents",
    "FP64": "fp64_contents", "BYTES": "bytes_contents"}


@st.composite
def numbers(draw: Any) -> tuple[str, list[Any]]:
    datatype = draw(st.sampled_from(sorted(NUMBERS)))
    return datatype, draw(st.lists(NUMBERS[datatype][1], max_size=6))


def tensors(**given: Any) -> list[Incoming]:
    """One row; a list is the row's elements."""
    made = []
    for name, value in given.items():
        values = value if isinstance(value, list) else [value]
        tensor = INPUT_OF[name]
        values = [v.encode() if isinstance(v, str) else v for v in values]
        shape = (1, len(values), *(1 for _ in tensor.dims[1:]))
        made.append(Incoming(name, tensor.datatype, shape, lambda values=values: values))
    return made


def read(defaults: Defaults = Defaults(max_n=4), **given: Any) -> Prompt:  # noqa: B008
    (row,) = read_rows(tensors(**{"text_input": "a", "max_tokens": 5, **given}), 8)
    return read_prompt(row, VOCABULARY, defaults)


# ---- forms on the wire ----


@given(numbers())
def test_numbers_pass_in_every_form(sample: tuple[str, list[Any]]) -> None:
    datatype, values = sample
    shape = [1, len(values)]
    array = np.array(values, NUMBERS[datatype][0])
    contents = service_pb2.InferTensorContents(**{FIELDS[datatype]: values})
    for tensor in (from_raw("x", datatype, shape, array.tobytes()),
                   from_contents("x", datatype, shape, contents),
                   *([from_json("x", datatype, shape, [values])] if np.isfinite(array).all() else ())):
        assert tensor.load() == values
    out = Outgoing("x", datatype, (1, len(values)), array.reshape(shape))
    assert out.raw() == array.tobytes()
    assert out.values() == values


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), max_size=5))
def test_texts_pass_in_every_form(texts: list[str]) -> None:
    items, shape = [text.encode() for text in texts], [len(texts)]
    raw = serialize_byte_tensor(np.array(items, object)).item() if items else b""
    contents = service_pb2.InferTensorContents(bytes_contents=items)
    assert from_raw("x", "BYTES", shape, raw).load() == items
    assert from_contents("x", "BYTES", shape, contents).load() == items
    assert from_json("x", "BYTES", shape, texts).load() == items
    out = Outgoing("x", "BYTES", (len(items),), items)
    assert deserialize_bytes_tensor(out.raw()).tolist() == items
    assert out.values() == texts


@given(st.lists(st.binary(max_size=5), min_size=1, max_size=4), st.data())
def test_bytes_that_are_cut_or_too_many_are_refused(items: list[bytes], data: Any) -> None:
    raw = Outgoing("x", "BYTES", (len(items),), items).raw()
    cut = raw[: data.draw(st.integers(0, len(raw) - 1))]
    with pytest.raises(RequestError, match="'x'"):
        from_raw("x", "BYTES", [len(items)], cut).load()
    with pytest.raises(RequestError, match="'x'"):
        from_raw("x", "BYTES", [len(items)], raw + data.draw(st.binary(min_size=1, max_size=9))).load()


@pytest.mark.parametrize("load", [
    lambda: from_raw("x", "INT32", [1, 1], b"123"),
    lambda: from_raw("x", "INT32", [2**62, 2**62], b""),
    lambda: from_raw("x", "INT32", [-1], b""),
    lambda: from_raw("x", "BF16", [1], b"12"),
    lambda: from_raw("x", "STRING", [1], b"12"),
    lambda: from_json("x", "INT32", [1], [1.0]),
    lambda: from_json("x", "INT32", [1], [True]),
    lambda: from_json("x", "INT32", [1], [2**31]),
    lambda: from_json("x", "FP32", [1], [10**400]),
    lambda: from_json("x", "BOOL", [1], [1]),
    lambda: from_json("x", "BYTES", [1], [1]),
    lambda: from_json("x", "BYTES", [1], ["\ud800"]),
    lambda: from_json("x", "BYTES", [1], [{}]),
    lambda: from_json("x", "BYTES", [2], ["a"]),
    lambda: from_contents("x", "FP16", [1], service_pb2.InferTensorContents()),
    lambda: from_contents("x", "INT8", [1], service_pb2.InferTensorContents(int_contents=[300])),
    lambda: from_contents("x", "INT32", [1], service_pb2.InferTensorContents(fp32_contents=[1])),
    lambda: from_contents("x", "INT32", [2], service_pb2.InferTensorContents(int_contents=[1])),
])
def test_what_is_no_tensor_is_named(load: Any) -> None:
    with pytest.raises(RequestError, match="'x'"):
        load().load()


def test_lists_may_be_nested_as_deeply_as_json_allows() -> None:
    deep: Any = 7
    for _ in range(5000):
        deep = [deep]
    assert from_json("x", "INT32", [1], deep).load() == [7]


# ---- the table ----


def test_absent_tensors_are_greedy() -> None:
    assert read().sampling == SamplingParams(max_tokens=5)
    prompt = read()
    assert (prompt.text, prompt.is_streamed, prompt.has_input_in_output) == ("a", False, True)
    assert read(temperature=1.0).sampling.temperature == 0.0, "TensorRT-LLM: top_k and top_p decide"
    assert read(temperature=1.0, top_k=1).sampling.temperature == 0.0
    assert read(temperature=1.0, top_p=0.0).sampling.temperature == 0.0


@pytest.mark.parametrize("given, expected", [
    ({"top_k": 5}, {"top_k": 5, "temperature": 1.0}),
    ({"runtime_top_k": 5, "temperature": 0.5}, {"top_k": 5, "temperature": 0.5}),
    ({"top_p": 0.5}, {"top_p": 0.5, "temperature": 1.0}),
    ({"runtime_top_p": 0.5, "top_k": 9}, {"top_p": 0.5, "top_k": 9, "temperature": 1.0}),
    ({"top_p": 0.9, "temperature": 0.0}, {"top_p": 0.9, "temperature": 0.0}),
    ({"random_seed": 7}, {"seed": 7}),
    ({"seed": 2**63 + 1}, {"seed": 1}),
    ({"min_length": 2}, {"min_tokens": 2}),
    ({"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5},
     {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5}),
    ({"num_return_sequences": 3}, {"n": 3}),
    ({"num_return_sequences": 0, "beam_width": 0}, {}),
    ({"stop_words": ["", "x", "yz"]}, {"stop": ("x", "yz")}),
    ({"bad_words": [""], "embedding_bias_words": [""], "embedding_bias_weights": [1.0]}, {}),
    ({"return_log_probs": True}, {"logprobs": 0}),
    ({"return_generation_logits": True}, {"return_generation_logits": True}),
    ({"end_id": 2}, {}),
    ({"end_id": 9}, {"ignore_eos": True, "stop_token_ids": (9,)}),
    ({"end_id": -1}, {"ignore_eos": True}),
    ({"pad_id": 9, "length_penalty": 0.3, "beam_width": 1}, {}),
    ({"decoder_text_input": "", "lora_task_id": 0, "prompt_vocab_size": 0, "use_draft_logits": False}, {}),
    ({"guided_decoding_guide": "", "guided_decoding_guide_type": ""}, {}),
])
def test_tensors_become_sampling(given: dict[str, Any], expected: dict[str, Any]) -> None:
    assert read(**given).sampling == SamplingParams(**{"max_tokens": 5, **expected})


def test_the_input_is_in_the_output_unless_someone_says_otherwise() -> None:
    excluding = Defaults(max_n=4, has_input_in_output=False)
    assert read().has_input_in_output
    assert not read(exclude_input_in_output=True).has_input_in_output
    assert not read(stream=True).has_input_in_output
    assert not read(excluding).has_input_in_output
    assert read(excluding, exclude_input_in_output=False).has_input_in_output


@pytest.mark.parametrize("given, named", [
    ({"beam_width": 2}, "beam_width"), ({"decoder_text_input": "a"}, "decoder_text_input"),
    ({"lora_task_id": 1}, "lora_task_id"), ({"lora_config": [1]}, "lora_config"),
    ({"lora_weights": [1.0]}, "lora_weights"), ({"prompt_embedding_table": [0.0]}, "prompt_embedding_table"),
    ({"prompt_vocab_size": 4}, "prompt_vocab_size"), ({"prompt_table_extra_id": 4}, "prompt_table_extra_id"),
    ({"num_draft_tokens": 4}, "num_draft_tokens"), ({"use_draft_logits": True}, "use_draft_logits"),
    ({"num_return_sequences": 5}, "num_return_sequences"), ({"max_tokens": 0}, "max_tokens"),
    ({"min_tokens": 6}, "min_tokens"), ({"temperature": -1.0}, "temperature"),
    ({"temperature": math.nan}, "temperature"), ({"top_p": 1.5}, "top_p"), ({"top_p": math.nan}, "top_p"),
    ({"top_k": -1}, "top_k"), ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"stop_words": ["a"] * (MAX_WORDS + 1)}, "stop_words"), ({"stop_words": ["a" * 2000]}, "stop_words"),
    ({"stop_words": [b"\xff"]}, "stop_words"), ({"text_input": b"\xff"}, "text_input"),
    ({"embedding_bias_words": ["a"]}, "embedding_bias_weights"),
    ({"embedding_bias_words": ["a"], "embedding_bias_weights": [math.inf]}, "embedding_bias_weights"),
    ({"guided_decoding_guide": "a"}, "guided_decoding_guide_type"),
    ({"guided_decoding_guide_type": "regex"}, "guided_decoding_guide"),
    ({"guided_decoding_guide_type": "xml", "guided_decoding_guide": "a"}, "json_schema"),
    ({"guided_decoding_guide_type": "choice", "guided_decoding_guide": "[1]"}, "choice"),
])
def test_what_cannot_be_honoured_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises((RequestError, ConfigError), match=named):
        read(**given)


def test_inputs_that_are_wrong_missing_twice_or_of_other_rows_are_refused() -> None:
    good = tensors(text_input="a", max_tokens=5)
    two_rows = Incoming("top_k", "INT32", (2, 1), lambda: [1, 1])
    for inputs, words in (
            (good[:1], "max_tokens"), (good[1:], "text_input"), ([*good, good[0]], "twice"),
            ([*good, *tensors(seed=1), *tensors(random_seed=1)], "twice"),
            ([*good, Incoming("foo", "INT32", (1, 1), list)], "unexpected inference input 'foo'"),
            ([*good, two_rows], "rows"), ([], "missing"),
            ([Incoming("text_input", "BYTES", (0, 1), list)], "rows"),
            ([Incoming("text_input", "BYTES", (9, 1), list)], "1 to 8"),
            ([Incoming("text_input", "BYTES", (1,), list)], "shape"),
            ([Incoming("text_input", "BYTES", (1, 2), list)], "shape"),
            ([Incoming("text_input", "INT32", (1, 1), list)], "datatype")):
        with pytest.raises(RequestError, match=words):
            read_rows(inputs, 8)


def test_other_widths_of_numbers_are_taken_and_models_without_batches_have_no_first_size() -> None:
    inputs = [Incoming("text_input", "BYTES", (1,), lambda: [b"a"]),
              Incoming("max_tokens", "UINT32", (1,), lambda: [3]),
              Incoming("stop_words", "BYTES", (2,), lambda: [b"x", b"y"])]
    assert read_rows(inputs, 0) == [{"text_input": [b"a"], "max_tokens": [3], "stop_words": [b"x", b"y"]}]


shapes = st.lists(st.integers(-1, 3), max_size=3)


@st.composite
def requests(draw: Any) -> list[tuple[str, str, list[int], bytes]]:
    """A good request with a few tensors of any name, type, shape and content."""
    good = [("text_input", "BYTES", [1, 1], b"\1\0\0\0a"), ("max_tokens", "INT32", [1, 1], b"\5\0\0\0")]
    return good + draw(st.lists(st.tuples(
        st.sampled_from([*INPUT_OF, "foo"]), st.sampled_from([*NUMBERS, "BYTES", "FP16", "BF16", "?"]),
        st.one_of(st.just([1, 1]), shapes), st.binary(max_size=12)), max_size=4))


@given(requests())
def test_whatever_is_sent_is_a_request_or_a_request_error(sent: Any) -> None:
    try:
        rows = read_rows([from_raw(*tensor) for tensor in sent], 8)
        prompts = [read_prompt(row, VOCABULARY, Defaults(max_n=4)) for row in rows]
    except DisaggError as error:
        assert str(error)
    else:
        assert prompts


# ---- replies ----


def call(identity: str = "7") -> Call:
    return Call("ensemble", "", identity, [], None)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=300), st.booleans(),
       st.text(st.characters(exclude_categories=["Cs"]), max_size=5))
def test_the_short_way_to_serialise_a_reply_gives_the_same_message(
        text: str, final: bool, identity: str) -> None:
    model = default_models(is_aggregated=False, tokens_per_block=4).get("ensemble")
    encoder = StreamEncoder(call(identity), model)
    message = service_pb2.ModelStreamInferResponse.FromString(encoder.encode(Reply(text, [], final)))
    expected = service_pb2.ModelInferResponse(
        model_name="ensemble", model_version="1", id=identity,
        raw_output_contents=[Outgoing("text_output", "BYTES", (1,), [text.encode()]).raw()])
    expected.outputs.add(name="text_output", datatype="BYTES", shape=[1])
    expected.parameters["triton_final_response"].bool_param = final
    assert message == service_pb2.ModelStreamInferResponse(infer_response=expected)
    other = Outgoing("batch_index", "INT32", (1, 1), np.array([[3]], np.int32))
    long = service_pb2.ModelStreamInferResponse.FromString(encoder.encode(Reply(text, [other], final)))
    assert [output.name for output in long.infer_response.outputs] == ["text_output", "batch_index"]
    assert long.infer_response.parameters["triton_final_response"].bool_param is final


def test_replies_of_unequal_length_are_stacked_with_zeros() -> None:
    replies = [
        Reply(text, [Outgoing("output_log_probs", "FP32", array.shape, array)])
        for text, array in (("a", np.array([[[-1.0, -2.0]]])), ("b", np.array([[[-3.0]]])))]
    text, log_probs = stack(replies)
    assert (text.shape, text.values()) == ((2,), ["a", "b"])
    assert log_probs.shape == (2, 1, 2)
    assert log_probs.values() == [-1.0, -2.0, -3.0, 0.0]


def test_a_streamed_end_waits_for_the_result_only_where_it_must() -> None:
    for asked, waits in (({}, False), ({"return_perf_metrics": True}, True)):
        row = Row(read(stream=True, **asked), batch_index=None, wanted=None, arrival_ns=0, tokens_per_block=4)
        assert row.take_event(TokenEvent("a", [1])) is not None
        assert (row.take_event(TokenEvent("b", [2], finish_reason="stop")) is None) is waits
        result = Result(id=None, request_id=1, prompt_token_ids=[1] * 6, choices=[
            Choice(0, "ab", [1, 2], "stop")])
        last = list(row.take_result(result))
        assert [reply.text for reply in last] == (["b"] if waits else [])
        if waits:
            found = {output.name: output.values() for output in last[0].others}
            assert found["kv_cache_alloc_total_blocks"] == [2], "7 positions in blocks of 4"


# ---- models ----


@pytest.mark.parametrize("is_aggregated", [True, False])
def test_default_models_fit_together(is_aggregated: bool) -> None:
    models = default_models(is_aggregated=is_aggregated, tokens_per_block=4)
    ensemble = models.get("ensemble")
    assert [tensor.name for tensor in ensemble.config.input] == [tensor.name for tensor in INPUTS]
    assert [tensor.name for tensor in ensemble.config.output] == [tensor.name for tensor in OUTPUTS]
    known = {tensor.name for tensor in ensemble.config.input}
    for step in ensemble.config.ensemble_scheduling.step:
        part = models.get(step.model_name).config
        assert set(step.input_map) <= {tensor.name for tensor in part.input}, part.name
        assert {tensor.name for tensor in part.input if not tensor.optional} <= set(step.input_map), part.name
        assert set(step.output_map) <= {tensor.name for tensor in part.output}, part.name
        assert set(step.input_map.values()) <= known, "what earlier steps made"
        known |= set(step.output_map.values())
    assert {tensor.name for tensor in ensemble.config.output} <= known
    for model in models:
        again = text_format.Parse(text_format.MessageToString(model.config), model_config_pb2.ModelConfig())
        assert again == model.config
        assert json.loads(json.dumps(as_json(model.config)))["name"] == model.name
    composing = {model.name for model in models.composing(ensemble)}
    assert composing == {model.name for model in models} - {"ensemble"}
