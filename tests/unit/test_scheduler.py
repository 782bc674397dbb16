"""Which requests are in a step: budget, order, head of line, and that everything ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import executor_request, replace

from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.engine.scheduler import Chunk, Scheduler
from disagg_mpi.engine.sequence import Sequence, Status
from disagg_mpi.request import ContextPhaseParams, RequestType


def sequence(request_id: int, num_prompt: int, max_tokens: int = 4,
             type: RequestType = RequestType.CONTEXT_AND_GENERATION) -> Sequence:
    params = ContextPhaseParams((1,), request_id, b"") \
        if type is RequestType.GENERATION_ONLY else None
    return Sequence(replace(executor_request(request_id, range(num_prompt), max_tokens=max_tokens),
                            type=type, context_phase_params=params))


def make(num_blocks: int = 64, **changes: int) -> tuple[Scheduler, BlockManager]:
    blocks = BlockManager(range(num_blocks))
    given = {"tokens_per_block": 4, "max_batch_size": 8, "max_num_tokens": 8, "reserved_output": 64} | changes
    return Scheduler(blocks, **given), blocks  # type: ignore[arg-type]


def forward(chunks: list[Chunk]) -> list[Sequence]:
    """What the engine does with a step, without a model; those that are done."""
    done = []
    for chunk in chunks:
        samples = chunk.samples
        chunk.sequence.hold(chunk.end)
        if samples:
            chunk.sequence.token_ids.append(0)
            if chunk.sequence.num_output_tokens >= chunk.sequence.sampling.max_tokens:
                done.append(chunk.sequence)
    return done


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 6), st.integers(0, 5)),
                min_size=1, max_size=12),
       st.integers(1, 4), st.integers(0, 12), st.integers(9, 40), st.integers(1, 6))
@settings(deadline=None)
def test_every_request_ends_in_order_within_budget_and_pool(
        requests: list[tuple[int, int, int]], batch: int, extra: int, num_blocks: int,
        reserved: int) -> None:
    budget = batch + extra
    scheduler, blocks = make(num_blocks, max_batch_size=batch, max_num_tokens=budget,
                             reserved_output=reserved)
    arriving = [(step, sequence(i, prompt, most)) for i, (prompt, most, step) in enumerate(requests)]
    arriving.sort(key=lambda pair: pair[0])
    order = [s.id for _, s in arriving]
    admitted: list[int] = []
    left = len(arriving)
    for step in range(3000):
        while arriving and arriving[0][0] <= step:
            scheduler.add(arriving.pop(0)[1])
        for one in scheduler.admit():
            admitted.append(one.id)
            assert len(blocks.table(one.id)) == scheduler.blocks_for(one)
        _, preempted = scheduler.grow()
        for one in preempted:
            assert one.status is Status.WAITING and not blocks.owns(one.id)
        chunks = scheduler.schedule()
        assert sum(chunk.length for chunk in chunks) <= budget
        assert len({chunk.sequence.id for chunk in chunks}) == len(chunks) <= batch
        phases = [chunk.sequence.in_context_phase for chunk in chunks]
        assert phases == sorted(phases), "generation first"
        running = [s for s in scheduler if s.status is Status.RUNNING]
        assert {s.id for s in running if not s.in_context_phase} <= {c.sequence.id for c in chunks}
        assert all(chunk.length > 0 and chunk.start == chunk.sequence.num_computed for chunk in chunks)
        for chunk in chunks:
            assert chunk.end <= len(blocks.table(chunk.sequence.id)) * 4
        assert chunks or not running, "whoever runs gets on"
        for one in forward(chunks):
            scheduler.remove(one)
            blocks.free(one.id)
            left -= 1
        if not left:
            break
    assert left == 0
    assert list(dict.fromkeys(admitted)) == order, "first come, first served"
    assert blocks.num_free == num_blocks and len(scheduler) == scheduler.num_waiting == 0


def test_a_long_prompt_goes_in_chunks_of_what_is_left() -> None:
    scheduler, _ = make(max_num_tokens=8)
    short, long = sequence(1, 2), sequence(2, 20)
    scheduler.add(short)
    scheduler.add(long)
    scheduler.admit()
    first = scheduler.schedule()
    assert [(c.sequence.id, c.start, c.length, c.samples) for c in first] == [
        (1, 0, 2, True), (2, 0, 6, False)]
    forward(first)
    second = scheduler.schedule()
    assert [(c.sequence.id, c.start, c.length, c.samples) for c in second] == [
        (1, 2, 1, True), (2, 6, 7, False)]
    forward(second)
    third = scheduler.schedule()
    assert [(c.sequence.id, c.start, c.length, c.samples) for c in third] == [
        (1, 3, 1, True), (2, 13, 7, True)]


def test_the_head_of_the_line_waits_and_so_do_those_behind_it() -> None:
    scheduler, blocks = make(num_blocks=6, max_num_tokens=64)
    first, large, small = sequence(1, 10, 3), sequence(2, 16, 4), sequence(3, 1, 1)
    for one in (first, large, small):
        scheduler.add(one)
    assert [s.id for s in scheduler.admit()] == [1]
    assert scheduler.admit() == []
    assert scheduler.num_waiting == 2
    scheduler.remove(first)
    blocks.free(1)
    assert [s.id for s in scheduler.admit()] == [2, 3]


def test_contexts_come_in_as_far_as_the_next_step_can_compute_them() -> None:
    """Until then others may compute what they begin with."""
    scheduler, _ = make(max_num_tokens=8)
    long, other = sequence(1, 20), sequence(2, 2)
    taken_over = sequence(3, 6, 4, RequestType.GENERATION_ONLY)
    for one in (long, other, taken_over):
        scheduler.add(one)
    assert scheduler.admit() == [long, taken_over], "what costs no step passes"
    forward(scheduler.schedule())
    forward(scheduler.schedule())
    assert scheduler.admit() == [other], "4 of 8 tokens are left"


def test_a_context_reserves_the_output_only_where_it_goes_along() -> None:
    context = sequence(1, 8, 9, RequestType.CONTEXT_ONLY)
    both = sequence(2, 8, 9)
    assert make()[0].blocks_for(context) == 2
    assert make(reserve_output_in_context=True)[0].blocks_for(context) == 4
    assert make()[0].blocks_for(both) == 4
    assert make()[0].blocks_for(sequence(3, 8, 1)) == 2, "the last token's KV is never computed"


def test_output_is_reserved_as_far_as_told() -> None:
    scheduler, _ = make(reserved_output=5)
    assert scheduler.blocks_for(sequence(1, 8, 4)) == 3
    assert scheduler.blocks_for(sequence(1, 8, 40)) == 3


def generating(scheduler: Scheduler, *sequences: Sequence) -> None:
    """Bring ``sequences`` to their first token."""
    for one in sequences:
        scheduler.add(one)
        assert scheduler.admit() == [one]
        while one.in_context_phase:
            forward([chunk for chunk in scheduler.schedule() if chunk.sequence is one])


def test_a_request_takes_more_blocks_as_it_grows() -> None:
    scheduler, blocks = make(num_blocks=4, reserved_output=1)
    one = sequence(1, 4, 9)
    generating(scheduler, one)
    assert blocks.table(1) == [0]
    assert scheduler.grow() == ([one], [])
    assert one.block_ids == [0, 1]
    forward(scheduler.schedule())
    assert scheduler.grow() == ([], []), "there is room for three more"


def test_the_youngest_is_preempted_and_waits_at_the_head() -> None:
    scheduler, blocks = make(num_blocks=5, reserved_output=1)
    old, middle, young, behind = (sequence(i, 4, 9) for i in range(1, 5))
    generating(scheduler, old, middle, young)
    scheduler.add(behind)
    assert scheduler.grow() == ([old, middle], [young])
    assert (young.status, young.block_ids, young.num_computed) == (Status.WAITING, [], 0)
    assert young.context_length == 5, "its first output token is computed again with the prompt"
    assert not blocks.owns(young.id)
    assert scheduler.num_waiting == 2
    assert scheduler.admit() == [], "the one behind does not pass it, although it would fit"
    for one in (old, middle):
        scheduler.remove(one)
        blocks.free(one.id)
    assert scheduler.admit() == [young, behind]
    (chunk, _) = scheduler.schedule()
    assert (chunk.start, chunk.length, chunk.samples) == (0, 5, True)


def test_who_cannot_grow_and_is_the_youngest_gives_up_itself() -> None:
    scheduler, blocks = make(num_blocks=2, reserved_output=1)
    old, young = sequence(1, 1, 9), sequence(2, 4, 4)
    generating(scheduler, old, young)
    assert scheduler.grow() == ([], [young])
    assert blocks.num_free == 1
    assert [c.sequence for c in scheduler.schedule()] == [old]


def test_what_is_in_flight_is_not_preempted_and_needs_no_room_yet() -> None:
    """With pipeline stages a step may hold a request's last token, or its context's."""
    scheduler, blocks = make(num_blocks=3, num_stages=2, reserved_output=1)
    old, young = sequence(1, 4, 9), sequence(2, 4, 9, RequestType.CONTEXT_ONLY)
    generating(scheduler, old)
    scheduler.add(young)
    assert scheduler.admit() == [young]
    young.num_scheduled, young.num_in_flight = 4, 1
    blocks.allocate(9, 1)
    assert scheduler.grow() == ([], []), "the older one waits for the younger one's step"
    assert scheduler.schedule() == [], "without a block it is in no step"
    scheduler.remove(young)
    blocks.free(young.id)
    assert scheduler.grow() == ([old], [])


def test_one_that_is_always_in_flight_is_left_out_of_a_step_so_that_it_can_be_preempted() -> None:
    """On a GPU the next step is launched while one runs: without a pause the older one would wait on."""
    scheduler, _ = make(num_blocks=3, reserved_output=1)
    old, young = sequence(1, 4, 9), sequence(2, 5, 9)  # the younger one has room for some tokens yet
    generating(scheduler, old, young)
    young.num_in_flight = 1
    assert scheduler.grow() == ([], [])
    assert scheduler.schedule() == []
    young.num_in_flight = 0
    assert scheduler.grow() == ([old], [young])
    assert [chunk.sequence for chunk in scheduler.schedule()] == [old]


@pytest.mark.parametrize("last", [
    sequence(1, 4, 9, RequestType.CONTEXT_ONLY), sequence(1, 4, 1), sequence(1, 3, 2)])
def test_what_is_in_flight_takes_no_block_that_it_may_never_need(last: Sequence) -> None:
    scheduler, blocks = make(num_stages=2)
    scheduler.add(last)
    scheduler.admit()
    for _ in range(last.num_prompt_tokens, 4):  # it generates up to the end of its block
        last.token_ids.append(0)
    last.num_scheduled, last.num_in_flight = 4, 1
    assert scheduler.grow() == ([], [])
    assert blocks.table(1) == [0]


def test_stages_get_a_fair_share_of_those_who_generate() -> None:
    scheduler, _ = make(num_stages=2)
    sequences = [sequence(i, 2, 9) for i in range(1, 6)]
    generating(scheduler, *sequences)
    first = scheduler.schedule()
    assert [c.sequence for c in first] == sequences[:3]
    for chunk in first:
        chunk.sequence.num_scheduled += 1
    assert [c.sequence for c in scheduler.schedule()] == sequences[3:], "no one is in two steps at once"


def test_what_is_handed_over_has_blocks_but_no_part_in_steps() -> None:
    scheduler, blocks = make()
    one = sequence(1, 6, 4, RequestType.GENERATION_ONLY)
    scheduler.add(one)
    assert scheduler.admit() == [one]
    assert one.status is Status.HANDOVER
    assert blocks.owns(1)
    assert scheduler.schedule() == []
    one.adopt_context((9,))
    one.status = Status.RUNNING
    assert [(c.start, c.length, c.samples) for c in scheduler.schedule()] == [(6, 1, True)]


def test_places_in_the_batch_are_limited_also_by_hand_overs() -> None:
    scheduler, _ = make(max_batch_size=2)
    for request_id in range(3):
        scheduler.add(sequence(request_id, 1, 2, RequestType.GENERATION_ONLY))
    assert len(scheduler.admit()) == 2
    assert scheduler.admit() == []


def test_removing_leaves_the_blocks_to_their_owner() -> None:
    scheduler, blocks = make()
    waiting, active = sequence(1, 4), sequence(2, 4)
    scheduler.add(active)
    scheduler.admit()
    scheduler.add(waiting)
    scheduler.remove(waiting)
    scheduler.remove(active)
    assert (len(scheduler), 1 in scheduler, scheduler.get(2)) == (0, False, None)
    assert blocks.owns(2)
    with pytest.raises(KeyError):
        scheduler.remove(active)


def test_preempted_requests_wait_by_age_and_nobody_passes_them() -> None:
    scheduler, blocks = make(24, reserved_output=1)
    kind = RequestType.GENERATION_ONLY
    first, second, third = running = [sequence(number, 16, 60, kind) for number in (1, 2, 3)]
    for one in running:
        scheduler.add(one)
    for one in scheduler.admit():
        one.adopt_context((5,))
        one.status = Status.RUNNING
    scheduler._preempt(third)
    scheduler._preempt(second)
    assert scheduler.admit() == [second], "its context fills the step; the other one waits"
    scheduler.add(sequence(4, 16, 60, kind))
    assert scheduler.admit() == [], "what the other one will need is not given to those who came later"
    scheduler._preempt(second)
    assert [one.id for one in scheduler._waiting] == [2, 3, 4]
    assert blocks.owners == [first.id]
