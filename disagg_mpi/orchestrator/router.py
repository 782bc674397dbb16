"""Which instances serve a request: pure functions over rank 0's ledger.

Least loaded, truly: fewest promised tokens of context, largest free share of generation blocks. (Upstream
promised the fewest in flight and did round robin.)
"""

from __future__ import annotations

from collections.abc import Iterable

from disagg_mpi.orchestrator.table import InstanceView


def pick_generation(instances: Iterable[InstanceView], num_blocks: int) -> InstanceView | None:
    """The instance with the largest share of free blocks that can hold the request now."""
    able = [i for i in instances
            if i.free_blocks >= num_blocks and i.num_requests < i.limits.max_batch_size]
    return max(able, default=None, key=lambda i: (
        (i.free_blocks - num_blocks) / i.limits.num_blocks, -i.num_requests, -i.id))


def pick_context(instances: Iterable[InstanceView]) -> InstanceView:
    """The instance with the fewest prompt tokens still to compute."""
    return min(instances, key=lambda i: (i.pending_context_tokens, i.num_requests, i.id))
