"""The arithmetic behind the benchmarks on GPUs: floors, FLOPs, distributions, traces, verdicts."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from gpu_common import (
    LLAMA_8B,
    TINY,
    Arrival,
    Figures,
    Results,
    Shape,
    fitted,
    gaps_of,
    poisson,
    quantile,
    read_trace,
    verdict_of,
    write_model,
)

LLAMA = Shape.of(LLAMA_8B)


def test_llama_3_8b_has_its_parameters() -> None:
    assert LLAMA.parameters == 8_030_261_248  # as its model card's files have


def test_parameters_agree_with_transformers(tmp_path: Path) -> None:
    from disagg_mpi.engine.tensor_parallel import ModelShard
    from disagg_mpi.engine.weights import plan_model

    for tied in (False, True):
        config = {**TINY, "tie_word_embeddings": tied}
        plan = plan_model(write_model(tmp_path / str(tied), config), "fp32", ModelShard())
        assert Shape.of(config).parameters == sum(p.numel() for p in plan.module.parameters())


@pytest.mark.parametrize(("batch", "milliseconds"), [(1, 5.05), (32, 6.43), (128, 10.73)])
def test_floor_of_a_generation_step(batch: int, milliseconds: float) -> None:
    floor = LLAMA.generation_bytes(batch * 1024, 2, 2) / 3.0e12
    assert floor * 1e3 == pytest.approx(milliseconds, abs=0.01)


def test_flops_of_a_context_step() -> None:
    whole = LLAMA.context_flops([(0, 4096)], 1)
    by_hand = 2 * LLAMA.layer_matrices * 4096 + 2 * LLAMA.output + 4 * 32 * 32 * 128 * (4096 * 4097 // 2)
    assert whole == by_hand
    chunks = [(start, 1024) for start in range(0, 4096, 1024)]
    assert sum(LLAMA.context_flops([chunk], 0) for chunk in chunks) + 2 * LLAMA.output == whole
    # Four prompts see less of each other than four parts of one.
    assert LLAMA.context_flops([(0, 1024)] * 4, 1) < whole


def test_quantiles_are_values_that_were_seen() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert [quantile(values, q) for q in (0.5, 0.9, 0.99, 1.0, 0.0)] == [50, 90, 99, 100, 1]
    assert quantile([3.0], 0.99) == 3.0
    assert math.isnan(quantile([], 0.5))


def test_gaps() -> None:
    assert gaps_of([1.0, 1.5, 1.5, 3.0]) == [0.5, 0.0, 1.5]
    assert gaps_of([1.0]) == gaps_of([]) == []


def test_arrivals_are_poisson_and_the_same_for_a_seed() -> None:
    times = poisson(50.0, 100.0, seed=1)
    assert times == poisson(50.0, 100.0, seed=1) != poisson(50.0, 100.0, seed=2)
    assert times == sorted(times) and times[0] > 0 and times[-1] < 100.0
    assert len(times) == pytest.approx(5000, rel=0.05)
    assert poisson(0.0, 100.0, seed=1) == []


MOONCAKE = """{"timestamp": 2000, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}
{"timestamp": 2500, "input_length": 7, "output_length": 0, "hash_ids": []}

{"timestamp": 2250, "input_length": 8, "output_length": 3}
{"timestamp": 9000, "input_length": 1, "output_length": 1}
"""
AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.6805900,396,109
2024-05-10 00:00:00.009930+00:00,1,2
"""


def test_a_trace_of_mooncake(tmp_path: Path) -> None:
    (tmp_path / "trace.jsonl").write_text(MOONCAKE)
    assert read_trace(tmp_path / "trace.jsonl", 3) == [
        Arrival(0.0, 6758, 500), Arrival(0.25, 8, 3), Arrival(0.5, 7, 1)]


def test_a_trace_of_azure(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text(AZURE)
    first, second = read_trace(tmp_path / "trace.csv", 2)
    assert (first, second.prompt, second.output) == (Arrival(0.0, 374, 44), 396, 109)
    assert second.at == pytest.approx(4.0)
    assert len(read_trace(tmp_path / "trace.csv", 9)) == 3


@pytest.mark.parametrize(("text", "said"), [
    ("a,b\n1,2\n", ":1: found 'a,b'; needed JSON lines with timestamp"),
    ("{\"timestamp\": 1}\n", ":1: KeyError: 'input_length'; needed an object"),
    (MOONCAKE + "{oops\n", ":6: JSONDecodeError"),
    (AZURE + "yesterday,1,2\n", ":5: Invalid isoformat string: 'yesterday'; needed TIMESTAMP"),
])
def test_what_is_no_trace(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "trace").write_text(text)
    with pytest.raises(ValueError) as caught:
        read_trace(tmp_path / "trace", 100)
    assert said in str(caught.value)


def test_a_trace_is_cut_to_what_is_measured_with() -> None:
    assert fitted([Arrival(3.0, 9000, 900), Arrival(6.0, 10, 20)], speed=1.5, max_prompt=4096,
                  max_output=128) == [Arrival(2.0, 4096, 128), Arrival(4.0, 10, 20)]


def figures(layout: str, itl: float, ttft: float, tokens: float, **more: float) -> Figures:
    return Figures(layout, "16 streams", itl_p99=itl, ttft_p50=ttft, tokens_per_second=tokens, **more)


BASE = figures("aggregated", 0.150, 0.200, 1000, attainment=0.5)


@pytest.mark.parametrize(("split", "said"), [
    (figures("split", 0.050, 0.200, 820),
     "split against aggregated, 16 streams: ITL P99 3.0x lower; TTFT P50 the same; output "
     "tokens/s 0.82x: pays where a steady time between tokens is worth the loss in output tokens/s"),
    (figures("split", 0.050, 0.100, 1001), ": pays"),
    (figures("split", 0.149, 0.199, 1001), ": does not pay"),
    (figures("split", 0.300, 0.400, 500), "ITL P99 2.0x higher; TTFT P50 2.0x higher; "
     "output tokens/s 0.50x: does not pay"),
    (figures("split", 0.300, 0.100, 1000), ": does not pay for a steady time between tokens; better only in "
     "TTFT P50"),
    (figures("split", 0.050, 0.200, 1000, num_late=2), "2 more prompts without a first token at the end: "
     "pays where a steady time between tokens is worth the loss in prompts in time"),
    (figures("split", 0.050, 0.200, 1000, num_failed=1), ": no verdict: 1 requests of split failed"),
    (figures("split", math.nan, 0.200, 1000),
     ": no verdict: no time between tokens was measured on both sides"),
    (figures("split", 0.150, 0.200, 1000, attainment=0.9),
     "output tokens/s 1.00x; within both limits 90% against 50%: pays"),
    (figures("split", 0.050, 0.200, 1000, attainment=0.3), "within both limits 30% against 50%: pays where a "
     "steady time between tokens is worth the loss in requests within both limits"),
])
def test_verdicts(split: Figures, said: str) -> None:
    assert verdict_of(BASE, split).endswith(said)


def test_figures_survive_json() -> None:
    again = Figures.from_json(json.loads(json.dumps(BASE.json())))
    assert again.itl_p99 == 0.150 and math.isnan(again.itl_max)


def test_results_are_on_disk_at_once_and_parts_are_joined(tmp_path: Path) -> None:
    part = Results(tmp_path / "part.json", machine="one")
    part.add("decode", {"batch": 1})
    part.set("ceilings", {"copy": 3})
    whole = Results(tmp_path / "all.json", machine="two")
    whole.add("decode", {"batch": 0})
    whole.take(tmp_path / "part.json")
    whole.take(tmp_path / "never-written.json")
    found = json.loads((tmp_path / "all.json").read_text())
    assert found["decode"] == [{"batch": 0}, {"batch": 1}]
    assert (found["ceilings"], found["machine"]) == ({"copy": 3}, "two")
