"""Which instances serve a request, and whether its context phase needs one of its own. Pure.

Functions over rank 0's ledger, and one small state: what context phases and hand-overs have cost so far.
The weights were chosen by ``benchmarks/routing.py`` on public traces; its tables are in docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from disagg_mpi.orchestrator.table import InstanceView

BUSY_LOAD_WEIGHT = 0.1
"""What a queued token counts against one to compute when every context instance has work.

Chosen on the traces themselves: 0.05 and 0.1 do equally well with instances 25 to 90 % busy (mean TTFT within
5 % of the best form tried, with 2 to 8 instances). 1 spreads prefixes and reuses less: 1.0 to 1.3 times
the TTFT up to 60 % busy, 1.4 to 4 times at 83 to 90 %. While some are idle the weight is nearer to 1: with a
fixed 0.1, the bursts of one prefix tried took up to twice as long as spread out; so they take 1.1 times.
"""

FREE_SHARE_LEEWAY = 0.25
"""Generation instances this close to the roomiest, in shares of their blocks, count as equally free."""

EWMA_WEIGHT = 1 / 8
"""Of the newest sample; TCP's choice for round-trip times."""


def pick_context(
    instances: Iterable[InstanceView], num_tokens: int, hashes: Sequence[int], tokens_per_block: int,
    busy_load_weight: float = BUSY_LOAD_WEIGHT,
) -> tuple[InstanceView, int]:
    """The instance for a prompt of ``num_tokens`` tokens, and how many of them it need not compute.

    Least ``weight * tokens queued there + tokens left to compute``; ties by fewest requests, then id. The
    weight is 1 when all are idle (this request's first token as early as can be) and ``busy_load_weight``
    when none is (the fewest tokens computed in all): what an idle instance computes twice costs nobody,
    what a busy one computes twice delays everyone behind it. With no ``hashes``: the least loaded.
    """
    views = list(instances)
    busy = sum(view.pending_context_tokens > 0 for view in views) / len(views)
    weight = 1 - (1 - busy_load_weight) * busy
    found = [(view, hit_tokens(view, num_tokens, hashes, tokens_per_block)) for view in views]
    return min(found, key=lambda pair: (
        weight * pair[0].pending_context_tokens + num_tokens - pair[1],
        pair[0].num_requests, pair[0].id))


def pick_generation(
    instances: Iterable[InstanceView], num_blocks: int, hashes: Sequence[int] = (),
    source_pool: str | None = None,
) -> InstanceView | None:
    """An instance that can hold the request's ``num_blocks`` now; ``None`` where there is none.

    Of those whose share of free blocks is within ``FREE_SHARE_LEEWAY`` of the largest: the one to which the
    fewest of the prompt's blocks (``hashes``) must come, none if it shares ``source_pool`` with the context
    instance; then the largest free share. An aggregated instance is picked so too: the blocks that it holds
    need no computing.
    """
    shares = {view: (view.free_blocks - num_blocks) / view.limits.num_blocks for view in instances
              if view.free_blocks >= num_blocks and view.num_requests < view.limits.max_batch_size}
    enough = max(shares.values(), default=0.0) - FREE_SHARE_LEEWAY

    def held(view: InstanceView) -> int:
        if view.pool == source_pool:
            return len(hashes) + 1
        return 0 if view.prefix is None else view.prefix.match(hashes)

    return max((view for view, share in shares.items() if share >= enough), default=None,
               key=lambda view: (held(view), shares[view], -view.num_requests, -view.id))


def hit_tokens(
    instance: InstanceView, num_tokens: int, hashes: Sequence[int], tokens_per_block: int
) -> int:
    """Prompt tokens that ``instance`` likely holds, in whole blocks; the last token is always computed."""
    if instance.prefix is None:
        return 0
    return instance.prefix.match(hashes[:(num_tokens - 1) // tokens_per_block]) * tokens_per_block


class LocalContext:
    """Whether a context phase runs on the generation instance itself: conditional disaggregation.

    ``threshold``: prompts with at most so many tokens left to compute, whatever the load; 0 for none.
    ``None``: decide by what was measured. Then local it is if the delay that this causes is less than the
    delay that it saves, summed over requests. Here: each of the ``num_running`` requests stands still while
    the prompt is computed. There: the prompt waits for those queued before it and for the hand-over. Its
    own computing takes as long in either place, as far as the same tokens are cached. And it must fit into
    one step of ``max_num_tokens`` beside a token of each running request, so that none misses more than one
    step. Until something was measured, nothing is local.

    Made with the launch, used by the dispatcher's thread.
    """

    def __init__(self, threshold: int | None, max_num_tokens: int) -> None:
        self._threshold = threshold
        self._max_num_tokens = max_num_tokens
        self._tokens = 0.0
        self._seconds = 0.0
        self._handover: float | None = None

    def observe_context(self, tokens: int, seconds: float) -> None:
        """A context phase has computed ``tokens`` in ``seconds``, waiting not counted."""
        # The ratio of two averages: a short prompt with its fixed costs has little say.
        weight = EWMA_WEIGHT if self._tokens else 1.0
        self._tokens += weight * (tokens - self._tokens)
        self._seconds += weight * (seconds - self._seconds)

    def observe_handover(self, seconds: float) -> None:
        """A hand-over has held its request up for ``seconds``."""
        before = seconds if self._handover is None else self._handover
        self._handover = before + EWMA_WEIGHT * (seconds - before)

    def is_local(
        self, uncached_tokens: int, context_queue_tokens: int, num_running: int,
        context_uncached_tokens: int | None = None,
    ) -> bool:
        """Whether to compute ``uncached_tokens`` prompt tokens on a generation instance.

        It runs ``num_running`` requests; the context instance to be used otherwise has
        ``context_queue_tokens`` before this one, of which it would compute ``context_uncached_tokens``
        (``None``: as many as here).
        """
        if self._threshold is not None:
            return uncached_tokens <= self._threshold
        if self._handover is None or not self._tokens:
            return False
        if uncached_tokens + num_running > self._max_num_tokens:
            return False
        seconds_per_token = self._seconds / self._tokens
        there = uncached_tokens if context_uncached_tokens is None else context_uncached_tokens
        return (uncached_tokens * (1 + num_running) * seconds_per_token
                <= (context_queue_tokens + there) * seconds_per_token + self._handover)
