"""The OpenAPI document of this API, made from the structs that read the requests."""

from __future__ import annotations

from typing import Any

import msgspec

from disagg_mpi import __version__
from disagg_mpi.frontend.openai import replies
from disagg_mpi.frontend.openai.calls import ChatCall, CompletionCall, DetokenizeCall, TokenizeCall
from disagg_mpi.frontend.openai.errors import ErrorBody

_POSTS: dict[str, tuple[type, type, str]] = {
    "/v1/completions": (CompletionCall, replies.Completion, "Continue prompts"),
    "/v1/chat/completions": (ChatCall, replies.ChatCompletion, "Answer a chat"),
    "/tokenize": (TokenizeCall, replies.Tokens, "Token ids of a text or a chat"),
    "/detokenize": (DetokenizeCall, replies.Text, "Text of token ids"),
}


def make_document() -> dict[str, Any]:
    """OpenAPI 3.1, as plain data."""
    types = [kind for call, reply, _ in _POSTS.values() for kind in (call, reply)]
    _, components = msgspec.json.schema_components(
        [*types, replies.ModelList, replies.Model, ErrorBody], ref_template="#/components/schemas/{name}")
    model = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    paths: dict[str, Any] = {
        path: {"post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(call)}}},
            "responses": _responses(reply)}}
        for path, (call, reply, summary) in _POSTS.items()}
    paths["/v1/models"] = {"get": {
        "summary": "The models of this server", "responses": _responses(replies.ModelList)}}
    paths["/v1/models/{model}"] = {"get": {
        "summary": "One of them", "parameters": [model], "responses": _responses(replies.Model)}}
    return {"openapi": "3.1.0", "info": {"title": "disagg_mpi", "version": __version__}, "paths": paths,
            "components": {"schemas": components,
                           "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
            "security": [{}, {"key": []}]}


def _ref(kind: type) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"}


def _responses(reply: type) -> dict[str, Any]:
    return {"200": {"description": "The answer; where `stream` is true, server-sent events",
                    "content": {"application/json": {"schema": _ref(reply)}}},
            "default": {"description": "An error",
                        "content": {"application/json": {"schema": _ref(ErrorBody)}}}}
