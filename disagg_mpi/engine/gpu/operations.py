"""What lies between a layer's matrix products: norms, rotation, activation. flashinfer's kernels, or torch's
own.

Both work in place where they can. flashinfer's take one launch each, and overlap with the kernel before them
(programmatic dependent launch). Generation steps can do without them (``products``).
"""

from __future__ import annotations

import importlib.util
from typing import Any, Protocol

import torch
import torch.nn.functional as F

from disagg_mpi.engine.gpu.device import Device


class Operations(Protocol):
    """Of rows ``[tokens, …]``."""

    name: str

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor: ...

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        """``residual`` becomes ``residual + x``; its norm, perhaps in the place of ``x``."""
        ...

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(first half) * second half`` of the last dimension."""
        ...

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
    ) -> None:
        """Rotary position embedding (Su et al. 2021), halves split, in place: ``[tokens, heads * head_dim]``.

        ``table``: fp32 ``[positions, head_dim]``, cosines before sines.
        """
        ...


def make_operations(device: Device, dtype: torch.dtype) -> Operations:
    """The fastest that can be had for ``dtype`` on ``device``."""
    has_kernels = (device.is_cuda and dtype is torch.bfloat16
                   and importlib.util.find_spec("flashinfer") is not None)
    return FlashInferOperations() if has_kernels else TorchOperations()


class TorchOperations:
    """As transformers computes them, operation by operation."""

    name = "torch"

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        residual += x
        return self.norm(residual, weight, eps)

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
    ) -> None:
        head_dim = table.shape[1]
        cos, sin = (half.repeat(1, 2).unsqueeze(1) for half in table[positions.long()].chunk(2, dim=-1))
        for x in (query, key):
            heads = x.view(len(x), -1, head_dim)
            first, second = heads.float().chunk(2, dim=-1)
            turned = heads.float() * cos + torch.cat((-second, first), dim=-1) * sin
            heads.copy_(turned)


class FlashInferOperations:
    """One kernel each."""

    name = "flashinfer"

    def __init__(self) -> None:
        import flashinfer

        self._library: Any = flashinfer

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        return self._library.rmsnorm(x, weight, eps)  # type: ignore[no-any-return]

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        self._library.fused_add_rmsnorm(x, residual, weight, eps)
        return x

    def gated(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self._library.silu_and_mul(gate_up)  # type: ignore[no-any-return]

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, table: torch.Tensor
    ) -> None:
        self._library.apply_rope_with_cos_sin_cache_inplace(
            positions, query, key, table.shape[1], table, is_neox=True)
