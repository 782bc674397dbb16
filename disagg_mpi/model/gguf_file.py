"""The GGUF container: metadata and tensors of one file, read in one pass over a memory map.

The ``gguf`` package has a reader too, and its dequantisation is what we use. But its reader takes
1.9 s for the default model, because it makes several arrays for each of 98,000 vocabulary strings;
the struct calls below take 0.06 s, and where a file ends early they know by how much.

A :class:`GgufFile` owns its map; arrays from :meth:`GgufFile.load` are copies and outlive it.
"""

from __future__ import annotations

import math
import mmap
import struct
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from disagg_mpi.errors import ModelError

_MAGIC = b"GGUF"
_SCALARS = {kind: code for kind, code in enumerate("BbHhIif?__Qqd") if code != "_"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 4  # GGML_MAX_DIMS


class GgufTensor(NamedTuple):
    """Where a tensor lies; ``shape`` in numpy's order (GGUF stores it reversed)."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    nbytes: int


class GgufFile:
    """An open GGUF file: ``fields`` (metadata) and ``tensors`` by name."""

    fields: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                # An empty file cannot be mapped; the reader below says what is wrong with it.
                self._map: mmap.mmap | bytes = (
                    mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
                )
        except OSError as error:
            raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def load(self, name: str) -> npt.NDArray[np.float32]:
        """A tensor in fp32, dequantised where it must be."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        kind = GGMLQuantizationType(tensor.kind)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        raw = np.frombuffer(self._map, np.uint8, tensor.nbytes, tensor.offset)
        rows = raw.reshape(*tensor.shape[:-1], tensor.shape[-1] // block * block_bytes)
        try:
            array = dequantize(rows, kind)
        except NotImplementedError as error:
            raise ModelError(
                f"{self.path}: tensor {name} is stored as {kind.name}, which cannot be read; "
                "use a file with F32, F16, BF16 or the common Q4 to Q8 types"
            ) from error
        return np.array(array, np.float32, copy=True)  # F32 is a view of the map until here

    def close(self) -> None:
        if isinstance(self._map, mmap.mmap):
            # An error on its way out still holds load()'s arrays; the map then ends with them.
            with suppress(BufferError):
                self._map.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self) -> None:
        found = bytes(self._map[:4])
        if found != _MAGIC:
            raise ModelError(
                f"{self.path}: not a GGUF file: found {found!r} at its start "
                f"({self.size} bytes in all), needed {_MAGIC!r}"
            )
        cursor = _Cursor(self.path, self._map, self.size, 4)
        version = cursor.scalar("I")
        if version not in (2, 3):
            kind = "big-endian GGUF" if version & 0xFFFF == 0 else f"GGUF version {version}"
            raise ModelError(f"{self.path}: found {kind}, needed little-endian version 2 or 3")
        num_tensors, num_fields = cursor.scalar("Q"), cursor.scalar("Q")
        self.fields = {}
        for _ in range(num_fields):
            key = cursor.string()
            self.fields[key] = cursor.value(cursor.scalar("I"))
        described = [
            (cursor.string(), cursor.dimensions(), cursor.scalar("I"), cursor.scalar("Q"))
            for _ in range(num_tensors)
        ]
        alignment = self.fields.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1:
            raise ModelError(f"{self.path}: found general.alignment = {alignment!r}")
        start = -(-cursor.position // alignment) * alignment
        self.tensors = {}
        for name, shape, kind_number, offset in described:
            nbytes = self._tensor_bytes(name, shape, kind_number)
            self.tensors[name] = GgufTensor(name, shape, kind_number, start + offset, nbytes)
        needed = max((t.offset + t.nbytes for t in self.tensors.values()), default=0)
        if needed > self.size:
            raise ModelError(
                f"{self.path}: truncated: found {self.size} bytes, needed {needed}; "
                "copy or download the file again"
            )

    def _tensor_bytes(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        except (ValueError, KeyError) as error:
            raise ModelError(
                f"{self.path}: tensor {name} has storage type {kind}, which is unknown; "
                "pip install --upgrade gguf, or use another quantisation"
            ) from error
        if not shape or shape[-1] % block:
            raise ModelError(f"{self.path}: tensor {name} has shape {shape}: the file is damaged")
        return int(math.prod(shape) // block * block_bytes)


class _Cursor:
    """A position in the header; every read checks the file's end first."""

    def __init__(self, path: Path, data: mmap.mmap | bytes, size: int, position: int) -> None:
        self._path, self._data, self._size = path, data, size
        self.position = position

    def _advance(self, nbytes: int) -> int:
        start, end = self.position, self.position + nbytes
        if end > self._size:
            raise ModelError(
                f"{self._path}: truncated or damaged: found {self._size} bytes, needed at least "
                f"{end} for the header alone; copy or download the file again"
            )
        self.position = end
        return start

    def scalar(self, code: str) -> Any:
        start = self._advance(struct.calcsize(code))
        return struct.unpack_from("<" + code, self._data, start)[0]

    def string(self) -> str:
        length = self.scalar("Q")
        start = self._advance(length)
        # A damaged header must end in a message about the file, not in a UnicodeDecodeError.
        return self._data[start : start + length].decode("utf-8", "replace")

    def dimensions(self) -> tuple[int, ...]:
        count = self.scalar("I")
        if count > _MAX_DIMENSIONS:
            raise ModelError(f"{self._path}: found a tensor of {count} dimensions: it is damaged")
        return tuple(self.scalar("Q") for _ in range(count))[::-1]

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            code = _SCALARS.get(kind)
            if code is not None:
                start = self._advance(count * struct.calcsize(code))
                return list(struct.unpack_from(f"<{count}{code}", self._data, start))
            return [self.value(kind) for _ in range(count)]
        code = _SCALARS.get(kind)
        if code is None:
            raise ModelError(f"{self._path}: found metadata of unknown type {kind}: it is damaged")
        return self.scalar(code)
