"""Where each endpoint of the OpenAI API lies."""

from __future__ import annotations

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.openai.chat import Chat
from disagg_mpi.frontend.openai.completions import Completions
from disagg_mpi.frontend.openai.document import make_document
from disagg_mpi.frontend.openai.served_model import ServedModel


def routes(gate: Gate) -> list[BaseRoute]:
    """For a starlette app; errors are raised as :class:`ApiError`, which the app turns into responses."""
    model, completions, chat = ServedModel(gate), Completions(gate), Chat(gate)
    document = msgspec.json.encode(make_document())

    async def complete(http: HttpRequest) -> Response:
        return await completions(http)

    async def converse(http: HttpRequest) -> Response:
        return await chat(http)

    async def openapi(http: HttpRequest) -> Response:
        return Response(document, media_type="application/json")

    return [
        Route("/v1/completions", complete, methods=["POST"]),
        Route("/v1/chat/completions", converse, methods=["POST"]),
        Route("/v1/models", model.models),
        Route("/v1/models/{model:path}", model.model),
        Route("/tokenize", model.tokenize, methods=["POST"]),
        Route("/detokenize", model.detokenize, methods=["POST"]),
        Route("/openapi.json", openapi),
    ]
