"""What clients may send: one struct for each kind of request, and how a body becomes one.

Fields that these structs do not have are ignored, as OpenAI's own server does; a wrong type is a 400 that
names the field. ``null`` means "not given".
"""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec

from disagg_mpi.frontend.openai.errors import ApiError, invalid

T = TypeVar("T")


class StreamOptions(msgspec.Struct, frozen=True):
    """What a stream holds beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True):
    """The ``json_schema`` of a ``response_format``."""

    schema: dict[str, Any]
    name: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True):
    """``{"type": "text" | "json_object" | "json_schema", "json_schema": …}``"""

    type: str
    json_schema: JsonSchema | None = None


class SamplingCall(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that completions and chats share. Those below ``user`` are not OpenAI's, but what
    other open servers take under these names."""

    model: str | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    """Token id → what is added to its logit."""
    n: int | None = None
    presence_penalty: float | None = None
    response_format: ResponseFormat | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    """Absent: 1."""
    top_p: float | None = None
    user: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    repetition_penalty: float | None = None
    stop_token_ids: list[int] | None = None
    top_k: int | None = None


class CompletionCall(SamplingCall, frozen=True, kw_only=True):
    """``POST /v1/completions``"""

    prompt: str | list[str | int | list[int]]
    """A text, texts, token ids, or lists of token ids."""
    best_of: int | None = None
    echo: bool | None = None
    logprobs: int | None = None
    max_tokens: int | None = None
    suffix: str | None = None


class ContentPart(msgspec.Struct, frozen=True):
    """A part of a message's content."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """A message as far as a text model's template reads it."""

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class ChatCall(SamplingCall, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``"""

    messages: list[ChatMessage]
    logprobs: bool | None = None
    max_completion_tokens: int | None = None
    max_tokens: int | None = None
    """The older name of ``max_completion_tokens``."""
    tools: list[dict[str, Any]] | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Variables of the model's own template, such as ``enable_thinking``."""


class TokenizeCall(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /tokenize``: a prompt, or a chat as its template renders it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeCall(msgspec.Struct, frozen=True, kw_only=True):
    """``POST /detokenize``"""

    tokens: list[int]
    model: str | None = None


def decode(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """A request's body as what ``decoder`` is for. Raises :class:`ApiError`, 400, naming the field."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _naming_field(str(error)) from None
    except (msgspec.DecodeError, UnicodeError, RecursionError, OverflowError) as error:
        raise invalid(f"the body is not valid JSON: {error}") from None


def _naming_field(message: str) -> ApiError:
    """msgspec says "Expected `int`, got `str` - at `$.n`", or "… missing required field `prompt`"."""
    found = re.search(r" - at `\$\.?([^`]*)`$", message) or re.search(r"required field `([^`]*)`$", message)
    field = (found[1] if found else "") or None
    text = re.sub(r" - at `\$[^`]*`$", "", message)
    return invalid(f"{field}: {text}" if field else text, re.split(r"[.\[]", field)[0] if field else None)
