"""Requests that outgrow what they reserved: blocks are taken, the youngest waits, and no token is another."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess import (
    Job,
    LedJob,
    Undisturbed,
    assert_ended_once,
    executor_request,
    replace,
    text_of,
    tokens_of,
    word,
)

from disagg_mpi.orchestrator.table import State
from disagg_mpi.request import ExecutorRequest, RequestType, Response
from disagg_mpi.topology import Role

SHAPES: dict[str, dict[str, Any]] = {
    "aggregated": {"roles": [Role.AGGREGATED]},
    "exchanged": {"roles": [Role.CONTEXT, Role.GENERATION]},
    "messages": {"roles": [Role.CONTEXT, Role.GENERATION], "shared": False},
    "copied": {"roles": [Role.CONTEXT, Role.GENERATION], "generation_tokens_per_block": 2},
}
# The pool holds the longest of LONG and little more.
TIGHT = {"num_blocks": 12, "reserved_output": 4, "max_num_tokens": 32}
LONG = [
    executor_request(1, [5, 9, 100, 3, 77, 21], max_tokens=30),
    executor_request(2, list(range(14)), max_tokens=33, temperature=1.0, seed=5, repetition_penalty=1.2),
    executor_request(3, [8, 8], max_tokens=40, logprobs=2),
    executor_request(4, list(range(60, 70)), max_tokens=25, temperature=0.8, seed=1, frequency_penalty=0.3),
    executor_request(5, [1, 2, 3], max_tokens=30, min_tokens=30),
]

SHAPED = pytest.mark.parametrize("shape", SHAPES)


def make(jobs: Any, shape: str, **changes: Any) -> Job:
    options = {**TIGHT, **SHAPES[shape], **changes}
    return jobs(*options.pop("roles"), **options)


@SHAPED
@pytest.mark.parametrize(("prefix_cache", "num_stages"), [(True, 1), (False, 1), (True, 2)])
def test_all_come_to_their_end_with_their_own_tokens(
        jobs: Any, undisturbed: Undisturbed, shape: str, prefix_cache: bool, num_stages: int) -> None:
    job = make(jobs, shape, prefix_cache=prefix_cache, num_stages=num_stages)
    num_preempted = 0
    for _ in range(2):  # the second time with scattered blocks, and cached ones
        said = job.run(LONG)
        for request in LONG:
            responses = said[request.request_id]
            final = assert_ended_once(responses)
            assert tokens_of(responses) == undisturbed.tokens(request)
            assert text_of(responses) == "".join(map(word, tokens_of(responses)))
            assert final.finish_reason == "length"
            num_preempted += final.timing.num_preempted if final.timing else 0
        oldest = said[1][-1].timing
        assert oldest is not None and oldest.num_preempted == 0
    assert num_preempted > 0
    assert job.problems() == []


def test_what_was_computed_may_still_be_there_and_is_not_called_cached(jobs: Any) -> None:
    """``cached_tokens`` are what the prompt found, not what a preempted request found of itself."""
    def finals(prefix_cache: bool) -> list[Any]:
        job = make(jobs, "aggregated", prefix_cache=prefix_cache)
        responses = job.run([executor_request(i, [i] * 9, max_tokens=20) for i in (1, 2)])
        assert job.problems() == []
        computed = sum(s.num_context_tokens + s.num_generation_tokens
                       for s in job.context.get_latest_iteration_stats())
        return [computed, *(r[-1].timing for r in responses.values())]

    computed, *timings = finals(True)
    without, *_ = finals(False)
    assert [t.num_preempted for t in timings] == [0, 1]
    assert [t.cached_tokens for t in timings] == [0, 0]
    assert computed < without


def steps_until_preempted(job: Job, requests: list[ExecutorRequest]) -> tuple[dict[int, list[Response]], int]:
    """Run in the last instance until somebody has no blocks; what was said, and whose they were."""
    said: dict[int, list[Response]] = {r.request_id: [] for r in requests}
    for _ in range(300):
        for instance, responses in zip(job.instances, job.turn().values(), strict=True):
            for response in responses:
                said[response.request_id].append(response)
                if response.context_phase_params is not None:
                    job.generation.enqueue_request(replace(
                        next(r for r in requests if r.request_id == response.request_id),
                        type=RequestType.GENERATION_ONLY,
                        context_phase_params=response.context_phase_params))
                if response.num_blocks == 0 and instance is job.instances[-1]:
                    return said, response.request_id
    raise AssertionError("nobody was preempted")


def enqueue(job: Job, requests: list[ExecutorRequest]) -> None:
    split = job.instances[0].role is Role.CONTEXT
    kind = RequestType.CONTEXT_ONLY if split else RequestType.CONTEXT_AND_GENERATION
    job.context.enqueue_requests([replace(r, type=kind) for r in requests])


@SHAPED
def test_the_youngest_gives_its_blocks_back(jobs: Any, shape: str) -> None:
    job = make(jobs, shape)
    requests = [executor_request(i, [i] * 6, max_tokens=30) for i in (7, 3, 5)]
    enqueue(job, requests)
    _, victim = steps_until_preempted(job, requests)
    assert victim == 5, "the last to come, whatever its id"
    assert not job.instances[-1].blocks.owns(5)
    assert [i.executor.check_integrity() for i in job.instances] == [[]] * len(job.instances)


@SHAPED
@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_a_preempted_request_can_be_given_up_while_it_waits(
        jobs: Any, undisturbed: Undisturbed, shape: str, reason: Any) -> None:
    job = make(jobs, shape)
    requests = [executor_request(i, [i] * 6, max_tokens=30) for i in (1, 2, 3)]
    enqueue(job, requests)
    said, victim = steps_until_preempted(job, requests)
    job.generation.cancel_request(victim, reason)
    for _ in range(100):
        for responses in job.turn().values():
            for response in responses:
                said[response.request_id].append(response)
    final = assert_ended_once(said[victim])
    assert final.finish_reason == reason
    for request in requests:
        tokens = tokens_of(said[request.request_id])
        if request.request_id == victim:
            assert tokens == undisturbed.tokens(request)[: len(tokens)]
        else:
            assert_ended_once(said[request.request_id])
            assert tokens == undisturbed.tokens(request)
    assert job.problems() == []


@SHAPED
def test_rank_0_is_told_of_every_block(jobs: Any, shape: str) -> None:
    """Its ledger and the instance's books agree after every turn, except for what is on its way."""
    led = LedJob(make(jobs, shape))
    sinks = [led.submit(request) for request in LONG]
    blocks = led.job.instances[-1].blocks
    sizes: set[int] = set()
    for _ in range(500):
        led.turn()
        led.lead()
        for request_id, entry in led.entries.items():
            if entry.state is State.GENERATION and not entry.is_over:
                held = len(blocks.table(request_id)) if blocks.owns(request_id) else 0
                assert entry.num_blocks == held
                sizes.add(held)
    assert [sink.end for sink in sinks] == [State.DONE] * len(LONG)
    assert {0, 12} & sizes and len(sizes) > 3
    assert sum(e.timing.num_preempted for e in led.entries.values()) > 0
    assert led.problems() == []


def test_a_stop_is_found_in_what_was_computed_again(jobs: Any, undisturbed: Undisturbed) -> None:
    requests = [executor_request(i, [i] * 6, max_tokens=30) for i in (1, 2, 3)]
    text = "".join(map(word, undisturbed.tokens(requests[2])))
    stops = [text[at : at + 3] for at in range(12, 20)]
    stop = next(s for s in stops if text.index(s) >= 12)
    job = make(jobs, "aggregated")
    stopping = replace(requests[2], sampling=replace(requests[2].sampling, stop=(stop,)))  # type: ignore[arg-type]
    said = job.run([*requests[:2], stopping])
    final = assert_ended_once(said[3])
    assert final.finish_reason == "stop" and final.timing is not None and final.timing.num_preempted
    assert text_of(said[3]) == text[: text.index(stop)]
    assert job.problems() == []


PROMPTS = [[5, 9, 100], list(range(12)), [7] * 8, [7] * 8 + [1, 2], [90]]


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_under_any_load_everyone_gets_the_same_tokens(
        tiny_llama: Path, undisturbed: Undisturbed, data: st.DataObject) -> None:
    """Random arrivals, lengths, cancels and stalls of the wire, led by rank 0."""
    shape = data.draw(st.sampled_from(sorted(SHAPES)), label="shape")
    options = {"shared": True, **SHAPES[shape]}
    led = LedJob(Job(
        tiny_llama, options.pop("roles"), num_blocks=data.draw(st.integers(8, 14), label="blocks"),
        reserved_output=data.draw(st.integers(1, 6), label="reserved"), max_batch_size=4,
        max_num_tokens=data.draw(st.integers(4, 20), label="budget"),
        prefix_cache=data.draw(st.booleans(), label="prefix_cache"),
        num_stages=data.draw(st.integers(1, 3), label="stages"), **options))
    requests: list[ExecutorRequest] = []
    sinks = []
    for action in data.draw(st.lists(st.sampled_from(["new", "new", "turn", "turns", "cancel", "hold"]),
                                     max_size=25), label="actions"):
        if action == "new":
            requests.append(executor_request(
                len(requests), data.draw(st.sampled_from(PROMPTS), label="prompt"),
                max_tokens=data.draw(st.sampled_from([1, 2, 9, 20]), label="max_tokens")))
            sinks.append(led.submit(requests[-1]))
        elif action == "cancel" and requests:
            led.dispatcher.cancel(data.draw(st.integers(0, len(requests) - 1), label="which"))
        elif action == "hold":
            led.job.wire.hold = not led.job.wire.hold
        for _ in range(6 if action == "turns" else 1):
            led.turn()
            assert [i.executor.check_integrity() for i in led.job.instances] == [[]] * len(led.job.instances)
    led.job.wire.hold = False
    led.finish()
    for request, sink in zip(requests, sinks, strict=True):
        expected = undisturbed.tokens(request)
        assert sink.token_ids == expected[: len(sink.token_ids)]
        if sink.end is State.DONE:
            assert sink.token_ids == expected
    assert led.problems() == []
    led.job.close()


@pytest.mark.parametrize("pause", range(3, 14))
def test_contexts_and_generations_never_wait_for_each_other(jobs: Any, pause: int) -> None:
    """Two that grow fill the generation pools, early requests the rest, and offers the context's."""
    job = jobs(Role.CONTEXT, Role.GENERATION, Role.GENERATION, shared=False, num_blocks=16, overlap_tokens=24,
               reserved_output=4, max_num_tokens=16)
    led = LedJob(job)
    chooser = random.Random(1)

    def request(number: int, length: int, max_tokens: int) -> ExecutorRequest:
        prompt = [chooser.randrange(128) for _ in range(length)]
        return executor_request(number, prompt, max_tokens=max_tokens)

    sinks = [led.submit(request(number, 5, 59)) for number in (1, 2)]
    for _ in range(pause):
        led.turn()
    for number, length in ((3, 20), (4, 20), (5, 28), (6, 28)):
        sinks.append(led.submit(request(number, length, 4)))
    led.finish()
    assert all(sink.end is State.DONE for sink in sinks)
    assert led.problems() == []
