"""The forward of one rank: its slice of its pipeline stage.

Made by every rank that computes, after the thread settings and before the first request; it owns the mapping
of the weights and knows nothing of requests. All ranks of a stage call it with the same step at the same time
(the sums of :mod:`.tensor_parallel` meet); stage after stage, what one returns is the next one's ``hidden``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from disagg_mpi.engine.attention import StepLayout
from disagg_mpi.engine.fused import FusedLlama
from disagg_mpi.engine.tensor_parallel import HostCollectives, ModelShard, StageLink
from disagg_mpi.engine.weights import DTYPES, has_onednn, load_model


class StageModel:
    """Callable, once a step. Raises :class:`ModelError` for a model that cannot be cut into ``shard``."""

    def __init__(
        self, path: Path, *, dtype: str, shard: ModelShard, link: StageLink | None
    ) -> None:
        """``dtype``: ``fp32`` or ``bf16``, as in the files; ``link`` may be ``None`` where tp is 1."""
        collectives = None if link is None else HostCollectives(link)
        loaded = load_model(path, dtype, shard, collectives)
        self._module: Any = loaded.module
        config: Any = loaded.module.config
        self.first_layer = loaded.first_layer
        self.num_layers: int = config.num_hidden_layers
        self.is_first = shard.is_first
        self.is_last = shard.is_last
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.vocab_range = shard.range_of(self.vocab_size) if shard.is_last else (0, 0)
        """First and end token of the logits that this rank makes."""
        self.dtype = DTYPES[dtype]
        """Of hidden states."""
        # In bf16 its fewer roundings would give other tokens than transformers' modules do.
        fits = dtype == "fp32" and has_onednn(dtype) and FusedLlama.fits(self._module)
        self._fused = FusedLlama(self._module, shard, collectives) if fits else None

    def __call__(
        self,
        batch_tokens: list[int],
        positions: list[int],
        keep: list[int],
        paged: StepLayout,
        hidden: torch.Tensor | None,
    ) -> torch.Tensor:
        """Compute a packed step; K and V of this rank's layers and heads go to the pool.

        ``batch_tokens`` matter to the first stage and ``hidden``, ``[tokens, hidden_size]``, to all others.
        The last stage returns the logits of the tokens at the places ``keep``, in fp32: ``[len(keep),
        vocab_range's length]``. The others return contiguous hidden states for the next.
        """
        position_ids = torch.tensor([positions])
        kept = torch.tensor(keep, dtype=torch.long)
        inputs: dict[str, torch.Tensor]
        if self.is_first:
            inputs = {"input_ids": torch.tensor([batch_tokens])}
        else:
            assert hidden is not None  # the caller's plan of stages
            inputs = {"inputs_embeds": hidden.unsqueeze(0)}
        if self._fused is not None:
            if self.is_first:
                hidden = self._module.get_input_embeddings()(inputs["input_ids"])[0]
            assert hidden is not None
            return self._fused(hidden, position_ids, kept, paged)
        if self.is_last:
            output = self._module(**inputs, position_ids=position_ids, use_cache=False,
                                  logits_to_keep=kept, paged=paged)
            return output.logits[0].float()  # type: ignore[no-any-return]
        output = self._module.model(**inputs, position_ids=position_ids, use_cache=False, paged=paged)
        return output.last_hidden_state[0].contiguous()  # type: ignore[no-any-return]
