"""One request inside an engine: its tokens, its blocks and how far its computation is. Pure."""

from __future__ import annotations

import time
from enum import Enum, auto

from disagg_mpi.request import ContextPhaseParams, ExecutorRequest, PhaseTiming, RequestType, SamplingParams


def positions_needed(num_prompt_tokens: int, max_tokens: int) -> int:
    """KV positions that a request can come to use: the last token's is never computed."""
    return num_prompt_tokens + max_tokens - 1


class Status(Enum):
    WAITING = auto()
    """Has no blocks yet, or no longer."""
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
        self.context_length = self.num_prompt_tokens
        """Positions to compute before the next token: the prompt, and after a preemption the output too."""
        self.num_scheduled = 0
        """Positions that are in the pool or in a step that has been launched."""
        self.num_computed = 0
        """Positions whose KV is in the pool."""
        self.num_in_flight = 0
        """Launched steps, not over yet, that this sequence is part of."""
        self.block_ids: list[int] = []
        self.block_hashes: list[int] = []
        """Of the full blocks of ``token_ids``, as far as they were asked for."""
        self.status = Status.WAITING
        self.context_params: ContextPhaseParams | None = request.context_phase_params
        """What the context phase elsewhere left; ``None`` until it is over, and where there is none."""
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
    def takes_over(self) -> bool:
        """Whether its context is computed elsewhere and has not been taken over yet."""
        return self.request.type is RequestType.GENERATION_ONLY and not self.num_output_tokens

    @property
    def in_context_phase(self) -> bool:
        return self.num_scheduled < self.context_length

    @property
    def can_schedule(self) -> bool:
        """Whether some token is known whose step has not been launched."""
        return self.num_scheduled < len(self.token_ids)

    def hold(self, num_tokens: int) -> None:
        """The first positions are in the blocks already."""
        self.num_scheduled = self.num_computed = num_tokens

    def adopt_context(self, first_tokens: tuple[int, ...]) -> None:
        """The prompt's KV is in place and these tokens were sampled from it elsewhere."""
        self.hold(self.num_prompt_tokens)
        self.token_ids.extend(first_tokens)

    def preempt(self) -> None:
        """Its blocks are given to others: all that is known so far is computed again."""
        self.hold(0)
        self.context_length = len(self.token_ids)
        self.block_ids = []
        self.status = Status.WAITING
        self.timing.num_preempted += 1
