"""What every attention on a device has: a pool, heads, and the two calls that a step makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from disagg_mpi.engine.gpu.buffers import DeviceStep
from disagg_mpi.transfer.layout import CacheView


class HeadShape:
    """Heads of a rank's layers, which are all alike."""

    def __init__(self, num_heads: int, num_kv_heads: int, head_dim: int, scaling: float,
                 windows: Sequence[int | None]) -> None:
        """``windows``: of every layer; ``None`` where a token sees all before it."""
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scaling = scaling
        self.windows = tuple(dict.fromkeys(windows))


class DevicePool:
    """One rank's part of a pool as tensors; the allocation belongs to whoever made it."""

    def __init__(self, memory: torch.Tensor, view: CacheView, dtype: torch.dtype) -> None:
        """``memory``: uint8, from the array's allocation's start."""
        layout, shard = view.layout, view.shard
        array = memory[view.offset : view.offset + layout.pool_bytes].view(dtype).view(
            layout.num_layers, 2, layout.num_blocks, layout.tokens_per_block, layout.num_kv_heads,
            layout.head_dim)
        layers = array.narrow(0, shard.first_layer - view.origin_layer, shard.num_layers)
        part = layers.narrow(4, shard.first_head - view.origin_head, shard.num_heads)
        self.memory = memory
        self.view = view
        self.dtype = dtype
        self.keys = [layer[0] for layer in part]
        self.values = [layer[1] for layer in part]
        """Per layer of the rank ``[blocks, tokens_per_block, num_heads, head_dim]``."""


AttendUnturned = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""(layer, qkv, rotary, ahead) → what :meth:`DeviceAttention.attend` gives, in a layer without a window;
queries and keys get their rotary position embedding first. ``qkv`` ``[tokens, (heads + 2 kv_heads) *
head_dim]``, ``rotary`` as ``Operations.rotate`` takes it, ``ahead`` what will be read next, if it is known;
``[tokens, heads * head_dim]``."""


class DeviceAttention(Protocol):
    """What layers attend with."""

    name: str
    can_capture: bool
    """Whether a step can be recorded and replayed with other requests."""

    def sizes(self, max_requests: int) -> list[int]:
        """Numbers of requests with one token each, up to so many, that between them need all kernels there
        are for such; the largest first."""
        ...

    def begin(self, step: DeviceStep) -> None:
        """The next calls of :meth:`attend` are of ``step``; outside of what is captured."""
        ...

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *,
        scaling: float | None = None, window: int | None = None,
    ) -> torch.Tensor:
        """Put K and V ``[tokens, kv_heads, head_dim]`` into the pool, and attend; as ``query``,
        ``[tokens, heads, head_dim]``."""
        ...

    @property
    def unturned(self) -> AttendUnturned | None:
        """A shorter way through the layers of the step that has begun, where there is one."""
        ...
