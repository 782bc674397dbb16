"""Context phases on the generation instance itself: by a threshold, or where what was measured says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from inprocess import PATIENCE, Job, LedJob, OrchestratedJob, Undisturbed, executor_request

from disagg_mpi.comm.messages import Enqueue
from disagg_mpi.orchestrator.table import State
from disagg_mpi.request import ExecutorRequest, RequestType, SamplingParams
from disagg_mpi.topology import Role

WAYS = pytest.mark.parametrize("shared", [True, False], ids=["exchanged", "messages"])
LONG = list(range(1, 40))


def lead(jobs: Any, local_context: Any, **options: Any) -> LedJob:
    return LedJob(jobs(local_context=local_context, **{"max_num_tokens": 64} | options))


def run(led: LedJob, undisturbed: Undisturbed, *requests: ExecutorRequest) -> list[list[int]]:
    """Run ``requests`` to their right end; the ranks that each was sent to."""
    led.sent.clear()
    sinks = [led.submit(request) for request in requests]
    led.finish()
    assert [sink.end for sink in sinks] == [State.DONE] * len(sinks)
    assert [sink.token_ids for sink in sinks] == [undisturbed.tokens(request) for request in requests]
    assert led.problems() == []
    return [[rank for rank, message in led.sent if isinstance(message, Enqueue)
             and any(r.request_id == request.request_id for r in message.requests)] for request in requests]


@WAYS
def test_up_to_the_threshold_it_is_local(jobs: Any, undisturbed: Undisturbed, shared: bool) -> None:
    led = lead(jobs, 8, shared=shared)
    places = run(led, undisturbed, *(executor_request(n, LONG[n : 2 * n]) for n in (7, 8, 9)))
    assert places == [[2], [2], [1, 2]]
    timing = led.entries[8].timing
    assert timing.context > 0
    assert (timing.transport, timing.kv_bytes) == ("", 0)
    assert led.entries[9].timing.transport == ("shared" if shared else "mpi")


@pytest.mark.parametrize("threshold", [0, 100])
def test_never_or_always(jobs: Any, undisturbed: Undisturbed, threshold: int) -> None:
    led = lead(jobs, threshold)
    (places,) = run(led, undisturbed, executor_request(1, LONG[:20]))
    assert places == ([2] if threshold else [1, 2])


@WAYS
def test_what_generation_holds_does_not_count(jobs: Any, undisturbed: Undisturbed, shared: bool) -> None:
    """A long prompt of which generation has all but the end is computed there, from what it has."""
    led = lead(jobs, 8, shared=shared)
    assert run(led, undisturbed, executor_request(1, LONG[:30])) == [[1, 2]]
    assert run(led, undisturbed, executor_request(2, LONG[:34])) == [[2]]
    assert led.entries[2].timing.cached_tokens == 28
    without = lead(jobs, 8, shared=shared, prefix_cache=False)
    assert run(without, undisturbed, executor_request(1, LONG[:30])) == [[1, 2]]
    assert run(without, undisturbed, executor_request(2, LONG[:34])) == [[1, 2]]


@WAYS
def test_auto_hands_over_until_it_knows_what_that_costs(
        jobs: Any, undisturbed: Undisturbed, shared: bool) -> None:
    led = lead(jobs, "auto", shared=shared, prefix_cache=False)
    assert run(led, undisturbed, executor_request(1, LONG[:9])) == [[1, 2]]
    # Alone at the generation instance it holds nobody up, and the hand-over is saved.
    assert run(led, undisturbed, executor_request(2, LONG[9:18])) == [[2]]


def test_auto_is_not_local_where_it_would_hold_others_up(jobs: Any, undisturbed: Undisturbed) -> None:
    led = lead(jobs, "auto", num_blocks=64, prefix_cache=False)
    run(led, undisturbed, executor_request(1, LONG[:20]))
    led.dispatcher._local.observe_handover(0.0)
    busy = [executor_request(10 + n, [n, n], max_tokens=40) for n in range(3)]
    sinks = [led.submit(request) for request in busy]
    while any(len(sink.token_ids) < 3 for sink in sinks):
        led.turn()
    (places,) = run(led, undisturbed, executor_request(2, LONG[19:]))
    assert places == [1, 2]
    assert [sink.token_ids for sink in sinks] == [undisturbed.tokens(request) for request in busy]


@WAYS
def test_local_ones_are_preempted_and_cancelled_as_others_are(
        jobs: Any, undisturbed: Undisturbed, shared: bool) -> None:
    led = lead(jobs, 6, shared=shared, num_blocks=12, reserved_output=4)
    requests = [executor_request(n, [n] * (4 + n), max_tokens=28) for n in range(1, 6)]
    places = run(led, undisturbed, *requests)
    assert places == [[2], [2], [1, 2], [1, 2], [1, 2]]
    assert sum(entry.timing.num_preempted for entry in led.entries.values()) > 0
    for turns in range(12):
        sink = led.submit(executor_request(9, [9] * 6, max_tokens=28))
        for _ in range(turns):
            led.turn()
        led.dispatcher.cancel(9)
        led.finish()
        assert sink.end is State.CANCELLED
        assert led.problems() == []


def test_kinds_of_requests_that_are_sent(jobs: Any) -> None:
    led = lead(jobs, 4)
    led.submit(executor_request(1, LONG[:4]))
    led.submit(executor_request(2, LONG[10:15]))
    led.lead()
    kinds = {r.request_id: r.type for _, m in led.sent if isinstance(m, Enqueue) for r in m.requests}
    assert kinds == {1: RequestType.CONTEXT_AND_GENERATION, 2: RequestType.CONTEXT_ONLY}
    led.finish()
    assert led.problems() == []


@pytest.mark.parametrize("local_context", [6, "auto"])
@WAYS
def test_in_an_orchestrated_job(
        tiny_llama: Path, undisturbed: Undisturbed, shared: bool, local_context: Any) -> None:
    """All at once with too few blocks: some here, some there, some preempted, all right."""
    job = OrchestratedJob(Job(
        tiny_llama, (Role.CONTEXT, Role.CONTEXT, Role.GENERATION, Role.GENERATION), shared=shared,
        local_context=local_context, num_blocks=12, reserved_output=3, overlap_tokens=16))
    prompts = [[n % 5] * (2 + n) for n in range(1, 20)]
    handles = [job.orchestrator.submit(p, SamplingParams(max_tokens=24)) for p in prompts]
    results = [handle.result(PATIENCE) for handle in handles]
    assert [r.token_ids for r in results] == [
        undisturbed.tokens(executor_request(0, p, max_tokens=24)) for p in prompts]
    assert sum(r.timing.num_preempted for r in results) > 0
    if local_context == 6:
        assert [r.timing.transport == "" for r in results[:4]] == [True] * 4
    job.orchestrator.check_integrity(PATIENCE)
    job.close()
