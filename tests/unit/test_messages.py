"""Control messages travel whole, in order for each sender; the bell and the waiting policy."""

from __future__ import annotations

import time
import typing
import uuid

import msgspec
import pytest

from disagg_mpi.comm import messages
from disagg_mpi.comm.channel import MemoryNetwork
from disagg_mpi.comm.waiting import Doorbell, Waiter
from disagg_mpi.request import (
    ContextPhaseParams,
    ExecutorLimits,
    ExecutorRequest,
    PhaseTiming,
    PoolBlocks,
    RequestType,
    Response,
    SamplingParams,
    TokenLogprobs,
)

PARAMS = ContextPhaseParams((5,), 2**62, b"\x00\xff")
REQUEST = ExecutorRequest(
    request_id=2**63 - 1, prompt_token_ids=[1, 2, 3],
    sampling=SamplingParams(max_tokens=3, temperature=0.5, seed=2**63 - 1, stop=("ä", "\n"),
                            stop_token_ids=(4,), logprobs=2),
    type=RequestType.GENERATION_ONLY, sequence_index=3, context_phase_params=PARAMS)
EARLY = ExecutorRequest(request_id=1, prompt_token_ids=[1], type=RequestType.GENERATION_ONLY, early_source=0)
RESPONSE = Response(
    request_id=1, token_ids=[3], text="é", logprobs=[TokenLogprobs(-0.5, [(3, -0.5), (4, -2.0)])],
    logits=[b"\x01\x02"], is_final=True, finish_reason="deadline", error="late",
    context_phase_params=PARAMS, timing=PhaseTiming(1.0, 2.0, 3.0, 4.0, 5, 6, "mpi", 7, 8, 9), num_blocks=0)


MESSAGES: list[messages.Message] = [
    messages.Enqueue([REQUEST, EARLY]), messages.Proceed(1, PARAMS), messages.Cancel([1, 2], "deadline"),
    messages.DropOffer([2**63 - 1]), messages.IntegrityCheck(3), messages.Shutdown(),
    messages.Ready(1, ExecutorLimits(2, 3, 4, 5, 6, 7, 8), {0: "shared", 3: "mpi"}, "host 0+0"),
    messages.Step(0, [RESPONSE]), messages.IntegrityReport(3, 1, ["a"], PoolBlocks("host 0+0", [(3, 4)])),
    messages.Batch(5, [1, 2, 3], [(7, 2, [(16, 9)]), (0, 1, [(32, 1), (40, 2)])], [2]),
    messages.PagedStep(6, [3, 0], [7, 0], [1, 2], [-1, 4, 5], [(0, 2, [8, 9])], [0],
                       [(0, 0.7, 5, 0.9, 0.25)], [2]),
    messages.CopyBlocks([1, 2], [8, 9]),
    messages.PullPart(1, 0, [1, 2], [3, 4], 0, 8, 1, 3), messages.PartDone(1),
    messages.PullRequest(7, [1, 2], (0, 2, 1, 2, 0, 8)), messages.Watch(2**63 - 1),
    messages.Announce(1, [5, 6], 0, 8, 0, 4), messages.Ended(1),
    messages.Release(1), messages.Release(1, [4, 5]), messages.Release(1, None, was_read=True),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_every_message_comes_back_as_it_went(message: messages.Message) -> None:
    data = messages.encode(message)
    assert messages.decode(bytearray(data)) == message


def test_every_message_is_tried_above() -> None:
    tried = {type(message) for message in MESSAGES}
    assert tried == set(typing.get_args(messages.AnyMessage))


@pytest.mark.parametrize("data", [
    b"", b"\xc1", b"\x92\xa4Nope\x01", messages.encode(messages.Cancel([1]))[:-3]])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        messages.decode(data)


def test_messages_arrive_in_order_for_each_sender() -> None:
    network = MemoryNetwork()
    one, two, three = (network.channel(rank) for rank in (1, 2, 3))
    for index in range(3):
        one.send(3, messages.Cancel([index]))
        two.send(3, messages.DropOffer([index]))
    taken = three.poll()
    assert [m.request_ids for source, m in taken if source == 1] == [[0], [1], [2]]
    assert [m.request_ids for source, m in taken if source == 2] == [[0], [1], [2]]
    assert three.poll() == one.poll() == []
    assert one.num_pending == 0 and one.flush(0.0)


@pytest.fixture
def bells() -> object:
    job = uuid.uuid4().hex
    made = [Doorbell(job, rank, [0, 1], True) for rank in (0, 1)]
    yield made
    for bell in made:
        bell.close()


def test_a_ring_ends_a_sleep_and_rings_do_not_add_up(bells: list[Doorbell]) -> None:
    for _ in range(1000):
        bells[0].ring(1)  # a full bell never blocks
    start = time.monotonic()
    assert bells[1].wait(30.0)
    assert time.monotonic() - start < 10.0
    assert not bells[1].wait(0.0)
    bells[1].ring_self()
    assert bells[1].wait(30.0)


def test_ringing_whom_nobody_knows_is_no_error(bells: list[Doorbell]) -> None:
    bells[0].ring(17)
    bells[1].close()
    bells[0].ring(1)
    bells[1].ring(0)
    bells[1].close()


def test_a_waiter_sleeps_no_longer_than_it_may(bells: list[Doorbell]) -> None:
    waiter = Waiter(bells[0])
    start = time.monotonic()
    for _ in range(40):
        waiter.idle(at_most=0.0)
    for _ in range(40):
        waiter.idle(at_most=-1.0)
    assert time.monotonic() - start < 5.0
