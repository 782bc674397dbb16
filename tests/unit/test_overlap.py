"""Requests that both instances have at once: the KV-cache passes while it is computed; each ends once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess import (
    Job,
    LedJob,
    Sink,
    Undisturbed,
    executor_request,
    replace,
    save_tiny_model,
    text_of,
    tokens_of,
    word,
)

from disagg_mpi.comm.messages import (
    Announce,
    Cancel,
    DropOffer,
    Enqueue,
    Proceed,
    PullRequest,
    Release,
    Watch,
)
from disagg_mpi.orchestrator.table import State
from disagg_mpi.request import ExecutorRequest, RequestType
from disagg_mpi.topology import Role
from disagg_mpi.transfer import offers

CONTEXT, GENERATION = 0, 1
PROMPT = [(11 * i * i + 5) % 128 for i in range(50)]
REQUEST = executor_request(1, PROMPT, max_tokens=6)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offers, "MIN_PIECE_TOKENS", 8)


def lead(jobs: Any, *roles: Role, **options: Any) -> LedJob:
    """Chunks of 12 tokens; every prompt of 20 tokens or more comes early."""
    return LedJob(jobs(*roles, **{"shared": False, "overlap_tokens": 20, "max_num_tokens": 12} | options))


def count_messages(job: Job) -> Counter[type]:
    counts: Counter[type] = Counter()
    job.network.on_send = lambda _source, _rank, message: counts.update([type(message)])
    return counts


def assert_ended(led: LedJob, sink: Sink, undisturbed: Undisturbed, state: State) -> None:
    """Once, so; what came till then is right; nobody holds anything."""
    assert sink.end is state
    expected = undisturbed.tokens(REQUEST)
    assert sink.token_ids == expected[: len(sink.token_ids)]
    if state is State.DONE:
        assert sink.token_ids == expected
    assert led.problems() == []


def test_both_have_it_at_once_and_generation_goes_on_after_the_context(
        jobs: Any, undisturbed: Undisturbed) -> None:
    led = lead(jobs)
    counts = count_messages(led.job)
    sink = led.submit(REQUEST)
    led.lead()
    enqueued = {rank: message.requests[0] for rank, message in led.sent if isinstance(message, Enqueue)}
    assert {rank: (r.type, r.early_source) for rank, r in enqueued.items()} == {
        1: (RequestType.CONTEXT_ONLY, None), 2: (RequestType.GENERATION_ONLY, CONTEXT)}
    led.finish()
    assert [type(m) for _, m in led.sent if not isinstance(m, Enqueue)] == [Proceed]
    assert_ended(led, sink, undisturbed, State.DONE)
    timing = led.entries[1].timing
    assert timing.transport == "mpi"
    assert timing.handover_bytes == timing.kv_bytes == 50 * 2 * 2 * 2 * 8 * 4
    assert timing.transfer >= timing.handover
    assert counts[Watch] == counts[Release] == 1
    # The chunks end at 12, 24, 36 and 48 (a step has room for 12); the last piece comes layer by layer.
    assert counts[Announce] == counts[PullRequest] >= 5


def test_the_pieces_arrive_before_the_context_is_over(jobs: Any, undisturbed: Undisturbed) -> None:
    led = lead(jobs)
    counts = count_messages(led.job)
    sink = led.submit(REQUEST)
    while not counts[PullRequest]:
        led.turn(GENERATION, CONTEXT)
    assert not sink.responses, "the first token is not there yet"
    led.finish()
    assert_ended(led, sink, undisturbed, State.DONE)


@pytest.mark.parametrize("least", [1, 30])
def test_the_number_of_messages_does_not_grow_with_the_prompt(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, least: int) -> None:
    monkeypatch.setattr(offers, "MIN_PIECE_TOKENS", least)
    path = save_tiny_model(tmp_path / "deep", num_hidden_layers=18)
    tokens = []
    for overlap_tokens in (1, 10_000):
        led = LedJob(Job(path, shared=False, num_blocks=60, max_num_tokens=8, overlap_tokens=overlap_tokens))
        counts = count_messages(led.job)
        tokens.append(led.submit(executor_request(1, [i % 100 for i in range(200)], max_tokens=4)))
        led.finish()
        assert led.problems() == []
        if overlap_tokens == 1:
            assert offers.MAX_PIECES // 2 < counts[Announce] == counts[PullRequest]
            assert counts[PullRequest] <= offers.MAX_PIECES + offers.MAX_LAYER_GROUPS
        else:
            assert (counts[Announce], counts[PullRequest]) == (0, 1)
        led.job.close()
    assert tokens[0].token_ids == tokens[1].token_ids


@pytest.mark.parametrize(("options", "prompt", "max_tokens"), [
    ({"overlap_tokens": 51}, 50, 6), ({}, 50, 1), ({"shared": True}, 50, 6),
    ({"shared": True, "generation_tokens_per_block": 8}, 50, 6)],
    ids=["short", "one token", "exchanged", "copied"])
def test_where_nothing_is_gained_it_comes_after_the_context(
        jobs: Any, undisturbed: Undisturbed, options: Any, prompt: int, max_tokens: int) -> None:
    led = lead(jobs, **options)
    request = executor_request(1, PROMPT[:prompt], max_tokens=max_tokens)
    sink = led.submit(request)
    led.finish()
    assert not any(isinstance(message, Proceed) for _, message in led.sent)
    assert sink.token_ids == undisturbed.tokens(request)
    assert led.problems() == []


# ---- cancelled, in every phase ----


ORDERS = {"together": (CONTEXT, GENERATION), "generation first": (GENERATION, CONTEXT),
          "context alone": (CONTEXT,), "generation alone": (GENERATION,)}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("hold", [False, True], ids=["", "bytes on their way"])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_cancel_may_come_at_any_moment(
        jobs: Any, undisturbed: Undisturbed, order: str, hold: bool, num_stages: int) -> None:
    """After every number of turns: before the watch, between the pieces, at the context's end, and after.

    One instance alone has turns for a while where the other's messages are to come late.
    """
    led = lead(jobs, num_stages=num_stages)
    for num_turns in range(16):
        led.job.wire.hold = hold
        sink = led.submit(REQUEST)
        for _ in range(num_turns):
            led.turn(*ORDERS[order])
        led.dispatcher.cancel(1)
        led.turn(*ORDERS[order])
        led.job.wire.hold = False
        led.finish()
        assert_ended(led, sink, undisturbed, State.DONE if sink.end is State.DONE else State.CANCELLED)
    led.submit(REQUEST)
    led.finish()
    assert led.problems() == []


def test_a_cancel_that_crosses_the_contexts_end(jobs: Any, undisturbed: Undisturbed) -> None:
    led = lead(jobs)
    sink = led.submit(REQUEST)
    led.lead()
    while not led.job.instances[CONTEXT].transceiver.has_offer(1):
        led.services[CONTEXT].turn()
        led.services[GENERATION].turn()
    led.dispatcher.cancel(1, "deadline")
    led.finish()
    assert sink.responses[-1].finish_reason == "deadline"
    kinds = Counter(type(message) for _, message in led.sent)
    assert (kinds[Cancel], kinds[Proceed], kinds[DropOffer]) == (2, 0, 1)
    assert_ended(led, sink, undisturbed, State.CANCELLED)


@pytest.mark.parametrize("proceeds", [False, True])
def test_a_generation_that_is_late_takes_all_in_one_piece(
        jobs: Any, undisturbed: Undisturbed, proceeds: bool) -> None:
    led = lead(jobs)
    counts = count_messages(led.job)
    sink = led.submit(REQUEST)
    led.lead()
    while not led.job.instances[CONTEXT].transceiver.has_offer(1):
        led.services[CONTEXT].turn()
    if proceeds:  # both messages are there when generation looks
        led.lead()
    led.services[GENERATION].turn()
    led.finish()
    assert (counts[Watch], counts[Announce], counts[PullRequest]) == ((0, 0, 1) if proceeds else (1, 1, 1))
    assert_ended(led, sink, undisturbed, State.DONE)


# ---- other ends ----


def test_a_stop_text_may_begin_in_the_contexts_token(jobs: Any, undisturbed: Undisturbed) -> None:
    text = "".join(map(word, undisturbed.tokens(REQUEST)))
    stop = text[:3]
    led = lead(jobs)
    sink = led.submit(replace(REQUEST, sampling=replace(REQUEST.sampling, stop=(stop, text[0] + "never"))))
    led.finish()
    assert (sink.end, sink.responses[-1].finish_reason) == (State.DONE, "stop")
    assert text_of(sink.responses) == ""
    assert any(isinstance(message, Proceed) for _, message in led.sent)
    assert led.problems() == []


def test_a_context_that_ends_at_its_first_token_is_the_end(jobs: Any, undisturbed: Undisturbed) -> None:
    first = undisturbed.tokens(REQUEST)[0]
    led = lead(jobs, eos=(first,))
    for order in ((CONTEXT, GENERATION), (GENERATION, CONTEXT), (CONTEXT,)):
        sink = led.submit(REQUEST)
        for _ in range(8):
            led.turn(*order)
        led.finish()
        assert (sink.end, sink.token_ids) == (State.DONE, [first])
        assert sink.responses[-1].finish_reason == "stop"
        assert led.problems() == []


@pytest.mark.parametrize("failing", [CONTEXT, GENERATION])
@pytest.mark.parametrize("late", [0, 2, 9])
def test_where_one_fails_the_other_is_told(
        jobs: Any, undisturbed: Undisturbed, failing: int, late: int) -> None:
    led = lead(jobs)
    executor = led.job.instances[failing].executor
    executor.limits = replace(executor.limits, max_model_len=8)
    sink = led.submit(REQUEST)
    led.lead()
    for _ in range(late):
        led.services[1 - failing].turn()
    led.finish()
    assert "exceed the model's context length of 8" in (sink.responses[-1].error or "")
    assert_ended(led, sink, undisturbed, State.FAILED)


def test_generation_goes_on_with_others_meanwhile(jobs: Any, undisturbed: Undisturbed) -> None:
    led = lead(jobs)
    short = executor_request(2, [3, 4, 5], max_tokens=30)
    sinks = [led.submit(short)]
    for _ in range(4):
        led.turn()
    sinks.append(led.submit(REQUEST))
    led.finish()
    assert [sink.token_ids for sink in sinks] == [undisturbed.tokens(r) for r in (short, REQUEST)]
    assert led.problems() == []


# ---- with prefixes, with preemption ----


def test_what_generation_holds_already_is_not_brought(jobs: Any, undisturbed: Undisturbed) -> None:
    led = lead(jobs)
    for round_ in range(2):
        counts = count_messages(led.job)
        sink = led.submit(REQUEST)
        led.finish()
        timing = led.entries[1].timing
        assert sink.token_ids == undisturbed.tokens(REQUEST)
        assert (timing.cached_tokens, timing.held_tokens) == ((48, 48) if round_ else (0, 0))
        assert timing.handover_bytes == timing.kv_bytes * (2 if round_ else 50) // 50
    assert counts[PullRequest] <= 2, "the last two tokens, layer by layer"
    assert led.problems() == []


def test_by_hand_what_is_given_up_takes_no_context_phase_params(jobs: Any) -> None:
    """The pull lets the context go, and no second time."""
    job = jobs(shared=False, max_num_tokens=12)
    job.wire.hold = True
    job.context.enqueue_request(replace(REQUEST, type=RequestType.CONTEXT_ONLY))
    job.generation.enqueue_request(replace(REQUEST, type=RequestType.GENERATION_ONLY, early_source=CONTEXT))
    said = []
    while not any(r.context_phase_params for r in said):
        said += job.turn()[1]
    job.generation.cancel_request(1)
    job.generation.proceed(1, said[-1].context_phase_params)
    job.turn()
    job.wire.hold = False
    finals = [r for _ in range(5) for r in job.turn()[2]]
    assert [r.finish_reason for r in finals] == ["cancelled"]
    assert job.problems() == []


SIZES = [3, 19, 20, 33, 50]


@given(st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_in_any_order_of_turns_everyone_ends_once(
        tiny_llama: Path, undisturbed: Undisturbed, data: st.DataObject) -> None:
    roles = [Role.CONTEXT] * data.draw(st.integers(1, 2), label="contexts") \
        + [Role.GENERATION] * data.draw(st.integers(1, 2), label="generations")
    hosts = [0] * (len(roles) - roles.count(Role.GENERATION) + 1) + [1] * roles.count(Role.GENERATION)
    led = LedJob(Job(
        tiny_llama, roles, shared=False, hosts=data.draw(st.sampled_from([None, hosts]), label="hosts"),
        num_blocks=data.draw(st.sampled_from([16, 40]), label="blocks"), overlap_tokens=20, max_batch_size=4,
        max_num_tokens=data.draw(st.sampled_from([6, 16]), label="budget"),
        reserved_output=data.draw(st.sampled_from([2, 64]), label="reserved"),
        prefix_cache=data.draw(st.booleans(), label="prefix_cache"),
        num_stages=data.draw(st.integers(1, 3), label="stages"),
        eos=data.draw(st.sampled_from([(), (undisturbed.tokens(REQUEST)[0],)]), label="eos")))
    requests: list[ExecutorRequest] = []
    sinks: list[Sink] = []

    def new() -> None:
        size = data.draw(st.sampled_from(SIZES), label="size")
        requests.append(executor_request(len(requests), PROMPT[:size], max_tokens=data.draw(
            st.sampled_from([1, 2, 9]), label="max_tokens")))
        sinks.append(led.submit(requests[-1]))

    def cancel() -> None:
        if requests:
            led.dispatcher.cancel(data.draw(st.integers(0, len(requests) - 1), label="which"))

    def hold() -> None:
        led.job.wire.hold = not led.job.wire.hold

    act: dict[str, Callable[[], object]] = {"new": new, "cancel": cancel, "hold": hold,
                                            "lead": led.lead, "all": led.turn}
    act |= {f"turn {i}": service.turn for i, service in enumerate(led.services)}
    for name in data.draw(st.lists(st.sampled_from(["new", *act]), max_size=40), label="actions"):
        act[name]()
        assert [i.executor.check_integrity() for i in led.job.instances] == [[]] * len(led.job.instances)
    led.job.wire.hold = False
    led.finish()
    for request, sink in zip(requests, sinks, strict=True):
        expected = undisturbed.tokens(request)
        assert sink.token_ids == expected[: len(sink.token_ids)]
        if sink.end is State.DONE and sink.responses[-1].finish_reason == "length":
            assert sink.token_ids == expected
    assert led.problems() == []
    led.job.close()


def test_the_tokens_of_two_ways_are_the_same(jobs: Any, undisturbed: Undisturbed) -> None:
    requests = [executor_request(i, PROMPT[i:], max_tokens=9, temperature=0.9, seed=i) for i in range(4)]
    for overlap_tokens in (1, 10_000):
        led = lead(jobs, overlap_tokens=overlap_tokens, num_blocks=80)
        sinks = [led.submit(request) for request in requests]
        led.finish()
        assert [tokens_of(s.responses) for s in sinks] == [undisturbed.tokens(r) for r in requests]
        assert led.problems() == []
