"""What the page shows, as JSON: made when somebody asks, and for all who ask within an interval once.

A :class:`PageState` lives as long as its server's application, in the server's event loop alone. It costs
O(instances + open requests + recent ones) an interval while pages are open, and nothing while none is; so
nothing is gathered over time here: the page itself keeps the history that it draws.
"""

from __future__ import annotations

import socket
import time

import msgspec

import disagg_mpi
from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.health import Health
from disagg_mpi.frontend.page.recent import FRACTIONS, Percentiles, RecentRequests, Timeline
from disagg_mpi.frontend.stats import Outcome
from disagg_mpi.orchestrator.snapshot import InstanceSnapshot

INTERVAL_SECONDS = 0.5


class State(msgspec.Struct, frozen=True, kw_only=True):
    """One moment of the server. Durations in seconds."""

    at: float
    """Monotonic; with ``num_tokens`` of two states it gives tokens a second."""
    model: str
    version: str
    host: str
    """Rank 0's."""
    max_model_len: int
    uptime: float
    problem: str | None
    """Why the job cannot make progress, if it cannot."""
    instances: list[InstanceSnapshot]
    phases: dict[str, int]
    num_tokens: int
    """Generated since the start, those of open requests included."""
    outcomes: dict[Outcome, int]
    num_refused: int
    window: float
    """What the percentiles are over, at most."""
    ttft: Percentiles
    itl: Percentiles
    """Inter-token latency: all gaps between tokens as rank 0 saw them."""
    tpot: Percentiles
    recent: list[Timeline]


class PageState:
    """Renders the state of one server."""

    def __init__(self, gate: Gate, health: Health, interval: float = INTERVAL_SECONDS) -> None:
        self._gate = gate
        self._health = health
        self._interval = interval
        self._recent = RecentRequests(gate.served.orchestrator.pace.window_seconds)
        self._host = socket.gethostname()
        self._started_at = time.monotonic()
        self._rendered = b""
        self._rendered_at = -interval
        gate.stats.observers.append(self._recent.observe)

    def render(self) -> bytes:
        """The state as JSON, at most an interval old."""
        now = time.monotonic()
        if now - self._rendered_at >= self._interval:
            self._rendered, self._rendered_at = msgspec.json.encode(self._state(now)), now
        return self._rendered

    def _state(self, now: float) -> State:
        served, stats = self._gate.served, self._gate.stats
        pace = served.orchestrator.pace
        job = served.orchestrator.snapshot()
        ttft, tpot = self._recent.percentiles()
        num_gaps, (p50, p90, p99) = pace.gaps(FRACTIONS)
        return State(
            at=now, model=served.name, version=disagg_mpi.__version__, host=self._host,
            max_model_len=served.max_model_len, uptime=now - self._started_at,
            problem=self._health.problem(), instances=job.instances, phases=job.phases,
            num_tokens=pace.num_tokens, outcomes=stats.outcomes, num_refused=sum(stats.num_refused.values()),
            window=pace.window_seconds, ttft=ttft, tpot=tpot,
            itl=Percentiles(count=num_gaps, p50=p50, p90=p90, p99=p99), recent=self._recent.timelines)
