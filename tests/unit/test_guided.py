"""Guided output: whatever the logits say, it is what was asked for, at every layout and when disturbed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess import (
    END,
    VOCABULARY,
    Job,
    LedJob,
    assert_ended_once,
    executor_request,
    replace,
    save_ascii_tokenizer,
    text_of,
    tokens_of,
)

from disagg_mpi.engine.guided import GrammarCompiler
from disagg_mpi.engine.sampler import NoToken, Sampled, Sampler
from disagg_mpi.engine.sequence import Sequence
from disagg_mpi.errors import RequestError
from disagg_mpi.model.tokenizer import Tokenizer
from disagg_mpi.orchestrator.table import State
from disagg_mpi.request import ContextPhaseParams, ExecutorRequest, Guided, RequestType
from disagg_mpi.topology import Role


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save_ascii_tokenizer(tmp_path_factory.mktemp("ascii")))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, VOCABULARY, (END,))


def write(compiler: GrammarCompiler, guided: Guided, noise: int, **sampling: Any) -> Sequence:
    """Sample from random logits until the output is over; 400 tokens at most."""
    sampling = {"max_tokens": 400, "temperature": 2.0, "seed": noise, **sampling}
    one = Sequence(executor_request(1, [1], guided=guided, **sampling), (), compiler.matcher(guided))
    generator = torch.Generator().manual_seed(noise)
    sampler = Sampler((END,))
    while one.num_output_tokens < 400 and one.guide is not None and not one.guide.is_over:
        (found,) = sampler(torch.randn(1, VOCABULARY, generator=generator) * 3, [one])
        assert isinstance(found, Sampled), found
        one.append(found.token)
    return one


def text(tokenizer: Tokenizer, one: Sequence) -> str:
    return tokenizer.decode(one.output_token_ids)


# ---- what is written is what was asked for ----

SMALL = st.integers(-20, 20)
SCHEMAS = st.recursive(
    st.one_of(
        st.just({"type": "boolean"}),
        st.just({"type": "null"}),
        st.tuples(SMALL, SMALL).map(lambda ends: {
            "type": "integer", "minimum": min(ends), "maximum": max(ends)}),
        st.lists(st.text("abc \"\\\n", max_size=5), min_size=1, max_size=4, unique=True).map(
            lambda texts: {"enum": texts}),
        st.integers(0, 6).map(lambda length: {"type": "string", "maxLength": length})),
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(lambda made: {
            "type": "array", "items": made[0], "minItems": made[1], "maxItems": made[1] + made[2]}),
        st.dictionaries(st.text("xyz", min_size=1, max_size=3), inner, max_size=3).flatmap(
            lambda fields: st.sets(st.sampled_from(sorted(fields) or ["x"])).map(lambda required: {
                "type": "object", "properties": fields, "additionalProperties": False,
                "required": sorted(required & fields.keys())}))),
    max_leaves=4)


def fits(value: Any, schema: dict[str, Any]) -> bool:
    """JSON Schema's rules, as far as :data:`SCHEMAS` use them."""
    if "enum" in schema:
        return value in schema["enum"]
    match schema["type"]:
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer":
            return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return isinstance(value, str) and len(value) <= schema["maxLength"]
        case "array":
            return (isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"]
                    and all(fits(item, schema["items"]) for item in value))
    fields = schema["properties"]
    return (isinstance(value, dict) and set(schema["required"]) <= value.keys() <= fields.keys()
            and all(fits(item, fields[name]) for name, item in value.items()))


@given(SCHEMAS, st.integers(0, 2**31))
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_json_is_of_its_schema(
        tokenizer: Tokenizer, compiler: GrammarCompiler, schema: dict[str, Any], noise: int) -> None:
    one = write(compiler, Guided(json=json.dumps(schema)), noise)
    assert one.guide is not None and one.guide.is_over, "schemas of bounded size have outputs of bounded size"
    assert fits(json.loads(text(tokenizer, one)), schema), text(tokenizer, one)


@pytest.mark.parametrize("pattern", [
    "a+b?", "[a-c]{3,5} x", "(true|false)(, (true|false))*", "\n.", "a|ab|b"])
def test_text_is_of_its_expression(
        tokenizer: Tokenizer, compiler: GrammarCompiler, pattern: str) -> None:
    found = {text(tokenizer, write(compiler, Guided(regex=pattern), noise)) for noise in range(30)}
    assert all(re.fullmatch(pattern, one) for one in found)
    assert len(found) > 1, "it leaves a choice"


def test_a_choice_is_one_of_its_texts_and_can_be_any(
        tokenizer: Tokenizer, compiler: GrammarCompiler) -> None:
    texts = ("a b", "ab", "a", 'c"\n', "\\x", "a|b")
    found = {text(tokenizer, write(compiler, Guided(choice=texts), noise)) for noise in range(120)}
    assert found == set(texts)


@pytest.mark.parametrize("grammar", [
    'root ::= "(" root ")" | "x"', 'start: "(" start ")" | "x"'], ids=["gbnf", "lark"])
def test_text_is_of_its_grammar(tokenizer: Tokenizer, compiler: GrammarCompiler, grammar: str) -> None:
    found = {text(tokenizer, write(compiler, Guided(grammar=grammar), noise)) for noise in range(20)}
    for one in found:
        depth = one.index("x")
        assert one == "(" * depth + "x" + ")" * depth
    assert len(found) > 2


def test_tokens_that_the_tokenizer_does_not_know_are_never_allowed(compiler: GrammarCompiler) -> None:
    allowed = compiler.matcher(Guided(regex="(?s).*")).allowed()
    assert allowed.shape == (VOCABULARY,)
    assert allowed[:END].all() and allowed[END] and not allowed[END + 1 :].any()


def test_greedy_takes_the_best_of_what_is_allowed(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    one = Sequence(executor_request(1, [1]), (), compiler.matcher(Guided(choice=("a", "b"))))
    row = torch.zeros(VOCABULARY)
    row[tokenizer.encode("z")] = 9.0
    row[tokenizer.encode("b")] = 1.0
    (found,) = Sampler((END,))(row.unsqueeze(0), [one])
    assert isinstance(found, Sampled) and [found.token] == tokenizer.encode("b")


# ---- where it ends ----


def test_an_end_is_allowed_only_where_the_grammar_may_end(
        compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    guide = compiler.matcher(Guided(regex="aa?"))
    assert not guide.allowed()[END]
    guide.advance(tokenizer.encode("a"))
    assert guide.allowed()[END] and not guide.is_over
    guide.advance([END])
    assert guide.is_over and not guide.error


def test_what_can_only_end_is_over_without_an_end_of_sequence(
        compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    guide = compiler.matcher(Guided(regex="ab"))
    guide.advance(tokenizer.encode("ab"))
    assert guide.is_over


def test_the_minimum_length_holds_where_the_grammar_can_go_on(
        compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for noise in range(10):
        assert len(text(tokenizer, write(compiler, Guided(regex="x*"), noise, min_tokens=7))) >= 7
        assert text(tokenizer, write(compiler, Guided(regex="x|xx"), noise, min_tokens=7)) == "xx"


def test_an_empty_output_ends_with_an_end_of_sequence(compiler: GrammarCompiler) -> None:
    assert write(compiler, Guided(regex="x{0}"), 1, min_tokens=3).output_token_ids == [END]


# ---- what cannot be ----

BROKEN = [
    (Guided(regex="(a"), "unclosed group"),
    (Guided(json="{"), "EOF while parsing"),
    (Guided(json='{"type": "strin"}'), "Invalid type: strin"),
    (Guided(json='{"$ref": "file:///etc/hostname"}'), "not present in a registry"),
    (Guided(grammar="start: nowhere"), "unknown name"),
    (Guided(grammar="root ::= nowhere"), "not found"),
]


@pytest.mark.parametrize(("guided", "message"), BROKEN)
def test_what_is_no_grammar_is_said_in_the_librarys_words(
        compiler: GrammarCompiler, guided: Guided, message: str) -> None:
    with pytest.raises(RequestError, match=f"guided is no valid grammar: (.|\n)*{message}"):
        compiler.matcher(guided)


def test_an_output_that_does_not_fit_says_so(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    one = Sequence(executor_request(1, [1]), (), compiler.matcher(Guided(regex="a+")))
    one.append(tokenizer.encode("b")[0])
    (found,) = Sampler((END,))(torch.zeros(1, VOCABULARY), [one])
    assert isinstance(found, NoToken) and "doesn't satisfy the grammar" in found.error


def test_a_grammar_and_bad_words_can_leave_nothing(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    bad = [tokenizer.encode("a")]
    one = Sequence(executor_request(1, [1]), bad, compiler.matcher(Guided(regex="a")))
    (found,) = Sampler((END,))(torch.zeros(1, VOCABULARY), [one])
    assert isinstance(found, NoToken) and "no token is left" in found.error


def test_without_the_library_the_error_says_what_to_install(
        tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"pip install 'disagg_mpi\[guided\]'"):
        GrammarCompiler(tokenizer, VOCABULARY, (END,)).matcher(Guided(regex="a"))


def test_a_model_without_an_end_cannot_be_guided(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="end-of-sequence"):
        GrammarCompiler(tokenizer, VOCABULARY, ()).matcher(Guided(regex="a"))


def test_a_grammar_is_compiled_once_and_forgotten_in_time(
        tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Guided] = []
    plain = GrammarCompiler._compile
    monkeypatch.setattr(GrammarCompiler, "_compile",
                        lambda self, guided: (compiled.append(guided), plain(self, guided))[1])
    compiler = GrammarCompiler(tokenizer, VOCABULARY, (END,))
    first, others = Guided(regex="first"), [Guided(regex=f"a{{{n}}}") for n in range(1, 40)]
    compiler.matcher(first)
    for other in others[:20]:
        compiler.matcher(other)
        compiler.matcher(first)
    assert compiled.count(first) == 1
    for other in others:
        compiler.matcher(other)
    compiler.matcher(first)
    assert compiled.count(first) == 2


# ---- a whole job ----

SCHEMA = json.dumps({
    "type": "object", "additionalProperties": False, "required": ["a", "b"],
    "properties": {"a": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
                   "b": {"enum": ["foo", "bar", "ab"]}}})
ASKED = [
    executor_request(1, [5, 9, 100, 3, 77, 21], max_tokens=60, guided=Guided(json=SCHEMA)),
    executor_request(2, list(range(14)), max_tokens=40, guided=Guided(regex="(ab|ba){4,12}c"),
                     temperature=1.0, seed=5, repetition_penalty=1.2),
    executor_request(3, [8, 8], max_tokens=12, guided=Guided(choice=("ab ba", "abba", "a"))),
    executor_request(4, list(range(60, 70)), max_tokens=40, temperature=0.8, seed=1,
                     guided=Guided(grammar='root ::= "(" root ")" | "x"'), logprobs=2),
    executor_request(5, [1, 2, 3], max_tokens=30),
    executor_request(6, [1, 2, 3], max_tokens=5, guided=Guided(choice=("a",))),
]
SHAPES: dict[str, dict[str, Any]] = {
    "aggregated": {"roles": [Role.AGGREGATED]},
    "exchanged": {"roles": [Role.CONTEXT, Role.GENERATION]},
    "messages": {"roles": [Role.CONTEXT, Role.GENERATION], "shared": False},
    "copied": {"roles": [Role.CONTEXT, Role.GENERATION], "generation_tokens_per_block": 2},
}
SHAPED = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture
def guided_jobs(jobs: Any, tokenizer: Tokenizer) -> Iterator[Any]:
    def make(shape: str, **changes: Any) -> Job:
        options = {**SHAPES[shape], **changes}
        job: Job = jobs(*options.pop("roles"), tokenizer=tokenizer, eos=(END,), **options)
        return job

    yield make


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, tokenizer: Tokenizer) -> dict[int, tuple[list[int], str]]:
    """Tokens and reasons of :data:`ASKED`, each alone with room for all it needs."""
    found = {}
    job = Job(tiny_llama, (Role.AGGREGATED,), shared=True, num_blocks=64, max_num_tokens=64,
              prefix_cache=False, tokenizer=tokenizer, eos=(END,))
    for request in ASKED:
        responses = job.run([request])[request.request_id]
        found[request.request_id] = tokens_of(responses), str(responses[-1].finish_reason)
    job.close()
    return found


def test_the_outputs_are_what_was_asked_for(
        expected: dict[int, tuple[list[int], str]], tokenizer: Tokenizer) -> None:
    texts = {number: tokenizer.decode(tokens) for number, (tokens, _) in expected.items()}
    reasons = {number: reason for number, (_, reason) in expected.items()}
    found = json.loads(texts[1])
    assert 2 <= len(found["a"]) <= 4 and found["b"] in ("foo", "bar", "ab")
    assert re.fullmatch("(ab|ba){4,12}c", texts[2])
    assert texts[3] in ("ab ba", "abba", "a") and texts[6] == "a"
    assert reasons[1] == reasons[2] == reasons[3] == reasons[6] == "stop"
    assert re.match(r"\(*x?\)*$", texts[4])


@SHAPED
@pytest.mark.parametrize("num_stages", [1, 2])
def test_every_layout_writes_the_same(
        guided_jobs: Any, expected: dict[int, tuple[list[int], str]], tokenizer: Tokenizer, shape: str,
        num_stages: int) -> None:
    job = guided_jobs(shape, num_stages=num_stages)
    for _ in range(2):  # the second time with the prefix cache filled
        for number, responses in job.run(ASKED).items():
            final = assert_ended_once(responses)
            assert (tokens_of(responses), final.finish_reason) == expected[number]
            assert text_of(responses) == tokenizer.decode(tokens_of(responses))
    assert job.problems() == []


@SHAPED
def test_a_preempted_output_goes_on_where_it_was(guided_jobs: Any, tokenizer: Tokenizer, shape: str) -> None:
    requests = [
        executor_request(number, [number] * 9, max_tokens=28, temperature=number - 1.0, seed=number,
                         guided=Guided(regex="c([d-f]g){12}c"))
        for number in (1, 2, 3, 4)]
    roomy = guided_jobs("aggregated", num_blocks=64, max_num_tokens=64, prefix_cache=False)
    alone = {r.request_id: tokens_of(roomy.run([r])[r.request_id]) for r in requests}
    job = guided_jobs(shape, num_blocks=12, reserved_output=4, max_num_tokens=32)
    num_preempted = 0
    for number, responses in job.run(requests).items():
        final = assert_ended_once(responses)
        assert tokens_of(responses) == alone[number] and final.finish_reason == "stop"
        assert re.fullmatch("c([d-f]g){12}c", tokenizer.decode(alone[number]))
        num_preempted += final.timing.num_preempted if final.timing else 0
    assert num_preempted > 0
    assert job.problems() == []


@SHAPED
def test_one_that_is_no_grammar_is_that_requests_error(
        guided_jobs: Any, expected: dict[int, tuple[list[int], str]], shape: str) -> None:
    job = guided_jobs(shape, overlap_tokens=1)
    led = LedJob(job)
    broken = [led.submit(executor_request(90 + at, [1, 2, 3], guided=guided))
              for at, (guided, _) in enumerate(BROKEN)]
    good = [led.submit(request) for request in ASKED]
    led.finish()
    for sink, (_, message) in zip(broken, BROKEN, strict=True):
        assert sink.end is State.FAILED and sink.token_ids == []
        assert re.search(message, sink.responses[-1].error or "")
    assert [sink.token_ids for sink in good] == [expected[request.request_id][0] for request in ASKED]
    assert led.problems() == []


def test_first_tokens_from_elsewhere_must_fit_too(guided_jobs: Any, tokenizer: Tokenizer) -> None:
    job = guided_jobs("exchanged")
    request = executor_request(1, [1, 2, 3], guided=Guided(regex="a+"))
    job.context.enqueue_request(replace(request, type=RequestType.CONTEXT_ONLY))
    for _ in range(50):
        said = job.turn()[1]
        if said:
            break
    params = said[0].context_phase_params
    assert params is not None
    forged = ContextPhaseParams((tokenizer.encode("b")[0],), params.req_id, params.opaque_state)
    job.generation.enqueue_request(replace(
        request, type=RequestType.GENERATION_ONLY, context_phase_params=forged))
    responses = [r for _ in range(50) for r in job.turn()[2]]
    final = assert_ended_once(responses)
    assert final.finish_reason == "error" and "doesn't satisfy the grammar" in (final.error or "")
    assert job.problems() == []


def test_a_model_without_a_tokenizer_says_so(jobs: Any) -> None:
    job = jobs(Role.AGGREGATED)

    def answer(request: ExecutorRequest) -> str:
        (response,) = job.run([request])[request.request_id]
        assert response.finish_reason == "error"
        return str(response.error)

    assert "needs a tokenizer" in answer(executor_request(1, [1], guided=Guided(regex="a")))
    assert "give bad_token_ids" in answer(executor_request(2, [1], bad=("a",)))
    assert job.problems() == []
