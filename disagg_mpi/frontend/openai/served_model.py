"""The model that this server has, as clients name it; and its tokenizer: models, tokenize, detokenize."""

from __future__ import annotations

import time

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.openai.calls import ChatMessage, DetokenizeCall, TokenizeCall, decode
from disagg_mpi.frontend.openai.errors import ApiError, invalid
from disagg_mpi.frontend.openai.messages import encode_chat
from disagg_mpi.frontend.openai.replies import Model, ModelList, Text, Tokens
from disagg_mpi.frontend.served import Served

_tokenize_decoder = msgspec.json.Decoder(TokenizeCall)
_detokenize_decoder = msgspec.json.Decoder(DetokenizeCall)


def check_model(name: str | None, served: Served) -> None:
    """Raise :class:`ApiError`, 404, for another model than ours; none at all is ours."""
    if name is not None and name != served.name:
        raise ApiError(404, f"the model {name[:200]!r} does not exist; this server has {served.name!r}",
                       param="model", code="model_not_found")


class ServedModel:
    """The endpoints that need no engine; one a server."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        served = gate.served
        self._model = Model(id=served.name, created=int(time.time()), max_model_len=served.max_model_len)

    async def models(self, http: HttpRequest) -> Response:
        """``GET /v1/models``"""
        return _json(ModelList(data=[self._model]))

    async def model(self, http: HttpRequest) -> Response:
        """``GET /v1/models/{id}``"""
        check_model(http.path_params["model"], self._gate.served)
        return _json(self._model)

    async def tokenize(self, http: HttpRequest) -> Response:
        """``POST /tokenize``"""
        call = decode(await http.body(), _tokenize_decoder)
        check_model(call.model, self._gate.served)
        if (call.prompt is None) == (call.messages is None):
            raise invalid("give prompt or messages" + (", not both" if call.prompt is not None else ""),
                          "prompt")
        if call.prompt is not None:
            (found,) = await self._gate.encode([call.prompt], call.add_special_tokens is not False)
        else:
            messages: list[ChatMessage] = call.messages or []
            found = await encode_chat(self._gate, messages, call.add_generation_prompt,
                                      call.chat_template_kwargs)
        return _json(Tokens(count=len(found), max_model_len=self._gate.served.max_model_len, tokens=found))

    async def detokenize(self, http: HttpRequest) -> Response:
        """``POST /detokenize``"""
        call = decode(await http.body(), _detokenize_decoder)
        check_model(call.model, self._gate.served)
        size = self._gate.served.orchestrator.limits.vocab_size
        bad = next((token for token in call.tokens if not 0 <= token < size), None)
        if bad is not None:
            raise invalid(f"tokens: id {bad} is outside the model's vocabulary of {size}", "tokens")
        return _json(Text(await self._gate.decode(call.tokens)))


def _json(reply: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(reply), media_type="application/json")
