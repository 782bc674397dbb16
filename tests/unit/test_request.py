"""Requests and sampling parameters: nothing gets past here that a later layer would stumble over."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

import disagg_mpi
from disagg_mpi.config import convert
from disagg_mpi.errors import ConfigError
from disagg_mpi.request import Choice, Guided, Request, Result, SamplingParams, Timing, TokenEvent


@pytest.mark.parametrize(("params", "text"), [
    ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
    ({"max_tokens": 2.0}, "max_tokens is 2.0; it must be a whole number"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"min_tokens": 65}, "min_tokens is 65; it must be between 0 and max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"temperature": float("inf")}, "temperature"),
    ({"temperature": "1"}, "temperature"),
    ({"top_k": -1}, "top_k"),
    ({"top_p": 0.0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"repetition_penalty": 0.0}, "repetition_penalty"),
    ({"presence_penalty": float("inf")}, "presence_penalty"),
    ({"frequency_penalty": float("nan")}, "frequency_penalty"),
    ({"stop": ("a", "")}, "stop"),
    ({"stop": "\n"}, r"stop is '\\n'; it must be a tuple of texts"),
    ({"stop": ("\ud800",)}, "stop"),
    ({"stop": (1,)}, "stop"),
    ({"stop_token_ids": 5}, "stop_token_ids"),
    ({"stop_token_ids": (1.0,)}, "stop_token_ids"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"logprobs": 21}, "logprobs is 21; it must be between 0 and 20"),
    ({"prompt_logprobs": 21}, "prompt_logprobs is 21; it must be between 0 and 20"),
    ({"prompt_logprobs": 1.0}, "prompt_logprobs"),
    ({"bad": "word"}, r"bad is 'word'; it must be a tuple of texts"),
    ({"bad": ("",)}, "bad"),
    ({"bad_token_ids": (1, 2)}, "bad_token_ids"),
    ({"bad_token_ids": ((),)}, "none empty"),
    ({"bad_token_ids": ((1, True),)}, "bad_token_ids"),
    ({"bad_token_ids": ((1,),) * 1000, "bad": ("a",) * 25}, "1025 sequences; together they may hold 1024"),
    ({"logit_bias": {"1": 2.0}}, "logit_bias"),
    ({"logit_bias": {1: float("nan")}}, "logit_bias"),
    ({"logit_bias": {1: float("inf")}}, "logit_bias"),
    ({"logit_bias": {1: 10**400}}, "logit_bias"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"guided": "a+"}, "guided is 'a\\+'; it must be a Guided"),
    ({"n": 0}, "n is 0"),
    ({"n": None}, "n is None"),
])
def test_bad_sampling_parameters_are_named(params: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SamplingParams(**params)


@pytest.mark.parametrize("params", [
    {}, {"temperature": 1}, {"stop": ["a", "é"]}, {"seed": 0}, {"seed": 2**63 - 1}, {"logprobs": 0},
    {"top_k": 10**9}, {"min_tokens": 64}, {"presence_penalty": -2}, {"bad": ("a",)},
    {"bad_token_ids": ((1,), (2, 3))}, {"logit_bias": {0: 1, 7: -100.0}}, {"prompt_logprobs": 0},
    {"guided": Guided(choice=("a", "b"))}, {"guided": Guided(json="{}")}])
def test_good_sampling_parameters_travel(params: dict[str, Any]) -> None:
    made = SamplingParams(**params)
    back = msgspec.msgpack.decode(msgspec.msgpack.encode(made), type=SamplingParams)
    assert back == msgspec.structs.replace(made, stop=tuple(made.stop))


def test_unknown_sampling_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"top_q.*Known keys"):
        convert({"top_q": 1}, SamplingParams, "here")


@pytest.mark.parametrize(("given", "text"), [
    ({}, "exactly one of json, regex, choice, grammar; found none"),
    ({"json": "{}", "regex": "a"}, "found json and regex"),
    ({"regex": ""}, "guided.regex is ''; it must be a text that is not empty"),
    ({"json": {"type": "object"}}, "guided.json"),
    ({"grammar": "\ud800"}, "guided.grammar"),
    ({"choice": ()}, "at least one"),
    ({"choice": "ab"}, "guided.choice"),
    ({"choice": ("a", "")}, "guided.choice"),
    ({"regex": "é" * 2**15 + "a"}, "guided.regex has 65537 bytes; it may have 65536 at most"),
])
def test_a_guide_that_cannot_be_is_named(given: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Guided(**given)


def test_token_ids_of_a_file_are_texts() -> None:
    made = convert({"logit_bias": {"5": -1}, "guided": {"regex": "a"}}, SamplingParams, "here")
    assert made == SamplingParams(logit_bias={5: -1.0}, guided=Guided(regex="a"))
    with pytest.raises(ConfigError, match="here"):
        convert({"logit_bias": {"five": -1}}, SamplingParams, "here")


@pytest.mark.parametrize("given", [
    {}, {"prompt": "a", "prompt_token_ids": [1]}, {"prompt": "a", "messages": []}])
def test_a_request_has_exactly_one_prompt(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exactly one of prompt, prompt_token_ids, messages; found"):
        Request(**given)


@pytest.mark.parametrize("deadline", [0, -1.0, float("nan")])
def test_a_deadline_is_positive(deadline: float) -> None:
    with pytest.raises(ConfigError, match="deadline"):
        Request(prompt="a", deadline=deadline)


def test_a_result_is_its_first_choice() -> None:
    result = Result(id="x", request_id=1, prompt_token_ids=[1, 2], choices=[
        Choice(0, "one", [3], "stop"), Choice(1, "two", [4, 5], "length")])
    assert (result.text, result.token_ids, result.finish_reason) == ("one", [3], "stop")
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (2, 3)
    assert result.usage.total_tokens == 5


def test_rates_of_nothing_are_nothing() -> None:
    assert Timing().handover_gb_per_s == 0.0
    assert Timing(handover=0.1, transfer=2.0, handover_bytes=4 * 10**9).handover_gb_per_s == 2.0
    assert TokenEvent("a", [1]).finish_reason is None


def test_all_public_names_are_there() -> None:
    for name in disagg_mpi.__all__:
        assert getattr(disagg_mpi, name) is not None
    assert set(dir(disagg_mpi)) == set(disagg_mpi.__all__)
    with pytest.raises(AttributeError, match="nope"):
        disagg_mpi.nope  # noqa: B018
