"""The tensors of a checkpoint as views of its mapped files.

Nothing is read before it is touched, and what is touched are the page cache's own pages: all ranks of a host
share them. So a slice of rows costs a rank nothing of its own. A slice of columns is no run of bytes that a
kernel could read, it is copied once, and the pages of its source are given back. A mapping is private
(a write would stay in this process) and lives as long as a tensor that looks into it.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import torch

from disagg_mpi.errors import ModelError
from disagg_mpi.model.safetensors_file import TensorInfo, read_header

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}


class _File:
    """One mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = read_header(path)
        with path.open("rb") as file:
            self.mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        self.bytes = torch.frombuffer(self.mapping, dtype=torch.uint8)
        # The tensors are what follows the header, to the file's last byte.
        self.start = len(self.mapping) - max((t.data_offsets[1] for t in self.tensors.values()), default=0)


class MappedWeights:
    """All tensors of some safetensors files, by name."""

    def __init__(self, files: Sequence[Path], dtype: torch.dtype) -> None:
        """Raises :class:`ModelError` where a floating-point tensor is not of ``dtype``."""
        self._files: dict[str, _File] = {}
        for path in files:
            file = _File(path)
            for name, info in file.tensors.items():
                found = _DTYPES.get(info.dtype)
                if found is None or (found.is_floating_point and found != dtype):
                    raise ModelError(f"{path}: {name} is {found or info.dtype}, {dtype} is needed")
                self._files[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def path_of(self, name: str) -> Path:
        return self._files[name].path

    def shape_of(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def whole(self, name: str) -> torch.Tensor:
        """The tensor, as a view of the mapping."""
        file, info = self._files[name], self._info(name)
        dtype = _DTYPES[info.dtype]
        first, end = self._range(name)
        raw = file.bytes[first:end]
        if first % dtype.itemsize:  # legal in the format, not for torch
            raw = raw.clone()
        return raw.view(dtype).view(info.shape)

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        """Rows ``[start, end)``, as a view of the mapping."""
        return self.whole(name)[start:end]

    def columns(self, name: str, start: int, end: int) -> torch.Tensor:
        """Columns ``[start, end)`` of a matrix, copied; of its source nothing stays resident."""
        part = self.whole(name)[:, start:end].clone(memory_format=torch.contiguous_format)
        first, last = self._range(name)
        first -= first % mmap.PAGESIZE  # neighbours whose pages go as well are read again when used
        self._files[name].mapping.madvise(mmap.MADV_DONTNEED, first, last - first)
        return part

    def _info(self, name: str) -> TensorInfo:
        return self._files[name].tensors[name]

    def _range(self, name: str) -> tuple[int, int]:
        """First and end byte in the file."""
        start = self._files[name].start
        first, end = self._info(name).data_offsets
        return start + first, start + end
