"""The matrix products of generation steps of the Llama family, with the norms, activations and sums between.

Made by :class:`~disagg_mpi.engine.gpu.model.LlamaSteps` where they can be used: for a rank that has the whole
model, in bf16 and without biases, on a GPU from Hopper on, with Triton. One row is multiplied by plain
threads, a few by tensor cores, where the GPU has room for their tiles; more are a library's affair.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from disagg_mpi.engine.gpu.device import OVERLAP_FROM

# Shared memory that tiles of few rows take, of a Hopper's 227 KiB a program.
_SHARED_BYTES = 192 * 2**10


class Products(Protocol):
    """Of rows ``[rows, columns]``; the residual ``hidden`` is written in place."""

    def normed(self, hidden: torch.Tensor, norm: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        """``linear`` of the root mean square norm of ``hidden``, whose weight is ``norm``."""
        ...

    def logits(self, hidden: torch.Tensor, norm: torch.Tensor, head: nn.Linear,
               out: torch.Tensor | None) -> torch.Tensor:
        """As :meth:`normed`, of a matrix with many rows; into ``out``, if given."""
        ...

    def gated(self, hidden: torch.Tensor, norm: torch.Tensor, gate_up: nn.Linear) -> torch.Tensor:
        """As :meth:`normed`, and then ``silu(first half) * second half``."""
        ...

    def add(self, x: torch.Tensor, linear: nn.Linear, hidden: torch.Tensor) -> None:
        """Add ``linear`` of ``x`` to ``hidden``."""
        ...


class AllProducts:
    """Of every number of rows for which there is something faster than a library."""

    def __init__(self, layers: Sequence[tuple[nn.Linear, ...]], eps: float) -> None:
        """``layers``: QKV, output, gate and up, down of each. They fit.

        Raises :class:`ImportError` for a Triton that is too old.
        """
        self._one = OneRow(eps)
        plain = [each for qkv, output, _, down in layers for each in (qkv, output, down)]
        fits = FewRows.has_room(plain[0].weight.device) and all(FewRows.fits(*layer) for layer in layers)
        self._few = FewRows(eps, plain) if fits else None

    @staticmethod
    def fit(layers: Sequence[tuple[nn.Linear, ...]], head: nn.Linear) -> bool:
        """Whether kernels here take all of these where they lie."""
        weight = head.weight
        if not weight.is_cuda or importlib.util.find_spec("triton") is None:
            return False
        return (torch.cuda.get_device_capability(weight.device) >= OVERLAP_FROM
                and all(OneRow.fits(each) for layer in layers for each in (*layer, head)))

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows that all kernels here are built for."""
        return [1, 16, 32, 64, 128] if self._few is not None else [1]

    def of(self, num_rows: int) -> Products | None:
        """``None``: nothing here is faster."""
        if num_rows == 1:
            return self._one
        return self._few if num_rows <= FewRows.most else None


class OneRow:
    """Five launches a layer, attention's included, which overlap."""

    # Rows of a program, and the columns that it loads at once: of products with a norm before them, and of
    # others. The best of those tried on an H200, where a second tile on its way was 6 % slower.
    _NORMED_TILE = (2, 1024)
    _PLAIN_TILE = (8, 1024)
    _WARPS = 4

    def __init__(self, eps: float) -> None:
        from disagg_mpi.engine.gpu.kernels.product import row_product

        self._kernel: Any = row_product
        self._eps = eps

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        weight = linear.weight
        return (weight.dtype is torch.bfloat16 and linear.bias is None and weight.is_contiguous()
                and not weight.shape[0] % 8 and not weight.shape[1] % 128)

    def normed(self, hidden: torch.Tensor, norm: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        return self._product(hidden, linear.weight, _room(hidden, len(linear.weight)), norm=norm)

    def logits(self, hidden: torch.Tensor, norm: torch.Tensor, head: nn.Linear,
               out: torch.Tensor | None) -> torch.Tensor:
        room = _room(hidden, len(head.weight)) if out is None else out
        return self._product(hidden, head.weight, room, norm=norm)

    def gated(self, hidden: torch.Tensor, norm: torch.Tensor, gate_up: nn.Linear) -> torch.Tensor:
        room = _room(hidden, len(gate_up.weight) // 2)
        return self._product(hidden, gate_up.weight, room, norm=norm, gated=True)

    def add(self, x: torch.Tensor, linear: nn.Linear, hidden: torch.Tensor) -> None:
        self._product(x, linear.weight, hidden, added=True)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *,
                 norm: torch.Tensor | None = None, gated: bool = False, added: bool = False) -> torch.Tensor:
        num_rows, num_columns = out.shape[1], weight.shape[1]
        rows, width = self._PLAIN_TILE if norm is None else self._NORMED_TILE
        while num_columns % width:
            width //= 2
        self._kernel[num_rows // rows,](
            x, weight, weight if norm is None else norm, self._eps, out, num_rows, num_columns, rows, width,
            norm is not None, gated, added, True, num_warps=self._WARPS, launch_pdl=True)
        return out


class Tiling(NamedTuple):
    """How a product of few rows is shared out."""

    most: int
    """Rows of ``x`` that it has room for."""
    rows: int
    """Of the weights, in a tile."""
    width: int
    splits: int
    stages: int
    warps: int


class FewRows:
    """The norm and the activation's product are ours, and QKV's and the sums' up to :attr:`_PLAIN_MOST` rows;
    the others and the logits' are the library's."""

    most = 128
    _PLAIN_MOST = 64
    """Rows above which the library's product is the faster one, but for the activation's."""

    def __init__(self, eps: float, plain: Sequence[nn.Linear]) -> None:
        """``plain``: matrices of :meth:`normed` and :meth:`add`."""
        from triton.tools.tensor_descriptor import TensorDescriptor

        from disagg_mpi.engine.gpu.kernels.few import few_rows_product, norm_rows

        self._descriptor: Any = TensorDescriptor
        self._kernel: Any = few_rows_product
        self._norm_kernel: Any = norm_rows
        self._eps = eps
        place = plain[0].weight.device
        shapes = [each.weight.shape for each in plain]
        most = max(rows * tiling(self._PLAIN_MOST, columns, gated=False).splits for rows, columns in shapes)
        self._partial = torch.empty(most * self._PLAIN_MOST, device=place)
        # Every launch leaves them at zero.
        self._counters = torch.zeros(max(rows for rows, _ in shapes), dtype=torch.int32, device=place)

    @staticmethod
    def has_room(place: torch.device) -> bool:
        """Whether the GPU's programs have the shared memory that tiles take."""
        properties: Any = torch.cuda.get_device_properties(place)
        room: int = getattr(properties, "shared_memory_per_block_optin", 0)  # torch 2.6 does not say
        return room >= _SHARED_BYTES + 1024  # and marks beside the tiles

    @staticmethod
    def fits(qkv: nn.Linear, output: nn.Linear, gate_up: nn.Linear, down: nn.Linear) -> bool:
        """Whether tiles cover these matrices exactly, for any number of rows of ``x``."""
        for linear, is_gated in ((qkv, False), (output, False), (gate_up, True), (down, False)):
            num_rows, num_columns = linear.weight.shape
            for members in (FewRows._PLAIN_MOST, FewRows.most) if is_gated else (FewRows._PLAIN_MOST,):
                tiles = tiling(members, num_columns, gated=is_gated)
                height = 2 * tiles.rows if is_gated else tiles.rows
                if num_rows % height or num_columns % (tiles.width * tiles.splits):
                    return False
        return True

    def normed(self, hidden: torch.Tensor, norm: torch.Tensor, linear: nn.Linear) -> torch.Tensor:
        normed = self._norm(hidden, norm)
        if len(hidden) > self._PLAIN_MOST:
            return F.linear(normed, linear.weight)
        return self._product(normed, linear.weight, _room(hidden, len(linear.weight)))

    def logits(self, hidden: torch.Tensor, norm: torch.Tensor, head: nn.Linear,
               out: torch.Tensor | None) -> torch.Tensor:
        return torch.mm(self._norm(hidden, norm), head.weight.t(), out=out)

    def gated(self, hidden: torch.Tensor, norm: torch.Tensor, gate_up: nn.Linear) -> torch.Tensor:
        room = _room(hidden, len(gate_up.weight) // 2)
        return self._product(self._norm(hidden, norm), gate_up.weight, room, gated=True)

    def add(self, x: torch.Tensor, linear: nn.Linear, hidden: torch.Tensor) -> None:
        if len(x) <= self._PLAIN_MOST:
            self._product(x, linear.weight, hidden, added=True)
        else:
            hidden.addmm_(x, linear.weight.t())

    def _norm(self, hidden: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        out = torch.empty_like(hidden)
        num_columns = hidden.shape[1]
        self._norm_kernel[len(hidden),](
            hidden, norm, self._eps, out, num_columns, 1 << (num_columns - 1).bit_length(), True,
            num_warps=8, launch_pdl=True)
        return out

    def _product(self, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, *, gated: bool = False,
                 added: bool = False) -> torch.Tensor:
        num_members, num_columns = x.shape
        num_rows = out.shape[1]
        most, rows, width, splits, stages, warps = tiling(num_members, num_columns, gated=gated)
        tiles = [self._descriptor.from_tensor(tensor, [height, width])
                 for tensor, height in ((x, most), (weight, rows))]
        self._kernel[num_rows // rows, splits](
            *tiles, out, self._partial, self._counters, num_members, num_rows, num_columns, most, rows, width,
            splits, stages, gated, added, True, num_warps=warps, launch_pdl=True)
        return out


def _room(rows: torch.Tensor, width: int) -> torch.Tensor:
    return torch.empty(len(rows), width, dtype=rows.dtype, device=rows.device)


def tiling(num_members: int, num_columns: int, *, gated: bool) -> Tiling:
    """After what was tried on an H200 with Llama-3-8B's shapes, at 8, 32, 64 and 128 rows: more splits, wider
    tiles and prefetching into the cache before the wait were all slower."""
    most = max(16, 1 << (num_members - 1).bit_length())
    rows, width, warps = (64, 128, 4) if most <= 64 else (128, 64, 8)
    splits = 2 if not gated and num_columns > 8192 else 1
    stage_bytes = 2 * width * (most + (2 if gated else 1) * rows)
    most_stages = 6 if most <= 64 else 3
    return Tiling(most, rows, width, splits, min(most_stages, _SHARED_BYTES // stage_bytes), warps)
