"""From a chat's messages to the model's prompt."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from disagg_mpi.errors import DisaggError, RequestError
from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.openai.calls import ChatMessage
from disagg_mpi.frontend.openai.errors import invalid


async def encode_chat(
    gate: Gate, messages: Sequence[ChatMessage], add_generation_prompt: bool | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[int]:
    """The token ids of a chat, in a thread: a template is a program of the model's, and may take its time.

    Raises :class:`ApiError` or :class:`RequestError` for messages that the template or the model cannot take.
    """
    plain = [_plain(position, message) for position, message in enumerate(messages)]
    try:
        return await asyncio.to_thread(
            gate.served.tokenizer.apply_chat_template, plain, add_generation_prompt is not False, variables)
    except (DisaggError, UnicodeError, TypeError) as error:
        raise RequestError(f"messages: {error}") from error


def _plain(position: int, message: ChatMessage) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise invalid(f"messages[{position}].content has a part of type {part.type[:40]!r}; this "
                              'model reads text only: {"type": "text", "text": …}', "messages")
        content = "".join(part.text or "" for part in content)
    plain: dict[str, Any] = {"role": message.role, "content": content}
    for name in ("name", "tool_calls", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            plain[name] = value
    return plain
