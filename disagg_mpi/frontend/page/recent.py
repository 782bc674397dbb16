"""The last requests that ended: where each one's time went, and percentiles over those of the last minutes.

A :class:`RecentRequests` lives as long as its server's application, in the server's event loop alone. It is
one of :class:`~disagg_mpi.frontend.stats.ServingStats`' observers: of each request it keeps a few numbers,
nothing that a client wrote and nothing that the model answered.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence

import msgspec

from disagg_mpi.frontend.stats import Ended, Outcome

NUM_TIMELINES = 40
NUM_SAMPLES = 2000
"""Choices whose TTFT and TPOT are kept at most; under more load the window is shorter."""

FRACTIONS = (0.5, 0.9, 0.99)


class Timeline(msgspec.Struct, frozen=True, kw_only=True):
    """One request that is over. Seconds; of several choices, those of the one that took longest."""

    number: int
    """Of the server's requests that ended, from 1."""
    started_at: float
    """Epoch seconds."""
    api: str
    outcome: Outcome
    num_choices: int
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt: not computed, since the prefix cache had them."""
    output_tokens: int
    queue: float
    context: float
    handover: float
    generation: float
    """From the first token, or where generation could go on after it, to the end."""
    other: float
    """Before the first token, and in neither queue nor context: messages, and a leader that is in a step and
    takes none. Where no token came, all the rest."""
    ttft: float
    """0: no token came."""
    tpot: float
    total: float
    handover_bytes: int
    kv_bytes: int
    transport: str
    num_preempted: int


class Percentiles(msgspec.Struct, frozen=True, kw_only=True):
    """Of ``count`` durations, in seconds; 0 where there are none."""

    count: int
    p50: float
    p90: float
    p99: float


class RecentRequests:
    """A ring of timelines, and one of TTFT and TPOT."""

    def __init__(self, window_seconds: float) -> None:
        self._window_seconds = window_seconds
        self._timelines: deque[Timeline] = deque(maxlen=NUM_TIMELINES)
        self._samples: deque[tuple[float, float, float]] = deque(maxlen=NUM_SAMPLES)
        """(monotonic time of the end, TTFT, TPOT) of each choice."""
        self._num_ended = 0

    def observe(self, ended: Ended) -> None:
        self._num_ended += 1
        self._timelines.append(_timeline_of(self._num_ended, ended))
        now = time.monotonic()
        self._samples.extend((now, choice.timing.ttft, choice.timing.tpot) for choice in ended.result.choices)

    @property
    def timelines(self) -> list[Timeline]:
        """The last ones, the latest end first."""
        return list(reversed(self._timelines))

    def percentiles(self) -> tuple[Percentiles, Percentiles]:
        """Of TTFT and of TPOT (a request's mean time between tokens), of what ended within the window."""
        oldest = time.monotonic() - self._window_seconds
        while self._samples and self._samples[0][0] < oldest:
            self._samples.popleft()
        return (percentiles_of([ttft for _, ttft, _ in self._samples if ttft]),
                percentiles_of([tpot for _, _, tpot in self._samples if tpot]))


def percentiles_of(values: Sequence[float]) -> Percentiles:
    """By nearest rank: each is a value that was measured."""
    ordered = sorted(values)
    found = [ordered[math.ceil(fraction * len(ordered)) - 1] if ordered else 0.0 for fraction in FRACTIONS]
    return Percentiles(count=len(ordered), p50=found[0], p90=found[1], p99=found[2])


def _timeline_of(number: int, ended: Ended) -> Timeline:
    result = ended.result
    timing = max((choice.timing for choice in result.choices), key=lambda timing: timing.total)
    # A job that failed has no timing of what was under way, but the gate has seen how long it was.
    total = timing.total or ended.seconds
    # The hand-over comes after the first token, which context sends at once.
    generation = max(0.0, timing.total - timing.ttft - timing.handover) if timing.ttft else 0.0
    spent = timing.queue + timing.context + timing.handover + generation
    return Timeline(
        number=number, started_at=ended.started_at, api=ended.api, outcome=ended.outcome,
        num_choices=len(result.choices), prompt_tokens=len(result.prompt_token_ids),
        cached_tokens=timing.cached_tokens, output_tokens=result.usage.completion_tokens,
        queue=timing.queue, context=timing.context, handover=timing.handover, generation=generation,
        other=max(0.0, total - spent), ttft=timing.ttft, tpot=timing.tpot, total=total,
        handover_bytes=timing.handover_bytes, kv_bytes=timing.kv_bytes, transport=timing.transport,
        num_preempted=timing.num_preempted)
