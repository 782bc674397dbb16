"""``POST /v1/chat/completions``: messages in, the assistant's next one out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from disagg_mpi.frontend.gate import Gate
from disagg_mpi.frontend.openai.answering import EventStream, results_of
from disagg_mpi.frontend.openai.calls import ChatCall, decode
from disagg_mpi.frontend.openai.completions import API
from disagg_mpi.frontend.openai.errors import invalid
from disagg_mpi.frontend.openai.logprobs import Spelling
from disagg_mpi.frontend.openai.messages import encode_chat
from disagg_mpi.frontend.openai.replies import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Delta,
    Usage,
    event,
    usage_of,
)
from disagg_mpi.frontend.openai.sampling import sampling_of
from disagg_mpi.frontend.openai.served_model import check_model
from disagg_mpi.request import Request, Result, TokenEvent, TokenLogprobs

_decoder = msgspec.json.Decoder(ChatCall)


@dataclass(frozen=True)
class _Head:
    """What all events of an answer begin with."""

    id: str
    created: int
    model: str


class Chat:
    """The endpoint; one a server."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._spelling = Spelling(gate.served.tokenizer)

    async def __call__(self, http: HttpRequest) -> Response:
        call = decode(await http.body(), _decoder)
        check_model(call.model, self._gate.served)
        if call.tools:
            raise invalid("tools: this server does not call tools", "tools")
        num_top = _num_top(call)
        prompt = await encode_chat(self._gate, call.messages, call.add_generation_prompt,
                                   call.chat_template_kwargs)
        asked = call.max_tokens if call.max_completion_tokens is None else call.max_completion_tokens
        max_tokens = self._gate.room(len(prompt)) if asked is None else asked
        sampling = sampling_of(call, max_tokens, num_top)
        head = _Head(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), self._gate.served.name)
        handles = self._gate.submit([Request(prompt_token_ids=prompt, sampling=sampling, id=head.id)], API)
        if call.stream:
            return EventStream(handles, _Writer(head, call, len(prompt), num_top, self._spelling))
        results = await results_of(http.receive, handles)
        return self._reply(head, results, num_top)

    def _reply(self, head: _Head, results: list[Result], num_top: int | None) -> Response:
        (result,) = results
        reply = ChatCompletion(
            id=head.id, created=head.created, model=head.model, usage=usage_of(results),
            choices=[ChatChoice(
                choice.index, AssistantMessage(choice.text),
                _logprobs(self._spelling, choice.token_ids, choice.logprobs, num_top), choice.finish_reason)
                for choice in result.choices])
        return Response(msgspec.json.encode(reply), media_type="application/json")


def _num_top(call: ChatCall) -> int | None:
    if call.top_logprobs is not None and not call.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    if call.top_logprobs is not None and not 0 <= call.top_logprobs <= 20:
        raise invalid(f"top_logprobs is {call.top_logprobs}; it must be between 0 and 20", "top_logprobs")
    return (call.top_logprobs or 0) if call.logprobs else None


def _logprobs(
    spelling: Spelling, token_ids: Sequence[int], found: Sequence[TokenLogprobs] | None, num_top: int | None
) -> ChatLogprobs | None:
    if num_top is None or found is None:
        return None
    return spelling.for_chat(token_ids, found, num_top)


class _Writer:
    """Events of one chat's stream."""

    def __init__(
        self, head: _Head, call: ChatCall, num_prompt_tokens: int, num_top: int | None, spelling: Spelling
    ) -> None:
        self._head = head
        self._options = call.stream_options
        self._num_prompt_tokens = num_prompt_tokens
        self._num_top = num_top
        self._spelling = spelling
        self._usage: Usage | msgspec.UnsetType | None = (
            None if self._options and self._options.include_usage else msgspec.UNSET)
        self._is_continuous = bool(self._options and self._options.continuous_usage_stats)
        self._num_generated = 0
        self._begun: set[int] = set()
        """Choices whose role was sent."""

    def write(self, position: int, events: Sequence[TokenEvent]) -> bytes:
        return b"".join([part for event in events for part in self._events(event)])

    def finish(self, results: list[Result]) -> bytes:
        if not (self._options and self._options.include_usage):
            return b""
        return event(self._chunk([], usage_of(results)))

    def _events(self, new: TokenEvent) -> list[bytes]:
        usage = self._usage
        if self._is_continuous:
            self._num_generated += len(new.token_ids)
            prompt = self._num_prompt_tokens
            usage = Usage(prompt, self._num_generated, prompt + self._num_generated)
        found = []
        if new.index not in self._begun:
            self._begun.add(new.index)
            begin = ChatChunkChoice(new.index, Delta(role="assistant", content=""))
            found.append(event(self._chunk([begin], usage)))
        logprobs = _logprobs(self._spelling, new.token_ids, new.logprobs, self._num_top)
        choice = ChatChunkChoice(new.index, Delta(content=new.text), logprobs, new.finish_reason)
        found.append(event(self._chunk([choice], usage)))
        return found

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | msgspec.UnsetType | None) -> ChatChunk:
        head = self._head
        return ChatChunk(id=head.id, created=head.created, model=head.model, choices=choices, usage=usage)
