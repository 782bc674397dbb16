"""Bias, bad words and what else is done to a row: against transformers' processors, and in whole jobs."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import (
    END,
    VOCABULARY,
    Job,
    assert_ended_once,
    executor_request,
    save_ascii_tokenizer,
    tokens_of,
)
from transformers.generation.logits_process import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor

from disagg_mpi.engine.logits import LogitsAdjuster
from disagg_mpi.engine.sampler import NoToken, Sampled, Sampler
from disagg_mpi.engine.sequence import Sequence
from disagg_mpi.executor.prepare import Preparer
from disagg_mpi.model.tokenizer import Tokenizer
from disagg_mpi.request import ExecutorRequest
from disagg_mpi.topology import Role

SMALL = 12


def sequence(prompt: list[int], output: list[int], **sampling: Any) -> Sequence:
    one = Sequence(executor_request(1, prompt, **{"max_tokens": 100, **sampling}))
    for token in output:
        one.append(token)
    return one


def adjusted(raw: torch.Tensor, one: Sequence) -> torch.Tensor:
    return LogitsAdjuster(one, ())(raw, one)


ROWS = st.integers(0, 2**31).map(
    lambda seed: torch.randn(SMALL, generator=torch.Generator().manual_seed(seed)) * 4)
TOKENS = st.lists(st.integers(0, SMALL - 1), min_size=4, max_size=9)
BAD = st.lists(st.lists(st.integers(0, SMALL - 1), min_size=1, max_size=3).map(tuple),
               min_size=1, max_size=5, unique=True).map(tuple)


@given(ROWS, TOKENS, TOKENS, BAD)
@settings(deadline=None, max_examples=200)
def test_bad_words_are_transformers(
        raw: torch.Tensor, prompt: list[int], output: list[int], bad: tuple[tuple[int, ...], ...]) -> None:
    one = sequence(prompt, output, bad_token_ids=bad)
    processor = NoBadWordsLogitsProcessor([list(ids) for ids in bad])
    expected = processor(torch.tensor([one.token_ids]), raw.unsqueeze(0).clone())[0]
    assert torch.equal(adjusted(raw, one), expected)


@given(ROWS, TOKENS, st.dictionaries(st.integers(0, SMALL - 1), st.floats(-100, 100, width=32), min_size=1))
@settings(deadline=None, max_examples=100)
def test_bias_is_transformers(raw: torch.Tensor, prompt: list[int], bias: dict[int, float]) -> None:
    one = sequence(prompt, [], logit_bias=bias)
    processor = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = processor(torch.tensor([prompt]), raw.unsqueeze(0).clone())[0]
    assert torch.allclose(adjusted(raw, one), expected)


def test_bias_comes_before_the_penalties() -> None:
    raw = torch.tensor([-1.0, 2.0, 0.0])
    one = sequence([0], [], logit_bias={0: 3.0}, repetition_penalty=2.0)
    assert adjusted(raw, one).tolist() == [1.0, 2.0, 0.0]
    assert raw.tolist() == [-1.0, 2.0, 0.0]


def test_a_row_to_which_nothing_applies_is_itself() -> None:
    raw = torch.randn(SMALL)
    assert adjusted(raw, sequence([1], [], temperature=1.0, seed=1)) is raw
    short = sequence([1], [], min_tokens=1, stop_token_ids=(3,))
    assert adjusted(raw, short) is not raw
    short.append(5)
    assert adjusted(raw, short) is raw


def test_what_excludes_everything_is_that_requests_error() -> None:
    everything = tuple((token,) for token in range(SMALL))
    rows = torch.randn(2, SMALL)
    none, other = Sampler(())(rows, [sequence([1], [], bad_token_ids=everything, temperature=1.0, seed=1),
                                     sequence([1], [])])
    assert isinstance(none, NoToken) and "no token is left" in none.error
    assert isinstance(other, Sampled) and other.token == int(rows[1].argmax())


def test_what_is_prepared_for_a_sequence_goes_with_it() -> None:
    sampler = Sampler(())
    one = sequence([1], [], logit_bias={1: 1.0})
    sampler(torch.randn(1, SMALL), [one])
    assert len(sampler._adjusters) == 1
    del one
    gc.collect()
    assert len(sampler._adjusters) == 0


# ---- texts ----


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save_ascii_tokenizer(tmp_path_factory.mktemp("ascii")))


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@pytest.mark.parametrize("text", ["ab", "foo", " a", "x y", " "])
def test_a_text_is_bad_with_and_without_a_space_before_it(tokenizer: Tokenizer, text: str) -> None:
    preparer = Preparer(VOCABULARY, lambda spelling: encode(tokenizer, spelling))
    found = preparer.prepare(executor_request(1, [1], bad=(text,), bad_token_ids=((5, 6),))).bad_token_ids
    bare = text.removeprefix(" ")
    spellings = [encode(tokenizer, spelling) for spelling in (bare, f" {bare}") if spelling]
    assert [list(ids) for ids in found] == [[5, 6], *spellings]


def test_tokens_that_the_model_cannot_make_are_not_bad(tokenizer: Tokenizer) -> None:
    preparer = Preparer(50, lambda spelling: encode(tokenizer, spelling))
    assert preparer.prepare(executor_request(1, [1], bad=("~",))).bad_token_ids == []


# ---- a whole job ----

SHAPES: dict[str, dict[str, Any]] = {
    "aggregated": {"roles": [Role.AGGREGATED]},
    "exchanged": {"roles": [Role.CONTEXT, Role.GENERATION]},
    "messages": {"roles": [Role.CONTEXT, Role.GENERATION], "shared": False},
}


@pytest.fixture(scope="module")
def plain(tiny_llama: Path) -> dict[int, list[int]]:
    """What the model says of its own accord."""
    job = Job(tiny_llama, (Role.AGGREGATED,), shared=True)
    found = job.run([executor_request(number, [number, 9, 100], max_tokens=24) for number in range(4)])
    job.close()
    return {number: tokens_of(responses) for number, responses in found.items()}


def contains(tokens: list[int], part: tuple[int, ...]) -> bool:
    return any(tuple(tokens[at : at + len(part)]) == part for at in range(len(tokens)))


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_bad_is_not_said_at_any_layout(jobs: Any, plain: dict[int, list[int]], shape: str) -> None:
    """The first token of generation completes what the context's began, and so on."""
    options = dict(SHAPES[shape])
    job = jobs(*options.pop("roles"), **options)
    whole = jobs(Role.AGGREGATED)
    requests: list[ExecutorRequest] = []
    bad: dict[int, tuple[int, ...]] = {}
    for number, tokens in plain.items():
        for at, length in ((0, 1), (0, 2), (0, 3), (1, 2), (5, 3)):
            bad[len(requests)] = part = tuple(tokens[at : at + length])
            requests.append(executor_request(
                len(requests), [number, 9, 100], max_tokens=24, bad_token_ids=(part,)))
    alone = {r.request_id: tokens_of(whole.run([r])[r.request_id]) for r in requests}
    for number, responses in job.run(requests).items():
        assert_ended_once(responses)
        tokens = tokens_of(responses)
        assert tokens == alone[number]
        assert len(tokens) == 24 and not contains(tokens, bad[number])
    assert job.problems() == []


@pytest.mark.parametrize("shape", SHAPES)
def test_bias_moves_the_choice_at_any_layout(jobs: Any, shape: str) -> None:
    options = dict(SHAPES[shape])
    job = jobs(*options.pop("roles"), **options)
    found = job.run([executor_request(1, [1, 2], logit_bias={77: 1000.0}, max_tokens=6),
                     executor_request(2, [1, 2], logit_bias={77: 1000.0, 5: 2000.0}, max_tokens=6,
                                      temperature=1.0, seed=3)])
    assert tokens_of(found[1]) == [77] * 6 and tokens_of(found[2]) == [5] * 6
    assert job.problems() == []


@pytest.mark.parametrize("shape", SHAPES)
def test_a_request_without_a_token_left_ends_alone(
        jobs: Any, plain: dict[int, list[int]], shape: str) -> None:
    """In the context phase, and after the hand-over: then all but the first token are excluded by it."""
    options = dict(SHAPES[shape])
    job = jobs(*options.pop("roles"), **options)
    first = plain[0][0]
    pairs = tuple((first, token) for token in range(VOCABULARY))
    at_once = executor_request(7, [0, 9, 100], bad_token_ids=tuple((t,) for t in range(VOCABULARY)))
    later = executor_request(8, [0, 9, 100], bad_token_ids=pairs)
    found = job.run([at_once, later, executor_request(1, [1, 9, 100], max_tokens=24)])
    assert tokens_of(found[7]) == [] and tokens_of(found[8]) == [first]
    for number in (7, 8):
        final = assert_ended_once(found[number])
        assert final.finish_reason == "error" and "no token is left" in (final.error or "")
    assert tokens_of(found[1]) == plain[1]
    assert job.problems() == []


def test_bad_texts_are_not_written(tiny_llama: Path, tokenizer: Tokenizer) -> None:
    job = Job(tiny_llama, (Role.CONTEXT, Role.GENERATION), shared=True, tokenizer=tokenizer, eos=(END,))
    letters = tuple("abcdefghijklm")
    found = job.run([executor_request(1, [3, 4], max_tokens=30, temperature=1.0, seed=2, bad=letters,
                                      ignore_eos=True)])
    singles = {encode(tokenizer, letter)[0] for letter in letters}
    assert len(tokens_of(found[1])) == 30 and not singles & set(tokens_of(found[1]))
    assert job.problems() == []
    job.close()
