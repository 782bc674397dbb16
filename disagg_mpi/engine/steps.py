"""Between the engine and whoever computes its steps: what it asks for, and what comes back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from typing import NamedTuple, Protocol

import torch

from disagg_mpi.engine.scheduler import Chunk

OnLayer = Callable[[int], None]


class StepOutput(NamedTuple):
    """What a step that is over has made."""

    chunks: Seq[Chunk]
    """All of it, in order."""
    host_chunks: Seq[Chunk]
    """Those whose logits came to the host."""
    logits: torch.Tensor | None
    """Their :attr:`~disagg_mpi.engine.scheduler.Chunk.num_kept` rows each, ``[rows, vocabulary]``, fp32."""
    tokens: Mapping[int, int]
    """Request → the token that was chosen on the device, for the other chunks that sample."""


class Steps(Protocol):
    """What the engine needs of a runner: :mod:`disagg_mpi.engine.runner`, or
    :mod:`disagg_mpi.engine.gpu.runner`."""

    @property
    def depth(self) -> int:
        """Steps that can usefully be in flight."""
        ...

    @property
    def is_done_at_launch(self) -> bool:
        """Whether this rank's part of a step is in the pool when :meth:`launch` returns."""
        ...

    @property
    def promises(self) -> bool:
        """Whether a step may start from tokens that an earlier one has not given yet."""
        ...

    @property
    def num_in_flight(self) -> int: ...

    def launch(self, chunks: Seq[Chunk], on_layer: OnLayer | None = None) -> None: ...

    def poll(self) -> StepOutput | None:
        """The oldest step that is over; ``None`` if there is none."""
        ...
