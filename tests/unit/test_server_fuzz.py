"""Whatever is sent, there is no 500, no hang, and no effect on what others asked for."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess import PATIENCE
from serving import ServedJob, save_byte_tokenizer

from disagg_mpi.frontend.openai.document import make_document

QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
WITNESS = {"prompt": "who is there", "max_tokens": 6, "temperature": 0}

document = schemathesis.openapi.from_dict(make_document())


@pytest.fixture(scope="module")
def shared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedJob]:
    job = ServedJob(tiny_llama, save_byte_tokenizer(tmp_path_factory.mktemp("ascii")))
    yield job
    job.assert_free()
    job.close()


@functools.cache
def _unhurried() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


def exchange(job: ServedJob, method: str, path: str, **options: Any) -> httpx.Response:
    """What is sent, beside a request whose answer is known; that it is answered, and that the other is."""
    async def run() -> httpx.Response:
        async with job.client() as client:
            witness = asyncio.ensure_future(client.post("/v1/completions", json=WITNESS))
            found = await client.request(method, path, **options)
            other = await witness
            assert other.status_code == 200
            texts.add(other.json()["choices"][0]["text"])
            return found

    found = _unhurried().run_until_complete(asyncio.wait_for(run(), PATIENCE))
    assert len(texts) == 1, "another request's answer changed"
    return found


texts: set[str] = set()


def check(found: httpx.Response) -> None:
    assert found.status_code < 500, found.text
    if found.status_code >= 400:
        assert found.json()["error"]["message"]


@document.parametrize()
@QUICK
def test_what_the_document_allows_and_forbids(case: Any, shared: ServedJob) -> None:
    sent = case.as_transport_kwargs(base_url="http://test")
    taken = {key: sent[key] for key in ("headers", "params", "json", "content", "data") if key in sent}
    check(exchange(shared, sent["method"], sent["url"], **taken))


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8)
FIELDS = ("prompt", "messages", "max_tokens", "temperature", "top_p", "n", "best_of", "stop", "logprobs",
          "echo", "stream", "stream_options", "seed", "logit_bias", "response_format", "stop_token_ids",
          "top_k", "min_tokens", "presence_penalty", "repetition_penalty", "tools", "top_logprobs",
          "chat_template_kwargs", "tokens", "guided_json", "guided_choice", "ignore_eos", "model")
likely = {"prompt": st.just("abc") | st.lists(st.integers(0, 130), max_size=4),
          "max_tokens": st.integers(0, 5),
          "messages": st.just([{"role": "user", "content": "x"}]), "n": st.integers(-1, 3),
          "stream": st.booleans(), "echo": st.booleans(), "logprobs": st.integers(-1, 3) | st.booleans(),
          "temperature": st.floats(-1, 3), "stop": st.text(max_size=2)}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
@given(data=st.data())
@QUICK
def test_any_json(path: str, data: Any, shared: ServedJob) -> None:
    others = data.draw(st.lists(st.sampled_from(FIELDS), max_size=6, unique=True))
    names = ["prompt", "max_tokens", *others]
    body = {name: data.draw(likely[name] | plain if name in likely else plain) for name in names}
    check(exchange(shared, "POST", path, json=body))


@given(body=st.binary(max_size=200), headers=st.dictionaries(
    st.sampled_from(["content-type", "authorization", "x-api-key", "accept", "content-length-x"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20)))
@QUICK
def test_any_bytes(body: bytes, headers: dict[str, str], shared: ServedJob) -> None:
    check(exchange(shared, "POST", "/v1/completions", content=body, headers=headers))
