"""KServe's bodies over HTTP: a request's bytes to a :class:`Call`, replies to bytes.

Pure: no server, no event loop.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from disagg_mpi.errors import RequestError, TooLargeError
from disagg_mpi.frontend.kserve import tensors
from disagg_mpi.frontend.kserve.ensemble import INPUT_OF
from disagg_mpi.frontend.kserve.models import Model
from disagg_mpi.frontend.kserve.replies import Reply
from disagg_mpi.frontend.kserve.rules import check_input, check_output, timeout_seconds
from disagg_mpi.frontend.kserve.service import Call

T = TypeVar("T")

HEADER_LENGTH = "Inference-Header-Content-Length"
"""The header that says where the JSON of a body ends and binary data begins."""


class _Tensor(msgspec.Struct):
    name: str
    shape: list[int]
    datatype: str
    parameters: dict[str, Any] = {}
    data: Any = None


class _Output(msgspec.Struct):
    name: str
    parameters: dict[str, Any] = {}


class _Body(msgspec.Struct):
    """``/infer``'s JSON. Fields beside these are not looked at."""

    inputs: list[_Tensor]
    id: str = ""
    parameters: dict[str, Any] = {}
    outputs: list[_Output] = []


# ---- requests ----


def unpack(data: bytes, encoding: str, most: int) -> bytes:
    """A body without its compression, and never more than ``most`` bytes of it.

    Raises :class:`TooLargeError` then, and :class:`RequestError` for another ``encoding`` (of
    ``Content-Encoding``) or damaged data.
    """
    window = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}.get(encoding)
    if window is None:
        if encoding in ("identity", ""):
            return data
        raise RequestError(f"Content-Encoding is {encoding!r}; known are gzip, deflate and identity")
    unpacker = zlib.decompressobj(window)
    try:
        unpacked = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise RequestError(f"the body is not valid {encoding}: {error}") from None
    if len(unpacked) > most:
        raise too_large(most)
    if not unpacker.eof:
        raise RequestError(f"the body is not valid {encoding}: it ends too early")
    return unpacked


def too_large(most: int) -> TooLargeError:
    """What a body of more than ``most`` bytes is answered with."""
    return TooLargeError(f"the body is too large; at most {most} bytes are taken")


def infer_call(model: Model, data: bytes, header_length: str | None) -> tuple[Call, Callable[[str], bool]]:
    """The call, and which outputs are to come as binary data.

    ``header_length``: the value of :data:`HEADER_LENGTH`, if it came. Raises :class:`RequestError`.
    """
    given = str(len(data)) if header_length is None else header_length
    length = int(given) if re.fullmatch("[0-9]{1,18}", given) else -1
    if not 0 <= length <= len(data):
        raise RequestError(f"{HEADER_LENGTH} is {given[:32]!r}; it is the length of the JSON that the body "
                           f"begins with, and the body has {len(data)} bytes")
    body = _decode(data[:length], _Body)
    inputs = _inputs(body.inputs, memoryview(data)[length:])
    asked = {}
    everything = body.parameters.get("binary_data_output") is True
    for output in body.outputs:
        check_output(output, output.parameters.get("classification"))
        asked[output.name] = output.parameters.get("binary_data", everything) is True
    timeout = timeout_seconds(body.parameters.get("timeout", 0))
    call = Call(model.name, model.version, body.id, inputs, frozenset(asked) or None, timeout,
                may_stream=False)
    return call, lambda name: asked.get(name, everything)


def _inputs(described: Sequence[_Tensor], binary: memoryview) -> list[tensors.Incoming]:
    """With the binary data, of which each that has some takes the next part."""
    inputs, at = [], 0
    for given in described:
        check_input(given)
        size = given.parameters.get("binary_data_size")
        if size is None:
            inputs.append(tensors.from_json(given.name, given.datatype, given.shape, given.data))
            continue
        if type(size) is not int or not 0 <= size <= len(binary) - at:
            raise RequestError(f"input '{given.name}' has binary_data_size {size!r}; {len(binary) - at} "
                               f"bytes are left after the JSON, whose length {HEADER_LENGTH} gives")
        data = bytes(binary[at : at + size])
        inputs.append(tensors.from_raw(given.name, given.datatype, given.shape, data))
        at += size
    if at != len(binary):
        raise RequestError(f"{len(binary) - at} bytes after the JSON belong to no input")
    return inputs


def generate_call(model: Model, data: bytes, *, may_stream: bool) -> Call:
    """``{"text_input": "…", "max_tokens": 20}``: inputs are plain values or flat lists; unknown fields are
    not looked at. Raises :class:`RequestError`."""
    body = _decode(data, dict[str, Any])
    inputs = []
    for name, value in body.items():
        tensor = INPUT_OF.get(model.ours(name))
        if tensor is None or value is None:
            continue
        shape = [1] if model.max_batch_size else []
        # A list where one value belongs is taken as it is, and refused by its shape unless it holds one.
        shape += [len(value) if isinstance(value, list) else 1, *(1 for _ in tensor.dims[1:])]
        inputs.append(tensors.from_json(name, tensor.datatype, shape, value))
    return Call(model.name, model.version, str(body.get("id") or ""), inputs, None, may_stream=may_stream)


def _decode(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RequestError(f"the body is not the JSON that is needed: {error}") from None


# ---- replies ----


def infer_body(
    model: Model, identity: str, outputs: Sequence[tensors.Outgoing], is_binary: Callable[[str], bool]
) -> tuple[bytes, int | None]:
    """The body, and the length of its JSON where binary data follows."""
    described, parts = [], []
    for output in outputs:
        name = model.theirs(output.name)
        head: dict[str, Any] = {"name": name, "datatype": output.datatype, "shape": output.shape}
        if is_binary(name):
            parts.append(output.raw())
            head["parameters"] = {"binary_data_size": len(parts[-1])}
        else:
            head["data"] = output.values()
        described.append(head)
    header = msgspec.json.encode({
        **({"id": identity} if identity else {}), "model_name": model.name, "model_version": model.version,
        "outputs": described})
    return b"".join([header, *parts]), len(header) if parts else None


def generate_body(model: Model, identity: str, outputs: Sequence[tensors.Outgoing]) -> bytes:
    """JSON: what is known of the request, and its outputs beside that."""
    return msgspec.json.encode(_generate_head(model, identity) | _generate_fields(model, outputs))


class EventEncoder:
    """The replies of one ``generate_stream``, as server-sent events; what they share is made once."""

    def __init__(self, call: Call, model: Model) -> None:
        self._model = model
        head = msgspec.json.encode(_generate_head(model, call.id))
        self._start = b"data: " + head[:-1] + b","
        self._text_start = self._start + msgspec.json.encode(model.theirs("text_output")) + b":"

    def encode(self, reply: Reply) -> bytes:
        """One event."""
        if reply.text is not None and not reply.others:
            return self._text_start + msgspec.json.encode(reply.text) + b"}\n\n"
        fields = msgspec.json.encode(_generate_fields(self._model, reply.outputs()))
        return self._start + fields[1:] + b"\n\n"

    @staticmethod
    def error(message: str) -> bytes:
        """The event that tells of a request's end by an error."""
        return b"data: " + msgspec.json.encode({"error": message}) + b"\n\n"


def _generate_head(model: Model, identity: str) -> dict[str, Any]:
    return {**({"id": identity} if identity else {}), "model_name": model.name,
            "model_version": model.version, "sequence_end": False, "sequence_id": 0, "sequence_start": False}


def _generate_fields(model: Model, outputs: Sequence[tensors.Outgoing]) -> dict[str, Any]:
    """One element is shown as itself, as Triton's ``generate`` does."""
    values = ((model.theirs(output.name), output.values()) for output in outputs)
    return {name: several[0] if len(several) == 1 else several for name, several in values}
