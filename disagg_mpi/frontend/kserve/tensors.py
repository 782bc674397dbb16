"""Tensors as KServe v2 has them on the wire (raw bytes, typed protobuf contents, JSON), to values and back.

Pure. What comes in stays undecoded (:class:`Incoming`) until its name and shape are known to be good, so that
a tensor nobody asked for costs nothing. Whatever is wrong with a client's tensor is a :class:`RequestError`
that names it.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from disagg_mpi.errors import RequestError

_LENGTH = struct.Struct("<I")

# Little-endian, as KServe's binary data is, whatever the machine. BF16 has no numpy type and no use here.
_NUMPY = {
    "BOOL": "?", "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8",
    "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8",
    "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}

_CONTENTS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents",
    "UINT32": "uint_contents", "UINT64": "uint64_contents", "FP32": "fp32_contents",
    "FP64": "fp64_contents", "BYTES": "bytes_contents",
}


class Contents(Protocol):
    """A protobuf ``InferTensorContents``: one repeated field for each kind of value."""

    def ListFields(self) -> Sequence[tuple[Any, Any]]: ...


@dataclass(frozen=True, slots=True)
class Incoming:
    """One input of a request, not decoded yet."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    load: Callable[[], list[Any]]
    """All values in row-major order: bool, int, float, or bytes for BYTES. Raises :class:`RequestError`."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Outgoing:
    """One output of a reply."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, Any] | list[bytes]
    """An array of ``shape``; for BYTES the elements in row-major order."""

    def raw(self) -> bytes:
        """As ``raw_output_contents`` and HTTP's binary data have it."""
        if isinstance(self.data, list):
            return b"".join(_LENGTH.pack(len(item)) + item for item in self.data)
        return self.data.astype(_NUMPY[self.datatype], copy=False).tobytes()

    def values(self) -> list[Any]:
        """Flat, as JSON's ``data`` has it."""
        if isinstance(self.data, list):
            return [item.decode() for item in self.data]
        return self.data.ravel().tolist()  # type: ignore[no-any-return]


def incoming(name: str, datatype: str, shape: Sequence[int], load: Callable[[], list[Any]]) -> Incoming:
    """Check the head of a tensor. Raises :class:`RequestError`."""
    if datatype != "BYTES" and datatype not in _NUMPY:
        raise RequestError(f"input '{name}' has datatype {datatype!r}; known are BYTES, {', '.join(_NUMPY)}")
    if any(size < 0 for size in shape):
        raise RequestError(f"input '{name}' has shape {list(shape)}; sizes are 0 or more")
    return Incoming(name, datatype, tuple(shape), load)


def from_raw(name: str, datatype: str, shape: Sequence[int], raw: bytes) -> Incoming:
    """A tensor in binary: little-endian values, or for BYTES each element after its length as uint32."""

    def load() -> list[Any]:
        count = tensor.num_elements
        if datatype == "BYTES":
            items = list(_split_bytes(name, raw))
            if len(items) != count:
                raise _wrong_count(name, shape, count, len(items))
            return items
        kind = np.dtype(_NUMPY[datatype])
        if len(raw) != count * kind.itemsize:
            raise RequestError(f"input '{name}' has {len(raw)} bytes of data; shape {list(shape)} of "
                               f"{datatype} needs {count * kind.itemsize}")
        return np.frombuffer(raw, kind).tolist()  # type: ignore[no-any-return]

    tensor = incoming(name, datatype, shape, load)
    return tensor


def from_contents(name: str, datatype: str, shape: Sequence[int], contents: Contents) -> Incoming:
    """A tensor in protobuf's typed fields."""

    def load() -> list[Any]:
        field = _CONTENTS.get(datatype)
        if field is None:
            raise RequestError(f"input '{name}' of {datatype} must come as raw_input_contents")
        filled = [descriptor.name for descriptor, _ in contents.ListFields()]
        if any(other != field for other in filled):
            raise RequestError(f"input '{name}' of {datatype} belongs in {field}; found {', '.join(filled)}")
        values = list(getattr(contents, field))
        if len(values) != tensor.num_elements:
            raise _wrong_count(name, shape, tensor.num_elements, len(values))
        if datatype in ("INT8", "INT16", "UINT8", "UINT16"):
            _check_range(name, datatype, values)
        return values

    tensor = incoming(name, datatype, shape, load)
    return tensor


def from_json(name: str, datatype: str, shape: Sequence[int], data: Any) -> Incoming:
    """A tensor in JSON: nested or flat lists of values."""

    def load() -> list[Any]:
        values = list(_flatten(data))
        if len(values) != tensor.num_elements:
            raise _wrong_count(name, shape, tensor.num_elements, len(values))
        return [_of_json(name, datatype, value) for value in values] if datatype in ("BYTES", "BOOL") \
            else _numbers_of_json(name, datatype, values)

    tensor = incoming(name, datatype, shape, load)
    return tensor


def _split_bytes(name: str, raw: bytes) -> Iterator[bytes]:
    at, end = 0, len(raw)
    while at < end:
        start = at + _LENGTH.size
        if start > end:
            raise RequestError(f"input '{name}': {end - at} bytes are left where the length of an element, 4 "
                               "bytes, is needed")
        (length,) = _LENGTH.unpack_from(raw, at)
        at = start + length
        if at > end:
            raise RequestError(f"input '{name}': an element says that it has {length} bytes, {end - start} "
                               "are there")
        yield raw[start:at]


def _flatten(data: Any) -> Iterator[Any]:
    """The values of nested lists, without recursion: a client chooses the depth."""
    stack = [iter((data,))]
    while stack:
        for value in stack[-1]:
            if isinstance(value, list):
                stack.append(iter(value))
                break
            yield value
        else:
            stack.pop()


def _of_json(name: str, datatype: str, value: Any) -> Any:
    if datatype == "BYTES" and isinstance(value, str):
        try:
            return value.encode()
        except UnicodeEncodeError:
            raise RequestError(f"input '{name}' has text that is not valid Unicode") from None
    if datatype == "BOOL" and isinstance(value, bool):
        return value
    raise _wrong_value(name, datatype, value)


def _numbers_of_json(name: str, datatype: str, values: list[Any]) -> list[Any]:
    is_float = datatype.startswith("FP")
    for value in values:
        if type(value) is not int and not (is_float and type(value) is float):
            raise _wrong_value(name, datatype, value)
    if is_float:
        try:
            return [float(value) for value in values]
        except OverflowError:
            raise RequestError(f"input '{name}' has a number beyond {datatype}") from None
    _check_range(name, datatype, values)
    return values


def _check_range(name: str, datatype: str, values: list[int]) -> None:
    limits = np.iinfo(_NUMPY[datatype])
    for value in values:
        if not limits.min <= value <= limits.max:
            raise RequestError(f"input '{name}' has a number beyond {datatype}, {limits.min} to {limits.max}")


def _wrong_value(name: str, datatype: str, value: Any) -> RequestError:
    kind = {bool: "a boolean", str: "a string", dict: "an object", float: "a fraction", int: "a number",
            type(None): "null"}.get(type(value), type(value).__name__)
    return RequestError(f"input '{name}' is of {datatype}; found {kind}")


def _wrong_count(name: str, shape: Sequence[int], needed: int, found: int) -> RequestError:
    return RequestError(f"input '{name}' has {found} elements; shape {list(shape)} needs {needed}")
