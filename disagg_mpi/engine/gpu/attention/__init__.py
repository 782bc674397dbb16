"""Paged attention on a device: K and V into the pool, then attention over a request's pages.

One object a rank, made with its stage; ``begin`` is told of each step before its forward, ``attend`` is
called by every layer. ``paged`` is flashinfer's, with a kernel of our own for generation (``ones``),
``gathered`` torch's own; :func:`make_attention` chooses.
"""

from __future__ import annotations

import importlib.util

import torch

from disagg_mpi.config import AttentionName
from disagg_mpi.engine.gpu.attention.base import AttendUnturned, DeviceAttention, DevicePool, HeadShape
from disagg_mpi.engine.gpu.attention.gathered import SdpaAttention
from disagg_mpi.engine.gpu.attention.paged import FlashInferAttention, last_line
from disagg_mpi.engine.gpu.device import Device
from disagg_mpi.errors import ModelError

__all__ = ["AttendUnturned", "DeviceAttention", "DevicePool", "FlashInferAttention", "HeadShape",
           "SdpaAttention", "make_attention"]


def make_attention(
    wanted: AttentionName, device: Device, pool: DevicePool, shape: HeadShape, dtype: torch.dtype, *,
    max_requests: int
) -> DeviceAttention:
    """The attention that was asked for, or the best there is, for so many requests in a step. ``dtype``: of
    queries.

    Raises :class:`ModelError` if it is not there.
    """
    missing = _flashinfer_lacks(device, pool, shape, dtype)
    if wanted == "sdpa" or (wanted == "auto" and missing):
        return SdpaAttention(pool, missing if wanted == "auto" else "")
    if not missing:
        try:
            return FlashInferAttention(device, pool, shape, max_requests)
        except (RuntimeError, OSError) as error:
            missing = ("its kernels cannot be built here, which takes nvcc and ninja, or pip install "
                       f"flashinfer-jit-cache: {last_line(error)}")
            if wanted == "auto":
                return SdpaAttention(pool, missing)
    raise ModelError(f"--attention flashinfer: {missing}; leave it at auto, or give --attention sdpa")


def _flashinfer_lacks(device: Device, pool: DevicePool, shape: HeadShape, dtype: torch.dtype) -> str:
    """Why flashinfer cannot be used; empty if it can."""
    if not device.is_cuda:
        return "it needs CUDA"
    if importlib.util.find_spec("flashinfer") is None:
        return "it is not installed (pip install 'disagg_mpi[cuda]')"
    if (dtype, pool.dtype) != (torch.bfloat16, torch.bfloat16):
        return "it computes in bf16 over a KV-cache in bf16"
    if shape.head_dim not in (64, 128, 256):
        return f"it has no kernel for heads of {shape.head_dim}"
    if importlib.util.find_spec("triton") is None:
        return "generation beside it takes triton, which is not installed"
    return ""
