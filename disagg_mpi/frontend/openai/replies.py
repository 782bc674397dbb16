"""What is sent back: one struct for each object of the API, and a stream's events as bytes."""

from __future__ import annotations

from typing import Literal

import msgspec

from disagg_mpi.frontend.openai.errors import ApiError, body_of
from disagg_mpi.request import FinishReason, Result

DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """``cached_tokens``: prompt tokens that the prefix cache had."""

    cached_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | msgspec.UnsetType = msgspec.UNSET


class CompletionLogprobs(msgspec.Struct):
    """Parallel lists, one item a token; the prompt's first token has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(msgspec.Struct):
    """One continuation, or in a stream what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(msgspec.Struct, kw_only=True):
    """``text_completion``, whole or one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(msgspec.Struct, frozen=True):
    """A generated token and its likeliest alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    """Of a choice's tokens."""

    content: list[ChatTokenLogprob]
    refusal: None = None


class AssistantMessage(msgspec.Struct, frozen=True):
    """The model's whole answer."""

    content: str
    role: Literal["assistant"] = "assistant"
    refusal: None = None


class Delta(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is new of an answer."""

    role: str | None = None
    content: str | None = None


class ChatChoice(msgspec.Struct):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunkChoice(msgspec.Struct):
    """What is new of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletion(msgspec.Struct, kw_only=True):
    """``chat.completion``"""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(msgspec.Struct, kw_only=True):
    """``chat.completion.chunk``"""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET


class Model(msgspec.Struct, kw_only=True):
    """``model``"""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "disagg_mpi"
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """``list`` of models"""

    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(msgspec.Struct, kw_only=True):
    """The answer of ``/tokenize``."""

    count: int
    max_model_len: int
    tokens: list[int]


class Text(msgspec.Struct):
    """The answer of ``/detokenize``."""

    prompt: str


def usage_of(results: list[Result]) -> Usage:
    """Of finished requests, together."""
    prompt = sum(len(result.prompt_token_ids) for result in results)
    completion = sum(result.usage.completion_tokens for result in results)
    cached = sum(result.timing.cached_tokens for result in results)
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))


def event(data: msgspec.Struct) -> bytes:
    """One server-sent event."""
    return b"data: %b\n\n" % _encode(data)


def error_event(error: ApiError) -> bytes:
    """An error in a stream that has begun."""
    return event(body_of(error))
