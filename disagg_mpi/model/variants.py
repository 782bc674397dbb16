"""A checkpoint in the type that is computed with.

Weights are mapped, not loaded, so the files must hold the compute type. Where they hold another, a
converted copy is written into the cache once: it costs disk, but every rank and every later start maps
it. Called by one process a host; needs torch, which is imported only if there is something to convert.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from disagg_mpi.model.cache import build_directory, cache_dir
from disagg_mpi.model.checkpoint import check_model_directory, weight_files

_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
_HEADER_NAMES = {"fp32": "F32", "bf16": "BF16"}
_FLOATS = ("F64", "F32", "F16", "BF16")
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")


def ensure_dtype(directory: Path, dtype: str) -> Path:
    """``directory`` itself if all its floating-point weights are ``dtype``, else a cached copy that is.

    ``dtype`` is ``fp32`` or ``bf16``. Raises :class:`ModelError` for a damaged directory or a full disk.
    """
    wanted = _HEADER_NAMES[dtype]
    tensors = check_model_directory(directory)
    if all(
        _spelled(info.dtype) == wanted
        for info in tensors.values()
        if _spelled(info.dtype) in _FLOATS
    ):
        return directory
    files = weight_files(directory)
    state = "|".join(f"{f.name}:{f.stat().st_size}:{f.stat().st_mtime_ns}" for f in files)
    key = hashlib.sha256(f"{directory.absolute()}|{state}".encode()).hexdigest()[:16]
    target = cache_dir() / "converted" / f"{directory.name}-{dtype}-{key}"
    size = 4 if dtype == "fp32" else 2
    needed = sum(info.nbytes for info in tensors.values()) * size
    return build_directory(
        target, lambda folder: _convert(directory, files, folder, dtype), bytes_needed=needed
    )


def _spelled(dtype: str) -> str:
    """A header's spelling, whichever of the two is given."""
    return {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(
        dtype, dtype
    )


def _convert(source: Path, files: list[Path], folder: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    kind = getattr(torch, _TORCH_NAMES[dtype])
    for file in files:
        converted = {
            name: tensor.to(kind) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(file).items()
        }
        save_file(converted, folder / file.name, metadata={"format": "pt"})
    for other in source.iterdir():
        if other.is_file() and other.suffix not in _WEIGHT_SUFFIXES:
            shutil.copy2(other, folder / other.name)
