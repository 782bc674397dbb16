"""The executors at work on a tiny model: handed over or not, the same; every request ends exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess import (
    VOCABULARY,
    Job,
    assert_ended_once,
    executor_request,
    replace,
    text_of,
    tokens_of,
    word,
)

from disagg_mpi.comm.channel import MemoryNetwork
from disagg_mpi.comm.messages import (
    Cancel,
    DropOffer,
    Enqueue,
    IntegrityCheck,
    Ready,
    Shutdown,
    Step,
)
from disagg_mpi.comm.waiting import Waiter
from disagg_mpi.executor.null import NullExecutor
from disagg_mpi.executor.service import LeaderService
from disagg_mpi.request import ContextPhaseParams, ExecutorLimits, ExecutorRequest, RequestType, Response
from disagg_mpi.topology import Role

WAYS = pytest.mark.parametrize("shared", [True, False], ids=["exchanged", "copied"])
PROMPT = [5, 9, 100, 3, 77, 21]


MIXED = [
    executor_request(1, PROMPT, max_tokens=12, return_generation_logits=True),
    executor_request(2, list(range(30)), max_tokens=9, return_generation_logits=True, logprobs=3),
    executor_request(3, [1], max_tokens=5, temperature=1.0, seed=7, return_generation_logits=True),
    executor_request(4, list(range(50, 67)), 2, max_tokens=14, temperature=0.8, top_p=0.9, seed=1,
                     repetition_penalty=1.2, return_generation_logits=True),
    executor_request(5, PROMPT[::-1], max_tokens=6, min_tokens=3, presence_penalty=0.5, top_k=5,
                     temperature=0.7, seed=0, return_generation_logits=True),
]


@WAYS
@pytest.mark.parametrize("max_num_tokens", [8, 64])
def test_handed_over_equals_aggregated_to_the_bit(jobs: Any, shared: bool, max_num_tokens: int) -> None:
    """Each alone, so that both see the same steps: then every logit must be the same bits."""
    apart = jobs(shared=shared, max_num_tokens=max_num_tokens)
    whole = jobs(Role.AGGREGATED, max_num_tokens=max_num_tokens)
    for request in MIXED:
        one = apart.run([request])[request.request_id]
        other = whole.run([request])[request.request_id]
        assert_ended_once(one)
        assert_ended_once(other)
        assert tokens_of(one) == tokens_of(other)
        assert text_of(one) == text_of(other)
        assert [r.logits for r in one] == [r.logits for r in other]
        assert [r.logprobs for r in one] == [r.logprobs for r in other]
    assert apart.problems() == whole.problems() == []


@WAYS
@pytest.mark.parametrize("max_num_tokens", [8, 13, 64])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_all_at_once_give_the_tokens_of_each_alone(
        jobs: Any, shared: bool, max_num_tokens: int, num_stages: int) -> None:
    whole = jobs(Role.AGGREGATED, max_num_tokens=64)
    alone = {r.request_id: tokens_of(whole.run([r])[r.request_id]) for r in MIXED}
    job = jobs(shared=shared, max_num_tokens=max_num_tokens, num_stages=num_stages)
    for _ in range(3):  # later rounds have scattered blocks
        found = job.run(MIXED)
        assert {i: tokens_of(responses) for i, responses in found.items()} == alone
        for responses in found.values():
            assert_ended_once(responses)
    assert job.problems() == []


@WAYS
def test_a_pool_too_small_for_all_serves_them_one_after_the_other(jobs: Any, shared: bool) -> None:
    job = jobs(shared=shared, num_blocks=10, max_batch_size=4)
    found = job.run([executor_request(i, list(range(20)), max_tokens=12) for i in range(6)])
    assert len({tuple(tokens_of(r)) for r in found.values()}) == 1
    assert job.problems() == []


@WAYS
def test_the_timing_says_how_the_cache_passed(jobs: Any, shared: bool) -> None:
    job = jobs(shared=shared)
    final = job.run([executor_request(1, PROMPT)])[1][-1]
    assert final.timing is not None
    assert final.timing.transport == ("shared" if shared else "mpi")
    assert final.timing.kv_bytes == len(PROMPT) * 2 * 2 * 2 * 8 * 4
    assert final.timing.handover_bytes == (0 if shared else final.timing.kv_bytes)


def test_with_other_block_sizes_on_one_host_bytes_are_copied_within_it(jobs: Any) -> None:
    whole = jobs(Role.AGGREGATED)
    for size in (1, 2, 8, 16):
        job = jobs(generation_tokens_per_block=size)
        found = job.run(MIXED)
        for request in MIXED:
            responses = found[request.request_id]
            assert tokens_of(responses) == tokens_of(whole.run([request])[request.request_id])
            timing = assert_ended_once(responses).timing
            assert timing is not None and timing.transport == "copy"
            assert timing.handover_bytes == timing.kv_bytes > 0
        assert job.problems() == []


@WAYS
def test_of_blocks_nothing_is_said_that_rank_0_knows(jobs: Any, shared: bool) -> None:
    job = jobs(shared=shared)
    assert all(r.num_blocks is None for said in job.run(MIXED).values() for r in said)


@WAYS
def test_a_limit_of_one_token_ends_in_the_context(jobs: Any, shared: bool) -> None:
    job = jobs(shared=shared)
    responses = job.run([executor_request(1, PROMPT, max_tokens=1)])[1]
    assert len(tokens_of(responses)) == 1
    assert assert_ended_once(responses).finish_reason == "length"
    assert job.problems() == []


def first_tokens(jobs: Any, count: int = 8) -> list[int]:
    return tokens_of(jobs(Role.AGGREGATED).run([executor_request(1, PROMPT, max_tokens=count)])[1])


@WAYS
@pytest.mark.parametrize("position", [0, 1, 4])
def test_the_models_end_ends_wherever_it_comes(jobs: Any, shared: bool, position: int) -> None:
    tokens = first_tokens(jobs)
    end = tokens[position]
    length = tokens.index(end) + 1
    job = jobs(shared=shared, eos=(end,))
    responses = job.run([executor_request(1, PROMPT), executor_request(2, PROMPT, ignore_eos=True),
                         executor_request(3, PROMPT, min_tokens=8)])
    assert tokens_of(responses[1]) == tokens[:length]
    assert assert_ended_once(responses[1]).finish_reason == "stop"
    assert tokens_of(responses[2]) == tokens
    assert assert_ended_once(responses[2]).finish_reason == "length"
    assert end not in tokens_of(responses[3])[:-1]
    assert job.problems() == []


@WAYS
@pytest.mark.parametrize("position", [0, 3])
def test_a_stop_token_of_the_request_ends_it(jobs: Any, shared: bool, position: int) -> None:
    tokens = first_tokens(jobs)
    job = jobs(shared=shared)
    responses = job.run([executor_request(1, PROMPT, stop_token_ids=(tokens[position],))])[1]
    assert tokens_of(responses) == tokens[: tokens.index(tokens[position]) + 1]
    assert assert_ended_once(responses).finish_reason == "stop"
    assert job.problems() == []


@WAYS
@pytest.mark.parametrize("length", [1, 2, 3])
@pytest.mark.parametrize("position", [0, 1, 4])
def test_a_stop_text_ends_it_also_across_the_hand_over(
        jobs: Any, shared: bool, position: int, length: int) -> None:
    text = "".join(word(token) for token in first_tokens(jobs))
    stop = text[position : position + length]
    job = jobs(shared=shared)
    responses = job.run([executor_request(1, PROMPT, stop=(stop, "never"))])[1]
    assert text_of(responses) == text[: text.index(stop)]
    assert assert_ended_once(responses).finish_reason == "stop"
    assert job.problems() == []


@WAYS
def test_a_stop_text_that_only_begins_is_given_in_the_end(jobs: Any, shared: bool) -> None:
    text = "".join(word(token) for token in first_tokens(jobs))
    job = jobs(shared=shared)
    stops = tuple(text[i : i + 2] + "ZZZ" for i in range(len(text)))
    responses = job.run([executor_request(1, PROMPT, stop=stops)])[1]
    assert text_of(responses) == text
    assert assert_ended_once(responses).finish_reason == "length"


# ---- cancelled in each phase ----


def drive_until(job: Job, request: ExecutorRequest, phase: str) -> list[Response]:
    """Bring a request into a phase; what it has said so far."""
    said: list[Response] = []
    job.context.enqueue_request(replace(request, type=RequestType.CONTEXT_ONLY))
    if phase == "context waiting":
        return said
    if phase == "context chunk":
        job.turn()
        return said
    while not (said and said[-1].is_final):
        for responses in job.turn().values():
            said += responses
    if phase == "offered":
        return said
    job.wire.hold = True
    job.generation.enqueue_request(replace(
        request, type=RequestType.GENERATION_ONLY,
        context_phase_params=said[-1].context_phase_params))
    if phase == "generation waiting":
        return said
    job.turn()
    job.turn()
    if phase == "hand-over":
        return said
    job.wire.hold = False
    for _ in range(3):
        for responses in job.turn().values():
            said += responses
    return said


@WAYS
@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
@pytest.mark.parametrize("phase", [
    "context waiting", "context chunk", "generation waiting", "hand-over", "generation"])
def test_a_request_that_is_cancelled_ends_once_and_leaves_nothing(
        jobs: Any, shared: bool, phase: str, reason: Any) -> None:
    job = jobs(shared=shared)
    said = drive_until(job, executor_request(1, list(range(40)), max_tokens=12), phase)
    holder = job.context if phase.startswith("context") else job.generation
    free = holder.num_free_blocks
    holder.cancel_request(1, reason)
    holder.cancel_request(1, reason)
    later: list[Response] = []
    for _ in range(3):
        later += [r for responses in job.turn().values() for r in responses]
    if phase == "hand-over" and not shared:
        assert later == [], "bytes are on their way: the blocks are not free yet"
        assert holder.num_free_blocks == free
        assert 1 in job.instances[-1].engine
        assert job.problems(idle=False) == []
        job.wire.hold = False
        for _ in range(3):
            later += [r for responses in job.turn().values() for r in responses]
    final = assert_ended_once(said + later)
    assert final.finish_reason == reason
    assert final.error
    assert job.problems() == []


@WAYS
def test_a_context_that_nobody_pulls_is_dropped(jobs: Any, shared: bool) -> None:
    job = jobs(shared=shared)
    drive_until(job, executor_request(1, PROMPT), "offered")
    job.context.cancel_request(1)  # it has had its last response
    assert job.turn() == {1: [], 2: []}
    assert job.context.num_free_blocks < 32
    job.context.drop_context(1)
    assert job.problems() == []


def test_cancelling_what_is_unknown_or_over_has_no_effect(jobs: Any) -> None:
    job = jobs()
    job.run([executor_request(1, PROMPT)])
    job.context.cancel_request(1)
    job.generation.cancel_request(1)
    job.generation.cancel_request(99)
    job.generation.drop_context(99)
    assert job.turn() == {1: [], 2: []}
    assert job.problems() == []


def test_a_cancel_that_comes_when_the_last_byte_has_arrived_is_not_lost(jobs: Any) -> None:
    """With a progress thread a pull may be over before the engine has seen it."""
    job = jobs(shared=False)
    said = drive_until(job, executor_request(1, PROMPT), "hand-over")
    job.wire.hold = False
    for instance in job.instances:
        instance.transceiver.has_thread = True
    for _ in range(3):
        for instance in job.instances:
            instance.transceiver.advance()
    job.generation.cancel_request(1)
    for instance in job.instances:
        instance.transceiver.has_thread = False
    said += [r for _ in range(3) for responses in job.turn().values() for r in responses]
    assert assert_ended_once(said).finish_reason == "cancelled"
    assert job.problems() == []


# ---- what cannot be ----


@pytest.mark.parametrize("request_", [
    executor_request(1, []), executor_request(1, [VOCABULARY]), executor_request(1, [1] * 300),
    executor_request(1, [1], max_tokens=256),
    replace(executor_request(1, [1]), type=RequestType.GENERATION_ONLY),
])
def test_what_cannot_be_served_gets_an_error(jobs: Any, request_: ExecutorRequest) -> None:
    job = jobs()
    job.context.enqueue_request(request_)
    (response,) = job.turn()[1]
    assert (response.is_final, response.finish_reason) == (True, "error")
    assert response.has_error
    assert job.problems() == []


@WAYS
@pytest.mark.parametrize("change", [
    {"prompt_token_ids": [1] * 500}, {"prompt_token_ids": []}, {"prompt_token_ids": [VOCABULARY]}])
def test_a_hand_over_that_is_refused_frees_the_context(jobs: Any, shared: bool, change: Any) -> None:
    job = jobs(shared=shared)
    request = executor_request(1, PROMPT)
    params = drive_until(job, request, "offered")[-1].context_phase_params
    job.generation.enqueue_request(replace(
        request, type=RequestType.GENERATION_ONLY, context_phase_params=params, **change))
    (response,) = job.turn()[2]
    assert response.finish_reason == "error"
    assert job.problems() == []


@WAYS
@pytest.mark.parametrize("state", [b"", b"rubbish", b"\x95\x01\x02\x03\x04\x05"])
def test_a_state_that_is_none_is_an_error_of_its_request_alone(jobs: Any, shared: bool, state: bytes) -> None:
    job = jobs(shared=shared)
    job.generation.enqueue_request(replace(
        executor_request(1, PROMPT), type=RequestType.GENERATION_ONLY,
        context_phase_params=ContextPhaseParams((1,), 1, state)))
    responses = [r for _ in range(2) for r in job.turn()[2]]
    assert assert_ended_once(responses).finish_reason == "error"
    assert job.problems() == []


def test_an_id_in_use_is_refused_and_the_first_goes_on(jobs: Any) -> None:
    job = jobs()
    request = executor_request(1, PROMPT)
    job.context.enqueue_requests([request, request])
    responses = [r for _ in range(12) for r in job.turn()[1]]
    assert [r.error for r in responses if r.has_error] == ["request id 1 is in use"]
    assert [r.finish_reason for r in responses if r.is_final] == ["error", "length"]
    assert job.problems() == []


@WAYS
def test_an_id_whose_context_still_waits_to_be_pulled_is_in_use(jobs: Any, shared: bool) -> None:
    job = jobs(shared=shared)
    request = executor_request(1, PROMPT)
    drive_until(job, request, "offered")
    job.context.enqueue_request(request)
    assert job.turn()[1][0].error == "request id 1 is in use"
    job.context.drop_context(1)
    assert job.problems() == []


@WAYS
def test_one_executor_may_hand_over_to_itself(jobs: Any, shared: bool) -> None:
    expected = first_tokens(jobs)
    job = jobs(Role.AGGREGATED, shared=shared)
    one = job.context
    one.enqueue_request(replace(executor_request(1, PROMPT), type=RequestType.CONTEXT_ONLY))
    (context,) = one.await_responses(timeout=30)
    one.enqueue_request(replace(executor_request(2, PROMPT), type=RequestType.GENERATION_ONLY,
                                context_phase_params=context.context_phase_params))
    tokens = list(context.token_ids)
    while len(tokens) < 8:
        tokens += tokens_of(one.await_responses(timeout=30))
    assert tokens == expected
    one.shutdown(timeout=5)
    assert job.problems() == []


# ---- the API ----


def test_responses_to_others_stay_for_a_later_call(jobs: Any) -> None:
    job = jobs(Role.AGGREGATED)
    executor = job.context
    ids = executor.enqueue_requests([executor_request(i, PROMPT, max_tokens=2) for i in (1, 2)])
    assert ids == [1, 2]
    assert executor.can_enqueue_requests()
    mine = executor.await_responses([2], timeout=30)
    assert {r.request_id for r in mine} == {2}
    assert executor.get_num_responses_ready() == executor.get_num_responses_ready(1) == 1
    assert executor.get_num_responses_ready(2) == 0
    assert executor.await_responses([3], timeout=0) == []
    rest = executor.await_responses(timeout=0)
    assert [r.request_id for r in rest] == [1, 1, 2]


def test_statistics_count_steps_and_tokens(jobs: Any) -> None:
    job = jobs(Role.AGGREGATED, max_num_tokens=8)
    job.run([executor_request(1, list(range(20)), max_tokens=4)])
    stats = job.context.get_latest_iteration_stats()
    assert job.context.get_latest_iteration_stats() == []
    assert sum(s.num_context_tokens for s in stats) == 20
    assert sum(s.num_generation_tokens for s in stats) == 3
    assert max(s.num_context_tokens for s in stats) == 8
    assert all(s.num_active_requests == 1 and s.num_queued_requests == 0 for s in stats)
    assert [s.iteration for s in stats] == sorted({s.iteration for s in stats})


def test_shutdown_waits_for_what_is_still_to_be_pulled(jobs: Any) -> None:
    job = jobs(shared=True)
    request = executor_request(1, PROMPT)
    params = drive_until(job, request, "offered")[-1].context_phase_params
    job.context.shutdown(timeout=0.0)
    assert job.context.check_integrity(idle=True) != []
    job.generation.enqueue_request(replace(
        request, type=RequestType.GENERATION_ONLY, context_phase_params=params))
    job.generation.advance()
    job.context.shutdown(timeout=30)
    assert job.context.check_integrity(idle=True) == []


def test_the_books_name_what_is_still_open(jobs: Any) -> None:
    job = jobs(shared=False)
    drive_until(job, executor_request(1, PROMPT), "hand-over")
    assert job.problems(idle=False) == []
    problems = " ".join(job.problems())
    assert "request 1 is still handover" in problems
    assert "1 hand-overs are still open" in problems
    assert "the text of 1 requests is still kept" in problems


@given(st.data())
@settings(max_examples=25, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_whatever_happens_every_request_ends_once(tiny_llama: Path, data: st.DataObject) -> None:
    """Random arrivals, cancels, drops and stalls of the wire on two context and two generation instances."""
    job = Job(tiny_llama, (Role.CONTEXT, Role.CONTEXT, Role.GENERATION, Role.GENERATION),
              shared=data.draw(st.booleans(), label="shared"), num_blocks=12, max_batch_size=3,
              max_num_tokens=8, num_stages=data.draw(st.integers(1, 3), label="stages"))
    said: dict[int, list[Response]] = {}
    requests: dict[int, ExecutorRequest] = {}
    place: dict[int, int] = {}
    dropped: set[int] = set()

    def turn(may_drop: bool) -> None:
        for rank, responses in job.turn().items():
            for response in responses:
                request_id = response.request_id
                said[request_id].append(response)
                if response.context_phase_params is None:
                    continue
                if may_drop and data.draw(st.integers(0, 3), label="drop") == 0:
                    job.instances[rank - 1].executor.drop_context(request_id)
                    dropped.add(request_id)
                    continue
                place[request_id] = data.draw(st.sampled_from([2, 3]), label="to")
                job.instances[place[request_id]].executor.enqueue_request(replace(
                    requests[request_id], type=RequestType.GENERATION_ONLY,
                    context_phase_params=response.context_phase_params))

    for step in range(data.draw(st.integers(1, 25), label="steps")):
        action = data.draw(st.sampled_from(["new", "new", "turn", "cancel", "hold", "go"]))
        if action == "new":
            requests[step] = executor_request(
                step, range(data.draw(st.integers(1, 20), label="prompt")),
                max_tokens=data.draw(st.integers(1, 6), label="max_tokens"))
            place[step] = data.draw(st.sampled_from([0, 1]), label="from")
            said[step] = []
            job.instances[place[step]].executor.enqueue_request(
                replace(requests[step], type=RequestType.CONTEXT_ONLY))
        elif action == "cancel" and place:
            request_id = data.draw(st.sampled_from(sorted(place)), label="which")
            job.instances[place[request_id]].executor.cancel_request(request_id)
        elif action in ("hold", "go"):
            job.wire.hold = action == "hold"
        turn(may_drop=True)
        for instance in job.instances:
            assert instance.executor.check_integrity() == []
    job.wire.hold = False
    for _ in range(150):
        turn(may_drop=False)
    for request_id, responses in said.items():
        if request_id in dropped:
            assert responses[-1].context_phase_params is not None and len(responses) == 1
        else:
            assert_ended_once(responses)
    assert job.problems() == []
    job.close()


# ---- the executor that computes nothing ----

LIMITS = ExecutorLimits(16, 4, 4, 8, 64, 10, 64)


@pytest.fixture
def bell() -> Iterator[Any]:
    import uuid

    from disagg_mpi.comm.waiting import Doorbell

    bell = Doorbell(uuid.uuid4().hex, 1, [1], True)
    yield bell
    bell.close()


def test_null_gives_every_request_its_tokens(bell: Any) -> None:
    null = NullExecutor(LIMITS, Waiter(bell))
    null.enqueue_requests([executor_request(1, [0] * 4, max_tokens=12),
                           executor_request(2, [0], max_tokens=1)])
    assert null.num_free_blocks == 16 - 4 - 1
    assert null.check_integrity(idle=True) != []
    responses = []
    while null.advance():
        responses += null.take_ready()
    assert tokens_of([r for r in responses if r.request_id == 1]) == [*range(10), 0, 1]
    assert [r.finish_reason for r in responses if r.is_final] == ["length", "length"]
    assert null.num_free_blocks == 16
    assert null.check_integrity(idle=True) == []


def test_null_splits_and_cancels_as_a_real_one(bell: Any) -> None:
    null = NullExecutor(LIMITS, Waiter(bell))
    request = executor_request(1, [0], max_tokens=3)
    null.enqueue_request(replace(request, type=RequestType.CONTEXT_ONLY))
    (context,) = null.await_responses(timeout=10)
    assert context.is_final and context.finish_reason is None
    null.enqueue_request(replace(request, type=RequestType.GENERATION_ONLY,
                                 context_phase_params=context.context_phase_params))
    responses = [*null.await_responses(timeout=10), *null.await_responses(timeout=10)]
    assert tokens_of([context, *responses]) == [0, 1, 2]
    null.enqueue_requests([executor_request(2, [0]), executor_request(2, [0])])
    null.enqueue_request(executor_request(3, [99]))
    null.cancel_request(2, "deadline")
    null.cancel_request(2)
    assert [r.finish_reason for r in null.take_ready()] == ["error", "error", "deadline"]
    assert null.num_free_blocks == 16


# ---- serving rank 0 ----


@pytest.fixture
def served(bell: Any) -> tuple[Any, Any]:
    network = MemoryNetwork()
    rank0 = network.channel(0)
    service = LeaderService(3, NullExecutor(LIMITS, Waiter(bell)), network.channel(1), Waiter(bell))
    return service, rank0


def test_the_leader_announces_its_limits(served: Any) -> None:
    service, rank0 = served
    service.announce({0: "shared"})
    assert rank0.poll() == [(1, Ready(3, LIMITS, {0: "shared"}, ""))]


def test_the_leader_sends_one_message_a_step(served: Any) -> None:
    service, rank0 = served
    assert not service.turn()
    rank0.send(1, Enqueue([executor_request(i, [0], max_tokens=2) for i in (1, 2, 3)]))
    assert service.turn()
    ((_, step),) = rank0.poll()
    assert isinstance(step, Step)
    assert (step.instance_id, [r.request_id for r in step.responses]) == (3, [1, 2, 3])
    rank0.send(1, Cancel([1], "deadline"))
    rank0.send(1, DropOffer([9]))
    service.turn()
    ((_, step),) = rank0.poll()
    assert [(r.request_id, r.finish_reason) for r in step.responses] == [
        (1, "deadline"), (2, "length"), (3, "length")]
    assert not service.turn()


def test_the_leader_reports_its_books_and_leaves_when_told(served: Any) -> None:
    service, rank0 = served
    rank0.send(1, IntegrityCheck(7))
    service.turn()
    ((_, report),) = rank0.poll()
    assert (report.token, report.instance_id, report.problems) == (7, 3, [])
    rank0.send(1, Shutdown())
    service.run()
    assert service.stopping


def test_the_leader_takes_no_message_that_is_not_for_it(served: Any) -> None:
    service, rank0 = served
    rank0.send(1, Step(0, []))
    with pytest.raises(TypeError, match="takes no Step"):
        service.turn()
