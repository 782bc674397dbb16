"""One request inside an engine: its tokens, its blocks and how far its computation is. Pure."""

from __future__ import annotations

import time
from enum import Enum, auto

from disagg_mpi.request import ExecutorRequest, PhaseTiming, RequestType, SamplingParams


def positions_needed(num_prompt_tokens: int, max_tokens: int) -> int:
    """KV positions that a request can come to use: the last token's is never computed."""
    return num_prompt_tokens + max_tokens - 1


class Status(Enum):
    WAITING = auto()
    """Has no blocks yet."""
    HANDOVER = auto()
    """Has blocks; its KV-cache is on its way here."""
    RUNNING = auto()


class Sequence:
    """A request from enqueue to its last token. Owned by the engine, changed by it alone."""

    def __init__(self, request: ExecutorRequest) -> None:
        self.request = request
        self.id = request.request_id
        self.sampling: SamplingParams = request.sampling
        self.token_ids: list[int] = list(request.prompt_token_ids)
        """Prompt and output."""
        self.num_prompt_tokens = len(self.token_ids)
        self.num_computed = 0
        """Positions whose KV is in the pool."""
        self.block_ids: list[int] = []
        self.status = Status.WAITING
        self.timing = PhaseTiming()
        self.enqueued_at = time.monotonic()
        self.started_at = 0.0

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_context_only(self) -> bool:
        return self.request.type is RequestType.CONTEXT_ONLY

    @property
    def is_generation_only(self) -> bool:
        return self.request.type is RequestType.GENERATION_ONLY

    @property
    def in_context_phase(self) -> bool:
        return self.num_computed < self.num_prompt_tokens

    def adopt_context(self, first_tokens: tuple[int, ...]) -> None:
        """The prompt's KV is in place and these tokens were sampled from it elsewhere."""
        self.num_computed = self.num_prompt_tokens
        self.token_ids.extend(first_tokens)
