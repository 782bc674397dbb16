"""What a job is doing at one moment: plain data for metrics, health and pages. Pure.

Made from rank 0's ledger whenever somebody asks (:meth:`Orchestrator.snapshot`); nothing refers to it
afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from disagg_mpi.orchestrator.table import Entry, InstanceView, State

PHASES = (State.QUEUED, State.CONTEXT, State.HANDOVER, State.GENERATION)
"""Those of a request that is not over."""


class InstanceSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """One instance, as rank 0's ledger has it."""

    id: int
    role: str
    name: str
    ranks: tuple[int, ...]
    """The leader's first."""
    shape: str
    """``tp2``, ``tp1pp2``."""
    hosts: tuple[str, ...]
    """Of each of ``ranks``; empty where nobody has said."""
    device_ids: tuple[int, ...] | None
    """Of each of ``ranks``, if the configuration names them."""
    num_blocks: int
    promised_blocks: int
    """Blocks that requests hold there, or were promised; what the prefix cache keeps beside is free."""
    tokens_per_block: int
    max_batch_size: int
    num_requests: int
    """Requests that it computes, or that were promised a place."""
    pending_context_tokens: int
    silent_seconds: float
    """How long its leader has owed somebody a word; 0 where it owes none."""


class JobSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """The whole job."""

    instances: list[InstanceSnapshot]
    phases: dict[str, int]
    """Phase (``queued``, ``context``, ``hand-over``, ``generation``) → sequences that are in it."""
    failure: str | None
    """Why the job cannot go on, if it cannot."""
    is_closing: bool

    @property
    def num_open(self) -> int:
        return sum(self.phases.values())


def take_snapshot(
    views: Sequence[InstanceView], entries: Iterable[Entry], now: float
) -> tuple[list[InstanceSnapshot], dict[str, int]]:
    """Both halves of a snapshot. ``now``: monotonic seconds."""
    phases = {phase.value: 0 for phase in PHASES}
    owed_since: dict[int, float] = {}
    for entry in entries:
        state = entry.state
        if state in PHASES:
            phases[state.value] += 1
        # In an early hand-over generation rightly says nothing while the context is computed.
        for holder in entry.holders[:1] if state is State.CONTEXT else list(entry.holders):
            owed_since[holder.id] = min(owed_since.get(holder.id, now), entry.given_at)
    return [_snapshot_of(view, owed_since.get(view.id), now) for view in views], phases


def _snapshot_of(view: InstanceView, owed_since: float | None, now: float) -> InstanceSnapshot:
    silent = 0.0 if owed_since is None else max(0.0, now - max(owed_since, view.heard_at))
    return InstanceSnapshot(
        id=view.id, role=view.role.value, name=view.name, ranks=view.ranks, shape=view.shape,
        hosts=view.hosts, device_ids=view.device_ids,
        num_blocks=view.limits.num_blocks, promised_blocks=view.limits.num_blocks - view.free_blocks,
        tokens_per_block=view.limits.tokens_per_block, max_batch_size=view.limits.max_batch_size,
        num_requests=view.num_requests, pending_context_tokens=view.pending_context_tokens,
        silent_seconds=silent)
