"""Tokens chosen for all rows at once are those that are chosen row by row on a processor."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import executor_request

from disagg_mpi.engine.gpu.device import HostDevice
from disagg_mpi.engine.gpu.sampler import Draw, draw, draw_some, likeliest
from disagg_mpi.engine.sampler import _draw, uniform
from disagg_mpi.engine.sequence import Sequence


class Asked(NamedTuple):
    """What a request says of its draw; a temperature of 0: nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


def row_by_row(logits: torch.Tensor, asked: list[Asked], position: int = 3) -> list[int]:
    found = []
    for row, one in zip(logits, asked, strict=True):
        sequence = Sequence(executor_request(1, [1] * position, 2, **one._asdict()))
        found.append(_draw(row, sequence) if one.temperature else int(row.argmax()))
    return found


def choose(logits: torch.Tensor, draws: list[Draw]) -> torch.Tensor:
    tokens = likeliest(logits)
    draw_some(tokens, logits, draws, HostDevice())
    return tokens


def at_once(logits: torch.Tensor, asked: list[Asked], position: int = 3) -> list[int]:
    draws: list[Draw] = [(row, one.temperature, one.top_k, one.top_p, uniform(one.seed, 2, position))
                         for row, one in enumerate(asked) if one.temperature]
    tokens = choose(logits, draws)
    assert tokens.dtype == torch.int32 and tokens.shape == (len(asked),)
    return tokens.tolist()


TEMPERATURES = st.sampled_from([0.0, 1e-300, 1e-30, 1e-3, 0.3, 0.8, 1.0, 2.0, 100.0])
TOP_P = st.sampled_from([1.0, 1.0, 0.999999, 0.9, 0.5, 0.25, 0.01, 1e-12])


@st.composite
def steps(draw_: st.DrawFn) -> tuple[torch.Tensor, list[Asked]]:
    """Rows with ties, with parts that are excluded, and smooth ones."""
    vocabulary = draw_(st.sampled_from([1, 2, 5, 40, 300]))
    top_k = st.sampled_from([0, 0, 1, 2, 3, vocabulary - 1, vocabulary, vocabulary + 1, 10**6])
    asked = draw_(st.lists(st.builds(Asked, TEMPERATURES, top_k, TOP_P, st.integers(0, 2**63 - 1)),
                           min_size=1, max_size=7))
    generator = torch.Generator().manual_seed(draw_(st.integers(0, 2**31)))
    logits = torch.randn(len(asked), vocabulary, generator=generator)
    logits *= draw_(st.sampled_from([1e-3, 1.0, 30.0]))
    kind = draw_(st.sampled_from(["smooth", "ties", "excluded"]))
    if kind == "ties":
        logits = logits.round()
    if kind == "excluded":
        excluded = torch.rand(logits.shape, generator=generator) < 0.7
        excluded[:, draw_(st.integers(0, vocabulary - 1))] = False
        logits = logits.masked_fill(excluded, -torch.inf)
    return logits, asked


@given(steps(), st.integers(1, 9))
@settings(max_examples=400, deadline=None)
def test_all_rows_at_once_are_each_row_alone(step: tuple[torch.Tensor, list[Asked]], position: int) -> None:
    logits, asked = step
    before = logits.clone()
    assert at_once(logits, asked, position) == row_by_row(logits, asked, position)
    assert torch.equal(logits, before), "others may still read the logits"


def test_top_k_keeps_all_that_tie_with_the_last_one() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0, 2.0]]).repeat(300, 1)
    for top_k, allowed in ((1, {1}), (2, {1, 2, 3, 5}), (4, {1, 2, 3, 5}), (5, {0, 1, 2, 3, 5}),
                           (6, set(range(6))), (0, set(range(6)))):
        asked = [Asked(2.0, top_k=top_k, seed=seed) for seed in range(300)]
        found = at_once(logits, asked)
        assert set(found) == allowed
        assert found == row_by_row(logits, asked)


def test_top_p_keeps_as_few_as_reach_it_and_of_ties_the_first() -> None:
    logits = torch.tensor([[math.log(p) for p in (0.125, 0.5, 0.125, 0.25)]]).repeat(300, 1)
    for top_p, allowed in ((0.1, {1}), (0.49, {1}), (0.6, {1, 3}), (0.8, {0, 1, 3}), (0.95, {0, 1, 2, 3})):
        asked = [Asked(1.0, top_p=top_p, seed=seed) for seed in range(300)]
        found = at_once(logits, asked)
        assert set(found) == allowed
        assert found == row_by_row(logits, asked)


def test_the_smallest_temperature_is_the_likeliest_token() -> None:
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    for temperature in (1e-308, 5e-324):
        asked = [Asked(temperature, seed=seed) for seed in range(20)]
        assert at_once(logits, asked) == logits.argmax(-1).tolist() == row_by_row(logits, asked)


def test_what_is_excluded_is_never_drawn() -> None:
    logits = torch.full((200, 9), -torch.inf)
    logits[:, 4], logits[:, 6] = 1.0, -50.0
    found = at_once(logits, [Asked(100.0, seed=seed) for seed in range(200)])
    assert set(found) == {4, 6}


def of(values: list[float], point: float, *, top_k: int = 0, top_p: float = 1.0) -> int:
    """The token at ``point`` of the distribution."""
    def one(value: Any) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.int64 if isinstance(value, int) else torch.float64)

    tokens = draw(torch.tensor([values]), one(1.0), one(top_k), one(top_p), one(point))
    assert tokens.shape == (1,)
    return int(tokens)


@pytest.mark.parametrize(("point", "token"), [
    (0.0, 1), (0.24999, 1), (0.25001, 2), (0.74999, 2), (0.75001, 4), (1 - 2**-53, 4), (1.0, 4)])
def test_a_number_is_a_place_in_the_distribution(point: float, token: int) -> None:
    """At its very beginning and end too, where tokens of no probability lie."""
    assert of([-math.inf, 0.0, math.log(2), -math.inf, 0.0, -math.inf], point) == token


@given(st.floats(0, 1, exclude_max=True))
def test_at_any_point_a_token_of_the_set_is_drawn(point: float) -> None:
    values = [-1e4, 0.3, -math.inf, 0.1, 0.2, -math.inf]
    assert of(values, point) in {1, 3, 4}
    assert of(values, point, top_k=2) in {1, 4}
    assert of(values, point, top_k=2, top_p=1e-9) == 1
    assert of([7.0], point) == 0


def test_logits_that_differ_in_their_last_bits_do_not_tie() -> None:
    """Less than fp32 can tell when they are taken from the largest."""
    assert {of([1.0, -1e-8, 0.0], point / 100, top_k=2) for point in range(100)} == {0, 2}


def test_a_step_without_draws_is_the_likeliest_of_each_row() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    assert choose(logits, []).tolist() == logits.argmax(-1).tolist()
    assert choose(logits[:0], []).tolist() == []


def test_a_seed_decides_together_with_index_and_position() -> None:
    logits = torch.zeros(1, 1000)
    found = {(seed, position): at_once(logits, [Asked(1.0, seed=seed)], position)[0]
             for seed in (1, 2, 2**63 - 1) for position in (1, 2, 3)}
    assert len(set(found.values())) == 9
