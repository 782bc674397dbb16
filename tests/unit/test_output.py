"""Text as it becomes final, stop texts across tokens, and what makes a request impossible."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import VOCABULARY, executor_request, replace

from disagg_mpi.executor.output import TextOutput
from disagg_mpi.executor.validate import blocks_needed, blocks_reserved, problem_with
from disagg_mpi.request import ContextPhaseParams, ExecutorLimits, ExecutorRequest, RequestType

WORDS = ["a", "b", "ab", "ba", "", "c", "aab", "\n"]


class Words:
    """Token ``i`` is ``WORDS[i]``; a token may come out late, as an incomplete character does."""

    def __init__(self, late: bool = False) -> None:
        self._late = late
        self._held = ""

    def push(self, token_ids: Any) -> str:
        text = self._held + "".join(WORDS[token] for token in token_ids)
        if not self._late or not text:
            self._held = ""
            return text
        self._held = text[-1]
        return text[:-1]

    def flush(self) -> str:
        text, self._held = self._held, ""
        return text


def cut(text: str, stops: list[str]) -> str | None:
    """The text before the first stop text in it, if there is one."""
    found = [text.find(stop) for stop in stops if stop in text]
    return text[: min(found)] if found else None


TOKENS = st.lists(st.integers(0, len(WORDS) - 1), max_size=14)
STOPS = st.lists(st.text("ab\nc", min_size=1, max_size=4), max_size=3)


@given(TOKENS, STOPS, st.booleans())
@settings(deadline=None, max_examples=300)
def test_text_and_stops_against_the_whole_text(tokens: list[int], stops: list[str], late: bool) -> None:
    output, sent = TextOutput(Words(late), stops), ""
    for position, token in enumerate(tokens):
        text, stopped = output.push([token])
        sent += text
        so_far = "".join(WORDS[t] for t in tokens[: position + 1])
        if late:
            so_far = so_far[:-1]
        expected = cut(so_far, stops)
        assert stopped == (expected is not None)
        if stopped:
            assert sent == expected
            assert output.finish() == "" or late
            return
        assert so_far.startswith(sent)
        held = so_far[len(sent) :]
        assert all(len(held) < len(stop) for stop in stops) or not held or any(
            stop.startswith(held) for stop in stops), "only what may become a stop text waits"
    sent += output.finish()
    whole = "".join(WORDS[t] for t in tokens)
    expected = cut(whole, stops)
    assert sent == (whole if expected is None else expected)


@given(TOKENS, STOPS, st.integers(0, 14), st.booleans())
@settings(deadline=None, max_examples=200)
def test_replay_goes_on_at_the_very_character(
        tokens: list[int], stops: list[str], split: int, late: bool) -> None:
    """The context instance sends the first tokens' text; the generation's output replays them."""
    first = TextOutput(Words(late), stops)
    sent = ""
    for token in tokens[:split]:
        text, stopped = first.push([token])
        sent += text
        if stopped:
            return
    second = TextOutput(Words(late), stops)
    second.push(tokens[:split])
    whole, expected = TextOutput(Words(late), stops), ""
    for token in tokens:
        text, stopped = whole.push([token])
        expected += text
        if stopped:
            break
    else:
        expected += whole.finish()
    for token in tokens[split:]:
        text, stopped = second.push([token])
        sent += text
        if stopped:
            break
    else:
        sent += second.finish()
    assert sent == expected


def test_without_a_decoder_there_is_no_text() -> None:
    output = TextOutput(None, ("a",))
    assert output.push([1, 2]) == ("", False)
    assert output.finish() == ""


def test_a_stop_text_that_does_not_come_is_given_at_the_end() -> None:
    output = TextOutput(Words(), ("abc",))
    assert output.push([2]) == ("", False)
    assert output.finish() == "ab"
    assert output.finish() == ""


LIMITS = ExecutorLimits(num_blocks=8, tokens_per_block=4, max_batch_size=4, max_num_tokens=8,
                        max_model_len=40, vocab_size=VOCABULARY, reserved_output=8)


def test_what_fits_exactly_is_served() -> None:
    assert problem_with(executor_request(1, [0] * 8, max_tokens=25), LIMITS) is None
    assert problem_with(executor_request(1, [0] * 39, max_tokens=1),
                        replace(LIMITS, num_blocks=10)) is None  # type: ignore[arg-type]
    assert blocks_needed(LIMITS, 8, 25) == 8
    assert blocks_needed(LIMITS, 1, 1) == 1


def test_a_request_is_admitted_with_room_for_some_of_its_output() -> None:
    assert blocks_reserved(LIMITS, 8, 25) == 4
    assert blocks_reserved(LIMITS, 8, 8) == blocks_needed(LIMITS, 8, 8) == 4
    assert blocks_reserved(LIMITS, 8, 1) == 2


def test_a_request_that_comes_early_has_its_context_phase_params_later() -> None:
    request = replace(executor_request(1, [0]), type=RequestType.GENERATION_ONLY, early_source=0)
    assert problem_with(request, LIMITS) is None


@pytest.mark.parametrize(("request_", "text"), [
    (executor_request(1, []), "the prompt is empty"),
    (executor_request(1, [0, 128]), "token id 128 is outside the model's vocabulary of 128"),
    (executor_request(1, [-1]), "token id -1"),
    (executor_request(1, [2**70]), "outside"),
    (executor_request(1, [0], stop_token_ids=(500,)), "token id 500"),
    (executor_request(1, [0], bad_token_ids=((1, 2), (3, 501))), "token id 501"),
    (executor_request(1, [0], logit_bias={128: 1.0}), "token id 128"),
    (executor_request(1, [0] * 30, max_tokens=11), "context length of 40; max_tokens can be 10 at most"),
    (executor_request(1, [0] * 40, max_tokens=1), "the prompt must be shortened"),
    (executor_request(1, [0] * 20, max_tokens=14), "need 9 blocks of 4 tokens, the pool of an instance "
                                                   "has 8; lower max_tokens or give --kv-tokens 36"),
    (replace(executor_request(1, [0]), type=RequestType.GENERATION_ONLY), "needs the context_phase_params"),
    (replace(executor_request(1, [0], temperature=1.0), type=RequestType.CONTEXT_ONLY), "needs a seed"),
    (replace(executor_request(1, [0]), type=RequestType.GENERATION_ONLY,
             context_phase_params=ContextPhaseParams((), 1, b"")), "holds 0 first tokens"),
    (replace(executor_request(1, [0], max_tokens=1), type=RequestType.GENERATION_ONLY,
             context_phase_params=ContextPhaseParams((1,), 1, b"")), "fewer than max_tokens 1"),
    (replace(executor_request(1, [0]), type=RequestType.GENERATION_ONLY,
             context_phase_params=ContextPhaseParams((999,), 1, b"")), "token id 999"),
])
def test_what_can_never_be_served_is_said(request_: ExecutorRequest, text: str) -> None:
    problem = problem_with(request_, LIMITS)
    assert problem is not None and text in problem


def test_a_sampled_request_in_one_piece_needs_no_seed() -> None:
    assert problem_with(executor_request(1, [0], temperature=1.0), LIMITS) is None
