"""From what a client asked for to :class:`SamplingParams`. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from disagg_mpi.frontend.openai.calls import ResponseFormat, SamplingCall
from disagg_mpi.frontend.openai.errors import invalid
from disagg_mpi.request import SamplingParams

DEFAULT_TEMPERATURE = 1.0
"""OpenAI's."""

# Each stop text is looked for after every token, by a leader that steps for everybody.
_MAX_STOPS = 32
_MAX_STOP_CHARACTERS = 1024
_MAX_STOP_TOKENS = 256

_SAME_NAMES = ("n", "frequency_penalty", "ignore_eos", "min_tokens", "presence_penalty",
               "repetition_penalty", "top_k", "top_p")


def sampling_of(
    call: SamplingCall, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None,
    **changes: Any,
) -> SamplingParams:
    """``logprobs``: alternatives to each generated token, ``prompt_logprobs``: to each of the prompt's.

    Raises :class:`ApiError` or :class:`ConfigError` that begin with the name of the field.
    """
    temperature = call.temperature
    given: dict[str, Any] = {
        "max_tokens": max_tokens, "logprobs": logprobs,
        "temperature": DEFAULT_TEMPERATURE if temperature is None else temperature,
        **{name: value for name in _SAME_NAMES if (value := getattr(call, name)) is not None}}
    if call.seed is not None:
        given["seed"] = call.seed % 2**63  # OpenAI's may be negative
    if call.stop:
        given["stop"] = _stops(call.stop)
    if call.stop_token_ids:
        if len(call.stop_token_ids) > _MAX_STOP_TOKENS:
            raise invalid(f"stop_token_ids has {len(call.stop_token_ids)} ids; this server takes "
                          f"{_MAX_STOP_TOKENS} at most", "stop_token_ids")
        given["stop_token_ids"] = tuple(call.stop_token_ids)
    if prompt_logprobs is not None:
        given["prompt_logprobs"] = prompt_logprobs
    if call.logit_bias:
        given["logit_bias"] = _bias(call.logit_bias)
    guide = _guide(call)
    if guide is not None:
        given["guided"] = guide
    # Through the field types, so that what is nested becomes its own struct.
    try:
        return msgspec.convert({**given, **changes}, SamplingParams)
    except msgspec.ValidationError as error:
        raise invalid(str(error)) from None


def _stops(stop: str | list[str]) -> tuple[str, ...]:
    texts = [stop] if isinstance(stop, str) else stop
    if len(texts) > _MAX_STOPS:
        raise invalid(f"stop has {len(texts)} texts; this server takes {_MAX_STOPS} at most", "stop")
    if any(len(text) > _MAX_STOP_CHARACTERS for text in texts):
        raise invalid(f"stop has a text of more than {_MAX_STOP_CHARACTERS} characters", "stop")
    return tuple(texts)


def _bias(bias: dict[str, float]) -> dict[int, float]:
    for token in bias:
        if not (token.isascii() and token.isdecimal() and len(token) < 12):
            raise invalid(f"logit_bias has the key {token[:40]!r}; keys are token ids", "logit_bias")
    return {int(token): value for token, value in bias.items()}


def _guide(call: SamplingCall) -> dict[str, Any] | None:
    """The one constraint on the output, as :class:`Guided` has it."""
    found: dict[str, dict[str, Any]] = {}
    form = call.response_format
    if form is not None and form.type != "text":
        found["response_format"] = {"json": _schema_of(form)}
    if call.guided_json is not None:
        schema = call.guided_json
        found["guided_json"] = {"json": schema if isinstance(schema, str) else _text(schema)}
    for kind in ("regex", "choice", "grammar"):
        value = getattr(call, f"guided_{kind}")
        if value is not None:
            found[f"guided_{kind}"] = {kind: value}
    if len(found) > 1:
        raise invalid(f"{' and '.join(found)} exclude each other: give one", next(iter(found)))
    return next(iter(found.values()), None)


def _schema_of(form: ResponseFormat) -> str:
    if form.type == "json_object":
        return '{"type": "object"}'
    if form.type != "json_schema":
        raise invalid(f"response_format.type is {form.type[:40]!r}; it is text, json_object or json_schema",
                      "response_format")
    if form.json_schema is None:
        raise invalid("response_format of type json_schema needs json_schema.schema", "response_format")
    return _text(form.json_schema.schema)


def _text(schema: dict[str, Any]) -> str:
    return msgspec.json.encode(schema).decode()
