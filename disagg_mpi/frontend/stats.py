"""What became of the requests of all front ends: counts, times, and who wants to hear of each end.

One :class:`ServingStats` a server, made beside :class:`~disagg_mpi.frontend.served.Served` and used in the
server's event loop alone, so it needs no lock. :class:`~disagg_mpi.frontend.gate.Gate` feeds it; metrics,
KServe's statistics and pages read it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from disagg_mpi.request import Result, Timing

Outcome = Literal["done", "cancelled", "deadline", "failed"]

OUTCOMES: tuple[Outcome, ...] = ("done", "cancelled", "deadline", "failed")


@dataclass
class Duration:
    """How often something took place and how long it took in all, as KServe's ``StatisticDuration``."""

    count: int = 0
    seconds: float = 0.0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.seconds += seconds

    @property
    def ns(self) -> int:
        return round(self.seconds * 1e9)


@dataclass(frozen=True)
class Ended:
    """One request that is over."""

    result: Result
    outcome: Outcome
    api: str
    """The front end that it came by: ``openai``, ``kserve-grpc``, …"""
    started_at: float
    """Epoch seconds."""
    seconds: float
    """From its submission to its end."""


@dataclass
class ServingStats:
    """Totals since the server started. Seconds are summed over choices, which run side by side."""

    num_refused: dict[str, int] = field(default_factory=dict)
    """Why (``overloaded``, ``invalid``, …) → requests that were turned away before they began."""
    num_open: int = 0
    """Sequences that are not over."""
    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    """Requests that ended with an error of the job's, a cancel or a deadline."""
    queue: Duration = field(default_factory=Duration)
    context: Duration = field(default_factory=Duration)
    handover: Duration = field(default_factory=Duration)
    generation: Duration = field(default_factory=Duration)
    """From the first token to the last."""
    outcomes: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that were not computed, since the prefix cache had them."""
    num_generated_tokens: int = 0
    num_handovers: int = 0
    handover_bytes: int = 0
    """Bytes that were copied for hand-overs; where block tables moved and the bytes stayed, none."""
    transfer_seconds: float = 0.0
    last_request_at: float = 0.0
    """Epoch seconds; 0 before the first."""
    observers: list[Callable[[Ended], None]] = field(default_factory=list)
    """Called with each request that ends, in the server's loop: keep them short."""

    def refused(self, reason: str) -> None:
        self.num_refused[reason] = self.num_refused.get(reason, 0) + 1

    def began(self, num_sequences: int) -> None:
        self.num_open += num_sequences
        self.last_request_at = time.time()

    def ended(self, ended: Ended) -> None:
        result = ended.result
        self.num_open -= len(result.choices)
        self.outcomes[ended.outcome] += 1
        (self.success if ended.outcome == "done" else self.fail).add(ended.seconds)
        self.num_prompt_tokens += len(result.prompt_token_ids)
        for choice in result.choices:
            self._add(choice.timing)
            self.num_generated_tokens += len(choice.token_ids)
        for observe in self.observers:
            observe(ended)

    def _add(self, timing: Timing) -> None:
        self.queue.add(timing.queue)
        self.num_cached_tokens += timing.cached_tokens
        if timing.context:
            self.context.add(timing.context)
        if timing.transport:
            self.num_handovers += 1
            self.handover.add(timing.handover)
            self.handover_bytes += timing.handover_bytes
            self.transfer_seconds += timing.transfer
        if timing.ttft:
            self.generation.add(timing.total - timing.ttft)


def outcome_of(result: Result) -> Outcome:
    """How a request ended, by the worst of its choices."""
    reasons = {choice.finish_reason for choice in result.choices}
    if reasons <= {"stop", "length"} and result.error is None:
        return "done"
    if "error" in reasons or None in reasons:
        return "failed"
    return "deadline" if "deadline" in reasons else "cancelled"
