"""What a request's sampling parameters do to a row of logits before a token is chosen from it.

In this order: bias, repetition penalty, presence and frequency penalty, bad words, and last what excludes
tokens as a whole: the grammar of a guided output and the minimum length. Temperature, top-k and top-p come
after it, in the sampler.

A :class:`LogitsAdjuster` belongs to one sequence; the sampler makes it with the sequence's first token and
drops it with the sequence. It holds only what the parameters say, never how far the output is.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np
import numpy.typing as npt
import torch

from disagg_mpi.engine.sequence import Sequence


class LogitsAdjuster:
    """Callable with each of its sequence's rows."""

    def __init__(self, sequence: Sequence, eos_token_ids: Seq[int]) -> None:
        params = sequence.sampling
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.long)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
        self._bad = [(list(ids[:-1]), ids[-1]) for ids in sequence.bad_token_ids]
        self._ends = torch.tensor([*eos_token_ids, *params.stop_token_ids], dtype=torch.long)

    def __call__(self, raw: torch.Tensor, sequence: Sequence) -> torch.Tensor:
        """The row to choose from: ``raw`` itself where nothing applies, else another."""
        params = sequence.sampling
        is_short = sequence.num_output_tokens < params.min_tokens
        if not (sequence.is_adjusted or is_short):
            return raw
        row = raw.clone()
        if params.logit_bias:
            row[self._biased] += self._bias
        if params.has_penalties:
            _penalize(row, sequence)
        for before, last in self._bad:
            if not before or sequence.token_ids[-len(before) :] == before:
                row[last] = -torch.inf
        if sequence.guide is not None:
            self._guide(row, sequence.guide.allowed(), is_short)
        elif is_short:
            row[self._ends] = -torch.inf
        return row

    def _guide(self, row: torch.Tensor, allowed: npt.NDArray[np.bool_], is_short: bool) -> None:
        """Leave what the grammar allows, without the ends if the output is short and can go on."""
        mask = torch.from_numpy(allowed)
        if is_short:
            longer = mask.clone()
            longer[self._ends] = False
            mask = longer if longer.any() else mask
        row.masked_fill_(~mask, -torch.inf)


def _penalize(row: torch.Tensor, sequence: Sequence) -> None:
    params = sequence.sampling
    if params.repetition_penalty != 1.0:
        seen = torch.tensor(sorted(set(sequence.token_ids)))
        values = row[seen]
        penalty = params.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    output = sequence.output_token_ids
    if output:
        used, counts = torch.tensor(output).unique(return_counts=True)  # type: ignore[no-untyped-call]
        row[used] -= params.presence_penalty + params.frequency_penalty * counts
