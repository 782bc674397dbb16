"""What rank 0 knows: every request that is not over, and every instance. Pure data.

            admit                 context steps            hand-over            generation steps
  QUEUED ─────────► CONTEXT ───────────────────► HANDOVER ───────────► GENERATION ───────► DONE
     │                                                                                     │
     └──────────────────────── cancel, deadline or failure at any arrow ──► CANCELLED / FAILED

An aggregated instance takes CONTEXT straight to GENERATION. An :class:`Entry` is one continuation
(a request with ``n`` of them has ``n`` entries); it is in the table until its final response.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Protocol

from disagg_mpi.orchestrator.prefix_index import PrefixIndex
from disagg_mpi.request import ExecutorLimits, ExecutorRequest, FinishReason, PoolBlocks, Response, Timing
from disagg_mpi.topology import Role


class State(StrEnum):
    QUEUED = "queued"
    CONTEXT = "context"
    HANDOVER = "hand-over"
    GENERATION = "generation"
    DONE = "done"
    CANCELLED = "cancelled"
    FAILED = "failed"


_DONE, _CANCELLED, _FAILED = State.DONE, State.CANCELLED, State.FAILED


class InstanceView:
    """Rank 0's ledger of one instance: what it has promised of it."""

    def __init__(self, instance_id: int, role: Role, name: str, leader: int, limits: ExecutorLimits,
                 ways: Mapping[int, str] | None = None, pool: str = "",
                 ranks: Sequence[int] = (), shape: str = "tp1", hosts: Sequence[str] = (),
                 device_ids: Sequence[int] | None = None) -> None:
        self.id = instance_id
        self.role = role
        self.name = name
        self.leader = leader
        self.ranks = tuple(ranks) or (leader,)
        self.shape = shape
        self.hosts = tuple(hosts)
        """The host's name for each of ``ranks``."""
        self.device_ids = None if device_ids is None else tuple(device_ids)
        self.limits = limits
        self.free_blocks = limits.num_blocks
        """Blocks not promised to any request: never more than the instance has free."""
        self.num_requests = 0
        self.pending_context_tokens = 0
        self.ways = ways or {}
        """Id of a context instance → how its KV-cache comes here."""
        self.pool = pool
        """Name of the memory whose prefixes it reuses; empty without a prefix cache."""
        self.prefix: PrefixIndex | None = None
        """What that memory likely holds; instances of one pool share it."""
        self.heard_at = 0.0
        """Monotonic time of its leader's last word."""


class Sink(Protocol):
    """Who is told what becomes of an entry; called on the pump thread."""

    def on_response(self, entry: Entry, response: Response) -> None:
        """New tokens, or the end (``entry.state`` says which)."""


class Entry:
    """One continuation of one request."""

    __slots__ = (
        "cancel_reason", "context", "context_holding", "context_tokens", "deadline", "first_token_at",
        "generation", "given_at", "hashes", "holders", "is_early", "last_token_at", "num_blocks",
        "num_tokens", "request", "second_token_at", "sink", "state", "submitted_at", "timing", "verdict",
    )

    def __init__(self, request: ExecutorRequest, sink: Sink, deadline: float | None) -> None:
        self.request = request
        self.sink = sink
        self.state = State.QUEUED
        self.deadline = deadline
        """Monotonic time by which it must be over."""
        self.cancel_reason: FinishReason | None = None
        self.context: InstanceView | None = None
        self.generation: InstanceView | None = None
        self.num_blocks = 0
        """Held at ``generation``, or promised there."""
        self.context_tokens = 0
        """Promised of ``context``: prompt tokens that it likely has to compute."""
        self.context_holding: tuple[InstanceView, int] | None = None
        """Where its prompt's blocks are promised until generation has taken over, and how many."""
        self.hashes: dict[int, list[int]] = {}
        """Block size → the hashes of the prompt's full blocks."""
        self.holders: list[InstanceView] = []
        """Those who still owe a final response."""
        self.given_at = 0.0
        """Monotonic time at which its holders got it."""
        self.is_early = False
        """Whether the generation instance has it while its context phase runs."""
        self.verdict: Response | None = None
        """The final response, while others than its sender still owe theirs."""
        self.num_tokens = 0
        self.timing = Timing()
        self.submitted_at = time.monotonic()
        self.first_token_at = 0.0
        self.second_token_at = 0.0
        self.last_token_at = 0.0

    @property
    def id(self) -> int:
        return self.request.request_id

    @property
    def is_over(self) -> bool:
        state = self.state  # asked for each token: identity is five times as fast as `in`
        return state is _DONE or state is _CANCELLED or state is _FAILED

    def count_tokens(self, count: int, now: float) -> None:
        if not self.num_tokens:
            self.first_token_at = now
        elif not self.second_token_at:
            self.second_token_at = now
        self.num_tokens += count
        self.last_token_at = now

    def finish_timing(self, now: float) -> Timing:
        """The end-to-end figures, once nothing more will come."""
        timing = self.timing
        timing.total = now - self.submitted_at
        if self.first_token_at:
            timing.ttft = self.first_token_at - self.submitted_at
        if self.second_token_at:
            timing.second_token = self.second_token_at - self.first_token_at
            timing.tpot = (self.last_token_at - self.first_token_at) / (self.num_tokens - 1)
        return timing


def find_shared_blocks(holdings: Iterable[tuple[str, PoolBlocks]]) -> list[str]:
    """Blocks that two instances both take for theirs, in words.

    Each instance's own books can be right and still name a block of another's; with the counts that each
    checks by itself, disjoint means that no block is lost either.
    """
    problems = []
    runs = sorted((held.pool, first, count, name) for name, held in holdings for first, count in held.runs)
    for (pool, first, count, name), (other_pool, other_first, _, other) in itertools.pairwise(runs):
        if pool == other_pool and other_first < first + count:
            problems.append(f"block {other_first} of pool {pool} is both {name}'s and {other}'s")
    return problems
