"""How much memory a layout takes: pure arithmetic over the model's shape, shown by ``layout``.

Where each part lies is :mod:`disagg_mpi.job.arrangement`'s.
"""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec

from disagg_mpi.config import JobConfig
from disagg_mpi.errors import ConfigError
from disagg_mpi.model.checkpoint import ModelSpec
from disagg_mpi.transfer.layout import KvLayout

# What a rank needs beside weights and pool: Python, torch and transformers, activations of one step.
RUNTIME_BYTES = 700 * 2**20


class MemoryPlan(msgspec.Struct, frozen=True):
    """Sizes of one instance's pool."""

    spec: ModelSpec
    kv_dtype: str
    tokens_per_block: int
    kv_tokens: int

    @property
    def blocks_per_instance(self) -> int:
        return -(-self.kv_tokens // self.tokens_per_block)

    def layout(self, num_blocks: int) -> KvLayout:
        spec = self.spec
        return KvLayout(spec.num_layers, spec.num_kv_heads, spec.head_dim, self.tokens_per_block,
                        num_blocks, self.kv_dtype)

    @property
    def pool_bytes(self) -> int:
        """Bytes of one instance's pool."""
        return self.layout(self.blocks_per_instance).pool_bytes

    def check_memory(self, num_ranks: int, kv_bytes: int) -> None:
        """Raise :class:`ConfigError` if this host cannot hold so many engine ranks and so much KV-cache."""
        if not num_ranks:  # rank 0 may be alone on its host
            return
        free = available_bytes()
        weights = self.spec.parameter_bytes
        needed = num_ranks * RUNTIME_BYTES + kv_bytes + weights
        if free is None or needed <= free:
            return
        room = free - weights - num_ranks * RUNTIME_BYTES
        tokens = int(self.kv_tokens * room / max(kv_bytes, 1)) // 1024 * 1024
        advice = (f"give --kv-tokens {tokens}" if tokens > 0
                  else "use fewer ranks on this host, or a smaller model")
        raise ConfigError(
            f"host {socket.gethostname()}: {num_ranks} engine ranks need {needed / 2**30:.1f} GiB "
            f"({kv_bytes / 2**30:.2f} GiB of KV-cache at {self.kv_tokens} tokens an instance, "
            f"{weights / 2**30:.2f} GiB of weights, {RUNTIME_BYTES / 2**30:.2f} GiB a rank); "
            f"{free / 2**30:.1f} GiB are available: {advice}")


def plan_memory(config: JobConfig, spec: ModelSpec) -> MemoryPlan:
    return MemoryPlan(spec, config.effective_kv_dtype, config.tokens_per_block, config.pool_tokens)


def available_bytes() -> int | None:
    """Memory that can be had on this host now; ``None`` where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
