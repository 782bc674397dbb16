"""What ``ModelStatistics`` counts, for each model. Updated and read on the servers' event loop.

An inference of the ensemble is one of each model that it passes through, as in Triton; each gets the share
of the time that it stands for here: preprocessing is the tokenizer, context and generation are the phases.
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec
from tritonclient.grpc import service_pb2

from disagg_mpi.frontend.kserve.models import Model, Models
from disagg_mpi.frontend.stats import Duration
from disagg_mpi.frontend.triton.wiring import Kind
from disagg_mpi.request import Timing


class ModelCounters(msgspec.Struct):
    """One model's."""

    success: Duration = msgspec.field(default_factory=Duration)
    fail: Duration = msgspec.field(default_factory=Duration)
    queue: Duration = msgspec.field(default_factory=Duration)
    compute_input: Duration = msgspec.field(default_factory=Duration)
    compute_infer: Duration = msgspec.field(default_factory=Duration)
    compute_output: Duration = msgspec.field(default_factory=Duration)
    inference_count: int = 0
    """Rows, over all requests."""
    execution_count: int = 0
    last_inference_ms: int = 0
    """Since 1970."""


class Statistics:
    """Counters of all models of one server."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self.counters = {model.name: ModelCounters() for model in models}

    def succeeded(self, model: Model, num_rows: int, encode: float, timing: Timing) -> None:
        """A request to ``model`` was answered. ``encode``: seconds in the tokenizer; ``timing``: of its
        longest sequence."""
        now_ms = time.time_ns() // 1_000_000
        for each in (model, *self._models.composing(model)):
            counters = self.counters[each.name]
            queue, infer = _shares(each.kind, encode, timing)
            is_whole = each is model
            counters.success.add(queue + infer + (encode if is_whole else 0.0))
            counters.queue.add(queue)
            counters.compute_input.add(encode if is_whole else 0.0)
            counters.compute_infer.add(infer)
            counters.compute_output.add(0.0)
            counters.inference_count += num_rows
            counters.execution_count += 1
            counters.last_inference_ms = now_ms

    def failed(self, model: Model, seconds: float) -> None:
        """A request to ``model`` was refused, failed or was cancelled after ``seconds``."""
        self.counters[model.name].fail.add(seconds)

    def response(self, models: Iterable[Model]) -> service_pb2.ModelStatisticsResponse:
        return service_pb2.ModelStatisticsResponse(model_stats=[self._message(model) for model in models])

    def _message(self, model: Model) -> service_pb2.ModelStatistics:
        counters = self.counters[model.name]

        def duration(value: Duration) -> service_pb2.StatisticDuration:
            return service_pb2.StatisticDuration(count=value.count, ns=value.ns)

        return service_pb2.ModelStatistics(
            name=model.name, version=model.version, last_inference=counters.last_inference_ms,
            inference_count=counters.inference_count, execution_count=counters.execution_count,
            inference_stats=service_pb2.InferStatistics(
                success=duration(counters.success), fail=duration(counters.fail),
                queue=duration(counters.queue), compute_input=duration(counters.compute_input),
                compute_infer=duration(counters.compute_infer),
                compute_output=duration(counters.compute_output)))


def _shares(kind: Kind, encode: float, timing: Timing) -> tuple[float, float]:
    """Seconds that a model of this kind waited and computed."""
    if kind is Kind.PREPROCESSING:
        return 0.0, encode
    if kind is Kind.POSTPROCESSING:  # text is made in the steps that make the tokens
        return 0.0, 0.0
    if kind is Kind.CONTEXT:
        return timing.queue, timing.context
    if kind is Kind.GENERATION:
        return timing.handover, max(0.0, timing.total - timing.ttft - timing.handover)
    return timing.queue, max(0.0, timing.total - timing.queue)
