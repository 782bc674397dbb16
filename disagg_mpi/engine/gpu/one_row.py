"""The layers of the Llama family for one token of one request: five launches a layer.

Made by :class:`~disagg_mpi.engine.gpu.model.LlamaSteps` where it can be used: for a rank that has the whole
model, in bf16 and without biases, on a GPU whose launches overlap, with Triton.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from disagg_mpi.engine.gpu.device import OVERLAP_FROM

Attend = Callable[[int, torch.Tensor], torch.Tensor]

# Rows of a program, and the columns that it loads at once: of products with a norm before them, and of
# others. The best of those tried on an H200, where a second tile on its way was 6 % slower.
_NORMED_TILE = (2, 1024)
_PLAIN_TILE = (8, 1024)
_WARPS = 4


class OneRow:
    """Callable as ``LlamaSteps`` is, with one row."""

    def __init__(self, qkv: Sequence[nn.Linear], gate_up: Sequence[nn.Linear], layers: Sequence[Any],
                 final_norm: torch.Tensor, head: nn.Linear, eps: float) -> None:
        from disagg_mpi.engine.gpu.kernels.product import row_product

        self._kernel: Any = row_product
        self._qkv, self._gate_up, self._layers = qkv, gate_up, layers
        self._final_norm, self._head, self._eps = final_norm, head, eps

    @staticmethod
    def fits(matrices: Sequence[nn.Linear]) -> bool:
        """Whether the kernel takes all of these where they lie."""
        weight = matrices[0].weight
        if not weight.is_cuda or torch.cuda.get_device_capability(weight.device) < OVERLAP_FROM:
            return False
        return importlib.util.find_spec("triton") is not None and all(
            each.weight.dtype is torch.bfloat16 and each.bias is None and each.weight.is_contiguous()
            and not each.weight.shape[0] % 8 and not each.weight.shape[1] % 128 for each in matrices)

    def __call__(self, hidden: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Logits ``[1, vocabulary]``; ``hidden`` ``[1, hidden_size]`` is written."""
        for index, (layer, qkv, gate_up) in enumerate(
                zip(self._layers, self._qkv, self._gate_up, strict=True)):
            attended = attend(index, self._product(hidden, qkv, norm=layer.input_layernorm.weight))
            self._product(attended, layer.self_attn.o_proj, out=hidden)
            gated = self._product(hidden, gate_up, norm=layer.post_attention_layernorm.weight, gated=True)
            self._product(gated, layer.mlp.down_proj, out=hidden)
        return self._product(hidden, self._head, norm=self._final_norm)

    def _product(self, x: torch.Tensor, linear: nn.Linear, *, norm: torch.Tensor | None = None,
                 gated: bool = False, out: torch.Tensor | None = None) -> torch.Tensor:
        """Into a new row, or added to ``out``."""
        weight = linear.weight
        num_columns = weight.shape[1]
        num_rows = weight.shape[0] // 2 if gated else weight.shape[0]
        rows, width = _PLAIN_TILE if norm is None else _NORMED_TILE
        while num_columns % width:
            width //= 2
        target = torch.empty(1, num_rows, dtype=x.dtype, device=x.device) if out is None else out
        self._kernel[num_rows // rows,](
            x, weight, weight if norm is None else norm, self._eps, target, num_rows, num_columns, rows,
            width, norm is not None, gated, out is not None, True, num_warps=_WARPS, launch_pdl=True)
        return target
