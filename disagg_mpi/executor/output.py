"""From tokens to text, and where a stop text ends it: one :class:`TextOutput` a sequence.

It runs at the leader, not at rank 0: rank 0 stays O(1) a step whatever the batch, and a stop text ends a
sequence in the very step that completes it. The state is a function of the output tokens alone, so a
generation instance restores it by replaying the tokens that the context instance has already sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class IncrementalDecoder(Protocol):
    """What is needed of :class:`disagg_mpi.model.tokenizer.Detokenizer`."""

    def push(self, token_ids: Sequence[int]) -> str: ...

    def flush(self) -> str: ...


class TextOutput:
    """Text that may be sent, in order; what could become a stop text is held back."""

    def __init__(self, decoder: IncrementalDecoder | None, stop: Sequence[str]) -> None:
        self._decoder = decoder
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token_ids: Sequence[int]) -> tuple[str, bool]:
        """New final text, and whether a stop text was reached (it and what follows are cut off)."""
        if self._decoder is None:
            return "", False
        return self._release(self._decoder.push(token_ids))

    def finish(self) -> str:
        """What was held back, now that nothing follows."""
        if self._decoder is None:
            return ""
        text, stopped = self._release(self._decoder.flush())
        if not stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> tuple[str, bool]:
        if not self._stop:
            return text, False
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stop)
        cut = len(text) - keep
        self._held = text[cut:]
        return text[:cut], False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
