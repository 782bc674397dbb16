"""What the model says of a prompt's own tokens: against a plain forward, however the prompt is cut."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from inprocess import (
    VOCABULARY,
    Job,
    LedJob,
    OrchestratedJob,
    assert_ended_once,
    executor_request,
    replace,
    tokens_of,
)

from disagg_mpi.engine.logprobs import take_scores
from disagg_mpi.frontend.jsonl import parse_line, result_data
from disagg_mpi.orchestrator.table import State
from disagg_mpi.request import ExecutorRequest, Request, RequestType, Response, SamplingParams
from disagg_mpi.topology import Role

SHAPES: dict[str, dict[str, Any]] = {
    "aggregated": {"roles": [Role.AGGREGATED]},
    "exchanged": {"roles": [Role.CONTEXT, Role.GENERATION]},
    "messages": {"roles": [Role.CONTEXT, Role.GENERATION], "shared": False},
    "copied": {"roles": [Role.CONTEXT, Role.GENERATION], "generation_tokens_per_block": 2},
}
SHAPED = pytest.mark.parametrize("shape", SHAPES)
PROMPTS = [list(range(40)), [7] * 21, [5, 9, 100], [3], list(range(40, 75))]


def make(jobs: Any, shape: str, **changes: Any) -> Job:
    options = {**SHAPES[shape], **changes}
    job: Job = jobs(*options.pop("roles"), **options)
    return job


def asking(number: int, prompt: list[int], **sampling: Any) -> ExecutorRequest:
    return executor_request(number, prompt, **{
        "max_tokens": 4, "prompt_logprobs": 2, "return_context_logits": True, **sampling})


@cache
def plain_logits(path: Path, prompt: tuple[int, ...]) -> torch.Tensor:
    """transformers' own, ``[positions, vocabulary]``."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0]  # type: ignore[no-any-return]


def check(path: Path, prompt: list[int], response: Response | Any, num_top: int = 2) -> None:
    expected = plain_logits(path, tuple(prompt))
    logits = np.stack([np.frombuffer(row, np.float32) for row in response.context_logits])
    assert np.allclose(logits, expected.numpy(), atol=1e-3)
    values = torch.log_softmax(expected, -1)
    first, *others = response.prompt_logprobs
    assert first is None and len(others) == len(prompt) - 1
    for position, (token, found) in enumerate(zip(prompt[1:], others, strict=True)):
        assert found.logprob == pytest.approx(float(values[position, token]), abs=1e-3)
        best = values[position].topk(num_top)
        assert [value for _, value in found.top] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert all(value == pytest.approx(float(values[position, token]), abs=1e-3)
                   for token, value in found.top)


def scores_of(responses: list[Response]) -> Response:
    """The one response that has them: that of the first token."""
    (found,) = [r for r in responses if r.prompt_logprobs is not None or r.context_logits is not None]
    assert found is next(r for r in responses if r.token_ids)
    return found


@SHAPED
@pytest.mark.parametrize(("max_num_tokens", "num_stages"), [(8, 1), (13, 3), (64, 1)])
def test_they_are_those_of_a_plain_forward(
        jobs: Any, tiny_llama: Path, undisturbed: Any, shape: str, max_num_tokens: int,
        num_stages: int) -> None:
    job = make(jobs, shape, max_num_tokens=max_num_tokens, num_stages=num_stages)
    requests = [asking(number, prompt) for number, prompt in enumerate(PROMPTS)]
    beside = executor_request(50, PROMPTS[0], max_tokens=12)
    for _ in range(2):  # the second time the prefix cache holds every prompt
        found = job.run([*requests, beside])
        for request in requests:
            responses = found[request.request_id]
            assert_ended_once(responses)
            check(tiny_llama, request.prompt_token_ids, scores_of(responses))
            plain = replace(request, sampling=SamplingParams(max_tokens=4))  # type: ignore[arg-type]
            assert tokens_of(responses) == undisturbed.tokens(plain)
        assert tokens_of(found[50]) == undisturbed.tokens(beside)
        assert not [r for r in found[50] if r.prompt_logprobs is not None or r.context_logits is not None]
    assert job.problems() == []


@SHAPED
def test_a_filled_prefix_cache_is_not_used_for_them_but_by_others(
        jobs: Any, tiny_llama: Path, shape: str) -> None:
    job = make(jobs, shape)
    prompt = PROMPTS[0]
    assert job.run([executor_request(1, prompt)])[1]
    responses = job.run([asking(2, prompt)])[2]
    check(tiny_llama, prompt, scores_of(responses))
    assert next(r.timing.cached_tokens for r in responses if r.timing) == 0
    others = job.run([executor_request(3, prompt)])[3]
    assert next(r.timing.cached_tokens for r in others if r.timing) > 0
    assert job.problems() == []


@pytest.mark.parametrize("most", [1, 5])
def test_a_step_keeps_no_more_rows_than_it_may(
        jobs: Any, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr("disagg_mpi.engine.scheduler.MAX_SCORED_TOKENS", most)
    kept: list[int] = []

    def watched(chunks: Any, logits: torch.Tensor, leaving: Any) -> torch.Tensor:
        kept.append(sum(chunk.length for chunk in chunks if chunk.is_scored))
        return take_scores(chunks, logits, leaving)

    monkeypatch.setattr("disagg_mpi.engine.engine.take_scores", watched)
    job = make(jobs, "aggregated", max_num_tokens=64)
    requests = [asking(number, prompt) for number, prompt in enumerate(PROMPTS)]
    found = job.run([*requests, executor_request(50, PROMPTS[0], max_tokens=30)])
    for request in requests:
        check(tiny_llama, request.prompt_token_ids, scores_of(found[request.request_id]))
    assert max(kept) == most
    assert job.problems() == []


@SHAPED
def test_they_come_once_whoever_is_preempted(jobs: Any, tiny_llama: Path, shape: str) -> None:
    job = make(jobs, shape, num_blocks=12, reserved_output=4, max_num_tokens=32)
    requests = [asking(number, [number] * 9, max_tokens=28) for number in range(1, 5)]
    found = job.run(requests)
    num_preempted = 0
    for request in requests:
        final = assert_ended_once(found[request.request_id])
        check(tiny_llama, request.prompt_token_ids, scores_of(found[request.request_id]))
        num_preempted += final.timing.num_preempted if final.timing else 0
    assert num_preempted > 0
    assert job.problems() == []


def test_one_preempted_within_its_prompt_begins_anew(jobs: Any, tiny_llama: Path) -> None:
    """A long prompt in chunks, younger than one that takes all blocks: its rows count once."""
    job = make(jobs, "aggregated", num_blocks=12, reserved_output=2, max_num_tokens=4, max_batch_size=4)
    old = executor_request(1, [1] * 8, max_tokens=40)
    young = asking(2, list(range(30)), max_tokens=2)
    responses = job.run([old, young])[2]
    final = assert_ended_once(responses)
    check(tiny_llama, young.prompt_token_ids, scores_of(responses))
    assert final.timing is not None and final.timing.num_preempted == 1
    assert job.problems() == []


@pytest.mark.parametrize("num_top", [0, 20])
def test_as_many_alternatives_as_asked_for(jobs: Any, tiny_llama: Path, num_top: int) -> None:
    job = make(jobs, "exchanged")
    responses = job.run([asking(1, PROMPTS[2], prompt_logprobs=num_top)])[1]
    found = scores_of(responses)
    check(tiny_llama, PROMPTS[2], found, num_top)
    assert found.prompt_logprobs is not None
    assert [len(one.top) for one in found.prompt_logprobs if one is not None] == [num_top] * 2


def test_either_can_be_had_alone_and_only_the_first_continuation_has_them(jobs: Any) -> None:
    job = make(jobs, "aggregated")
    found = job.run([
        asking(1, PROMPTS[2], return_context_logits=False), asking(2, PROMPTS[2], prompt_logprobs=None),
        executor_request(3, PROMPTS[2], 1, prompt_logprobs=2, return_context_logits=True)])
    assert scores_of(found[1]).context_logits is None
    assert scores_of(found[2]).prompt_logprobs is None
    assert all(r.prompt_logprobs is None and r.context_logits is None for r in found[3])


def test_a_generation_phase_does_not_score(jobs: Any) -> None:
    request = replace(asking(1, PROMPTS[2]), type=RequestType.GENERATION_ONLY)
    assert not request.scores_prompt


def test_rank_0_counts_on_no_hit_for_them(jobs: Any) -> None:
    """Its ledger of context tokens to compute says what will be computed."""
    job = make(jobs, "exchanged", max_num_tokens=64)
    led = LedJob(job)
    sinks = [led.submit(executor_request(1, PROMPTS[0]))]
    led.finish()
    promised = []
    for number, request in ((2, asking(2, PROMPTS[0])), (3, executor_request(3, PROMPTS[0]))):
        sinks.append(led.submit(request))
        led.lead()
        promised.append(led.entries[number].context_tokens)
        led.finish()
    assert promised[0] == len(PROMPTS[0]) > promised[1]
    assert [sink.end for sink in sinks] == [State.DONE] * 3
    assert led.problems() == []


def test_a_result_has_them_once_and_a_stream_with_its_first_event(jobs: Any, tiny_llama: Path) -> None:
    whole = OrchestratedJob(make(jobs, "exchanged"))
    try:
        params = SamplingParams(max_tokens=3, prompt_logprobs=2, return_context_logits=True, n=2,
                                temperature=1.0, seed=4)
        handle = whole.orchestrator.submit(Request(prompt_token_ids=PROMPTS[1], sampling=params))
        events = list(handle)
        result = handle.result()
        check(tiny_llama, PROMPTS[1], result)
        scored = [event for event in events if event.prompt_logprobs is not None]
        assert [event.prompt_logprobs for event in scored] == [result.prompt_logprobs]
        assert scored[0] is next(event for event in events if event.index == 0)
        plain = whole.orchestrator.submit(PROMPTS[1], SamplingParams(max_tokens=2)).result()
        assert plain.prompt_logprobs is None and plain.context_logits is None
        line = result_data(result)["prompt_logprobs"]
        assert line[0] is None and len(line) == len(PROMPTS[1])
        assert line[1][0] == pytest.approx(result.prompt_logprobs[1].logprob)  # type: ignore[index, union-attr]
    finally:
        whole.close()


def test_too_many_logits_are_refused_by_size(jobs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("disagg_mpi.executor.validate.MAX_CONTEXT_LOGITS_BYTES", 4 * VOCABULARY * 10)
    job = make(jobs, "aggregated")
    found = job.run([asking(1, [1] * 10), asking(2, [1] * 11),
                     asking(3, [1] * 11, return_context_logits=False)])
    assert tokens_of(found[1]) and tokens_of(found[3])
    assert "shorten the prompt to 10 tokens, or ask for prompt_logprobs" in (found[2][-1].error or "")


def test_a_line_of_a_file_may_ask_for_them_but_not_for_logits() -> None:
    defaults = SamplingParams()
    line = parse_line(b'{"prompt": "a", "prompt_logprobs": 1, "logit_bias": {"5": -2}, "bad": ["x"],'
                      b' "guided": {"regex": "a+"}}', 1, defaults)
    assert line.request is not None, line.error
    sampling = line.request.sampling
    assert sampling.prompt_logprobs == 1 and sampling.logit_bias == {5: -2.0} and sampling.bad == ("x",)
    assert sampling.guided is not None and sampling.guided.regex == "a+"
    refused = parse_line(b'{"prompt": "a", "return_context_logits": true}', 2, defaults)
    assert refused.request is None and "logits are not written to files" in (refused.error or "")
