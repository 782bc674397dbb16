"""What a server tells of itself: snapshot, statistics, health, metrics as Prometheus itself reads them."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from inprocess import PATIENCE
from prometheus_client.parser import text_string_to_metric_families
from serving import ServedJob, wait_until

from disagg_mpi.comm.messages import Step
from disagg_mpi.executor import service
from disagg_mpi.frontend.stats import outcome_of
from disagg_mpi.request import Choice, Request, Result, SamplingParams
from disagg_mpi.topology import Role

GREEDY = SamplingParams(max_tokens=8)
CONTEXT, GENERATION = "context", "generation"


def ask(job: ServedJob, num: int = 1, **sampling: Any) -> None:
    """Through the gate, in a loop of its own; returns when the statistics know of the end."""
    import asyncio

    async def run() -> None:
        params = SamplingParams(**{"max_tokens": 8, **sampling})
        handles = job.gate.submit(
            [Request(prompt_token_ids=[5, i, 9, 9, 9], sampling=params) for i in range(num)], "test")
        for handle in handles:
            await handle
        while job.gate.num_open:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(run(), PATIENCE))


def values_of(text: str) -> dict[str, float]:
    """``name{labels}`` → value, as Prometheus' own parser reads them."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, f"{family.name} says nothing of itself"
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            name = f"{sample.name}{{{labels}}}"
            assert name not in found, f"{name} comes twice"
            found[name] = sample.value
    return found


def metrics_of(job: ServedJob) -> dict[str, float]:
    return values_of(job.metrics.render().decode())


@pytest.fixture
def job(serve: Any) -> ServedJob:
    return serve()


# ---- the snapshot ----


def test_a_snapshot_follows_a_request(job: ServedJob) -> None:
    orchestrator = job.job.orchestrator
    quiet = orchestrator.snapshot()
    assert [(i.role, i.name, i.ranks, i.num_blocks) for i in quiet.instances] == [
        (CONTEXT, "context 0", (1,), 256), (GENERATION, "generation 0", (2,), 256)]
    assert quiet.phases == {"queued": 0, "context": 0, "hand-over": 0, "generation": 0}
    assert (quiet.num_open, quiet.failure, quiet.is_closing) == (0, None, False)
    assert all(i.promised_blocks == i.num_requests == i.silent_seconds == 0 for i in quiet.instances)
    job.job.pause()
    handle = orchestrator.submit(list(range(20)), SamplingParams(max_tokens=100))
    wait_until(lambda: orchestrator.snapshot().phases["context"] == 1)
    context, generation = orchestrator.snapshot().instances
    assert context.promised_blocks == 5 + 25, "the prompt's blocks, and room for the output: they go along"
    assert generation.promised_blocks == 30
    assert context.num_requests == generation.num_requests == 1
    assert context.pending_context_tokens == 20
    wait_until(lambda: orchestrator.snapshot().instances[0].silent_seconds > 0.01)
    assert orchestrator.snapshot().instances[1].silent_seconds == 0, "generation owes nothing yet"
    job.job.resume()
    assert handle.result(PATIENCE).error is None
    assert orchestrator.snapshot().instances == quiet.instances


def test_a_snapshot_may_be_taken_while_everything_moves(job: ServedJob) -> None:
    orchestrator = job.job.orchestrator
    handles = [orchestrator.submit([i, 3], GREEDY) for i in range(60)]
    most = 0
    while not all(handle.done() for handle in handles):
        found = orchestrator.snapshot()
        most = max(most, found.num_open)
        assert all(0 <= i.promised_blocks <= i.num_blocks for i in found.instances)
        time.sleep(0.0005)  # the threads that move everything need the interpreter too
    assert most > 1
    assert orchestrator.snapshot().num_open == 0


def test_the_end_of_the_job_shows(serve: Any) -> None:
    job = serve()
    job.job.orchestrator.close()
    found = job.job.orchestrator.snapshot()
    assert (found.is_closing, found.failure) == (True, None)
    assert job.health.problem() == "the server is shutting down"


# ---- health ----


def test_a_leader_that_owes_a_word_and_is_silent_is_named(serve: Any) -> None:
    job = serve(silent_seconds=0.05)
    assert job.health.problem() is None
    time.sleep(0.1)
    assert job.health.problem() is None, "who owes nothing may be silent"
    job.job.pause()
    handle = job.job.orchestrator.submit([1, 2], GREEDY)
    wait_until(lambda: job.health.problem() is not None)
    assert str(job.health.problem()).startswith("context 0 (rank 1) has said nothing for 0 s although")
    assert metrics_of(job)["disagg_mpi_healthy{}"] == 0
    job.job.resume()
    handle.result(PATIENCE)
    assert job.health.problem() is None
    assert metrics_of(job)["disagg_mpi_healthy{}"] == 1


def test_a_leader_at_work_speaks_without_having_tokens(job: ServedJob, monkeypatch: Any) -> None:
    monkeypatch.setattr(service, "HEARTBEAT_SECONDS", -1.0)
    sent: list[Any] = []
    job.job.network.on_send = lambda _source, _rank, message: sent.append(message)
    job.job.orchestrator.submit(list(range(100)) + list(range(100)), GREEDY).result(PATIENCE)
    steps = [message for message in sent if isinstance(message, Step)]
    assert any(not step.responses for step in steps), "the prompt takes four steps, and three have no token"


# ---- statistics and metrics ----


def test_statistics_add_up(job: ServedJob) -> None:
    ended: list[Any] = []
    job.gate.stats.observers.append(ended.append)
    ask(job, 3, n=2, temperature=1.0)
    stats = job.gate.stats
    assert stats.outcomes["done"] == stats.success.count == 3
    assert stats.queue.count == stats.context.count == stats.handover.count == stats.num_handovers == 6
    assert stats.num_prompt_tokens == 15 and stats.num_generated_tokens == 48
    assert stats.generation.count == 6 and 0 < stats.generation.seconds < PATIENCE
    assert stats.success.ns == round(stats.success.seconds * 1e9) > 0
    assert [e.outcome for e in ended] == ["done"] * 3
    assert {e.api for e in ended} == {"test"}
    assert all(e.seconds > 0 and abs(e.started_at - time.time()) < PATIENCE for e in ended)


@pytest.mark.parametrize(("reasons", "error", "outcome"), [
    (["stop", "length"], None, "done"), (["stop", "cancelled"], "x", "cancelled"),
    (["deadline", "cancelled"], "x", "deadline"), (["error", "cancelled"], "x", "failed"),
    ([None], "x", "failed")])
def test_the_worst_choice_is_the_outcome(reasons: list[Any], error: str | None, outcome: str) -> None:
    choices = [Choice(i, finish_reason=reason) for i, reason in enumerate(reasons)]
    assert outcome_of(Result(id=None, request_id=1, prompt_token_ids=[], choices=choices,
                             error=error)) == outcome


def test_every_phase_has_a_histogram(job: ServedJob) -> None:
    ask(job, 4)
    found = metrics_of(job)
    for name in ("queue", "context", "handover", "time_to_first_token", "time_per_output_token", "request"):
        assert found[f"disagg_mpi_{name}_seconds_count{{}}"] == 4, name
        assert found[f"disagg_mpi_{name}_seconds_bucket{{le=+Inf}}"] == 4
        assert 0 <= found[f"disagg_mpi_{name}_seconds_sum{{}}"] < PATIENCE
    assert found["disagg_mpi_requests_total{outcome=done}"] == 4
    assert found["disagg_mpi_generated_tokens_total{}"] == 32
    assert found["disagg_mpi_prompt_tokens_total{}"] == 20
    assert found["disagg_mpi_handovers_total{}"] == 4
    assert found["disagg_mpi_handover_bytes_total{}"] == 0, "on one host the bytes stay"


def test_handed_over_bytes_are_counted_where_they_move(serve: Any) -> None:
    job = serve(generation_tokens_per_block=8)
    ask(job, 2)
    found = metrics_of(job)
    assert found["disagg_mpi_handover_bytes_total{}"] > 0
    assert found["disagg_mpi_handover_transfer_seconds_total{}"] > 0


def test_instances_show_what_they_hold(job: ServedJob) -> None:
    job.job.pause()
    handle = job.job.orchestrator.submit(list(range(20)), SamplingParams(max_tokens=100))
    wait_until(lambda: job.job.orchestrator.snapshot().phases["context"] == 1)
    found = metrics_of(job)
    own = "{instance=generation 0,rank=2,role=generation}"
    assert found[f"disagg_mpi_kv_blocks_used{own}"] == 30
    assert found[f"disagg_mpi_kv_blocks_total{own}"] == 256
    assert found[f"disagg_mpi_running_requests{own}"] == 1
    assert found["disagg_mpi_open_requests{phase=context}"] == 1
    kv = "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=%s,model=generation,version=1}"
    assert found[kv % "used"] == 30 and found[kv % "free"] == 226 and found[kv % "max"] == 256
    assert found[kv % "fraction"] == 30 / 256 and found[kv % "tokens_per"] == 4
    job.job.resume()
    handle.result(PATIENCE)


def test_tritons_names_are_there(job: ServedJob) -> None:
    ask(job, 2)
    found = metrics_of(job)
    model = "{model=ensemble,version=1}"
    assert found[f"nv_inference_request_success{model}"] == 2
    assert found[f"nv_inference_request_failure{model}"] == 0
    assert found[f"nv_inference_request_duration_us{model}"] > 0
    assert found[f"nv_inference_compute_infer_duration_us{model}"] > 0
    kind = ("nv_trt_llm_disaggregated_serving_metrics"
            "{disaggregated_serving_type=%s,model=generation,version=1}")
    assert found[kind % "request_count"] == 2
    assert found[kind % "kv_cache_transfer_ms"] >= 0
    for request_type in ("active", "scheduled", "waiting", "max", "context"):
        for name in (CONTEXT, GENERATION):
            labels = f"{{model={name},request_type={request_type},version=1}}"
            assert f"nv_trt_llm_request_metrics{labels}" in found


def test_an_aggregated_job_is_one_model(serve: Any) -> None:
    job = serve(Role.AGGREGATED)
    ask(job)
    found = metrics_of(job)
    assert "nv_trt_llm_request_metrics{model=tensorrt_llm,request_type=max,version=1}" in found
    assert not any("model=context" in name for name in found)
    assert found["disagg_mpi_handovers_total{}"] == 0
    assert found["disagg_mpi_handover_seconds_count{}"] == 0


def test_metrics_are_on_both_ports_and_head_is_answered(job: ServedJob) -> None:
    url = job.listen()
    httpx.post(f"{url}/v1/completions", json={"prompt": "a", "max_tokens": 0})
    for base in (url, job.metrics_url):
        found = httpx.get(f"{base}/metrics")
        assert found.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert values_of(found.text)["disagg_mpi_refused_total{reason=invalid}"] == 1
        assert httpx.head(f"{base}/metrics").status_code == 200
        assert httpx.head(f"{base}/health").status_code == 200
    assert httpx.get(f"{job.metrics_url}/v1/models").status_code == 404
