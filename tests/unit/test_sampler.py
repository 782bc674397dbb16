"""From logits to tokens: against a reference written the plain way, and against itself in other batches."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from inprocess import executor_request

from disagg_mpi.engine.sampler import Sampler, uniform
from disagg_mpi.engine.sequence import Sequence

VOCABULARY = 12


def sequence(prompt: list[int], output: list[int], index: int = 0, **sampling: Any) -> Sequence:
    sampling = {"max_tokens": 100, **sampling}
    one = Sequence(executor_request(1, prompt, index, **sampling))
    one.token_ids += output
    return one


def sample(logits: Any, *sequences: Sequence, eos: tuple[int, ...] = ()) -> list[Any]:
    rows = torch.as_tensor(np.asarray(logits), dtype=torch.float32)
    return Sampler(eos)(rows.reshape(len(sequences), -1), sequences)


def reference_adjust(logits: list[float], one: Sequence, eos: tuple[int, ...]) -> list[float]:
    """Keskar et al.'s and OpenAI's formulas, token by token."""
    params, row = one.sampling, list(logits)
    output = one.token_ids[one.num_prompt_tokens :]
    for token in range(len(row)):
        if token in one.token_ids:
            row[token] = (row[token] / params.repetition_penalty if row[token] > 0
                          else row[token] * params.repetition_penalty)
        count = output.count(token)
        row[token] -= params.frequency_penalty * count + params.presence_penalty * (count > 0)
        if len(output) < params.min_tokens and (token in eos or token in params.stop_token_ids):
            row[token] = -math.inf
    return row


def reference_set(row: list[float], params: Any) -> dict[int, float]:
    """Probability of each token that may be drawn."""
    highest = max(row)
    weights = {t: math.exp((value - highest) / params.temperature) for t, value in enumerate(row)}
    if 0 < params.top_k < len(row):
        kth = sorted(weights.values(), reverse=True)[params.top_k - 1]
        weights = {t: w for t, w in weights.items() if w >= kth}
    total = sum(weights.values())
    kept, mass = {}, 0.0
    for token, weight in sorted(weights.items(), key=lambda item: -item[1]):
        if mass >= params.top_p:
            break
        kept[token] = weight
        mass += weight / total
    total = sum(kept.values())
    return {token: weight / total for token, weight in kept.items() if weight > 0}


LOGITS = st.lists(st.integers(-40, 40), min_size=VOCABULARY, max_size=VOCABULARY, unique=True).map(
    lambda values: [value / 8 for value in values])
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=8)
PENALTIES = st.fixed_dictionaries({
    "repetition_penalty": st.sampled_from([1.0, 0.7, 1.3]),
    "presence_penalty": st.sampled_from([0.0, 0.51, -0.37]),
    "frequency_penalty": st.sampled_from([0.0, 0.23, -0.11]),
    "min_tokens": st.sampled_from([0, 3, 50]),
    "stop_token_ids": st.sampled_from([(), (2, 7)]),
})


@given(LOGITS, TOKENS.filter(bool), TOKENS, PENALTIES, st.sampled_from([(), (0,), (4, 5)]))
@settings(deadline=None, max_examples=150)
def test_greedy_with_penalties_is_the_references_best(
        logits: list[float], prompt: list[int], output: list[int], sampling: dict[str, Any],
        eos: tuple[int, ...]) -> None:
    one = sequence(prompt, output, **sampling)
    expected = reference_adjust(logits, one, eos)
    token = sample(logits, one, eos=eos)[0].token
    assert expected[token] == pytest.approx(max(expected), abs=1e-5)


@given(LOGITS, TOKENS.filter(bool), TOKENS, PENALTIES, st.sampled_from([0.3, 1.0, 3.0]),
       st.integers(0, VOCABULARY + 1), st.sampled_from([0.01, 0.3, 0.8, 0.999, 1.0]),
       st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=150)
def test_drawn_tokens_are_of_the_references_set(
        logits: list[float], prompt: list[int], output: list[int], sampling: dict[str, Any],
        temperature: float, top_k: int, top_p: float, seed: int) -> None:
    one = sequence(prompt, output, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
                   **sampling)
    allowed = reference_set(reference_adjust(logits, one, (0,)), one.sampling)
    # The order of two sums decides who is in when the mass meets top_p exactly: 1e-9 is let off.
    token = sample(logits, one, eos=(0,))[0].token
    near = reference_set(reference_adjust(logits, one, (0,)),
                         type("P", (), {"temperature": temperature, "top_k": top_k,
                                        "top_p": min(1.0, top_p + 1e-6)}))
    assert token in allowed or token in near


def drawn(logits: list[float], count: int, **sampling: Any) -> Counter[int]:
    many = [sequence([1], [], temperature=1.0, seed=seed, **sampling) for seed in range(count)]
    return Counter(s.token for s in sample([logits] * count, *many))


def test_top_k_and_top_p_keep_exactly_their_sets() -> None:
    logits = [math.log(p) for p in (0.05, 0.4, 0.3, 0.15, 0.1)]
    assert set(drawn(logits, 400)) == {0, 1, 2, 3, 4}
    assert set(drawn(logits, 400, top_k=2)) == {1, 2}
    assert set(drawn(logits, 400, top_k=1)) == {1}
    assert set(drawn(logits, 400, top_p=0.35)) == {1}
    assert set(drawn(logits, 400, top_p=0.6)) == {1, 2}
    assert set(drawn(logits, 400, top_p=0.75)) == {1, 2, 3}
    assert set(drawn(logits, 400, top_k=3, top_p=0.9)) == {1, 2, 3}
    assert set(drawn(logits, 400, top_p=1e-9)) == {1}


def test_the_distribution_is_the_softmax() -> None:
    probabilities = np.array([0.05, 0.4, 0.3, 0.15, 0.1])
    count = 2000
    found = drawn(np.log(probabilities).tolist(), count)
    expected = probabilities * count
    chi_square = sum((found[t] - e) ** 2 / e for t, e in enumerate(expected))
    assert chi_square < 18.5, "0.1 % of all fair samplers with 4 degrees of freedom are worse"
    halved = drawn((np.log(probabilities) * 2).tolist(), count)
    sharp = probabilities**2 / (probabilities**2).sum() * count
    assert sum((halved[t] - e) ** 2 / e for t, e in enumerate(sharp)) < 18.5


def test_the_numbers_are_uniform_and_a_function_of_seed_index_and_position() -> None:
    values = [uniform(seed, index, position)
              for seed in (0, 1, 2**63 - 1) for index in range(10) for position in range(100)]
    assert len(set(values)) == len(values) == 3000
    assert all(0 <= value < 1 for value in values)
    counts = np.histogram(values, bins=10, range=(0, 1))[0]
    assert ((counts - 300) ** 2 / 300).sum() < 27.9, "9 degrees of freedom, 0.1 %"
    assert uniform(3, 1, 4) == uniform(3, 1, 4)
    assert np.corrcoef(values[:-1], values[1:])[0, 1] < 0.06


@given(st.lists(st.tuples(LOGITS, st.integers(0, 5), st.integers(0, 3)), min_size=2, max_size=6),
       st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_a_token_does_not_depend_on_the_batch(
        rows: list[tuple[list[float], int, int]], random: Any) -> None:
    def sequences() -> list[Sequence]:
        return [sequence([1, 2], [], index, temperature=0.9, top_p=0.9, seed=seed,
                         repetition_penalty=1.1) if seed else sequence([1, 2], [], index)
                for _, seed, index in rows]

    alone = [sample(logits, one)[0].token
             for (logits, _, _), one in zip(rows, sequences(), strict=True)]
    order = list(range(len(rows)))
    random.shuffle(order)
    many = sequences()
    together = sample([rows[i][0] for i in order], *[many[i] for i in order])
    assert [s.token for s in together] == [alone[i] for i in order]


def test_other_seeds_indices_and_positions_draw_others() -> None:
    flat = [0.0] * VOCABULARY
    base = {"temperature": 1.0}
    seeds = {sample(flat, sequence([1], [], seed=s, **base))[0].token for s in range(60)}
    indices = {sample(flat, sequence([1], [], i, seed=5, **base))[0].token for i in range(60)}
    positions = {sample(flat, sequence([1], [1] * n, seed=5, **base))[0].token for n in range(60)}
    assert len(seeds) > 8 and len(indices) > 8 and len(positions) > 8


def test_a_token_without_probability_is_never_drawn() -> None:
    row = [-math.inf, 0.0, -math.inf, 0.0, -math.inf]
    many = [sequence([1], [], temperature=1.0, seed=seed) for seed in range(200)]
    assert {s.token for s in sample([row] * 200, *many)} == {1, 3}


@pytest.mark.parametrize(("point", "token"), [(0.0, 1), (1.0, 3)])
def test_the_ends_of_the_distribution_are_tokens_that_have_a_part_in_it(
        monkeypatch: pytest.MonkeyPatch, point: float, token: int) -> None:
    monkeypatch.setattr("disagg_mpi.engine.sampler.uniform", lambda *_: point)
    row = [-math.inf, 0.0, -math.inf, 0.0, -math.inf]
    assert sample(row, sequence([1], [], temperature=1.0, seed=1))[0].token == token


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-30, 999999.0])
def test_extreme_temperatures_are_no_accident(temperature: float) -> None:
    logits = [1.0, 50.0, -50.0, 49.0]
    token = sample(logits, sequence([1], [], temperature=temperature, seed=4))[0].token
    assert token == 1 if temperature < 1 else token in range(4)


def test_minimum_length_holds_back_the_end_just_that_long() -> None:
    logits = [9.0, 1.0, 8.0, 7.0]
    params = {"min_tokens": 2, "stop_token_ids": (2,)}
    assert sample(logits, sequence([1], [], **params), eos=(0,))[0].token == 3
    assert sample(logits, sequence([1], [3], **params), eos=(0,))[0].token == 3
    assert sample(logits, sequence([1], [3, 3], **params), eos=(0,))[0].token == 0
    assert sample(logits, sequence([1], [], min_tokens=2))[0].token == 0, "a model without an end"


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = [2.0, 1.0, 0.0, -1.0]
    one = sequence([0], [], logprobs=2, repetition_penalty=5.0)
    found = sample(logits, one)[0]
    expected = torch.log_softmax(torch.tensor(logits), -1).tolist()
    assert found.token == 1, "the penalty moves the choice"
    assert found.logprobs.logprob == pytest.approx(expected[1])
    assert [token for token, _ in found.logprobs.top] == [0, 1]
    assert [value for _, value in found.logprobs.top] == pytest.approx(expected[:2])
    assert sample(logits, sequence([0], [], logprobs=0))[0].logprobs.top == []
    assert sample(logits, sequence([0], []))[0].logprobs is None


def test_logits_are_given_raw_and_the_input_is_left_alone() -> None:
    rows = torch.randn(2, VOCABULARY)
    before = rows.clone()
    found = Sampler((1,))(rows, [
        sequence([0], [3], return_generation_logits=True, repetition_penalty=2.0, min_tokens=9),
        sequence([0], [3], temperature=1.0, seed=1, top_k=2, frequency_penalty=1.0)])
    assert torch.equal(rows, before)
    assert np.array_equal(np.frombuffer(found[0].logits, np.float32), before[0].numpy())
    assert found[1].logits is None
