"""The orchestrator's API over a whole job in one process: its pump thread, and one thread of workers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inprocess import PATIENCE, VOCABULARY, Job, LetterTokenizer, OrchestratedJob

from disagg_mpi.comm.messages import Cancel
from disagg_mpi.errors import ConfigError, IntegrityError, JobFailed, RequestError
from disagg_mpi.request import Request, Result, SamplingParams
from disagg_mpi.topology import Role

SPLIT = (Role.CONTEXT, Role.CONTEXT, Role.GENERATION, Role.GENERATION)
GREEDY = SamplingParams(max_tokens=8)
PROMPTS = [[i, 5, 2 * i, 99] for i in range(1, 12)]


def within(function: Callable[[], Any]) -> Any:
    """``function()`` in a thread of its own: a hang is a failure, not the end of the run."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((function(), None))
        except BaseException as error:
            found.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), f"still waiting after {PATIENCE} s"
    value, error = found[0]
    if error is not None:
        raise error
    return value


def run_async(make: Callable[[], Any]) -> Any:
    return within(lambda: asyncio.run(asyncio.wait_for(make(), PATIENCE)))


@pytest.fixture
def start(tiny_llama: Path) -> Iterator[Callable[..., OrchestratedJob]]:
    made: list[OrchestratedJob] = []

    def make(*roles: Role, shared: bool = True, **changes: Any) -> OrchestratedJob:
        job = Job(tiny_llama, roles or SPLIT, shared=shared, **changes)
        made.append(OrchestratedJob(job, LetterTokenizer()))
        return made[-1]

    yield make
    for job in made:
        job.close()


@pytest.fixture
def job(start: Callable[..., OrchestratedJob]) -> OrchestratedJob:
    return start()


def assert_clean(job: OrchestratedJob) -> None:
    within(lambda: job.orchestrator.check_integrity(PATIENCE))
    assert job.orchestrator.num_open == 0
    assert job.orchestrator._handles == {}


def expected_tokens(start: Callable[..., OrchestratedJob], prompts: list[list[int]],
                    sampling: SamplingParams) -> list[list[list[int]]]:
    whole = start(Role.AGGREGATED)
    results = within(lambda: list(whole.orchestrator.generate(prompts, sampling)))
    assert_clean(whole)
    return [[choice.token_ids for choice in result.choices] for result in results]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sampling", [
    GREEDY, SamplingParams(max_tokens=6, temperature=1.0, seed=0, top_p=0.95, n=2)])
def test_split_equals_aggregated_in_order(start: Any, shared: bool, sampling: SamplingParams) -> None:
    expected = expected_tokens(start, PROMPTS, sampling)
    job = start(shared=shared)
    results = within(lambda: list(job.orchestrator.generate(PROMPTS, sampling)))
    assert [[c.token_ids for c in r.choices] for r in results] == expected
    assert [r.prompt_token_ids for r in results] == PROMPTS
    assert all(r.error is None and r.finish_reason == "length" for r in results)
    assert all(c.text for r in results for c in r.choices)
    assert_clean(job)


def test_choices_of_one_request_differ_and_are_the_seeds(start: Any) -> None:
    job = start()
    sampling = SamplingParams(max_tokens=8, temperature=1.5, seed=3, n=4)
    one, two = within(lambda: list(job.orchestrator.generate([PROMPTS[0]] * 2, sampling)))
    assert [c.index for c in one.choices] == [0, 1, 2, 3]
    assert [c.token_ids for c in one.choices] == [c.token_ids for c in two.choices]
    assert len({tuple(c.token_ids) for c in one.choices}) > 1
    assert one.usage.completion_tokens == 32


def test_without_a_seed_each_request_draws_its_own(job: OrchestratedJob) -> None:
    sampling = SamplingParams(max_tokens=10, temperature=2.0)
    results = within(lambda: list(job.orchestrator.generate([PROMPTS[0]] * 4, sampling)))
    assert len({tuple(r.token_ids) for r in results}) > 1


def test_unordered_results_are_all_there(start: Any) -> None:
    expected = [tokens for (tokens,) in expected_tokens(start, PROMPTS, GREEDY)]
    job = start()
    results = within(lambda: list(job.orchestrator.generate(PROMPTS, GREEDY, ordered=False)))
    found = {tuple(r.prompt_token_ids): r.token_ids for r in results}
    assert [found[tuple(prompt)] for prompt in PROMPTS] == expected
    assert_clean(job)


def test_prompts_are_taken_as_there_is_room(start: Any) -> None:
    job = start(max_batch_size=1, max_num_tokens=8)
    taken = 0

    def endless() -> Iterator[list[int]]:
        nonlocal taken
        while True:
            taken += 1
            yield [taken % VOCABULARY, 3]

    def run() -> int:
        results = job.orchestrator.generate(endless(), SamplingParams(max_tokens=2))
        for _ in range(5):
            next(results)
        results.close()
        return taken

    assert within(run) <= 4 * job.orchestrator.capacity + 8
    within(lambda: wait_for(lambda: job.orchestrator.num_open == 0))
    assert_clean(job)


def wait_for(condition: Callable[[], bool]) -> None:
    ended = threading.Event()
    while not condition():
        ended.wait(0.001)


def test_leaving_the_results_early_cancels_the_rest(job: OrchestratedJob) -> None:
    sent: list[Any] = []
    job.network.on_send = lambda _source, _rank, message: sent.append(message)

    def run() -> None:
        for _ in job.orchestrator.generate(PROMPTS * 3, SamplingParams(max_tokens=60)):
            break
        wait_for(lambda: job.orchestrator.num_open == 0)

    within(run)
    assert any(isinstance(message, Cancel) for message in sent)
    assert_clean(job)


def test_texts_chats_and_requests_are_prompts(job: OrchestratedJob) -> None:
    prompts: list[Any] = ["hello", Request(messages=[{"role": "user", "content": "hello"}], id="chat"),
                          Request(prompt_token_ids=LetterTokenizer().encode("hello")),
                          np.array(LetterTokenizer().encode("hello")),
                          tuple(LetterTokenizer().encode("hello"))]
    results = within(lambda: list(job.orchestrator.generate(prompts)))
    assert len({tuple(r.token_ids) for r in results}) == 1
    assert results[1].id == "chat"
    assert all(len(r.token_ids) == 64 for r in results)


@pytest.mark.parametrize("prompt", [
    [1.5], ["a"], [None], Request(prompt="\ud800"), 7, None], ids=repr)
def test_what_is_no_prompt_is_refused_to_its_caller_alone(job: OrchestratedJob, prompt: Any) -> None:
    with pytest.raises((RequestError, ConfigError)):
        job.orchestrator.submit(prompt, None if isinstance(prompt, Request) else GREEDY)
    assert within(lambda: job.orchestrator.submit([1], GREEDY).result()).error is None


def test_a_job_without_a_tokenizer_takes_ids(tiny_llama: Path) -> None:
    job = OrchestratedJob(Job(tiny_llama, (Role.AGGREGATED,), shared=True, make_decoder=None))
    try:
        with pytest.raises(RequestError, match="no tokenizer"):
            job.orchestrator.submit("text")
        result = within(lambda: job.orchestrator.submit([1, 2], GREEDY).result())
        assert (len(result.token_ids), result.text) == (8, "")
    finally:
        job.close()


def test_parameters_are_given_once(job: OrchestratedJob) -> None:
    with pytest.raises(RequestError, match="not both"):
        job.orchestrator.submit(Request(prompt="a"), GREEDY)


@pytest.mark.parametrize("prompt", [[], [VOCABULARY], [-1], [2**80], [1] * 300])
def test_what_cannot_be_served_is_a_result_with_an_error(job: OrchestratedJob, prompt: list[int]) -> None:
    result = within(lambda: job.orchestrator.submit(prompt, GREEDY).result())
    assert result.error and result.finish_reason == "error"
    assert_clean(job)


# ---- streams ----


def test_a_stream_is_the_result_in_pieces(job: OrchestratedJob) -> None:
    def run() -> None:
        handle = job.orchestrator.stream(PROMPTS[0], GREEDY)
        events = list(handle)
        result = handle.result(PATIENCE)
        assert [t for e in events for t in e.token_ids] == result.token_ids
        assert "".join(e.text for e in events) == result.text
        assert [e.finish_reason for e in events] == [None] * 7 + ["length"]
        assert list(handle) == [], "read again: nothing, and no hang"
        assert handle.done()

    within(run)
    assert_clean(job)


def test_a_stream_of_several_choices_says_whose_each_event_is(job: OrchestratedJob) -> None:
    sampling = SamplingParams(max_tokens=5, n=3, temperature=1.0, seed=1, logprobs=1)

    def run() -> None:
        handle = job.orchestrator.stream(PROMPTS[0], sampling)
        events = list(handle)
        result = handle.result(PATIENCE)
        for choice in result.choices:
            own = [e for e in events if e.index == choice.index]
            assert [t for e in own for t in e.token_ids] == choice.token_ids
            assert [p for e in own for p in e.logprobs] == choice.logprobs
            assert len(choice.logprobs) == 5

    within(run)


def test_a_stream_in_asyncio(job: OrchestratedJob) -> None:
    async def one(prompt: list[int]) -> tuple[list[int], Result]:
        handle = job.orchestrator.stream(prompt, GREEDY)
        tokens = [t async for e in handle for t in e.token_ids]
        assert [e async for e in handle] == []
        return tokens, await handle

    async def run() -> list[tuple[list[int], Result]]:
        return await asyncio.gather(*(one(prompt) for prompt in PROMPTS))

    for tokens, result in run_async(run):
        assert tokens == result.token_ids and len(tokens) == 8
    assert_clean(job)


def test_a_handle_is_read_in_the_way_it_was_made_for(job: OrchestratedJob) -> None:
    async def run() -> None:
        handle = job.orchestrator.stream(PROMPTS[0], GREEDY)
        with pytest.raises(RuntimeError, match="async for"):
            next(iter(handle))
        other = job.orchestrator.submit(PROMPTS[0], GREEDY)
        with pytest.raises(RuntimeError, match="not made for asyncio"):
            async for _ in other:
                pass
        await handle
        await other

    run_async(run)


def test_a_loop_that_is_closed_ends_nothing_but_itself(job: OrchestratedJob) -> None:
    job.pause()
    handles = []

    async def leave() -> None:
        handles.append(job.orchestrator.stream(PROMPTS[0], GREEDY))

    run_async(leave)
    job.resume()
    assert within(lambda: handles[0].result(PATIENCE)).error is None
    assert within(lambda: job.orchestrator.submit(PROMPTS[1], GREEDY).result(PATIENCE)).error is None
    assert_clean(job)


def test_generate_async(start: Any) -> None:
    expected = [tokens for (tokens,) in expected_tokens(start, PROMPTS, GREEDY)]
    job = start()

    async def run() -> list[Result]:
        return await asyncio.gather(*(job.orchestrator.generate_async(p, GREEDY) for p in PROMPTS))

    assert [r.token_ids for r in run_async(run)] == expected
    assert_clean(job)


def test_cancelling_the_task_cancels_the_request(job: OrchestratedJob) -> None:
    job.pause()

    async def run() -> None:
        task = asyncio.create_task(job.orchestrator.generate_async(PROMPTS[0], SamplingParams(max_tokens=60)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_async(run)
    job.resume()
    within(lambda: wait_for(lambda: job.orchestrator.num_open == 0 and not job.orchestrator._commands))
    assert_clean(job)


def test_who_stops_waiting_leaves_the_result_to_the_others(job: OrchestratedJob) -> None:
    job.pause()

    async def run() -> Result:
        handle = job.orchestrator.stream(PROMPTS[0], GREEDY)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handle, 0.001)
        job.resume()
        tokens = [t async for e in handle for t in e.token_ids]
        result = await handle
        assert tokens == result.token_ids
        return result

    assert run_async(run).error is None
    assert_clean(job)


# ---- ends before the end ----


def test_a_cancelled_request_has_a_result(job: OrchestratedJob) -> None:
    job.pause()
    handle = job.orchestrator.submit(PROMPTS[0], SamplingParams(max_tokens=60, n=3))
    handle.cancel()
    handle.cancel()
    job.resume()
    result = within(lambda: handle.result(PATIENCE))
    assert [c.finish_reason for c in result.choices] == ["cancelled"] * 3
    assert result.error
    assert_clean(job)
    handle.cancel()
    assert_clean(job)


def test_a_deadline_passes_wherever_the_request_is(start: Any) -> None:
    job = start(max_batch_size=1, max_num_tokens=8)
    job.pause()
    handles = [job.orchestrator.submit(Request(prompt_token_ids=p, deadline=0.01)) for p in PROMPTS]
    within(lambda: wait_for(lambda: sum(h.done() for h in handles) == len(handles) - 2))
    job.resume()
    results = within(lambda: [h.result(PATIENCE) for h in handles])
    assert {r.finish_reason for r in results} == {"deadline"}
    assert all("deadline passed" in r.error for r in results)
    assert_clean(job)


def test_a_result_that_does_not_come_in_time_is_a_timeout(job: OrchestratedJob) -> None:
    job.pause()
    handle = job.orchestrator.submit(PROMPTS[0], GREEDY)
    with pytest.raises(TimeoutError):
        handle.result(0.01)
    job.resume()
    assert within(lambda: handle.result(PATIENCE)).error is None


def test_closing_ends_what_is_open(start: Any) -> None:
    job = start()
    handles = [job.orchestrator.submit(p, SamplingParams(max_tokens=100)) for p in PROMPTS]
    within(job.orchestrator.close)
    results = within(lambda: [h.result(PATIENCE) for h in handles])
    assert all(r.finish_reason in ("cancelled", "length") for r in results)
    with pytest.raises(JobFailed, match="shut down"):
        job.orchestrator.submit(PROMPTS[0])
    within(job.orchestrator.close)


def test_closing_does_not_leave_anyone_waiting_for_workers_that_are_stuck(start: Any) -> None:
    job = start()
    job.pause()
    handles = [job.orchestrator.submit(p, GREEDY) for p in PROMPTS]
    within(lambda: job.orchestrator.close(timeout=0.2))
    for handle in handles:
        try:
            assert within(lambda h=handle: h.result(PATIENCE)).finish_reason == "cancelled"
        except JobFailed as error:
            assert "shut down" in str(error)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failing_pump_fails_everyone_and_hangs_nobody(job: OrchestratedJob) -> None:
    job.pause()
    handles = [job.orchestrator.submit(p, GREEDY) for p in PROMPTS]
    streamed = job.orchestrator.stream(PROMPTS[0], GREEDY)

    def broken() -> None:
        raise ZeroDivisionError("the pump's own fault")

    job.orchestrator._command(broken)
    late = []
    with contextlib.suppress(JobFailed):
        late.append(job.orchestrator.submit(PROMPTS[0], GREEDY))  # behind the fault, or after it
    for handle in (*handles, *late):
        with pytest.raises(JobFailed, match="ZeroDivisionError: the pump's own fault"):
            within(lambda h=handle: h.result(PATIENCE))
    with pytest.raises(JobFailed):
        within(lambda: list(streamed))
    within(lambda: job.orchestrator._pump.join(PATIENCE))
    with pytest.raises(JobFailed, match="the pump's own fault"):
        job.orchestrator.submit(PROMPTS[0], GREEDY)
    with pytest.raises(JobFailed):
        within(lambda: list(job.orchestrator.generate(PROMPTS)))
    with pytest.raises(JobFailed, match="the pump's own fault"):
        within(lambda: job.orchestrator.check_integrity(timeout=0.05))
    within(job.orchestrator.close)
    job._stop.set()


def test_the_books_are_asked_of_everyone(job: OrchestratedJob) -> None:
    assert_clean(job)
    job.job.instances[0].blocks.allocate(99, 1)
    with pytest.raises(IntegrityError, match="context 0: blocks of request 99 are owned by nobody"):
        within(lambda: job.orchestrator.check_integrity(PATIENCE))
    job.job.instances[0].blocks.free(99)
    job.pause()
    with pytest.raises(IntegrityError, match=r"4 leaders did not answer within 0\.01 s"):
        within(lambda: job.orchestrator.check_integrity(0.01))
    job.resume()
    assert_clean(job)


def test_many_threads_may_ask_at_once(start: Any) -> None:
    expected = [tokens for (tokens,) in expected_tokens(start, PROMPTS, GREEDY)]
    job = start()
    found: dict[int, list[int]] = {}

    def ask(index: int) -> None:
        found[index] = job.orchestrator.submit(PROMPTS[index], GREEDY).result(PATIENCE).token_ids

    threads = [threading.Thread(target=ask, args=(i,), daemon=True) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert [found[i] for i in range(len(PROMPTS))] == expected
    assert_clean(job)


def test_timing_adds_up(job: OrchestratedJob) -> None:
    result = within(lambda: job.orchestrator.submit(PROMPTS[0], GREEDY).result(PATIENCE))
    timing = result.timing
    assert 0 < timing.ttft < timing.total
    assert timing.context > 0 and timing.handover >= 0 and timing.queue >= 0
    assert timing.ttft + timing.tpot * 7 <= timing.total + 1e-6
    assert timing.second_token > 0
    assert timing.transport == "shared" and timing.handover_bytes == 0 < timing.kv_bytes
