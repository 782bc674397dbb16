"""The life of a request as rank 0 leads it, with instances played by the test."""

from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from inprocess import Sink, executor_request

from disagg_mpi.comm.messages import Cancel, DropOffer, Enqueue, Proceed, Step
from disagg_mpi.executor.validate import blocks_needed
from disagg_mpi.orchestrator.dispatcher import Dispatcher, Policy
from disagg_mpi.orchestrator.table import Entry, InstanceView, State
from disagg_mpi.request import ContextPhaseParams, ExecutorLimits, PhaseTiming, RequestType, Response
from disagg_mpi.topology import Role

LIMITS = ExecutorLimits(num_blocks=10, tokens_per_block=4, max_batch_size=3, max_num_tokens=8,
                        max_model_len=100, vocab_size=50, reserved_output=8)


class Rank0:
    """A dispatcher with what it sends; contexts are instances 0, …, generations follow.

    ``way``: how KV-cache comes from every context instance to every generation instance; ``None``: by other
    means than ours.
    """

    def __init__(self, context: int = 1, generation: int = 1, aggregated: int = 0, *,
                 way: str | None = "shared", **policy: Any) -> None:
        roles = ([Role.CONTEXT] * context + [Role.GENERATION] * generation if not aggregated
                 else [Role.AGGREGATED] * aggregated)
        ways = {} if way is None else dict.fromkeys(range(context), way)
        self.views = [InstanceView(i, role, f"{role} {i}", 10 + i, LIMITS,
                                   ways if role is Role.GENERATION else None)
                      for i, role in enumerate(roles)]
        self.sent: list[tuple[int, Any]] = []
        self.dispatcher = Dispatcher(self.views, lambda rank, m: self.sent.append((rank, m)),
                                     Policy(**policy))
        self.entries: dict[int, Entry] = {}

    def submit(self, request_id: int, prompt: int = 4, max_tokens: int = 5,
               deadline: float | None = None) -> Sink:
        sink = Sink()
        entry = Entry(executor_request(request_id, range(prompt), max_tokens=max_tokens), sink,
                      deadline)
        self.entries[request_id] = entry
        self.dispatcher.submit(entry)
        return sink

    def turn(self) -> list[tuple[int, Any]]:
        self.sent.clear()
        self.dispatcher.turn()
        return list(self.sent)

    def step(self, instance: int, *responses: Response) -> list[tuple[int, Any]]:
        self.dispatcher.on_step(Step(instance, list(responses)))
        return self.turn()

    def assert_over(self) -> None:
        assert self.turn() == []
        assert self.dispatcher.num_open == self.dispatcher.num_queued == 0
        assert self.dispatcher.check() == []


def context_done(request_id: int) -> Response:
    return Response(request_id=request_id, token_ids=[1], is_final=True, timing=PhaseTiming(),
                    context_phase_params=ContextPhaseParams((1,), request_id, b"state"))


def token(request_id: int) -> Response:
    return Response(request_id=request_id, token_ids=[2])


def last(request_id: int, reason: Any = "length") -> Response:
    return Response(request_id=request_id, token_ids=[3], is_final=True, finish_reason=reason,
                    timing=PhaseTiming(handover=0.5, kv_bytes=7, transport="shared"))


def given_up(request_id: int, reason: Any = "cancelled") -> Response:
    return Response(request_id=request_id, is_final=True, finish_reason=reason, error="gone",
                    timing=PhaseTiming())


def test_a_life_from_queue_to_end() -> None:
    rank0 = Rank0()
    sink = rank0.submit(1)
    entry = rank0.entries[1]
    assert entry.state is State.QUEUED
    ((leader, message),) = rank0.turn()
    assert leader == 10 and isinstance(message, Enqueue)
    assert message.requests[0].type is RequestType.CONTEXT_ONLY
    assert (entry.state, rank0.views[1].free_blocks) == (State.CONTEXT, 8)
    assert rank0.views[0].pending_context_tokens == 4
    ((leader, message),) = rank0.step(0, context_done(1))
    assert leader == 11 and isinstance(message, Enqueue)
    assert message.requests[0].type is RequestType.GENERATION_ONLY
    assert message.requests[0].context_phase_params.opaque_state == b"state"
    assert entry.state is State.HANDOVER
    assert rank0.views[0].pending_context_tokens == 0
    rank0.step(1, token(1))
    assert entry.state is State.GENERATION
    rank0.step(1, last(1))
    assert sink.end is State.DONE
    assert [r.token_ids for r in sink.responses] == [[1], [2], [3]]
    assert (entry.timing.transport, entry.timing.kv_bytes) == ("shared", 7)
    assert entry.timing.total >= entry.timing.ttft > 0
    assert entry.timing.tpot > 0 and entry.timing.second_token > 0
    rank0.assert_over()


def test_an_aggregated_instance_does_both() -> None:
    rank0 = Rank0(aggregated=1)
    sink = rank0.submit(1)
    ((_, message),) = rank0.turn()
    assert message.requests[0].type is RequestType.CONTEXT_AND_GENERATION
    rank0.step(0, token(1))
    assert rank0.entries[1].state is State.GENERATION
    rank0.step(0, last(1))
    assert sink.end is State.DONE
    rank0.assert_over()


def test_admission_reserves_and_the_head_of_the_line_waits() -> None:
    rank0 = Rank0()
    first, large, small = (rank0.submit(1, 16, 9), rank0.submit(2, 16, 9), rank0.submit(3, 1, 1))
    ((_, message),) = rank0.turn()
    assert [r.request_id for r in message.requests] == [1]
    assert rank0.views[1].free_blocks == 4
    assert rank0.dispatcher.num_queued == 2
    assert rank0.turn() == []
    sent = rank0.step(0, context_done(1))
    assert [m.requests[0].request_id for _, m in sent] == [1]
    sent = rank0.step(1, last(1))
    assert [[r.request_id for r in m.requests] for _, m in sent] == [[2, 3]]
    assert first.end is State.DONE and not large.ends and not small.ends


def test_places_in_the_batch_are_reserved_too() -> None:
    rank0 = Rank0()
    for request_id in range(5):
        rank0.submit(request_id, 1, 1)
    rank0.turn()
    assert rank0.dispatcher.num_queued == 5 - LIMITS.max_batch_size == 2
    assert rank0.dispatcher.capacity == 3


def test_the_least_loaded_are_picked() -> None:
    rank0 = Rank0(2, 2)
    for request_id, prompt in enumerate((12, 2, 3, 4), start=1):
        rank0.submit(request_id, prompt, 1)
    sent = {leader: [r.request_id for r in m.requests] for leader, m in rank0.turn()}
    assert sent == {10: [1], 11: [2, 3, 4]}, "fewest prompt tokens to compute"
    assert [v.free_blocks for v in rank0.views[2:]] == [7, 7], "largest free share"
    places = {i: e.generation.id for i, e in rank0.entries.items() if e.generation}
    assert places == {1: 2, 2: 3, 3: 3, 4: 3}


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_cancelled_in_the_queue(reason: Any) -> None:
    rank0 = Rank0()
    sink = rank0.submit(1)
    rank0.dispatcher.cancel(1, reason)
    assert sink.end is State.CANCELLED
    assert sink.responses[0].finish_reason == reason
    assert sink.responses[0].error
    rank0.assert_over()


def test_cancelled_in_context_is_said_to_the_context() -> None:
    rank0 = Rank0()
    sink = rank0.submit(1)
    rank0.turn()
    rank0.dispatcher.cancel(1)
    rank0.dispatcher.cancel(1, "deadline")
    assert rank0.turn() == [(10, Cancel([1], "cancelled"))]
    assert not sink.ends, "its blocks are not free yet"
    rank0.step(0, given_up(1))
    assert sink.end is State.CANCELLED
    rank0.assert_over()


@pytest.mark.parametrize(("way", "drops"), [("shared", []), (None, [(10, DropOffer([1]))])])
def test_a_context_that_generation_gave_up_is_dropped_where_nobody_else_can(way: Any, drops: Any) -> None:
    rank0 = Rank0(way=way)
    rank0.submit(1)
    rank0.turn()
    rank0.step(0, context_done(1))
    rank0.dispatcher.cancel(1)
    rank0.turn()
    assert rank0.step(1, given_up(1)) == drops
    rank0.assert_over()


@pytest.mark.parametrize("pulled", [token(1), last(1), Response(
    request_id=1, is_final=True, finish_reason="stop")])
def test_a_context_that_was_pulled_is_not_dropped(pulled: Response) -> None:
    rank0 = Rank0(way=None)
    rank0.submit(1)
    rank0.turn()
    rank0.step(0, context_done(1))
    sent = rank0.step(1, pulled)
    if not pulled.is_final:
        sent += rank0.step(1, given_up(1))
    assert sent == []
    rank0.assert_over()


def test_a_cancel_that_crosses_the_contexts_end_drops_the_offer() -> None:
    rank0 = Rank0()
    sink = rank0.submit(1)
    rank0.turn()
    rank0.dispatcher.cancel(1, "deadline")
    rank0.turn()
    assert rank0.step(0, context_done(1)) == [(10, DropOffer([1]))]
    assert sink.end is State.CANCELLED
    assert sink.responses[-1].finish_reason == "deadline"
    assert sink.responses[-1].error
    rank0.assert_over()


@pytest.mark.parametrize("tokens", [0, 1])
def test_cancelled_at_the_generation(tokens: int) -> None:
    rank0 = Rank0()
    sink = rank0.submit(1)
    rank0.turn()
    rank0.step(0, context_done(1))
    for _ in range(tokens):
        rank0.step(1, token(1))
    rank0.dispatcher.cancel(1)
    assert rank0.turn() == [(11, Cancel([1], "cancelled"))]
    rank0.step(1, token(1))  # the step that was under way
    rank0.step(1, given_up(1))
    assert sink.end is State.CANCELLED
    rank0.assert_over()


def test_a_cancel_in_the_turn_of_the_hand_over_comes_after_it() -> None:
    rank0 = Rank0()
    rank0.submit(1)
    rank0.turn()
    rank0.dispatcher.on_step(Step(0, [context_done(1)]))
    rank0.dispatcher.cancel(1)
    assert [(leader, type(m)) for leader, m in rank0.turn()] == [(11, Enqueue), (11, Cancel)]


def test_a_cancel_that_comes_too_late_changes_nothing() -> None:
    rank0 = Rank0()
    sink = rank0.submit(1)
    rank0.turn()
    rank0.step(0, context_done(1))
    rank0.dispatcher.cancel(1)
    rank0.turn()
    rank0.step(1, last(1))
    assert sink.end is State.DONE
    rank0.dispatcher.cancel(1)
    rank0.step(1, given_up(1))
    assert len(sink.ends) == 1
    rank0.assert_over()


@pytest.mark.parametrize("at_context", [True, False])
def test_an_error_of_an_instance_ends_the_request(at_context: bool) -> None:
    rank0 = Rank0()
    sink = rank0.submit(1)
    rank0.turn()
    if not at_context:
        rank0.step(0, context_done(1))
    rank0.step(0 if at_context else 1, Response(
        request_id=1, is_final=True, finish_reason="error", error="broken"))
    assert sink.end is State.FAILED
    assert sink.responses[-1].error == "broken"
    rank0.assert_over()


def test_what_cannot_be_served_never_leaves_rank_0() -> None:
    rank0 = Rank0()
    for request_id, (prompt, most) in enumerate([(0, 1), (60, 1), (99, 2), (4, 200)]):
        sink = rank0.submit(request_id, prompt, most)
        assert sink.end is State.FAILED
        assert sink.responses[0].finish_reason == "error"
    rank0.assert_over()


def test_deadlines_pass_in_the_queue_and_at_an_instance() -> None:
    rank0 = Rank0()
    now = time.monotonic()
    running = rank0.submit(1, 16, 9, deadline=now - 1.0 + 3600)
    rank0.turn()
    late = rank0.submit(2, 16, 9, deadline=now - 0.001)
    waiting = rank0.submit(3, 16, 9, deadline=now + 7200)
    rank0.turn()
    assert late.end is State.CANCELLED
    assert late.responses[0].finish_reason == "deadline"
    wait = rank0.dispatcher.turn()
    assert wait is not None and 3500 < wait < 3600
    rank0.entries[1].deadline = now
    rank0.dispatcher._deadlines[0] = (now, 1)
    assert rank0.turn() == [(10, Cancel([1], "deadline"))]
    rank0.step(0, given_up(1, "deadline"))
    assert running.end is State.CANCELLED
    rank0.dispatcher.cancel(3)
    rank0.step(0, given_up(3))
    assert waiting.end is State.CANCELLED
    assert rank0.dispatcher.turn() is None
    rank0.assert_over()


def test_messages_of_a_turn_are_one_of_a_kind_for_each_leader() -> None:
    rank0 = Rank0()
    for request_id in (1, 2, 3):
        rank0.submit(request_id, 1, 1)
    assert len(rank0.turn()) == 1
    rank0.dispatcher.cancel_all()
    ((_, message),) = rank0.turn()
    assert message == Cancel([1, 2, 3], "cancelled")
    sent = rank0.step(0, *(context_done(i) for i in (1, 2, 3)))
    assert sent == [(10, DropOffer([1, 2, 3]))]
    rank0.assert_over()


def test_responses_to_nobody_are_ignored() -> None:
    rank0 = Rank0()
    assert rank0.step(1, token(99), last(99)) == []
    rank0.assert_over()


def test_the_ledger_names_what_is_still_promised() -> None:
    rank0 = Rank0()
    rank0.submit(1)
    rank0.turn()
    problems = " ".join(rank0.dispatcher.check())
    assert "request 1 is still context" in problems
    assert "generation 1: 2 blocks, 1 requests" in problems
    assert "4 context tokens are still promised" in problems


# ---- blocks come and go ----


def test_output_is_reserved_up_to_a_limit_and_what_a_request_takes_is_told() -> None:
    rank0 = Rank0()
    sink = rank0.submit(1, 4, 29)
    waiting = rank0.submit(2, 24, 9)
    rank0.turn()
    assert rank0.views[1].free_blocks == 7, "4 prompt tokens and 8 of 29"
    rank0.step(0, context_done(1))
    sized = token(1)
    sized.num_blocks = 7
    assert rank0.step(1, sized) == []
    assert rank0.views[1].free_blocks == 3
    assert rank0.step(1, Response(request_id=1, num_blocks=0)) != [], "preempted: the other one comes in"
    assert [r.token_ids for r in sink.responses] == [[1], [2]], "sizes are not the caller's affair"
    assert rank0.views[1].free_blocks == 2
    rank0.step(1, Response(request_id=1, num_blocks=8))
    assert rank0.views[1].free_blocks == -6, "it has taken what the other was promised, who waits there"
    rank0.step(1, last(1))
    assert sink.end is State.DONE and not waiting.ends
    assert rank0.views[1].free_blocks == 2
    rank0.dispatcher.cancel(2)
    rank0.step(0, given_up(2))
    rank0.assert_over()


def test_what_a_context_holds_is_not_the_generations() -> None:
    rank0 = Rank0()
    rank0.submit(1)
    rank0.turn()
    rank0.step(0, Response(request_id=1, num_blocks=5))
    assert rank0.views[1].free_blocks == 8


# ---- both at once ----


def early(**more: Any) -> tuple[Rank0, Sink]:
    rank0 = Rank0(way="mpi", overlap_tokens=4, **more)
    sink = rank0.submit(1)
    rank0.turn()
    return rank0, sink


def test_an_early_request_goes_to_both_at_once() -> None:
    rank0 = Rank0(way="mpi", overlap_tokens=4)
    sink = rank0.submit(1)
    (to_context, to_generation) = rank0.turn()
    assert [rank for rank, _ in (to_context, to_generation)] == [10, 11]
    (at_context,), (at_generation,) = to_context[1].requests, to_generation[1].requests
    assert (at_context.type, at_context.early_source) == (RequestType.CONTEXT_ONLY, None)
    assert (at_generation.type, at_generation.early_source) == (RequestType.GENERATION_ONLY, 0)
    assert at_generation.context_phase_params is None
    done = context_done(1)
    assert rank0.step(0, done) == [(11, Proceed(1, done.context_phase_params))]
    assert rank0.entries[1].state is State.HANDOVER
    rank0.step(1, token(1))
    rank0.step(1, last(1))
    assert sink.end is State.DONE and sink.token_ids == [1, 2, 3]
    rank0.assert_over()


@pytest.mark.parametrize(("way", "overlap_tokens", "max_tokens"), [
    ("mpi", 5, 5), ("mpi", 4, 1), ("shared", 4, 5), ("copy", 4, 5)])
def test_only_what_gains_from_it_is_early(way: str, overlap_tokens: int, max_tokens: int) -> None:
    rank0 = Rank0(way=way, overlap_tokens=overlap_tokens)
    rank0.submit(1, 4, max_tokens)
    assert [rank for rank, _ in rank0.turn()] == [10]


@pytest.mark.parametrize("first", [0, 1])
def test_a_cancelled_early_request_ends_when_both_have_said_so(first: int) -> None:
    rank0, sink = early()
    rank0.dispatcher.cancel(1, "deadline")
    assert rank0.turn() == [(10, Cancel([1], "deadline")), (11, Cancel([1], "deadline"))]
    assert rank0.step(first, given_up(1, "deadline")) == []
    assert not sink.ends
    rank0.step(1 - first, given_up(1, "deadline"))
    assert sink.end is State.CANCELLED
    rank0.assert_over()


@pytest.mark.parametrize("first", [0, 1])
def test_a_cancel_that_crosses_an_early_contexts_end_drops_the_offer(first: int) -> None:
    rank0, sink = early()
    rank0.dispatcher.cancel(1)
    rank0.turn()
    steps = [lambda: rank0.step(0, context_done(1)), lambda: rank0.step(1, given_up(1))]
    sent = steps[first]() + steps[1 - first]()
    assert sent == [(10, DropOffer([1]))]
    assert sink.end is State.CANCELLED
    rank0.assert_over()


def test_a_context_that_ends_with_its_first_token_ends_an_early_request() -> None:
    rank0, sink = early()
    assert rank0.step(0, last(1, "stop")) == [(11, Cancel([1], "cancelled"))]
    assert not sink.ends, "generation may still hold blocks for it"
    assert rank0.views[1].free_blocks == 8
    rank0.step(1, given_up(1))
    assert sink.end is State.DONE and sink.responses[-1].finish_reason == "stop"
    assert sink.token_ids == [3]
    rank0.assert_over()


@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_ends_an_early_request_at_both(failing: int, crossing: bool) -> None:
    rank0, sink = early()
    broken = Response(request_id=1, is_final=True, finish_reason="error", error="broken")
    assert rank0.step(failing, broken) == [(11 - failing, Cancel([1], "cancelled"))]
    rank0.dispatcher.cancel(1)
    rank0.turn()
    assert not sink.ends
    if failing == 1 and crossing:
        assert rank0.step(0, context_done(1)) == [(10, DropOffer([1]))]
    else:
        assert rank0.step(1 - failing, given_up(1)) == []
    assert sink.end is State.FAILED and sink.responses[-1].error == "broken"
    rank0.assert_over()


def test_an_early_generation_that_failed_as_the_context_ended() -> None:
    """The proceed finds nobody; the instance itself refuses it."""
    rank0, sink = early()
    done = context_done(1)
    assert rank0.step(0, done) == [(11, Proceed(1, done.context_phase_params))]
    rank0.step(1, Response(request_id=1, is_final=True, finish_reason="error", error="broken"))
    assert sink.end is State.FAILED
    rank0.assert_over()


class Interleavings(RuleBasedStateMachine):
    """Submissions, cancels and deadlines against instances that play by the rules, in any order."""

    @initialize(shape=st.sampled_from([(1, 1, 0), (2, 2, 0), (1, 3, 0), (0, 0, 2)]),
                way=st.sampled_from(["shared", "mpi"]), local=st.sampled_from([0, 3, "auto"]))
    def start(self, shape: tuple[int, int, int], way: str, local: Any) -> None:
        self.rank0 = Rank0(*shape, way=way, overlap_tokens=5, local_context=local)
        # Early at a generation instance: it waits for the context's end.
        self.early: dict[int, set[int]] = {view.id: set() for view in self.rank0.views}
        self.sinks: dict[int, Sink] = {}
        # What each instance holds: request id → tokens left; and contexts' offers.
        self.at: dict[int, dict[int, int]] = {view.id: {} for view in self.rank0.views}
        self.offers: dict[int, set[int]] = {view.id: set() for view in self.rank0.views}
        self.context_of: dict[int, int] = {}
        self.wire: list[tuple[int, Any]] = []
        self.admitted: list[int] = []

    @rule(prompt=st.integers(0, 30), most=st.integers(1, 12))
    def submit(self, prompt: int, most: int) -> None:
        request_id = len(self.sinks) + 1
        self.sinks[request_id] = self.rank0.submit(request_id, prompt, most)

    @rule(data=st.data(), reason=st.sampled_from(["cancelled", "deadline"]))
    @precondition(lambda self: self.sinks)
    def cancel(self, data: st.DataObject, reason: Any) -> None:
        self.rank0.dispatcher.cancel(data.draw(st.sampled_from(sorted(self.sinks))), reason)

    @rule()
    def turn(self) -> None:
        self.wire += self.rank0.turn()

    @rule()
    @precondition(lambda self: self.wire)
    def deliver(self) -> None:
        leader, message = self.wire.pop(0)
        instance = leader - 10
        if isinstance(message, Enqueue):
            for request in message.requests:
                if request.early_source is not None:
                    self.early[instance].add(request.request_id)
                elif request.type is RequestType.GENERATION_ONLY:
                    self.offers[self.context_of[request.request_id]].remove(request.request_id)
                    self.at[instance][request.request_id] = request.sampling.max_tokens - 1
                else:
                    self.admitted.append(request.request_id)
                    self.at[instance][request.request_id] = request.sampling.max_tokens
        elif isinstance(message, Cancel):
            for request_id in message.request_ids:
                if self.at[instance].pop(request_id, None) is not None or request_id in self.early[instance]:
                    self.early[instance].discard(request_id)
                    self.report(instance, given_up(request_id, message.reason))
        elif isinstance(message, Proceed):
            self.offers[self.context_of[message.request_id]].remove(message.request_id)
            if message.request_id in self.early[instance]:
                self.early[instance].remove(message.request_id)
                left = self.rank0.entries[message.request_id].request.sampling.max_tokens - 1
                self.at[instance][message.request_id] = left
        else:
            assert isinstance(message, DropOffer)
            for request_id in message.request_ids:
                self.offers[instance].remove(request_id)

    @rule(data=st.data(), fails=st.integers(0, 9))
    def work(self, data: st.DataObject, fails: int) -> None:
        busy = [i for i, held in self.at.items() if held]
        if not busy:
            return
        instance = data.draw(st.sampled_from(busy))
        request_id = data.draw(st.sampled_from(sorted(self.at[instance])))
        self.work_on(instance, request_id, fails == 0)

    @rule(data=st.data())
    def fail_early(self, data: st.DataObject) -> None:
        found = [(i, request_id) for i, held in self.early.items() for request_id in sorted(held)]
        if not found:
            return
        instance, request_id = data.draw(st.sampled_from(found))
        self.early[instance].remove(request_id)
        self.report(instance, Response(request_id=request_id, is_final=True, error="broken",
                                       finish_reason="error"))

    @rule(data=st.data(), count=st.integers(0, 10))
    def resize(self, data: st.DataObject, count: int) -> None:
        """A request takes blocks, or is preempted."""
        found = [(i, request_id) for i, held in self.at.items() for request_id in sorted(held)
                 if self.rank0.views[i].role.does_generation]
        if found:
            instance, request_id = data.draw(st.sampled_from(found))
            self.report(instance, Response(request_id=request_id, num_blocks=count))

    def work_on(self, instance: int, request_id: int, fails: bool) -> None:
        held = self.at[instance]
        held[request_id] -= 1
        if fails:
            del held[request_id]
            self.report(instance, Response(request_id=request_id, is_final=True, error="broken",
                                           finish_reason="error"))
        elif held[request_id] == 0:
            del held[request_id]
            self.report(instance, last(request_id))
        elif self.rank0.views[instance].role is Role.CONTEXT:
            del held[request_id]
            self.context_of[request_id] = instance
            self.offers[instance].add(request_id)
            self.report(instance, context_done(request_id))
        else:
            self.report(instance, token(request_id))

    def report(self, instance: int, response: Response) -> None:
        self.rank0.dispatcher.on_step(Step(instance, [response]))

    @invariant()
    def nothing_is_promised_twice(self) -> None:
        for view in self.rank0.views:
            assert view.free_blocks <= LIMITS.num_blocks
            assert view.num_requests >= 0 and view.pending_context_tokens >= 0
            if view.role.does_generation:
                assert view.num_requests <= LIMITS.max_batch_size
                held = sum(e.num_blocks for e in self.rank0.entries.values() if e.generation is view)
                assert held == LIMITS.num_blocks - view.free_blocks
        # First come, first served: seen in the order of arrival where one instance takes all of them.
        takers = [view for view in self.rank0.views if view.role.does_context]
        assert self.admitted == sorted(self.admitted) or len(takers) > 1
        for sink in self.sinks.values():
            assert len(sink.ends) <= 1
            if sink.ends:
                assert sink.responses[-1].finish_reason is not None

    def teardown(self) -> None:
        if not hasattr(self, "rank0"):
            return
        for _ in range(2000):
            self.turn()
            while self.wire:
                self.deliver()
            for instance, held in self.at.items():
                for request_id in list(held):
                    self.work_on(instance, request_id, False)
            if not self.rank0.dispatcher.num_open and not self.rank0.dispatcher._drops:
                break
        assert all(len(sink.ends) == 1 for sink in self.sinks.values())
        assert not any(self.offers.values()), "every offer was pulled or dropped"
        self.rank0.assert_over()


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


@given(st.integers(1, 200), st.integers(1, 200))
def test_blocks_for_a_request_hold_all_it_can_use(prompt: int, most: int) -> None:
    count = blocks_needed(LIMITS, prompt, most)
    assert (count - 1) * 4 < prompt + most - 1 <= count * 4
