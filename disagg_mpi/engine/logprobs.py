"""Log-probabilities of tokens, from raw logits: of the output's, one at a time, and of a prompt's own.

A prompt is scored chunk by chunk: the rows of a step become log-probabilities at once (or bytes, where logits
are asked for), so that no more than a step's rows are kept.
"""

from __future__ import annotations

from collections.abc import Container
from collections.abc import Sequence as Seq

import torch

from disagg_mpi.engine.scheduler import Chunk
from disagg_mpi.engine.sequence import Sequence
from disagg_mpi.request import TokenLogprobs


def token_logprobs(rows: torch.Tensor, tokens: Seq[int], num_top: int) -> list[TokenLogprobs]:
    """For each row of ``[len(tokens), vocabulary]`` its token's log-probability and the ``num_top`` best."""
    values = torch.log_softmax(rows, dim=-1)
    chosen = values.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    best, ids = values.topk(min(num_top, values.shape[-1]))
    return [TokenLogprobs(value, list(zip(top_ids, top_values, strict=True)))
            for value, top_ids, top_values in zip(chosen.tolist(), ids.tolist(), best.tolist(), strict=True)]


def take_scores(chunks: Seq[Chunk], logits: torch.Tensor, leaving: Container[int]) -> torch.Tensor:
    """Score the prompts that are to be, but for the ids in ``leaving``; the rows to choose new tokens from.

    ``logits`` are a step's: of each chunk its ``num_kept`` rows, ``[rows, vocabulary]``. What is returned has
    one row for each chunk that samples.
    """
    if not any(chunk.is_scored for chunk in chunks):
        return logits
    sampling = []
    end = 0
    for chunk in chunks:
        start, end = end, end + chunk.num_kept
        if chunk.is_scored and chunk.sequence.id not in leaving:
            _score(chunk.sequence, chunk.start, logits[start:end])
        if chunk.samples:
            sampling.append(end - 1)
    return logits[sampling]


def _score(sequence: Sequence, start: int, rows: torch.Tensor) -> None:
    """Take the logits at the prompt's positions from ``start``: ``[positions, vocabulary]``, fp32.

    Those at one position are about the token at the next; at the last, about the output's first token, which
    is not the prompt's.
    """
    scores = sequence.prompt_scores
    assert scores is not None  # the chunk says that it is scored
    if scores.logits is not None:
        scores.logits += [row.numpy().tobytes() for row in rows]
    if scores.logprobs is not None:
        followers = sequence.token_ids[start + 1 : start + 1 + len(rows)]
        num_top = sequence.sampling.prompt_logprobs
        assert num_top is not None  # or there were none to gather
        if followers:
            scores.logprobs += token_logprobs(rows[: len(followers)], followers, num_top)
