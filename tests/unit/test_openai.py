"""The OpenAI API over a whole job: what is asked, what comes back, and what is refused."""

from __future__ import annotations

import asyncio
import json
import re
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest
from inprocess import PATIENCE
from serving import NAME, ServedJob, events_of, texts_of

from disagg_mpi.errors import ConfigError
from disagg_mpi.frontend.openai.calls import ChatCall, CompletionCall, decode
from disagg_mpi.frontend.openai.errors import ApiError
from disagg_mpi.frontend.openai.logprobs import Spelling
from disagg_mpi.frontend.openai.sampling import sampling_of
from disagg_mpi.request import Guided, SamplingParams, TokenLogprobs
from disagg_mpi.topology import Role

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
GREEDY = {"prompt": "hello", "max_tokens": 8, "temperature": 0}
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}


def post(job: ServedJob, path: str, body: Any, **options: Any) -> httpx.Response:
    async def run() -> httpx.Response:
        async with job.client() as client:
            if isinstance(body, bytes):
                return await client.post(path, content=body, **options)
            return await client.post(path, json=body, **options)

    return asyncio.run(asyncio.wait_for(run(), PATIENCE))


def get(job: ServedJob, path: str, method: str = "GET") -> httpx.Response:
    async def run() -> httpx.Response:
        async with job.client() as client:
            return await client.request(method, path)

    return asyncio.run(asyncio.wait_for(run(), PATIENCE))


def answer(job: ServedJob, path: str, body: Any) -> Any:
    found = post(job, path, body)
    assert found.status_code == 200, found.text
    return found.json()


def expected(job: ServedJob, prompt: str, **sampling: Any) -> Any:
    """What the orchestrator itself makes of it."""
    params = SamplingParams(**{"max_tokens": 8, **sampling})
    return job.job.orchestrator.submit(prompt, params).result(PATIENCE)


@pytest.fixture
def job(serve: Any) -> ServedJob:
    return serve()


@pytest.fixture
def uncached(serve: Any) -> ServedJob:
    """Where a second answer is computed as the first was, and so is equal to the last bit."""
    return serve(prefix_cache=False)


# ---- completions ----


def test_a_completion_is_the_jobs_own_text(job: ServedJob) -> None:
    found = answer(job, COMPLETIONS, GREEDY)
    result = expected(job, "hello")
    (choice,) = found["choices"]
    assert choice == {"index": 0, "text": result.text, "logprobs": None, "finish_reason": "length"}
    assert found["usage"]["prompt_tokens"] == 5
    assert found["usage"]["completion_tokens"] == 8
    assert found["usage"]["total_tokens"] == 13
    assert (found["object"], found["model"]) == ("text_completion", NAME)
    assert found["id"].startswith("cmpl-")
    job.assert_free()


def test_all_forms_of_a_prompt_are_the_same(job: ServedJob) -> None:
    ids = list(b"hello")
    texts = {answer(job, COMPLETIONS, GREEDY | {"prompt": prompt})["choices"][0]["text"]
             for prompt in ("hello", ["hello"], ids, [ids])}
    assert texts == {expected(job, "hello").text}
    many = answer(job, COMPLETIONS, GREEDY | {"prompt": ["hello", "world"]})["choices"]
    assert [choice["index"] for choice in many] == [0, 1]
    assert [choice["text"] for choice in many] == [expected(job, "hello").text, expected(job, "world").text]


def test_defaults_are_openais(job: ServedJob) -> None:
    found = answer(job, COMPLETIONS, {"prompt": "hello", "seed": 1})
    assert found["usage"]["completion_tokens"] == 16
    again = answer(job, COMPLETIONS, {"prompt": "hello", "seed": 1, "temperature": 1.0, "top_p": 1, "n": 1,
                                      "max_tokens": 16, "stream": False, "model": NAME, "user": "somebody",
                                      "unknown": {"field": 1}, "stop": None, "logit_bias": None})
    assert again["choices"] == found["choices"]
    assert answer(job, COMPLETIONS, GREEDY)["choices"] != found["choices"]


def test_choices_are_the_seeds_and_a_negative_seed_is_one_too(job: ServedJob) -> None:
    body = GREEDY | {"n": 3, "temperature": 1.5, "seed": -3}
    one, two = answer(job, COMPLETIONS, body), answer(job, COMPLETIONS, body)
    assert one["choices"] == two["choices"]
    assert [choice["index"] for choice in one["choices"]] == [0, 1, 2]
    assert len({choice["text"] for choice in one["choices"]}) > 1
    assert one["usage"]["completion_tokens"] == 24
    two_prompts = answer(job, COMPLETIONS, body | {"prompt": ["hello", "world"]})["choices"]
    assert [choice["index"] for choice in two_prompts] == list(range(6))
    assert two_prompts[:3] == one["choices"]


def test_best_of_keeps_the_likeliest(job: ServedJob) -> None:
    body = GREEDY | {"temperature": 1.5, "seed": 4, "logprobs": 0}
    every = answer(job, COMPLETIONS, body | {"n": 4})["choices"]
    best = answer(job, COMPLETIONS, body | {"n": 2, "best_of": 4})
    by_score = sorted(every, key=lambda c: -sum(c["logprobs"]["token_logprobs"]))
    assert [c["text"] for c in best["choices"]] == [c["text"] for c in by_score[:2]]
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert best["usage"]["completion_tokens"] == 32
    quiet = answer(job, COMPLETIONS, {**body, "logprobs": None, "n": 1, "best_of": 4})["choices"]
    assert [(c["text"], c["logprobs"]) for c in quiet] == [(by_score[0]["text"], None)]


def test_stop_texts_end_a_completion(job: ServedJob) -> None:
    text = expected(job, "hello").text
    for stop in (text[3:5], [text[3:5], "never"]):
        (choice,) = answer(job, COMPLETIONS, GREEDY | {"stop": stop})["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text[:text.index(text[3:5])], "stop")
    (choice,) = answer(job, COMPLETIONS, GREEDY | {"stop_token_ids": [ord(text[2])]})["choices"]
    assert choice["finish_reason"] == "stop"


def test_logprobs_are_those_of_the_tokens(uncached: ServedJob) -> None:
    job = uncached
    result = expected(job, "hello", logprobs=3)
    (choice,) = answer(job, COMPLETIONS, GREEDY | {"logprobs": 3})["choices"]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"] == result.text
    assert logprobs["text_offset"] == list(range(8))
    assert logprobs["token_logprobs"] == pytest.approx([p.logprob for p in result.choices[0].logprobs])
    for token, own, top in zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"],
                               strict=True):
        assert len(top) == 3 and top[token] == own == max(top.values())


def test_a_sampled_token_is_among_its_alternatives_even_if_unlikely(job: ServedJob) -> None:
    body = GREEDY | {"temperature": 5.0, "seed": 1, "logprobs": 1, "max_tokens": 30}
    logprobs = answer(job, COMPLETIONS, body)["choices"][0]["logprobs"]
    pairs = list(zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    assert all(token in top for token, top in pairs)
    assert 2 in {len(top) for _, top in pairs} <= {1, 2}


def test_echo_begins_with_the_prompt(job: ServedJob) -> None:
    text = expected(job, "hello").text
    for prompt in ("hello", list(b"hello")):
        (choice,) = answer(job, COMPLETIONS, GREEDY | {"prompt": prompt, "echo": True})["choices"]
        assert choice["text"] == "hello" + text
    body = GREEDY | {"prompt": ["hello", "world"], "echo": True, "stream": True, "n": 2}
    texts = texts_of(events_of(post(job, COMPLETIONS, body).text))
    assert [texts[i][:5] for i in range(4)] == ["hello", "hello", "world", "world"]
    assert texts[0] == "hello" + text


def test_a_stream_is_the_completion_in_pieces(job: ServedJob) -> None:
    found = post(job, COMPLETIONS, GREEDY | {"stream": True})
    assert found.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = events_of(found.text)
    assert texts_of(events) == {0: expected(job, "hello").text}
    assert [e["choices"][0]["finish_reason"] for e in events] == [None] * 7 + ["length"]
    assert len({e["id"] for e in events}) == 1
    assert all("usage" not in e for e in events)
    job.assert_free()


def test_a_stream_of_several_prompts_says_whose_each_piece_is(job: ServedJob) -> None:
    body = GREEDY | {"prompt": ["hello", "world"], "n": 2, "temperature": 1.0, "seed": 2}
    whole = {c["index"]: c["text"] for c in answer(job, COMPLETIONS, body)["choices"]}
    assert texts_of(events_of(post(job, COMPLETIONS, body | {"stream": True}).text)) == whole
    assert len(whole) == 4


def test_usage_in_a_stream(job: ServedJob) -> None:
    body = GREEDY | {"stream": True, "stream_options": {"include_usage": True}}
    *events, last = events_of(post(job, COMPLETIONS, body).text)
    assert all(event["usage"] is None for event in events)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] == 13
    body["stream_options"]["continuous_usage_stats"] = True
    *events, last = events_of(post(job, COMPLETIONS, body).text)
    assert [event["usage"]["completion_tokens"] for event in events] == list(range(1, 9))
    assert {event["usage"]["prompt_tokens"] for event in events} == {5}
    assert last["choices"] == []


def test_logprobs_in_a_stream_are_those_of_the_whole(uncached: ServedJob) -> None:
    job = uncached
    body = GREEDY | {"logprobs": 2}
    whole = answer(job, COMPLETIONS, body)["choices"][0]["logprobs"]
    events = events_of(post(job, COMPLETIONS, body | {"stream": True}).text)
    pieces = [event["choices"][0]["logprobs"] for event in events]
    for name in whole:
        assert [item for piece in pieces for item in piece[name]] == whole[name]


# ---- chats ----


def test_a_chat_is_the_templates_prompt(job: ServedJob) -> None:
    found = answer(job, CHAT, HELLO)
    result = expected(job, "user: hello\nassistant: ")
    assert found["choices"] == [{"index": 0, "finish_reason": "length", "logprobs": None, "message": {
        "role": "assistant", "content": result.text, "refusal": None}}]
    assert found["object"] == "chat.completion"
    parts = HELLO | {"messages": [{"role": "user", "content": [
        {"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]}]}
    assert answer(job, CHAT, parts)["choices"] == found["choices"]
    newer = {**HELLO, "max_tokens": None, "max_completion_tokens": 8}
    assert answer(job, CHAT, newer)["choices"] == found["choices"]
    longer = answer(job, CHAT, HELLO | {"chat_template_kwargs": {"suffix": "Oh"}})
    assert longer["usage"]["prompt_tokens"] == found["usage"]["prompt_tokens"] + 2


def test_a_chat_without_a_length_goes_to_the_end_of_the_context(job: ServedJob) -> None:
    body = {key: value for key, value in HELLO.items() if key != "max_tokens"}
    found = answer(job, CHAT, body)
    assert found["usage"]["total_tokens"] == job.served.max_model_len
    assert found["choices"][0]["finish_reason"] == "length"
    job.assert_free()


def test_a_chats_stream_begins_with_the_role(job: ServedJob) -> None:
    body = HELLO | {"stream": True, "n": 2, "temperature": 1.0, "seed": 5,
                    "stream_options": {"include_usage": True}}
    *events, last = events_of(post(job, CHAT, body).text)
    whole = answer(job, CHAT, {**body, "stream": False})
    assert texts_of(events) == {c["index"]: c["message"]["content"] for c in whole["choices"]}
    for index in (0, 1):
        own = [e["choices"][0] for e in events if e["choices"][0]["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert all("role" not in choice["delta"] for choice in own[1:])
        assert own[-1]["finish_reason"] == "length"
    assert last["usage"]["completion_tokens"] == 16
    assert events[0]["object"] == "chat.completion.chunk"


def test_a_chats_logprobs(job: ServedJob) -> None:
    result = expected(job, "user: hello\nassistant: ", logprobs=2)
    (choice,) = answer(job, CHAT, HELLO | {"logprobs": True, "top_logprobs": 2})["choices"]
    content = choice["logprobs"]["content"]
    assert "".join(item["token"] for item in content) == result.text
    assert [item["bytes"] for item in content] == [[token] for token in result.token_ids]
    assert all(len(item["top_logprobs"]) == 2 for item in content)
    assert all(item["top_logprobs"][0]["token"] == item["token"] for item in content)
    assert answer(job, CHAT, HELLO | {"logprobs": True})["choices"][0]["logprobs"]["content"][0][
        "top_logprobs"] == []


# ---- models and tokens ----


def test_models_tokenize_and_detokenize(job: ServedJob) -> None:
    (model,) = get(job, "/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (NAME, 256)
    assert get(job, f"/v1/models/{NAME}").json() == model
    missing = get(job, "/v1/models/other/one")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert answer(job, "/tokenize", {"prompt": "hello"}) == {
        "count": 5, "max_model_len": 256, "tokens": list(b"hello")}
    chat = answer(job, "/tokenize", {"messages": HELLO["messages"], "model": NAME})
    assert bytes(chat["tokens"]) == b"user: hello\nassistant: "
    long = "x" * 100_000  # in a thread
    assert answer(job, "/tokenize", {"prompt": long})["count"] == len(long)
    assert answer(job, "/detokenize", {"tokens": list(b"hello")}) == {"prompt": "hello"}
    assert answer(job, "/detokenize", {"tokens": []}) == {"prompt": ""}


# ---- what is refused ----


@pytest.mark.parametrize(("path", "body", "param", "text"), [
    (COMPLETIONS, {"prompt": 5}, "prompt", "prompt: Expected `str | array`, got `int`"),
    (COMPLETIONS, {}, "prompt", "missing required field"),
    (COMPLETIONS, GREEDY | {"max_tokens": "8"}, "max_tokens", "Expected `int | null`, got `str`"),
    (COMPLETIONS, GREEDY | {"stream_options": {"include_usage": 3}}, "stream_options", "include_usage"),
    (COMPLETIONS, GREEDY | {"stop": ["a", 3]}, "stop", "stop[1]"),
    (COMPLETIONS, GREEDY | {"prompt": []}, "prompt", "at least one"),
    (COMPLETIONS, GREEDY | {"prompt": ["a", 1]}, "prompt", "of one kind"),
    (COMPLETIONS, GREEDY | {"prompt": ""}, None, "the prompt is empty"),
    (COMPLETIONS, GREEDY | {"prompt": [[1], []]}, None, "the prompt is empty"),
    (COMPLETIONS, GREEDY | {"prompt": [-1]}, None, "token id -1 is outside"),
    (COMPLETIONS, GREEDY | {"prompt": [-1], "echo": True}, None, "token id -1 is outside"),
    (COMPLETIONS, GREEDY | {"prompt": [2**70], "echo": True}, None, "is outside"),
    (COMPLETIONS, GREEDY | {"prompt": "x" * 300}, None, "must be shortened"),
    (COMPLETIONS, GREEDY | {"prompt": ["x"] * 513}, "prompt", "513 prompts"),
    (COMPLETIONS, GREEDY | {"max_tokens": 0}, "max_tokens", "at least 1"),
    (COMPLETIONS, GREEDY | {"max_tokens": 10**30}, None, "context length"),
    (COMPLETIONS, GREEDY | {"temperature": -1}, "temperature", "0 (greedy) or"),
    (COMPLETIONS, GREEDY | {"top_p": 0}, "top_p", "above 0"),
    (COMPLETIONS, GREEDY | {"n": 0}, "n", "at least 1"),
    (COMPLETIONS, GREEDY | {"n": 17}, "n", "16 at most"),
    (COMPLETIONS, GREEDY | {"best_of": 17}, "best_of", "16 at most"),
    (COMPLETIONS, GREEDY | {"n": 3, "best_of": 2}, "best_of", "n (3) or more"),
    (COMPLETIONS, GREEDY | {"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
    (COMPLETIONS, GREEDY | {"logprobs": 21}, "logprobs", "between 0 and 20"),
    (COMPLETIONS, GREEDY | {"stop": ["x"] * 33}, "stop", "32 at most"),
    (COMPLETIONS, GREEDY | {"stop": ["x" * 2000]}, "stop", "1024 characters"),
    (COMPLETIONS, GREEDY | {"stop": [""]}, "stop", "not empty"),
    (COMPLETIONS, GREEDY | {"stop_token_ids": [128]}, None, "token id 128"),
    (COMPLETIONS, GREEDY | {"suffix": "after"}, "suffix", "continues"),
    (COMPLETIONS, GREEDY | {"echo": True, "logprobs": 1, "stream": True}, "echo", "cannot be streamed"),
    (COMPLETIONS, GREEDY | {"min_tokens": 9}, "min_tokens", "between 0 and max_tokens"),
    (CHAT, HELLO | {"messages": []}, None, "malformed messages"),
    (CHAT, HELLO | {"messages": [{"content": "x"}]}, "messages", "missing required field `role`"),
    (CHAT, HELLO | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages",
     "'image_url'"),
    (CHAT, HELLO | {"messages": [{"role": "user", "content": None}]}, None, "malformed message 0"),
    (CHAT, HELLO | {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    (CHAT, HELLO | {"logprobs": True, "top_logprobs": 21}, "top_logprobs", "between 0 and 20"),
    (CHAT, HELLO | {"tools": [{"type": "function"}]}, "tools", "does not call tools"),
    (CHAT, HELLO | {"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    (CHAT, HELLO | {"response_format": {"type": "json_schema"}}, "response_format", "json_schema.schema"),
    (CHAT, HELLO | {"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex", "exclude each other"),
    (CHAT, HELLO | {"logit_bias": {"x": 1}}, "logit_bias", ""),
    ("/tokenize", {}, "prompt", "give prompt or messages"),
    ("/tokenize", {"prompt": "a", "messages": []}, "prompt", "not both"),
    ("/detokenize", {"tokens": [128]}, "tokens", "outside"),
    ("/detokenize", {"tokens": [2**40]}, "tokens", "outside"),
])
def test_bad_requests_are_told_what_is_wrong(job: ServedJob, path: str, body: Any, param: str | None,
                                             text: str) -> None:
    found = post(job, path, body)
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert text in error["message"]
    job.assert_free()


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"x"', b'{"prompt": "\\ud800"}', b"\xff\xfe", b'{"prompt": "\xff"}',
    b"[" * 100_000, b'{"prompt": "a", "temperature": 1e999}'])
def test_what_is_no_json_object_is_refused(job: ServedJob, body: bytes) -> None:
    found = post(job, COMPLETIONS, body)
    assert found.status_code == 400, found.text
    assert found.json()["error"]["message"]


def test_too_long_has_openais_code(job: ServedJob) -> None:
    found = post(job, COMPLETIONS, GREEDY | {"max_tokens": 300})
    assert found.json()["error"]["code"] == "context_length_exceeded"


def test_other_models_paths_and_methods(job: ServedJob) -> None:
    assert post(job, COMPLETIONS, GREEDY | {"model": "other"}).status_code == 404
    assert post(job, CHAT, HELLO | {"model": "other"}).json()["error"]["param"] == "model"
    assert post(job, "/tokenize", {"prompt": "a", "model": "other"}).status_code == 404
    for path in ("/v1/nothing", "/../etc/passwd", "/v1/completions/x"):
        found = get(job, path)
        assert found.status_code == 404 and found.json()["error"]["message"]
    wrong = get(job, COMPLETIONS)
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "POST")


def test_any_content_type_is_taken(job: ServedJob) -> None:
    body = json.dumps(GREEDY).encode()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "nonsense"):
        assert post(job, COMPLETIONS, body, headers={"content-type": kind}).status_code == 200


def test_what_a_prompt_may_be_is_a_limit_of_the_server(serve: Any) -> None:
    job = serve(limits={"max_prompt_tokens": 4, "max_n": 2})
    assert "4 at most" in post(job, COMPLETIONS, GREEDY).text
    assert answer(job, COMPLETIONS, GREEDY | {"prompt": "hell"})["choices"]
    assert "2 at most" in post(job, CHAT, HELLO | {"n": 3, "messages": [
        {"role": "", "content": ""}]}).text


def test_a_pool_that_is_smaller_than_the_context_bounds_a_chat(serve: Any) -> None:
    job = serve(Role.AGGREGATED, num_blocks=16, tokens_per_block=4)
    body = {key: value for key, value in HELLO.items() if key != "max_tokens"}
    assert answer(job, CHAT, body)["usage"]["total_tokens"] == 64


# ---- what the engine must know; the fields are SamplingParams' own ----


def call_of(kind: Any, **fields: Any) -> Any:
    return decode(json.dumps(fields).encode(), msgspec.json.Decoder(kind))


def test_sampling_fields_reach_the_engine() -> None:
    call = call_of(CompletionCall, prompt="a", temperature=0.5, top_p=0.9, top_k=3, min_tokens=2, seed=7,
                   frequency_penalty=0.1, presence_penalty=0.2, repetition_penalty=1.1, ignore_eos=True,
                   stop="end", stop_token_ids=[4])
    assert sampling_of(call, 9, 2) == SamplingParams(
        max_tokens=9, logprobs=2, temperature=0.5, top_p=0.9, top_k=3, min_tokens=2, seed=7,
        frequency_penalty=0.1, presence_penalty=0.2, repetition_penalty=1.1, ignore_eos=True,
        stop=("end",), stop_token_ids=(4,))


@pytest.mark.parametrize(("fields", "field", "value"), [
    ({"logit_bias": {"5": -100}}, "logit_bias", {5: -100.0}),
    ({"response_format": {"type": "json_object"}}, "guided", Guided(json='{"type": "object"}')),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "null"}}}},
     "guided", Guided(json='{"type":"null"}')),
    ({"guided_json": {"type": "null"}}, "guided", Guided(json='{"type":"null"}')),
    ({"guided_regex": "a+"}, "guided", Guided(regex="a+")),
    ({"guided_choice": ["a", "b"]}, "guided", Guided(choice=("a", "b"))),
    ({"guided_grammar": "start: x"}, "guided", Guided(grammar="start: x")),
])
def test_what_an_output_may_be_reaches_the_engine(fields: dict[str, Any], field: str, value: Any) -> None:
    assert getattr(sampling_of(call_of(ChatCall, messages=[], **fields), 8, None), field) == value


def test_a_text_format_asks_for_nothing() -> None:
    sampling_of(call_of(ChatCall, messages=[], response_format={"type": "text"}), 8, None)


def test_bad_fields_of_the_engine_begin_with_their_name() -> None:
    with pytest.raises((ApiError, ConfigError), match="top_k"):
        sampling_of(call_of(ChatCall, messages=[], top_k=-1), 8, None)


# ---- log-probabilities of the prompt ----


def test_echoed_logprobs_begin_with_null_and_cover_prompt_and_output(uncached: ServedJob) -> None:
    job = uncached
    found = answer(job, COMPLETIONS, GREEDY | {"echo": True, "logprobs": 2})["choices"][0]
    alone = expected(job, "hello", prompt_logprobs=2, logprobs=2)
    logprobs = found["logprobs"]
    assert found["text"] == "hello" + alone.text
    assert logprobs["tokens"] == [*"hello", *alone.text]
    assert logprobs["text_offset"] == list(range(13))
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(
        [each.logprob for each in [*alone.prompt_logprobs[1:], *alone.choices[0].logprobs]])
    assert all(len(top) >= 2 for top in logprobs["top_logprobs"][1:])


# ---- what an output may be ----


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_an_output_is_what_its_guide_says(serve: Any, path: str) -> None:
    job = serve(eos=(0,))
    body = GREEDY if path == COMPLETIONS else HELLO
    for fields, pattern in (({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
                            ({"guided_choice": ["yes", "no"]}, "yes|no"),
                            ({"response_format": {"type": "json_schema", "json_schema": {
                                "name": "x", "schema": {"enum": [1234]}}}}, "1234")):
        choice = answer(job, path, body | fields)["choices"][0]
        text = choice["text"] if path == COMPLETIONS else choice["message"]["content"]
        assert re.fullmatch(pattern, text), (fields, text)
        assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_is_none_is_the_clients_mistake(serve: Any, stream: bool) -> None:
    job = serve(eos=(0,))
    found = post(job, COMPLETIONS, GREEDY | {"guided_grammar": "start: nowhere", "stream": stream})
    assert found.status_code == 400, found.text
    assert "guided is no valid grammar" in found.json()["error"]["message"]
    job.assert_free()


def test_biased_tokens_are_those_that_come(job: ServedJob) -> None:
    (choice,) = answer(job, COMPLETIONS, GREEDY | {"logit_bias": {str(ord("x")): 100.0}})["choices"]
    assert choice["text"] == "x" * 8


def test_tokens_that_are_half_a_character_are_spelt_in_bytes() -> None:
    bytes_of = {1: b"\xe2\x82", 2: "é".encode()}
    tokenizer: Any = SimpleNamespace(is_byte_level=True, byte_table=lambda skip: bytes_of)
    spelling = Spelling(tokenizer)
    assert spelling.text_of(1) == "bytes:\\xe2\\x82"
    assert spelling.text_of(2) == "é"
    (item,) = spelling.for_chat([1], [TokenLogprobs(-1.0, [(2, -2.0)])], 1).content
    assert (item.bytes, item.top_logprobs[0].bytes) == ([0xE2, 0x82], [0xC3, 0xA9])
