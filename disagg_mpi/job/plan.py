"""How much memory a layout takes: pure arithmetic over the model's shape, shown by ``layout``."""

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

    def check_memory(self, num_pools: int) -> None:
        """Raise :class:`ConfigError` if this host cannot hold ``num_pools`` pools."""
        if not num_pools:  # rank 0 may be alone on its host
            return
        free = available_bytes()
        needed = num_pools * (self.pool_bytes + RUNTIME_BYTES) + self.spec.parameter_bytes
        if free is None or needed <= free:
            return
        per_token = self.layout(1).kv_bytes(1)
        room = (free - self.spec.parameter_bytes - num_pools * RUNTIME_BYTES) // num_pools
        advice = (f"give --kv-tokens {room // per_token // 1024 * 1024}" if room > 1024 * per_token
                  else "use fewer instances on this host, or a smaller model")
        raise ConfigError(
            f"host {socket.gethostname()}: {num_pools} instances need {needed / 2**30:.1f} GiB "
            f"({num_pools} pools of {self.kv_tokens} tokens, {self.pool_bytes / 2**30:.2f} GiB each, "
            f"and {self.spec.parameter_bytes / 2**30:.2f} GiB of weights); "
            f"{free / 2**30:.1f} GiB are available: {advice}")


def plan_memory(config: JobConfig, spec: ModelSpec) -> MemoryPlan:
    return MemoryPlan(spec, config.effective_kv_dtype, config.tokens_per_block, config.kv_tokens)


def available_bytes() -> int | None:
    """Memory that can be had on this host now; ``None`` where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None
