"""Prometheus metrics: our own per phase and instance, and those that Triton's users' dashboards ask for.

A :class:`Metrics` lives as long as its server. It listens to :class:`ServingStats` for its histograms and
reads the rest, statistics and the job's snapshot, when somebody scrapes; so it costs nothing in between.

Triton's names are kept exactly, with the labels that it gives them. Its counters have no ``_total``, which
the client library adds to each counter, so they are declared untyped: ``rate()`` does not ask for the type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.health import Health
from disagg_mpi.frontend.stats import Ended
from disagg_mpi.orchestrator.snapshot import InstanceSnapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Powers of about 2.2 from a tenth of a millisecond: a block table's way takes that, a long prompt minutes.
_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
            10.0, 25.0, 60.0, 150.0)

_HISTOGRAMS = {
    "queue": "Waiting for a place at rank 0 and for the first step at the instance.",
    "context": "Computing the prompt, from its first step to the first token.",
    "handover": "What the hand-over of the KV-cache added to a request.",
    "time_to_first_token": "From submission to the first token at rank 0.",
    "time_per_output_token": "Mean time between tokens after the first.",
    "request": "From submission to the end.",
}

GUIDE_NAMES = {
    "ensemble": "ensemble", "context": "context", "generation": "generation", "aggregated": "tensorrt_llm"}
"""The guide's model names, as labels of Triton's metrics: of the whole, and of each role's instances."""


class Metrics:
    """Renders all metrics of one server."""

    def __init__(self, gate: Gate, health: Health, names: Mapping[str, str] = GUIDE_NAMES) -> None:
        """``names``: what a model repository calls the models of :data:`GUIDE_NAMES`."""
        self._registry = CollectorRegistry()
        self._histograms = {
            name: Histogram(f"disagg_mpi_{name}_seconds", text, buckets=_SECONDS, registry=self._registry)
            for name, text in _HISTOGRAMS.items()}
        self._registry.register(_Scrape(gate, health, {**GUIDE_NAMES, **names}))
        gate.stats.observers.append(self._observe)

    def render(self) -> bytes:
        """Everything in Prometheus' text format (:data:`CONTENT_TYPE`)."""
        return generate_latest(self._registry)

    def _observe(self, ended: Ended) -> None:
        observe = {name: histogram.observe for name, histogram in self._histograms.items()}
        observe["request"](ended.seconds)
        for choice in ended.result.choices:
            timing = choice.timing
            observe["queue"](timing.queue)
            if timing.context:
                observe["context"](timing.context)
            if timing.transport:
                observe["handover"](timing.handover)
            if timing.ttft:
                observe["time_to_first_token"](timing.ttft)
            if timing.tpot:
                observe["time_per_output_token"](timing.tpot)


class _Scrape(Collector):
    """What is read at the moment of a scrape."""

    def __init__(self, gate: Gate, health: Health, names: Mapping[str, str]) -> None:
        self._gate = gate
        self._health = health
        self._names = names

    def describe(self) -> list[Metric]:
        """Nothing: the names depend on the job, and registering must not ask it."""
        return []

    def collect(self) -> Iterator[Metric]:
        job = self._gate.served.orchestrator.snapshot()
        yield from self._totals()
        phases = GaugeMetricFamily("disagg_mpi_open_requests", "Sequences in each phase.", labels=["phase"])
        for phase, count in job.phases.items():
            phases.add_metric([phase], count)
        yield phases
        yield GaugeMetricFamily("disagg_mpi_healthy", "1 while the job can make progress.",
                                value=self._health.problem() is None)
        yield from _instances(job.instances)
        yield from self._triton(job.instances, job.num_open)

    def _totals(self) -> Iterator[Metric]:
        stats = self._gate.stats
        ended = CounterMetricFamily("disagg_mpi_requests", "Requests that ended, by outcome.",
                                    labels=["outcome"])
        for outcome, count in stats.outcomes.items():
            ended.add_metric([outcome], count)
        yield ended
        refused = CounterMetricFamily("disagg_mpi_refused", "Requests turned away before they began.",
                                      labels=["reason"])
        for reason, count in sorted(stats.num_refused.items()):
            refused.add_metric([reason], count)
        yield refused
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of requests that ended.", stats.num_prompt_tokens),
            ("cached_tokens", "Of these, not computed thanks to the prefix cache.", stats.num_cached_tokens),
            ("generated_tokens", "Tokens generated.", stats.num_generated_tokens),
            ("handovers", "KV-caches handed over from context to generation.", stats.num_handovers),
            ("handover_bytes", "Bytes copied for them; 0 where the bytes stayed.", stats.handover_bytes),
            ("handover_transfer_seconds", "Time in which they were under way.", stats.transfer_seconds),
        ):
            yield CounterMetricFamily(f"disagg_mpi_{name}", text, value=value)

    def _triton(self, instances: Sequence[InstanceSnapshot], num_open: int) -> Iterator[Metric]:
        stats = self._gate.stats
        done = stats.success.count
        for name, text, value in (
            ("request_success", "Number of successful inference requests.", done),
            ("request_failure", "Number of failed inference requests.",
             stats.fail.count + sum(stats.num_refused.values())),
            ("count", "Number of inferences performed.", done),
            ("exec_count", "Number of model executions performed.", done),
            ("request_duration_us", "Cumulative inference request duration in microseconds.",
             _us(stats.success.seconds + stats.fail.seconds)),
            ("queue_duration_us", "Cumulative inference queuing duration in microseconds.",
             _us(stats.queue.seconds)),
            ("compute_input_duration_us", "Cumulative compute input duration in microseconds: the context "
             "phase.", _us(stats.context.seconds)),
            ("compute_infer_duration_us", "Cumulative compute inference duration in microseconds: "
             "generation.", _us(stats.generation.seconds)),
            ("compute_output_duration_us", "Cumulative compute output duration in microseconds: text is "
             "made while tokens are.", 0),
        ):
            yield self._metric(f"nv_inference_{name}", text, "unknown", value)
        pending = sum(i.num_requests for i in instances if i.role != "context")
        yield self._metric("nv_inference_pending_request_count", "Instantaneous number of pending requests "
                           "per model.", "gauge", max(0, num_open - pending))
        yield from _tensorrt_llm(instances, num_open, self._names)
        handed_over = Metric("nv_trt_llm_disaggregated_serving_metrics",
                             "TRT LLM disaggregated serving metrics, since the start", "gauge")
        for kind, amount in (("kv_cache_transfer_ms", stats.transfer_seconds * 1e3),
                             ("request_count", stats.num_handovers)):
            handed_over.add_sample(handed_over.name, {
                "disaggregated_serving_type": kind, "model": self._names["generation"],
                "version": "1"}, amount)
        yield handed_over

    def _metric(self, name: str, text: str, kind: str, value: float) -> Metric:
        metric = Metric(name, text, kind)
        metric.add_sample(name, {"model": self._names["ensemble"], "version": "1"}, value)
        return metric


def _instances(instances: Sequence[InstanceSnapshot]) -> Iterator[Metric]:
    for name, text, values in (
        ("kv_blocks_used", "KV blocks that requests hold or were promised.",
         [i.promised_blocks for i in instances]),
        ("kv_blocks_total", "KV blocks of an instance.", [i.num_blocks for i in instances]),
        ("running_requests", "Sequences that an instance computes or has a place for.",
         [i.num_requests for i in instances]),
        ("pending_context_tokens", "Prompt tokens that an instance has yet to compute.",
         [i.pending_context_tokens for i in instances]),
        ("silent_seconds", "How long an instance that has work has said nothing.",
         [i.silent_seconds for i in instances]),
    ):
        family = GaugeMetricFamily(f"disagg_mpi_{name}", text, labels=["instance", "role", "rank"])
        for instance, value in zip(instances, values, strict=True):
            family.add_metric([instance.name, instance.role, str(instance.ranks[0])], value)
        yield family


def _tensorrt_llm(
    instances: Sequence[InstanceSnapshot], num_open: int, names: Mapping[str, str]
) -> Iterator[Metric]:
    """The gauges of Triton's TensorRT-LLM backend: copies of a model are summed, as one model has them."""
    requests = Metric("nv_trt_llm_request_metrics", "TRT LLM request metrics", "gauge")
    blocks = Metric("nv_trt_llm_kv_cache_block_metrics", "TRT LLM KV cache block metrics", "gauge")
    for role in ("context", "generation", "aggregated"):
        model = names[role]
        own = [i for i in instances if i.role == role]
        if not own:
            continue
        active = sum(i.num_requests for i in own)
        total, used = sum(i.num_blocks for i in own), sum(i.promised_blocks for i in own)
        for kind, value in (
            ("active", active), ("scheduled", active), ("max", sum(i.max_batch_size for i in own)),
            ("waiting", max(0, num_open - active) if role != "context" else 0),
            ("context", active if role == "context" else 0),
        ):
            requests.add_sample(requests.name, {"request_type": kind, "model": model, "version": "1"}, value)
        for kind, amount in (
            ("max", total), ("used", used), ("free", total - used), ("tokens_per", own[0].tokens_per_block),
            ("fraction", used / total),
        ):
            blocks.add_sample(blocks.name, {
                "kv_cache_block_type": kind, "model": model, "version": "1"}, amount)
    yield requests
    yield blocks


def _us(seconds: float) -> int:
    return round(seconds * 1e6)
