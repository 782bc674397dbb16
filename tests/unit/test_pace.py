"""Counting tokens and the gaps between them."""

from __future__ import annotations

import random
import statistics

import pytest

from disagg_mpi.orchestrator.pace import Pace
from disagg_mpi.request import Request, SamplingParams


def test_percentiles_are_within_three_percent_of_the_exact_ones() -> None:
    draw, pace, now = random.Random(3), Pace(), 1000.0
    gaps = [draw.lognormvariate(-3.5, 1.0) for _ in range(5000)]
    for gap in gaps:
        pace.add(1, now, now - gap)
    exact = statistics.quantiles(gaps, n=100, method="inclusive")
    total, found = pace.gaps([0.5, 0.9, 0.99], now)
    assert total == pace.num_tokens == 5000
    assert found == [pytest.approx(exact[percent - 1], rel=0.03) for percent in (50, 90, 99)]


def test_a_first_token_has_no_gap_and_tokens_that_come_together_have_one() -> None:
    pace = Pace()
    pace.add(1, 10.0, 0.0)
    assert (pace.num_tokens, pace.gaps([0.5, 0.99], 10.0)) == (1, (0, [0.0, 0.0]))
    pace.add(3, 10.5, 10.0)
    total, found = pace.gaps([0.0, 0.5, 1.0], 10.5)
    assert (pace.num_tokens, total) == (4, 1)
    assert found[1:] == [pytest.approx(0.5, rel=0.03)] * 2


@pytest.mark.parametrize("gap", [0.0, -0.1, 1e-9, 1e5])
def test_gaps_of_any_size_count(gap: float) -> None:
    pace = Pace()
    pace.add(1, 1e6, 1e6 - gap)
    total, found = pace.gaps([1.0], 1e6)
    assert total == 1
    assert 0 < found[0] < 600


def test_what_is_older_than_the_window_is_forgotten() -> None:
    pace = Pace(window_seconds=30.0)
    for second in range(100, 140):
        pace.add(1, float(second), second - 0.01)
    assert pace.gaps([], 139.0)[0] == 30
    assert pace.gaps([], 139.0 + 20)[0] == 10
    assert pace.gaps([], 139.0 + 30)[0] == 0, "also when nothing new comes"
    assert pace.num_tokens == 40


def test_the_job_counts_what_it_generates(serve: object) -> None:
    job = serve()  # type: ignore[operator]
    orchestrator = job.job.orchestrator
    sampling = SamplingParams(max_tokens=9, n=2)
    result = orchestrator.submit(Request(prompt_token_ids=[1, 2, 3], sampling=sampling)).result(60)
    assert result.error is None
    assert orchestrator.pace.num_tokens == 18
    total, (median,) = orchestrator.pace.gaps([0.5])
    assert total == 16, "all but each continuation's first token"
    assert median < max(choice.timing.total for choice in result.choices)
