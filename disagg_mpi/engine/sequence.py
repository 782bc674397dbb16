"""One request inside an engine: its tokens, its blocks and how far its computation is. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence as Seq
from enum import Enum, auto
from typing import Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from disagg_mpi.request import (
    ContextPhaseParams,
    ExecutorRequest,
    PhaseTiming,
    RequestType,
    SamplingParams,
    TokenLogprobs,
)


def positions_needed(num_prompt_tokens: int, max_tokens: int) -> int:
    """KV positions that a request can come to use: the last token's is never computed."""
    return num_prompt_tokens + max_tokens - 1


class Status(Enum):
    WAITING = auto()
    """Has no blocks yet, or no longer."""
    HANDOVER = auto()
    """Has blocks; its KV-cache is on its way here."""
    RUNNING = auto()


class Guide(Protocol):
    """Where an output stands in what it must be; see :class:`disagg_mpi.engine.guided.Matcher`."""

    def advance(self, token_ids: Seq[int]) -> None:
        """These are the output's next tokens."""

    @property
    def error(self) -> str:
        """Why the output cannot go on; empty while it can."""

    @property
    def is_over(self) -> bool:
        """Whether nothing can follow."""

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Which tokens of the model's vocabulary may be next; ends of sequence where it may end."""


class PromptScores(msgspec.Struct):
    """What the model says of the prompt's own tokens, as far as it is computed; ``None``: not asked for."""

    logprobs: list[TokenLogprobs | None] | None
    logits: list[bytes] | None

    @classmethod
    def wanted_by(cls, request: ExecutorRequest) -> PromptScores | None:
        if not request.scores_prompt:
            return None
        params = request.sampling
        return cls([None] if params.prompt_logprobs is not None else None,
                   [] if params.return_context_logits else None)


class Sequence:
    """A request from enqueue to its last token. Owned by the engine, changed by it alone."""

    def __init__(self, request: ExecutorRequest, bad_token_ids: Seq[Seq[int]] = (),
                 guide: Guide | None = None) -> None:
        """``bad_token_ids``: of the request's bad texts, beside those it names itself; ``guide``: at the
        start of what ``guided`` asks for."""
        self.request = request
        self.id = request.request_id
        self.sampling: SamplingParams = request.sampling
        self.token_ids: list[int] = list(request.prompt_token_ids)
        """Prompt and output."""
        self.num_prompt_tokens = len(self.token_ids)
        self.bad_token_ids = [*self.sampling.bad_token_ids, *bad_token_ids]
        self.guide = guide
        params = self.sampling
        self.is_adjusted = (params.has_penalties or bool(params.logit_bias or self.bad_token_ids)
                            or guide is not None)
        """Whether its logits are changed before a token is chosen; the minimum length aside."""
        self.is_plain = not (self.is_adjusted or params.temperature or params.logprobs is not None
                             or params.return_generation_logits)
        """Whether the likeliest token is all that it asks for; the minimum length aside."""
        self.prompt_scores = PromptScores.wanted_by(request)
        """Gathered with the prompt's chunks; gone once the first token is sampled."""
        self.context_length = self.num_prompt_tokens
        """Positions to compute before the next token: the prompt, and after a preemption the output too."""
        self.num_scheduled = 0
        """Positions that are in the pool or in a step that has been launched."""
        self.num_computed = 0
        """Positions whose KV is in the pool."""
        self.num_in_flight = 0
        """Launched steps, not over yet, that this sequence is part of."""
        self.num_promised = 0
        """Tokens that launched steps will give it and that later ones may start from unseen."""
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
        """Whether some token is known, or promised, whose step has not been launched."""
        return self.num_scheduled < len(self.token_ids) + self.num_promised

    @property
    def is_drawn_on_device(self) -> bool:
        """Whether its next token, after those promised, can be chosen where its logits are made: from nothing
        but them, temperature, top-k and top-p."""
        params = self.sampling
        return not (self.is_adjusted or params.logprobs is not None or params.return_generation_logits
                    or self.num_output_tokens + self.num_promised < params.min_tokens)

    def promise(self) -> None:
        """A launched step gives it a token on the device: the step after it need not wait for its id, unless
        it is the last one that may be."""
        num_known = self.num_output_tokens + self.num_promised
        if not self.is_context_only and num_known + 1 < self.sampling.max_tokens:
            self.num_promised += 1

    def take_prompt_scores(self) -> PromptScores | None:
        """All of them, once: the prompt is not scored again after this."""
        scores, self.prompt_scores = self.prompt_scores, None
        return scores

    def append(self, token: int) -> None:
        """The output's next token."""
        self.token_ids.append(token)
        self.num_promised = max(0, self.num_promised - 1)
        if self.guide is not None:
            self.guide.advance((token,))

    def hold(self, num_tokens: int) -> None:
        """The first positions are in the blocks already."""
        self.num_scheduled = self.num_computed = num_tokens

    def adopt_context(self, first_tokens: tuple[int, ...]) -> None:
        """The prompt's KV is in place and these tokens were sampled from it elsewhere."""
        self.hold(self.num_prompt_tokens)
        for token in first_tokens:
            self.append(token)

    def preempt(self) -> None:
        """Its blocks are given to others: all that is known so far is computed again."""
        self.hold(0)
        self.context_length = len(self.token_ids)
        if self.prompt_scores is not None:
            self.prompt_scores = PromptScores.wanted_by(self.request)
        self.block_ids = []
        self.status = Status.WAITING
        self.timing.num_preempted += 1
