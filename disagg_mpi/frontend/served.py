"""What the servers of one job have in common: the job, its model's name and limits.

Made once at rank 0 by ``serve``, before the first server starts; nothing in it changes afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from disagg_mpi.errors import ConfigError
from disagg_mpi.model.tokenizer import Tokenizer
from disagg_mpi.orchestrator.orchestrator import Orchestrator


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client may ask for at most. What is beyond is refused with its name and the limit."""

    max_body_bytes: int = 8 * 2**20
    max_prompt_tokens: int | None = None
    """``None``: the model's context length."""
    max_n: int = 16
    max_open_requests: int = 512
    """Sequences that are open at once; beyond it, 429 and UNAVAILABLE."""
    max_connections: int = 1024
    """TCP connections to the HTTP port that are open at once."""
    header_seconds: float = 10.0
    """Within which a request's head must be there."""

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_prompt_tokens", "max_n", "max_open_requests", "max_connections",
                     "header_seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be more than 0")


@dataclass(frozen=True)
class Served:
    """One job as its servers see it."""

    orchestrator: Orchestrator
    tokenizer: Tokenizer
    name: str
    """The model's name for clients."""
    max_model_len: int
    limits: ServerLimits = field(default_factory=ServerLimits)
    api_key: str | None = None
