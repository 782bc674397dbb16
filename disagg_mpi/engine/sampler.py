"""From logits to tokens, the same at every layout.

Randomness is a pure function of (seed, continuation, position): Philox, a counter-based generator
(Salmon et al., SC'11), gives the one uniform number that a token is drawn with. No generator state
exists, so none has to be handed over, and batches, layouts and restarts do not change the numbers; the
logits they meet differ in their last bits with the batch's shape, which hardly ever decides a draw.

Order, as in the field: what :mod:`disagg_mpi.engine.logits` does to the row, temperature, top-k, top-p.
Log-probabilities are those of the raw logits.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
import torch

from disagg_mpi.engine.logits import LogitsAdjuster
from disagg_mpi.engine.logprobs import token_logprobs
from disagg_mpi.engine.sequence import Sequence
from disagg_mpi.request import TokenLogprobs


class Sampled(msgspec.Struct, frozen=True):
    """One new token of one sequence."""

    token: int
    logprobs: TokenLogprobs | None = None
    logits: bytes | None = None


class NoToken(msgspec.Struct, frozen=True):
    """A sequence to which no token can be given, and why."""

    error: str


def uniform(seed: int, sequence_index: int, position: int) -> float:
    """The number in [0, 1) that the token at ``position`` of this continuation is drawn with."""
    bits = np.random.Philox(key=(sequence_index << 64) | seed, counter=position)
    return float(np.random.Generator(bits).random())


class Sampler:
    """Holds what all requests share, the end-of-sequence tokens, and prepares what each asks for."""

    def __init__(self, eos_token_ids: Seq[int]) -> None:
        self._eos = list(eos_token_ids)
        self._adjusters: WeakKeyDictionary[Sequence, LogitsAdjuster] = WeakKeyDictionary()

    def __call__(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> list[Sampled | NoToken]:
        """``logits``: ``[len(sequences), vocabulary]``, fp32, raw."""
        greedy = logits.argmax(dim=-1).tolist()
        return [self._one(row, sequence, token) if _is_special(sequence) else Sampled(token)
                for row, sequence, token in zip(logits, sequences, greedy, strict=True)]

    def _one(self, raw: torch.Tensor, sequence: Sequence, greedy: int) -> Sampled | NoToken:
        params = sequence.sampling
        row = self._adjuster(sequence)(raw, sequence)
        if sequence.guide is not None and sequence.guide.error:
            return NoToken(f"guided: {sequence.guide.error}")
        if row is not raw and row.max() == -torch.inf:
            return NoToken("no token is left to choose from: guided, bad, bad_token_ids and min_tokens "
                           "exclude all of the vocabulary together")
        if params.temperature == 0.0:
            token = greedy if row is raw else int(row.argmax())
        else:
            token = _draw(row, sequence)
        logprobs = None
        if params.logprobs is not None:
            (logprobs,) = token_logprobs(raw.unsqueeze(0), [token], params.logprobs)
        kept = raw.numpy().tobytes() if params.return_generation_logits else None
        return Sampled(token, logprobs, kept)

    def _adjuster(self, sequence: Sequence) -> LogitsAdjuster:
        adjuster = self._adjusters.get(sequence)
        if adjuster is None:
            adjuster = self._adjusters[sequence] = LogitsAdjuster(sequence, self._eos)
        return adjuster


def _is_special(sequence: Sequence) -> bool:
    """Whether a plain argmax is not all that this sequence asks for."""
    return not sequence.is_plain or sequence.num_output_tokens < sequence.sampling.min_tokens


def _draw(row: torch.Tensor, sequence: Sequence) -> int:
    """Inverse of the cumulated distribution in float64, so that rounding hardly ever decides."""
    params = sequence.sampling
    # The largest is 0 before the division: no temperature is small enough to overflow.
    scaled = (row.double() - row.max()) / params.temperature
    if 0 < params.top_k < len(scaled):
        scaled[scaled < scaled.topk(params.top_k).values[-1]] = -torch.inf
    probabilities = torch.softmax(scaled, dim=-1)
    if params.top_p < 1.0:
        ordered, indices = probabilities.sort(descending=True, stable=True)
        # Keep a token if those before it do not yet reach top_p: always at least the first.
        beyond = ordered.cumsum(0) - ordered >= params.top_p
        probabilities[indices[beyond]] = 0.0
    cumulated = probabilities.cumsum(0)
    assert params.seed is not None  # checked at enqueue
    point = uniform(params.seed, sequence.request.sequence_index, len(sequence.token_ids))
    target = torch.tensor([point], dtype=torch.float64) * cumulated[-1]
    token = int(torch.searchsorted(cumulated, target, right=True))
    # The very end of the distribution: the last token that has any probability.
    return min(token, int(probabilities.nonzero()[-1]))
