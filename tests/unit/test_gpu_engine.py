"""The engine for GPUs at work: the tokens of the processor's, whatever is in flight when something happens.

The device is a stand-in that lets nobody see what a step has left on the host before its mark is waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from inprocess import (
    VOCABULARY,
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
from test_executor import PROMPT, drive_until
from test_preemption import LONG, TIGHT

from disagg_mpi.engine.gpu.device import HostDevice, Mark
from disagg_mpi.orchestrator.table import State
from disagg_mpi.request import ExecutorRequest, RequestType, Response
from disagg_mpi.topology import Role


class Behind(torch.Tensor):
    """Host memory of a device that is behind: what comes from there is rubbish until it has arrived."""

    arrivals: list[Callable[[], Any]]

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.copy_ and isinstance(args[0], Behind) and kwargs.get("non_blocking"):
            target, values = (each.as_subclass(torch.Tensor) for each in args[:2])
            values = values.clone()  # as they are when the copy's turn in the queue comes
            args[0].arrivals.append(lambda: target.copy_(values))
            return target.fill_(-7)
        with torch._C.DisableTorchFunctionSubclass():  # what is made of it is a tensor like any other
            return func(*args, **kwargs)


class DeviceBehind(HostDevice):
    """Results arrive when somebody waits for a mark behind them."""

    def __init__(self) -> None:
        super().__init__()
        self._arrivals: list[Callable[[], Any]] = []
        self.arrived = 0

    def host_empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        memory = torch.empty(*shape, dtype=dtype).as_subclass(Behind)
        memory.arrivals = self._arrivals
        return memory

    def mark(self) -> Mark:
        return MarkBehind(self, len(self._arrivals))

    def arrive(self, end: int) -> None:
        for arrival in self._arrivals[self.arrived : end]:
            arrival()
        self.arrived = max(self.arrived, end)


class MarkBehind:
    def __init__(self, device: DeviceBehind, end: int) -> None:
        self._device, self._end = device, end

    def is_past(self) -> bool:
        return self._device.arrived >= self._end

    def wait(self) -> None:
        self._device.arrive(self._end)


SHAPES: dict[str, dict[str, Any]] = {
    "aggregated": {"roles": [Role.AGGREGATED]},
    "exchanged": {"roles": [Role.CONTEXT, Role.GENERATION]},
    "gathered": {"roles": [Role.CONTEXT, Role.GENERATION], "gpus": [0, 0, 1]},
    "other blocks": {"roles": [Role.CONTEXT, Role.GENERATION], "generation_tokens_per_block": 2},
    "messages": {"roles": [Role.CONTEXT, Role.GENERATION], "shared": False},
    "hosts": {"roles": [Role.CONTEXT, Role.GENERATION], "hosts": [0, 0, 2]},
}
WAYS = {"aggregated": "", "exchanged": "shared", "gathered": "copy", "other blocks": "copy",
        "messages": "mpi", "hosts": "mpi"}
SHAPED = pytest.mark.parametrize("shape", SHAPES)
GRAPHS = pytest.mark.parametrize("graphs", [True, False], ids=["captured", "not captured"])
SPLIT = pytest.mark.parametrize("shape", ["exchanged", "gathered", "messages"])

# Chosen on the device, chosen at the host, and both kinds of the first tokens of one that has a minimum.
MIXED = [
    executor_request(1, PROMPT, max_tokens=14),
    executor_request(2, list(range(30)), max_tokens=9, temperature=1.0, seed=3),
    executor_request(3, [1], max_tokens=12, temperature=0.7, top_k=5, seed=7),
    executor_request(4, list(range(50, 67)), 2, max_tokens=14, temperature=1.3, top_p=0.8, seed=1),
    executor_request(5, PROMPT[::-1], max_tokens=6, temperature=0.9, top_k=20, top_p=0.9, seed=2**63 - 1),
    executor_request(6, [9, 9, 9], max_tokens=11, repetition_penalty=1.3, frequency_penalty=0.2),
    executor_request(7, list(range(12)), max_tokens=8, logprobs=3),
    executor_request(8, [70, 3], max_tokens=10, temperature=0.8, seed=5, presence_penalty=0.4, logprobs=1),
    executor_request(9, [44] * 5, max_tokens=9, min_tokens=4, stop_token_ids=(0, 127)),
    executor_request(10, [100, 50], max_tokens=7, return_generation_logits=True),
    executor_request(11, PROMPT, max_tokens=2),
    executor_request(12, PROMPT, max_tokens=1),
]


def make(jobs: Any, shape: str, **options: Any) -> Job:
    options = {"device": "emulated", "make_device": DeviceBehind, "max_num_tokens": 24, "num_blocks": 64,
               **SHAPES[shape], **options}
    return jobs(*options.pop("roles"), **options)


def in_flight(job: Job) -> list[int]:
    """Steps that each instance has launched and not looked at."""
    return [instance.engine._runner.num_in_flight for instance in job.instances]


def computed(job: Job) -> int:
    """Positions of all steps so far."""
    return sum(s.num_context_tokens + s.num_generation_tokens
               for instance in job.instances for s in instance.executor.get_latest_iteration_stats())


# ---- the same tokens ----


@SHAPED
@GRAPHS
def test_all_at_once_get_the_processors_tokens(
        jobs: Any, undisturbed: Undisturbed, shape: str, graphs: bool) -> None:
    job = make(jobs, shape, cuda_graphs=graphs)
    for _ in range(3):  # later rounds have scattered blocks and other seats
        found = job.run(MIXED)
        for request in MIXED:
            responses = found[request.request_id]
            final = assert_ended_once(responses)
            assert tokens_of(responses) == undisturbed.tokens(request), request
            assert text_of(responses) == "".join(map(word, tokens_of(responses)))
            if request.sampling.max_tokens > 1:
                assert final.timing is not None and final.timing.transport == WAYS[shape]
        assert job.problems() == []


@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 5])
@GRAPHS
def test_more_requests_than_seats(
        jobs: Any, undisturbed: Undisturbed, max_batch_size: int, graphs: bool) -> None:
    """There are twice as many as requests in a step: they are given up and taken again."""
    job = make(jobs, "exchanged", cuda_graphs=graphs, max_batch_size=max_batch_size, max_num_tokens=8)
    found = job.run(MIXED)
    assert [tokens_of(found[r.request_id]) for r in MIXED] == [undisturbed.tokens(r) for r in MIXED]
    assert job.problems() == []


def test_scores_are_the_processors(jobs: Any) -> None:
    """Log-probabilities, logits and scores of prompts, beside requests that need none."""
    requests = [
        executor_request(1, list(range(40, 60)), max_tokens=5, prompt_logprobs=2, logprobs=2),
        executor_request(2, PROMPT, max_tokens=8),
        executor_request(3, list(range(9)), max_tokens=4, return_context_logits=True,
                         return_generation_logits=True),
        executor_request(4, [7], max_tokens=6, temperature=0.9, seed=4, prompt_logprobs=0),
        *[executor_request(number, [number], max_tokens=9) for number in (5, 6)],
    ]
    mine = make(jobs, "exchanged").run(requests)
    theirs = jobs(shared=True, max_num_tokens=24, num_blocks=64).run(requests)

    def rows(found: Any, request_id: int, name: str) -> Any:
        values = [getattr(response, name) for response in found[request_id]]
        return np.concatenate([np.frombuffer(row, np.float32) for each in values if each for row in each])

    for request_id in (1, 2, 3, 4, 5, 6):
        assert tokens_of(mine[request_id]) == tokens_of(theirs[request_id])
    for name in ("logits", "context_logits"):
        ours, expected = (rows(found, 3, name) for found in (mine, theirs))
        assert ours.shape == expected.shape and len(ours) >= 4 * VOCABULARY
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
    for request_id, name, count in (
            (1, "prompt_logprobs", 20), (4, "prompt_logprobs", 1), (1, "logprobs", 5)):
        ours, expected = ([one for response in found[request_id] for one in getattr(response, name) or ()]
                          for found in (mine, theirs))
        assert len(ours) == len(expected) == count
        for a, b in zip(ours, expected, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert close(a, b), (a, b)


def close(mine: Any, theirs: Any) -> bool:
    """Equal but for the last bits of numbers."""
    if isinstance(mine, float):
        return abs(mine - theirs) < 1e-4
    if isinstance(mine, (list, tuple)):
        return len(mine) == len(theirs) and all(map(close, mine, theirs))
    if isinstance(mine, dict):
        return mine.keys() == theirs.keys() and all(close(mine[key], theirs[key]) for key in mine)
    if hasattr(mine, "__struct_fields__"):
        return all(close(getattr(mine, name), getattr(theirs, name)) for name in mine.__struct_fields__)
    return bool(mine == theirs)


@SHAPED
def test_equal_beginnings_are_computed_once(jobs: Any, undisturbed: Undisturbed, shape: str) -> None:
    job = make(jobs, shape)
    shared = list(range(20))
    requests = [executor_request(number, [*shared, *tail], max_tokens=9)
                for number, tail in enumerate(([1], [2, 3], [1]))]
    for number, request in enumerate(requests):
        found = job.run([request])[request.request_id]
        final = assert_ended_once(found)
        assert tokens_of(found) == undisturbed.tokens(request)
        assert final.finish_reason == "length"
        cached = max(response.timing.cached_tokens for response in found if response.timing is not None)
        assert cached == 0 if number == 0 else cached >= 16, (number, cached)
    assert job.problems() == []


@SHAPED
@GRAPHS
def test_those_that_outgrow_what_they_reserved_come_to_their_end(
        jobs: Any, undisturbed: Undisturbed, shape: str, graphs: bool) -> None:
    job = make(jobs, shape, cuda_graphs=graphs, **TIGHT)
    requests = [*LONG, executor_request(6, [4, 5], max_tokens=30, temperature=1.0, seed=9)]
    num_preempted = 0
    for _ in range(2):
        said = job.run(requests)
        for request in requests:
            final = assert_ended_once(said[request.request_id])
            assert tokens_of(said[request.request_id]) == undisturbed.tokens(request)
            num_preempted += final.timing.num_preempted if final.timing else 0
        assert job.problems() == []
    assert num_preempted > 0


@pytest.mark.parametrize("tokens_per_block", [3, 4, 7])
@pytest.mark.parametrize("reserved_output", [1, 8, 60])
def test_a_request_may_take_all_of_the_models_length(
        jobs: Any, undisturbed: Undisturbed, tokens_per_block: int, reserved_output: int) -> None:
    """Its block table then fills its seat's, whatever was taken in advance."""
    job = make(jobs, "aggregated", tokens_per_block=tokens_per_block, num_blocks=100,
               reserved_output=reserved_output)
    request = executor_request(1, list(range(103)) * 2, max_tokens=50)
    found = job.run([request])
    assert tokens_of(found[1]) == undisturbed.tokens(request)
    assert assert_ended_once(found[1]).finish_reason == "length"
    assert job.problems() == []


def test_one_executor_may_hand_over_to_itself(jobs: Any, undisturbed: Undisturbed) -> None:
    job = make(jobs, "aggregated")
    one = job.context
    one.enqueue_request(replace(executor_request(1, PROMPT), type=RequestType.CONTEXT_ONLY))
    (context,) = one.await_responses(timeout=30)
    one.enqueue_request(replace(executor_request(2, PROMPT), type=RequestType.GENERATION_ONLY,
                                context_phase_params=context.context_phase_params))
    tokens = list(context.token_ids)
    while len(tokens) < 8:
        tokens += tokens_of(one.await_responses(timeout=30))
    assert tokens == undisturbed.tokens(executor_request(0, PROMPT))
    one.shutdown(timeout=5)
    assert job.problems() == []


# ---- what is in flight ----


def test_a_step_is_launched_before_the_token_it_starts_from_is_known(jobs: Any) -> None:
    """As long as tokens are chosen on the device; those chosen at the host are waited for."""
    job = make(jobs, "aggregated")
    job.context.enqueue_request(executor_request(1, PROMPT, max_tokens=9))
    seen = []
    while not (responses := job.turn()[1]) or not responses[-1].is_final:
        seen.append((in_flight(job)[0], len(responses)))
    assert seen == [(1, 1)] * 8
    assert in_flight(job) == [0], "the step that gives the last token is not followed by another"
    job.context.enqueue_request(executor_request(2, PROMPT, max_tokens=9, logprobs=0))
    job.turn()
    assert in_flight(job) == [0]


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 10])
def test_no_position_is_computed_that_is_not_asked_for(jobs: Any, max_tokens: int) -> None:
    job = make(jobs, "aggregated")
    job.run([executor_request(1, PROMPT, max_tokens=max_tokens)])
    job.settle()
    assert computed(job) == len(PROMPT) + max_tokens - 1
    assert job.problems() == []


def the_tokens(undisturbed: Undisturbed, count: int = 8) -> list[int]:
    return undisturbed.tokens(executor_request(0, PROMPT, max_tokens=count))


@SHAPED
@pytest.mark.parametrize("position", [0, 1, 2, 4, 7])
def test_a_stop_is_found_while_the_next_step_runs(
        jobs: Any, undisturbed: Undisturbed, shape: str, position: int) -> None:
    """The model's end, a stop token, a stop text: nothing more is said, and the blocks wait for the step."""
    tokens = the_tokens(undisturbed)
    end = tokens[position]
    length = tokens.index(end) + 1
    text = "".join(map(word, tokens))
    stop = text[position : position + 2]
    job = make(jobs, shape, eos=(end,))
    requests = [executor_request(1, PROMPT), executor_request(2, PROMPT, ignore_eos=True),
                executor_request(3, PROMPT, ignore_eos=True, stop_token_ids=(end,)),
                executor_request(4, PROMPT, ignore_eos=True, stop=(stop, "never"))]
    found = job.run(requests)
    for request_id in (1, 3):
        assert tokens_of(found[request_id]) == tokens[:length]
        assert assert_ended_once(found[request_id]).finish_reason == "stop"
    assert tokens_of(found[2]) == tokens
    assert assert_ended_once(found[2]).finish_reason == "length"
    assert text_of(found[4]) == text[: text.index(stop)]
    assert assert_ended_once(found[4]).finish_reason == "stop"
    assert job.problems() == []


def test_blocks_of_one_that_is_done_are_nobodys_while_a_step_still_writes_them(
        jobs: Any, undisturbed: Undisturbed) -> None:
    tokens = the_tokens(undisturbed)
    position = next(i for i in range(2, 7) if tokens[i] not in tokens[:i])
    job = make(jobs, "aggregated", num_blocks=4, prefix_cache=False)
    engine = job.instances[0].engine
    job.context.enqueue_request(executor_request(1, PROMPT, stop_token_ids=(tokens[position],)))
    held = set()
    while not (responses := job.turn()[1]) or not responses[-1].is_final:
        held.add(engine.num_free_blocks)
    assert in_flight(job) == [1], "the step behind the last token"
    assert held == {engine.num_free_blocks} and 1 in engine, "its blocks are not free yet"
    assert job.context.check_integrity() == []
    # Another that needs them waits until they are.
    other = executor_request(2, list(range(10)), max_tokens=4)
    job.context.enqueue_request(other)
    assert job.turn() == {1: []}
    assert 1 not in engine and engine.num_free_blocks == 4
    said: list[Response] = []
    while not (said and said[-1].is_final):
        said += job.turn()[1]
    assert tokens_of(said) == undisturbed.tokens(other)
    assert job.problems() == []


def test_shutdown_waits_for_the_step_behind_the_last_token(jobs: Any, undisturbed: Undisturbed) -> None:
    tokens = the_tokens(undisturbed)
    position = next(i for i in range(2, 7) if tokens[i] not in tokens[:i])
    job = make(jobs, "aggregated")
    job.context.enqueue_request(executor_request(1, PROMPT, stop_token_ids=(tokens[position],)))
    while not (responses := job.turn()[1]) or not responses[-1].is_final:
        pass
    assert in_flight(job) == [1]
    job.context.shutdown(timeout=5)
    assert in_flight(job) == [0]
    assert job.instances[0].engine.check(idle=True) == []


@SPLIT
@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
@pytest.mark.parametrize("phase", [
    "context waiting", "context chunk", "generation waiting", "hand-over", "generation"])
def test_a_request_that_is_given_up_ends_once_and_leaves_nothing(
        jobs: Any, undisturbed: Undisturbed, shape: str, phase: str, reason: Any) -> None:
    job = make(jobs, shape, max_num_tokens=16)
    request = executor_request(1, list(range(40)), max_tokens=12)
    everything = list(drive_until(job, request, phase))
    holder = job.context if phase.startswith("context") else job.generation
    beside = executor_request(2, [3, 1], max_tokens=20)
    holder.enqueue_request(beside)
    holder.cancel_request(1, reason)
    holder.cancel_request(1, reason)
    assert [instance.executor.check_integrity() for instance in job.instances] == [[], []]
    job.wire.hold = False
    for _ in range(40):
        everything += [response for responses in job.turn().values() for response in responses]
    said = {i: [r for r in everything if r.request_id == i] for i in (1, 2)}
    final = assert_ended_once(said[1])
    assert final.finish_reason == reason and final.error
    if phase != "generation":  # of which the driver does not keep all
        known = tokens_of(said[1])
        assert known == undisturbed.tokens(request)[: len(known)]
    assert_ended_once(said[2])
    assert tokens_of(said[2]) == undisturbed.tokens(beside)
    assert job.problems() == []


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize("graphs", [True, False])
def test_it_can_be_given_up_between_any_two_turns(jobs: Any, number: int, graphs: bool) -> None:
    """A step is in flight then, with a token for it that nobody will ever see."""
    job = make(jobs, "aggregated", cuda_graphs=graphs, max_num_tokens=8)
    requests = [executor_request(1, list(range(10)), max_tokens=6), executor_request(2, [5], max_tokens=7)]
    job.context.enqueue_requests(requests)
    said: list[Response] = []
    for _ in range(number):
        said += job.turn()[1]
    before = tokens_of([r for r in said if r.request_id == 1])
    was_over = any(r.is_final and r.request_id == 1 for r in said)
    job.context.cancel_request(1)
    for _ in range(12):
        said += job.turn()[1]
        assert job.context.check_integrity() == []
    mine = [r for r in said if r.request_id == 1]
    assert assert_ended_once(mine).finish_reason == ("length" if was_over else "cancelled")
    assert tokens_of(mine) == before
    assert len(tokens_of([r for r in said if r.request_id == 2])) == 7
    assert job.problems() == []


@SHAPED
def test_rank_0_is_told_of_every_block(jobs: Any, shape: str) -> None:
    led = LedJob(make(jobs, shape, **TIGHT))
    sinks = [led.submit(request) for request in LONG]
    blocks = led.job.instances[-1].blocks
    for _ in range(500):
        led.turn()
        led.lead()
        for request_id, entry in led.entries.items():
            if entry.state is State.GENERATION and not entry.is_over:
                assert entry.num_blocks == (len(blocks.table(request_id)) if blocks.owns(request_id) else 0)
    assert [sink.end for sink in sinks] == [State.DONE] * len(LONG)
    assert led.problems() == []


# ---- anything ----

PROMPTS = [[5, 9, 100], list(range(12)), [7] * 8, [7] * 8 + [1, 2], [90]]
SAMPLINGS: list[dict[str, Any]] = [
    {}, {}, {"max_tokens": 1}, {"max_tokens": 2}, {"temperature": 0.8, "top_p": 0.9, "seed": 1},
    {"temperature": 1.0, "top_k": 4, "seed": 2}, {"logprobs": 1}, {"repetition_penalty": 1.3},
    {"min_tokens": 3, "stop_token_ids": tuple(range(0, 128, 9))},
    {"stop_token_ids": tuple(range(0, 128, 5))}, {"stop": ("a", "<")}]


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_under_any_load_everyone_gets_the_processors_tokens(
        tiny_llama: Path, undisturbed: Undisturbed, data: st.DataObject) -> None:
    """Random arrivals, lengths, ways to sample and to stop, cancels and stalls of the wire."""
    options = {"shared": True, **SHAPES[data.draw(st.sampled_from(sorted(SHAPES)), label="shape")]}
    led = LedJob(Job(
        tiny_llama, options.pop("roles"), num_blocks=data.draw(st.integers(8, 14), label="blocks"),
        reserved_output=data.draw(st.integers(1, 6), label="reserved"),
        max_batch_size=data.draw(st.integers(1, 4), label="batch"),
        max_num_tokens=data.draw(st.integers(4, 20), label="budget"),
        prefix_cache=data.draw(st.booleans(), label="prefix_cache"),
        cuda_graphs=data.draw(st.booleans(), label="graphs"), device="emulated", make_device=DeviceBehind,
        **options))
    requests: list[ExecutorRequest] = []
    sinks = []
    for action in data.draw(st.lists(st.sampled_from(["new", "new", "turn", "turns", "cancel", "hold"]),
                                     max_size=25), label="actions"):
        if action == "new":
            requests.append(executor_request(
                len(requests), data.draw(st.sampled_from(PROMPTS), label="prompt"),
                **{"max_tokens": data.draw(st.sampled_from([3, 9, 20]), label="max_tokens"),
                   **data.draw(st.sampled_from(SAMPLINGS), label="sampling")}))
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


def test_the_stand_in_shows_nothing_before_its_time() -> None:
    """What these tests rely on."""
    device = DeviceBehind()
    values = torch.arange(3)
    host = device.host_empty(3, dtype=torch.int64)
    host.copy_(values, non_blocking=True)
    mark = device.mark()
    values += 10
    assert host.tolist() == [-7] * 3 and not mark.is_past()
    mark.wait()
    assert host.tolist() == [0, 1, 2] and mark.is_past()
