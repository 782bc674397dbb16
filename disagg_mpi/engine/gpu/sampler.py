"""Tokens from logits, all rows at once and without a word to the host: :mod:`disagg_mpi.engine.sampler`'s
rules.

The random number of a token is made at the host, where it depends on nothing that a step computes; here it
only meets the distribution. So a seed gives the same text here as there, up to the last bits of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disagg_mpi.engine.gpu.device import Device

_PIECES = 256
"""Of a row, at most."""

Draw = tuple[int, float, int, float, float]
"""Row, temperature, top-k, top-p, random number in [0, 1)."""


def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """The first place of the largest value in each row of ``logits`` ``[rows, vocabulary]``.

    ``[rows]``, int32. In two rounds: in one, a GPU gives a row to few of its processors.
    """
    vocabulary = logits.shape[-1]
    pieces = next(count for count in range(_PIECES, 0, -1) if vocabulary % count == 0)
    best, places = logits.view(-1, pieces, vocabulary // pieces).max(dim=-1)
    piece = best.argmax(dim=-1, keepdim=True)
    found = torch.empty(piece.shape, dtype=torch.int32, device=logits.device)
    torch.add(places.gather(-1, piece), piece, alpha=vocabulary // pieces, out=found)
    return found.squeeze(-1)


def draw_some(tokens: torch.Tensor, logits: torch.Tensor, draws: Sequence[Draw], device: Device) -> None:
    """Write the tokens of the rows that are drawn over those in ``tokens`` ``[rows]``, int32."""
    if not draws:
        return
    host = device.host_empty(len(draws), 5, dtype=torch.float64)
    host.copy_(torch.tensor(draws, dtype=torch.float64))
    table = host.to(logits.device, non_blocking=True)
    rows = table[:, 0].long()
    drawn = draw(logits[rows], table[:, 1], table[:, 2].long(), table[:, 3], table[:, 4],
                 largest_top_k=max(each[2] for each in draws), any_top_p=any(each[3] < 1 for each in draws))
    tokens[rows] = drawn.int()


def draw(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor,
    point: torch.Tensor, *, largest_top_k: int | None = None, any_top_p: bool = True,
) -> torch.Tensor:
    """Inverse of the cumulated distribution of each row, in float64; the parameters are ``[rows]``.

    ``largest_top_k`` and ``any_top_p`` spare a sort of the vocabulary where no row needs one; ``None`` and
    ``True`` are always right.
    """
    exact = logits.double()
    scaled = (exact - exact.amax(dim=-1, keepdim=True)) / temperature.unsqueeze(-1)
    vocabulary = scaled.shape[-1]
    most = vocabulary if largest_top_k is None else min(largest_top_k, vocabulary)
    if most > 0:
        limited = (top_k > 0) & (top_k < vocabulary)
        least = scaled.topk(most, dim=-1).values.gather(-1, (top_k.clamp(1, most) - 1).unsqueeze(-1))
        scaled = scaled.masked_fill((scaled < least) & limited.unsqueeze(-1), -torch.inf)
    probabilities = torch.softmax(scaled, dim=-1)
    if any_top_p:
        ordered, indices = probabilities.sort(dim=-1, descending=True, stable=True)
        # Keep a token if those before it do not yet reach top_p: always at least the first.
        beyond = (ordered.cumsum(-1) - ordered >= top_p.unsqueeze(-1)) & (top_p < 1).unsqueeze(-1)
        probabilities = probabilities.scatter(-1, indices, ordered.masked_fill(beyond, 0.0))
    cumulated = probabilities.cumsum(-1)
    target = point.unsqueeze(-1) * cumulated[:, -1:]
    tokens = torch.searchsorted(cumulated, target, right=True).squeeze(-1)
    # The very end of the distribution: the last token that has any probability.
    places = torch.arange(vocabulary, device=logits.device)
    last = torch.where(probabilities > 0, places, 0).amax(dim=-1)
    return torch.minimum(tokens, last)
