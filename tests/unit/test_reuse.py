"""What the pool holds already is not computed again, and gives the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess import Job, LedJob, Undisturbed, assert_ended_once, executor_request, replace, tokens_of

from disagg_mpi.orchestrator.table import State
from disagg_mpi.request import ExecutorRequest, PhaseTiming, RequestType
from disagg_mpi.topology import Role

SHAPES: dict[str, dict[str, Any]] = {
    "aggregated": {"roles": [Role.AGGREGATED]},
    "exchanged": {"roles": [Role.CONTEXT, Role.GENERATION]},
    "messages": {"roles": [Role.CONTEXT, Role.GENERATION], "shared": False},
    "hosts": {"roles": [Role.CONTEXT, Role.CONTEXT, Role.GENERATION], "hosts": [0, 0, 0, 1]},
    "copied": {"roles": [Role.CONTEXT, Role.GENERATION], "generation_tokens_per_block": 8},
}
SHAPED = pytest.mark.parametrize("shape", SHAPES)
# Blocks of 4: 5 full ones and 2 tokens.
PROMPT = [(7 * i * i + 3) % 128 for i in range(22)]


def make(jobs: Any, shape: str, **changes: Any) -> Job:
    options = {"max_num_tokens": 64, **SHAPES[shape], **changes}
    return jobs(*options.pop("roles"), **options)


def ask(job: Job, undisturbed: Undisturbed, prompt: list[int], **sampling: Any) -> PhaseTiming:
    """Run one request, whose tokens must be right; its timing, of both phases."""
    request = executor_request(1, prompt, **sampling)
    responses = job.run([request])[1]
    assert tokens_of(responses) == undisturbed.tokens(request)
    assert_ended_once(responses)
    assert job.problems() == []
    timing = PhaseTiming()
    for response in responses:
        if response.timing is not None:
            timing.cached_tokens += response.timing.cached_tokens
            timing.held_tokens += response.timing.held_tokens
            timing.kv_bytes += response.timing.kv_bytes
            timing.handover_bytes += response.timing.handover_bytes
    return timing


@SHAPED
def test_the_same_prompt_again_is_not_computed_and_not_moved(
        jobs: Any, undisturbed: Undisturbed, shape: str) -> None:
    job = make(jobs, shape)
    first, second = (ask(job, undisturbed, PROMPT) for _ in range(2))
    assert (first.cached_tokens, first.held_tokens) == (0, 0)
    assert second.cached_tokens == 20
    # Where blocks change hands there is nothing to be saved; blocks of 8 hold 16 of the 22.
    held = {"messages": 20, "hosts": 20, "copied": 16}.get(shape, 0)
    assert second.held_tokens == held
    if first.handover_bytes:
        assert second.kv_bytes == first.kv_bytes == first.handover_bytes
        assert second.handover_bytes == first.kv_bytes * (22 - held) // 22


@SHAPED
def test_without_a_cache_all_is_computed(jobs: Any, undisturbed: Undisturbed, shape: str) -> None:
    job = make(jobs, shape, prefix_cache=False)
    for _ in range(2):
        timing = ask(job, undisturbed, PROMPT)
        assert (timing.cached_tokens, timing.held_tokens) == (0, 0)


@SHAPED
@pytest.mark.parametrize(("length", "cached"), [(22, 20), (21, 20), (20, 16), (19, 16), (5, 4), (4, 0)])
def test_a_prefix_is_reused_in_whole_blocks_and_one_token_is_computed(
        jobs: Any, undisturbed: Undisturbed, shape: str, length: int, cached: int) -> None:
    job = make(jobs, shape)
    ask(job, undisturbed, PROMPT)
    assert ask(job, undisturbed, PROMPT[:length]).cached_tokens == cached


@SHAPED
def test_what_differs_in_its_first_token_shares_nothing(
        jobs: Any, undisturbed: Undisturbed, shape: str) -> None:
    job = make(jobs, shape)
    ask(job, undisturbed, PROMPT)
    assert ask(job, undisturbed, [1, *PROMPT[1:]]).cached_tokens == 0
    assert ask(job, undisturbed, [*PROMPT[:9], 1, *PROMPT[10:]]).cached_tokens == 8


@SHAPED
def test_turns_of_a_conversation_build_on_each_other(
        jobs: Any, undisturbed: Undisturbed, shape: str) -> None:
    """Prompt, output, and more: in one pool also the output's KV-cache is there."""
    job = make(jobs, shape, num_blocks=64)
    so_far = PROMPT[:10]
    for turn in range(4):
        request = executor_request(1, so_far, max_tokens=11)
        timing = ask(job, undisturbed, so_far, max_tokens=11)
        if turn:
            both_know = shape in ("aggregated", "exchanged")
            known = len(so_far) - 3 - (1 if both_know else 11)  # the last token's KV is never computed
            assert timing.cached_tokens == known // 4 * 4
            if not both_know:  # generation has kept the output, and takes over what follows it
                size = 8 if shape == "copied" else 4
                assert timing.held_tokens == (len(so_far) - 4) // size * size
        so_far = [*so_far, *undisturbed.tokens(request), 50 + turn, 60, 70]


@SHAPED
def test_a_batch_of_one_prompt_computes_its_beginning_once(
        jobs: Any, undisturbed: Undisturbed, shape: str) -> None:
    """Contexts come in as far as a step goes, so that later ones find what earlier ones have computed."""
    job = make(jobs, shape, max_num_tokens=22, num_blocks=64)
    requests = [executor_request(i, [*PROMPT[:20], i, i]) for i in range(6)]
    said = job.run(requests)
    for request in requests:
        assert tokens_of(said[request.request_id]) == undisturbed.tokens(request)
    stats = job.context.get_latest_iteration_stats()
    assert sum(s.num_context_tokens for s in stats) == 22 + 5 * 2
    assert job.problems() == []


@SHAPED
def test_what_is_evicted_is_computed_again(jobs: Any, undisturbed: Undisturbed, shape: str) -> None:
    job = make(jobs, shape, num_blocks=18)
    others = [[i] * 30 for i in (1, 2, 3)]
    ask(job, undisturbed, PROMPT)
    for other in others:
        ask(job, undisturbed, other)
    assert ask(job, undisturbed, PROMPT).cached_tokens < 20
    assert ask(job, undisturbed, PROMPT).cached_tokens == 20


def test_a_pool_that_is_full_of_its_own_prefix_still_serves(jobs: Any, undisturbed: Undisturbed) -> None:
    """The blocks that hold the prefix are the only ones there are: some must be written."""
    job = make(jobs, "aggregated", num_blocks=8)
    prompt = PROMPT[:20]
    for _ in range(3):
        ask(job, undisturbed, prompt, max_tokens=13)  # all 8 blocks
        ask(job, undisturbed, [*prompt[:8], *range(12)], max_tokens=13)


def test_two_at_once_of_one_prefix_copy_it(jobs: Any, undisturbed: Undisturbed) -> None:
    job = make(jobs, "aggregated")
    ask(job, undisturbed, PROMPT)
    requests = [executor_request(i, [*PROMPT, i]) for i in (1, 2, 3)]
    said = job.run(requests)
    for request in requests:
        final = assert_ended_once(said[request.request_id])
        assert tokens_of(said[request.request_id]) == undisturbed.tokens(request)
        assert final.timing is not None and final.timing.cached_tokens == 20
    assert job.problems() == []


@pytest.mark.parametrize("roles", [
    [Role.AGGREGATED, Role.AGGREGATED], [Role.CONTEXT, Role.CONTEXT, Role.GENERATION]])
def test_instances_of_one_pool_reuse_each_others_work(
        jobs: Any, undisturbed: Undisturbed, roles: list[Role]) -> None:
    job = jobs(*roles, max_num_tokens=64)
    one, other = job.instances[0].executor, job.instances[1].executor
    request = replace(executor_request(1, PROMPT, max_tokens=1))
    for executor, cached in ((one, 0), (other, 20), (one, 20)):
        executor.enqueue_request(request)
        (response,) = executor.await_responses(timeout=30)
        assert response.token_ids == undisturbed.tokens(request)
        assert response.timing is not None and response.timing.cached_tokens == cached
    assert job.problems() == []


def test_instances_with_pools_of_their_own_do_not(jobs: Any, undisturbed: Undisturbed) -> None:
    job = jobs(Role.AGGREGATED, Role.AGGREGATED, shared=False)
    request = executor_request(1, PROMPT, max_tokens=1)
    for instance in job.instances:
        instance.executor.enqueue_request(request)
        response = instance.executor.await_responses(timeout=30)[-1]
        assert response.timing is not None and response.timing.cached_tokens == 0


def test_a_block_that_is_written_anew_during_the_copy_is_not_used(
        jobs: Any, undisturbed: Undisturbed) -> None:
    """The owner of another instance's cached block may evict it at any moment: then it is computed."""
    job = jobs(Role.AGGREGATED, Role.AGGREGATED, max_num_tokens=64)
    one, other = job.instances
    request = executor_request(1, PROMPT, max_tokens=4)
    one.executor.enqueue_request(request)
    while not one.executor.await_responses(timeout=30)[-1].is_final:
        pass
    reuse = other.engine._reuse
    assert reuse is not None
    copy, copied = reuse._copy_blocks, []

    def copy_late(sources: Any, targets: Any) -> None:
        copied.append(list(sources))
        one.blocks.allocate(99, 32)  # evicts all that the first instance holds
        copy(sources, targets)

    reuse._copy_blocks = copy_late
    other.executor.enqueue_request(request)
    responses = []
    while not (responses and responses[-1].is_final):
        responses += other.executor.await_responses(timeout=30)
    one.blocks.free(99)
    assert copied and len(copied[0]) == 5
    assert tokens_of(responses) == undisturbed.tokens(request)
    assert responses[-1].timing is not None and responses[-1].timing.cached_tokens == 0
    assert job.problems() == []


def test_what_was_cancelled_leaves_only_what_is_whole(jobs: Any, undisturbed: Undisturbed) -> None:
    job = make(jobs, "aggregated", max_num_tokens=10)
    job.context.enqueue_request(executor_request(1, PROMPT))
    job.turn()
    job.context.cancel_request(1)
    assert [r.finish_reason for r in job.turn()[1]] == ["cancelled"]
    assert ask(job, undisturbed, PROMPT).cached_tokens == 8, "10 tokens were computed"


# A small tree of prefixes; some end within a block.
TRUNKS = [[9] * 8, list(range(40, 51)), [*[9] * 8, *[3] * 6], [1]]
TAILS = [[], [5], [6, 7, 8, 9, 10], [5] * 9]


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_reused_the_tokens_are_the_same(
        tiny_llama: Path, undisturbed: Undisturbed, data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(sorted(SHAPES)), label="shape")
    options = {"shared": True, **SHAPES[shape]}
    led = LedJob(Job(
        tiny_llama, options.pop("roles"), num_blocks=data.draw(st.sampled_from([10, 16, 40]), label="blocks"),
        max_num_tokens=data.draw(st.sampled_from([6, 30]), label="budget"), max_batch_size=5,
        reserved_output=data.draw(st.sampled_from([2, 64]), label="reserved"),
        num_stages=data.draw(st.integers(1, 3), label="stages"), **options))
    requests: list[ExecutorRequest] = []
    sinks = []
    for action in data.draw(st.lists(st.sampled_from(["new", "new", "again", "turn", "turns", "cancel"]),
                                     max_size=25), label="actions"):
        if action == "new":
            prompt = (data.draw(st.sampled_from(TRUNKS), label="trunk")
                      + data.draw(st.sampled_from(TAILS), label="tail"))
        elif action == "again" and requests:  # the next turn of a conversation
            before = data.draw(st.sampled_from(requests), label="of")
            prompt = [*before.prompt_token_ids, *undisturbed.tokens(before)][:30]
        if action in ("new", "again") and (requests or action == "new"):
            requests.append(executor_request(
                len(requests), prompt, max_tokens=data.draw(st.sampled_from([1, 2, 8]), label="max_tokens")))
            sinks.append(led.submit(requests[-1]))
        elif action == "cancel" and requests:
            led.dispatcher.cancel(data.draw(st.integers(0, len(requests) - 1), label="which"))
        for _ in range(8 if action == "turns" else 1):
            led.turn()
            assert [i.executor.check_integrity() for i in led.job.instances] == [[]] * len(led.job.instances)
    led.finish()
    for request, sink in zip(requests, sinks, strict=True):
        expected = undisturbed.tokens(request)
        assert sink.token_ids == expected[: len(sink.token_ids)]
        if sink.end is State.DONE:
            assert sink.token_ids == expected
    assert led.problems() == []
    led.job.close()


def test_a_request_that_was_split_by_hand_reuses_too(jobs: Any, undisturbed: Undisturbed) -> None:
    """A state that names no instance is an error of the pull, not of the look for a prefix."""
    job = make(jobs, "messages")
    ask(job, undisturbed, PROMPT)
    request = replace(executor_request(1, PROMPT), type=RequestType.CONTEXT_ONLY)
    job.context.enqueue_request(request)
    (context,) = job.context.await_responses(timeout=30)
    params = replace(context.context_phase_params, opaque_state=b"rubbish")
    job.generation.enqueue_request(replace(
        request, type=RequestType.GENERATION_ONLY, context_phase_params=params))
    (response,) = job.turn()[2]
    assert response.finish_reason == "error"
    job.context.drop_context(1)
    assert job.problems() == []
