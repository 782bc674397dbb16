"""What benchmarks/gpu_pays.py makes of the times that tokens came at."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import gpu_pays
import pytest
from gpu_common import Arrival, Figures
from gpu_pays import Reader, figures_of, trace_figures, verdicts

# One stream with a token every 0.1 s from 0 to 12, and a pause of 1 s that begins at 5.
STREAM = Reader(0.0, [n / 10 for n in range(51)] + [6.0 + n / 10 for n in range(61)])


def test_figures_are_of_the_time_of_the_load() -> None:
    prompts = [Reader(4.0, [4.5, 4.6]), Reader(5.0, [6.5]), Reader(9.0)]
    found = figures_of([STREAM], prompts, quiet_start=1.0, start=4.0, end=10.0, now=12.0)
    assert found.itl_p50 == pytest.approx(0.1)
    assert found.itl_max == pytest.approx(1.0)
    assert found.quiet_itl_p50 == pytest.approx(0.1)
    assert found.ttft_p50 == pytest.approx(1.5)
    assert found.ttft_p99 == pytest.approx(3.0)  # as long as it has waited
    assert (found.num_prompts, found.num_late, found.num_failed) == (3, 1, 0)
    assert found.tokens_per_second == pytest.approx((51 + 3) / 6, abs=0.2)
    assert found.prompt_tokens_per_second == pytest.approx(2 / 6)


def test_a_stream_that_stands_still_to_the_end_is_a_pause() -> None:
    still = Reader(0.0, [4.0, 4.1, 4.2])
    found = figures_of([still], [], quiet_start=1.0, start=4.0, end=10.0, now=15.0)
    assert found.itl_max == pytest.approx(10.8)


def test_nothing_came() -> None:
    found = figures_of([Reader(0.0)], [], quiet_start=1.0, start=4.0, end=10.0, now=12.0)
    assert math.isnan(found.itl_p99) and math.isnan(found.ttft_p50)
    assert found.tokens_per_second == 0.0


def test_requests_of_a_trace_within_both_limits() -> None:
    rows = [Arrival(0.0, 100, 3), Arrival(1.0, 200, 2), Arrival(2.0, 300, 2), Arrival(3.0, 400, 2)]
    readers = [Reader(0.0, [0.5, 0.6, 0.7]),  # good
               Reader(1.0, [2.5, 2.6]),  # its first token comes late
               Reader(2.0, [2.5, 3.5]),  # its second
               Reader(3.0, [3.5])]  # has not come to its end
    found = trace_figures(readers, rows, start=0.0, now=5.0, ttft_slo=1.0, itl_slo=0.2)
    assert found.attainment == 0.25
    assert found.num_late == 0
    assert found.prompt_tokens_per_second == pytest.approx(1000 / 3.5)
    assert found.tokens_per_second == pytest.approx(8 / 3.5)
    assert found.itl_max == pytest.approx(1.0)


def test_verdicts_are_of_equal_loads() -> None:
    made = [Figures(layout, load, itl_p99=itl, ttft_p50=1.0, tokens_per_second=1.0)
            for layout, load, itl in (("aggregated", "a", 2.0), ("two aggregated", "a", 1.0),
                                      ("disaggregated", "a", 1.0), ("disaggregated, MPS", "a", 0.5),
                                      ("aggregated", "b", 1.0), ("disaggregated", "b", 2.0))]
    lines = verdicts(made)
    assert [(line.partition(":")[0], line.rpartition(": ")[2]) for line in lines] == [
        ("disaggregated against aggregated, a", "pays"),
        ("disaggregated against two aggregated, a", "does not pay"),
        ("disaggregated, MPS against aggregated, a", "pays"),
        ("disaggregated, MPS against two aggregated, a", "pays"),
        ("disaggregated against aggregated, b", "does not pay")]


def options(monkeypatch: pytest.MonkeyPatch, *words: str) -> gpu_pays.argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["gpu_pays.py", *words])
    return gpu_pays.arguments()


def test_all_layouts_have_as_much_kv_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """And configurations that a job takes."""
    from disagg_mpi.config import JobConfig
    from disagg_mpi.topology import build_topology

    asked = options(monkeypatch, "--context-shares", "1,0.6")
    found = gpu_pays.layouts(asked, Path("/model"))
    assert [(each.name, each.mps) for each in found] == [
        ("aggregated, chunks of 512", False), ("aggregated, chunks of 2048", False),
        ("two aggregated, chunks of 512", False), ("two aggregated, chunks of 512, MPS", True),
        ("disaggregated", False), ("disaggregated, MPS", True),
        ("disaggregated, MPS, contexts on 60%", True)]
    assert [each.config.get("context_gpu_share", 1) for each in found[-3:]] == [1, 1, 0.6]
    for each in found:
        config = JobConfig(**each.config)
        topology = build_topology(config)
        assert topology.world_size == each.num_ranks
        assert len(topology.groups) * config.pool_tokens == asked.kv_tokens
        assert all(group.device_of(group.leader) == 0 for group in topology.groups)


@pytest.mark.parametrize(("words", "said"), [
    (("--layouts", "aggregated,three"), "three: layouts are aggregated, two, disaggregated"),
    (("--chunks", "32"), "--chunks 32: a step takes 64 requests"),
    (("--context-shares", "half"), "--context-shares half: needed are shares, as 1,0.6"),
    (("--context-shares", "0.6", "--mps", "off"), "they are for ranks on one GPU under MPS"),
    (("--context-shares", "60"), "--context-shares 60: needed are shares, as 1,0.6"),
])
def test_what_cannot_be(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
                        words: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit):
        options(monkeypatch, *words)
    assert said in capsys.readouterr().err
