"""safetensors files: reading a header without touching the tensors, writing one tensor at a time.

The ``safetensors`` package reads and writes too, but its reader says "invalid header" where a user
needs to know which file lacks how many bytes, and its writer wants all tensors in memory at once
(four bytes a parameter). The format is 8 bytes of header length, JSON, then the tensors' bytes.
Nothing here is kept open: a reader closes before it returns, a writer is a context manager.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt

from disagg_mpi.errors import ModelError

# The reference implementation refuses longer headers; so a larger number means another format.
MAX_HEADER_BYTES = 100_000_000

_GIT_LFS_POINTER = b"version https://git-lfs"


class TensorInfo(msgspec.Struct, frozen=True):
    """One tensor as its header describes it."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a file, after checking that the file is as long as its header says."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if prefix == _GIT_LFS_POINTER[:8]:
                raise ModelError(
                    f"{path}: found a Git LFS pointer of {size} bytes, not the weights; "
                    f"type: git -C {path.parent} lfs pull"
                )
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or 8 + header_bytes > size:
                needed = 8 if len(prefix) < 8 else 8 + header_bytes
                if needed > MAX_HEADER_BYTES:
                    raise _not_safetensors(path, f"a header of {header_bytes} bytes")
                raise _truncated(path, size, needed, " for the header alone")
            raw = file.read(header_bytes)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    tensors = _decode_header(path, raw)
    end = max((info.data_offsets[1] for info in tensors.values()), default=0)
    needed = 8 + header_bytes + end
    if size < needed:
        raise _truncated(path, size, needed, "")
    if size > needed:
        raise ModelError(
            f"{path}: found {size} bytes, its header describes {needed}: "
            "the file is damaged; copy or download it again"
        )
    return tensors


def _decode_header(path: Path, raw: bytes) -> dict[str, TensorInfo]:
    try:
        entries = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        return {
            name: msgspec.json.decode(entry, type=TensorInfo)
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except msgspec.MsgspecError as error:
        raise _not_safetensors(path, f"a header that is not its JSON ({error})") from error


def _truncated(path: Path, found: int, needed: int, what: str) -> ModelError:
    return ModelError(
        f"{path}: truncated: found {found} bytes, needed {needed}{what}; "
        "copy or download the file again"
    )


def _not_safetensors(path: Path, found: str) -> ModelError:
    return ModelError(f"{path}: not a safetensors file: found {found}")


class SafetensorsWriter:
    """Write a file of fp32 tensors whose shapes are known, in the order of ``shapes``.

    >>> with SafetensorsWriter(path, {"a": (2, 3)}) as writer:   # doctest: +SKIP
    ...     writer.write("a", array)
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = dict(shapes)
        self._names = iter(self._shapes)
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape in self._shapes.items():
            end = offset + 4 * math.prod(shape)
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        # The tensors start at a cache line's boundary (8 bytes of length precede the text), so that
        # kernels get aligned rows from a mapping.
        text += b" " * (-(len(text) + 8) % 64)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, array: npt.NDArray[np.float32]) -> None:
        expected = next(self._names)
        if name != expected or array.shape != self._shapes[name] or array.dtype != np.float32:
            raise ValueError(
                f"got {name} {array.shape} {array.dtype}, "
                f"next is {expected} {self._shapes[expected]} float32"
            )
        self._file.write(np.ascontiguousarray(array).data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._file:  # closes even where flush or fsync fails
            if kind is None:
                if (missing := next(self._names, None)) is not None:
                    raise ValueError(f"{missing} was never written")
                self._file.flush()
                os.fsync(self._file.fileno())
