"""How many tokens come to rank 0 and how far apart: a total, and the gaps of the last minutes. Pure.

One :class:`Pace` a dispatcher, fed by the pump thread with each response that has tokens; read from any
thread. Gaps are counted in buckets, not kept: a token costs a logarithm and an addition whatever the load,
and a reader gets percentiles of every gap, not of a sample or of requests' means.
"""

from __future__ import annotations

import bisect
import itertools
import math
import time
from collections import deque
from collections.abc import Sequence

PACE_WINDOW_SECONDS = 300.0

_NUM_SLOTS = 30
"""Parts of the window; the oldest is forgotten as a whole."""

# Buckets from 8 µs to 9 minutes, each 4.4 % wider than the one before: what is told is off by 2.2 % at most.
_SHORTEST = 2.0**-17
_PER_OCTAVE = 16
_NUM_BUCKETS = 26 * _PER_OCTAVE


class Pace:
    """Counts tokens, and the gaps between a sequence's tokens as rank 0 saw them."""

    def __init__(self, window_seconds: float = PACE_WINDOW_SECONDS) -> None:
        self.num_tokens = 0
        """Since the start."""
        self.window_seconds = window_seconds
        self._slot_seconds = window_seconds / _NUM_SLOTS
        self._slots: deque[tuple[int, list[int]]] = deque(maxlen=_NUM_SLOTS)
        """(number of the slot since the clock's zero, gaps in each bucket)."""
        self._last_gap, self._last_bucket = 0.0, 0

    def add(self, count: int, now: float, last_token_at: float) -> None:
        """One sequence got ``count`` tokens at ``now`` and its last ones at ``last_token_at`` (0: none yet).

        Tokens that come together have one gap: nobody waited between them.
        """
        self.num_tokens += count
        if not last_token_at:
            return
        slot = int(now / self._slot_seconds)
        if not self._slots or self._slots[-1][0] != slot:
            self._slots.append((slot, [0] * _NUM_BUCKETS))
        gap = now - last_token_at
        if gap != self._last_gap:  # sequences that step together have one gap
            self._last_gap, self._last_bucket = gap, _bucket_of(gap)
        self._slots[-1][1][self._last_bucket] += 1

    def gaps(self, fractions: Sequence[float], now: float | None = None) -> tuple[int, list[float]]:
        """How many gaps the window has, and below which seconds each of ``fractions`` of them lies."""
        oldest = int((time.monotonic() if now is None else now) / self._slot_seconds) - _NUM_SLOTS
        slots = [counts for slot, counts in tuple(self._slots) if slot > oldest]
        up_to = list(itertools.accumulate(sum(column) for column in zip(*slots, strict=True)))
        if not up_to:
            return 0, [0.0] * len(fractions)
        total = up_to[-1]
        return total, [_middle_of(bisect.bisect_left(up_to, math.ceil(fraction * total)))
                       for fraction in fractions]


def _bucket_of(gap: float) -> int:
    if gap <= _SHORTEST:
        return 0
    return min(int(math.log2(gap / _SHORTEST) * _PER_OCTAVE), _NUM_BUCKETS - 1)


def _middle_of(bucket: int) -> float:
    return float(_SHORTEST * 2 ** ((bucket + 0.5) / _PER_OCTAVE))
