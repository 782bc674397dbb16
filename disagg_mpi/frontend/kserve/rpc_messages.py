"""gRPC's messages: a request's bytes to a :class:`Call`, replies to messages, and those of a stream to bytes.

Pure: no server, no event loop.
"""

from __future__ import annotations

from typing import TypeAlias

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from disagg_mpi.errors import RequestError
from disagg_mpi.frontend.kserve import tensors
from disagg_mpi.frontend.kserve.models import Model
from disagg_mpi.frontend.kserve.replies import Reply
from disagg_mpi.frontend.kserve.rules import check_input, check_output, timeout_seconds
from disagg_mpi.frontend.kserve.service import Call

# A malformed message is its sender's mistake: it must reach a method, or gRPC calls it our internal error.
Parsed: TypeAlias = service_pb2.ModelInferRequest | DecodeError


def parse(data: bytes) -> Parsed:
    """A request, or why it is none; never raises."""
    try:
        return service_pb2.ModelInferRequest.FromString(data)
    except DecodeError as error:
        return error


def call_of(request: Parsed, *, may_stream: bool) -> Call:
    """What a message asks for; its tensors stay undecoded. Raises :class:`RequestError`."""
    if isinstance(request, DecodeError):
        raise RequestError(f"the message is not a ModelInferRequest: {request}")
    for given in request.inputs:  # first: one in shared memory has no contents
        check_input(given)
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise RequestError(f"{len(request.inputs)} inputs have {len(raw)} raw_input_contents; there is one "
                           "for each, or none where all have contents")
    inputs = []
    for position, given in enumerate(request.inputs):
        if not raw:
            inputs.append(tensors.from_contents(given.name, given.datatype, given.shape, given.contents))
        elif given.contents.ByteSize():
            raise RequestError(f"input '{given.name}' has contents beside raw_input_contents; give one of "
                               "them")
        else:
            inputs.append(tensors.from_raw(given.name, given.datatype, given.shape, raw[position]))
    for wanted in request.outputs:
        check_output(wanted, "classification" in wanted.parameters)
    names = frozenset(wanted.name for wanted in request.outputs)
    return Call(request.model_name, request.model_version, request.id, inputs, names or None,
                _timeout_of(request), may_stream)


def _timeout_of(request: service_pb2.ModelInferRequest) -> float | None:
    """Triton's request timeout, in seconds; 0 is none."""
    if "timeout" not in request.parameters:
        return None
    given = request.parameters["timeout"]
    value = getattr(given, given.WhichOneof("parameter_choice") or "int64_param")
    return timeout_seconds(value)


def response_of(call: Call, model: Model, outputs: list[tensors.Outgoing]) -> service_pb2.ModelInferResponse:
    """The only reply of a call, or one of a stream's before it is said whether it is the last."""
    response = service_pb2.ModelInferResponse(
        model_name=model.name, model_version=model.version, id=call.id,
        raw_output_contents=[output.raw() for output in outputs])
    for output in outputs:
        response.outputs.add(name=model.theirs(output.name), datatype=output.datatype, shape=output.shape)
    return response


def stream_error(request: Parsed, message: str) -> bytes:
    """The last reply to a request of a stream that fails; the stream goes on."""
    response = service_pb2.ModelStreamInferResponse(error_message=message)
    if isinstance(request, service_pb2.ModelInferRequest):
        response.infer_response.id = request.id
        response.infer_response.model_name = request.model_name
    response.infer_response.parameters["triton_final_response"].bool_param = True
    data: bytes = response.SerializeToString()
    return data


class StreamEncoder:
    """The replies of one request of a stream, as serialised ``ModelStreamInferResponse`` messages.

    All but the text is the same in nearly every reply, so that part is serialised once: protobuf allows to
    append a field to a message that is serialised already. Every reply says whether it is the last:
    clients take a reply without ``triton_final_response`` for one that is.
    """

    def __init__(self, call: Call, model: Model) -> None:
        self._call = call
        self._model = model
        self._starts = tuple(self._start(is_final) for is_final in (False, True))

    def encode(self, reply: Reply) -> bytes:
        if reply.text is None or reply.others:
            response = response_of(self._call, self._model, reply.outputs())
            response.parameters["triton_final_response"].bool_param = reply.is_final
            body: bytes = response.SerializeToString()
        else:
            text = reply.text.encode()
            # raw_output_contents (6): one element of BYTES.
            body = b"".join((self._starts[reply.is_final], b"\x32", _varint(len(text) + 4),
                             len(text).to_bytes(4, "little"), text))
        return b"\x12" + _varint(len(body)) + body  # infer_response (2)

    def _start(self, is_final: bool) -> bytes:
        response = service_pb2.ModelInferResponse(
            model_name=self._model.name, model_version=self._model.version, id=self._call.id)
        response.parameters["triton_final_response"].bool_param = is_final
        response.outputs.add(name=self._model.theirs("text_output"), datatype="BYTES", shape=[1])
        data: bytes = response.SerializeToString()
        return data


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
