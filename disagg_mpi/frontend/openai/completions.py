"""``POST /v1/completions``: text, texts, or token ids in; continuations out."""

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
from disagg_mpi.frontend.openai.calls import CompletionCall, decode
from disagg_mpi.frontend.openai.errors import invalid
from disagg_mpi.frontend.openai.logprobs import Spelling, joined
from disagg_mpi.frontend.openai.replies import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    Usage,
    event,
    usage_of,
)
from disagg_mpi.frontend.openai.sampling import sampling_of
from disagg_mpi.frontend.openai.served_model import check_model
from disagg_mpi.request import Choice, Request, Result, SamplingParams, TokenEvent

API = "openai"

DEFAULT_MAX_TOKENS = 16
"""OpenAI's for completions."""

_Prompt = str | list[str | int | list[int]]

_decoder = msgspec.json.Decoder(CompletionCall)


@dataclass(frozen=True)
class _Plan:
    """A checked call."""

    call: CompletionCall
    prompts: list[list[int]]
    echoes: list[str]
    """What each choice's text begins with: its prompt, or nothing."""
    id: str
    created: int
    model: str
    num_kept: int
    """Choices of each prompt that are sent back."""


class Completions:
    """The endpoint; one a server."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate
        self._spelling = Spelling(gate.served.tokenizer)

    async def __call__(self, http: HttpRequest) -> Response:
        plan, sampling = await self._plan(decode(await http.body(), _decoder))
        handles = self._gate.submit(
            [Request(prompt_token_ids=prompt, sampling=sampling, id=plan.id) for prompt in plan.prompts], API)
        if plan.call.stream:
            return EventStream(handles, _Writer(plan, self._spelling))
        return self._reply(plan, await results_of(http.receive, handles))

    async def _plan(self, call: CompletionCall) -> tuple[_Plan, SamplingParams]:
        check_model(call.model, self._gate.served)
        if call.suffix:
            raise invalid("suffix: this model only continues texts", "suffix")
        num_kept = call.n if call.n is not None else 1
        best_of = call.best_of if call.best_of is not None else num_kept
        if best_of < num_kept:
            raise invalid(f"best_of is {best_of}; it must be n ({num_kept}) or more", "best_of")
        if best_of > num_kept and call.stream:
            raise invalid("best_of cannot be streamed: which is best is known at the end", "best_of")
        name, most = "n" if call.best_of is None else "best_of", self._gate.served.limits.max_n
        if best_of > most:
            raise invalid(f"{name} is {best_of}; this server takes {most} at most", name)
        scores_prompt = bool(call.echo) and call.logprobs is not None
        if scores_prompt and call.stream:
            raise invalid("echo with logprobs cannot be streamed: leave stream out", "echo")
        # The mean log-probability says which are best.
        logprobs = 0 if call.logprobs is None and best_of > num_kept else call.logprobs
        max_tokens = DEFAULT_MAX_TOKENS if call.max_tokens is None else call.max_tokens
        sampling = sampling_of(call, max_tokens, logprobs, call.logprobs if scores_prompt else None,
                               n=best_of)
        prompts = await self._prompts(call.prompt)
        echoes = await self._echoes(call.prompt, prompts, sampling) if call.echo else [""] * len(prompts)
        plan = _Plan(call, prompts, echoes, f"cmpl-{uuid.uuid4().hex}", int(time.time()),
                     self._gate.served.name, num_kept)
        return plan, sampling

    async def _prompts(self, prompt: _Prompt) -> list[list[int]]:
        """The token ids of all prompts."""
        items = [prompt] if isinstance(prompt, str) else prompt
        most = self._gate.served.limits.max_open_requests
        kinds = {type(item) for item in items}
        if kinds == {int}:
            return [[item for item in items if isinstance(item, int)]]
        if len(items) > most:
            raise invalid(f"prompt has {len(items)} prompts; this server takes {most} at once", "prompt")
        if kinds == {list}:
            return [item for item in items if isinstance(item, list)]
        if kinds == {str}:
            return await self._gate.encode([item for item in items if isinstance(item, str)])
        raise invalid("prompt: give a text, texts, token ids or lists of token ids; at least one"
                      + (", and of one kind" if kinds else ""), "prompt")

    async def _echoes(
        self, prompt: _Prompt, prompts: list[list[int]], sampling: SamplingParams
    ) -> list[str]:
        """The texts of all prompts."""
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], str):
            return [item for item in prompt if isinstance(item, str)]
        for token_ids in prompts:
            self._gate.check(token_ids, sampling)
        return [await self._gate.decode(token_ids) for token_ids in prompts]

    def _reply(self, plan: _Plan, results: list[Result]) -> Response:
        choices: list[CompletionChoice] = []
        for echo, result in zip(plan.echoes, results, strict=True):
            for choice in _best(result.choices, plan.num_kept):
                choices.append(CompletionChoice(
                    len(choices), echo + choice.text, self._logprobs(plan, result, choice, echo),
                    choice.finish_reason))
        reply = Completion(id=plan.id, created=plan.created, model=plan.model, choices=choices,
                           usage=usage_of(results))
        return Response(msgspec.json.encode(reply), media_type="application/json")

    def _logprobs(self, plan: _Plan, result: Result, choice: Choice, echo: str) -> CompletionLogprobs | None:
        if plan.call.logprobs is None or choice.logprobs is None:
            return None
        own = self._spelling.for_completion(choice.token_ids, choice.logprobs, len(echo))
        if not plan.call.echo:
            return own
        of_prompt = self._spelling.for_completion(result.prompt_token_ids, result.prompt_logprobs or [])
        return joined([of_prompt, own])


def _best(choices: Sequence[Choice], count: int) -> list[Choice]:
    """Those with the highest log-probability a token; all of them, in order, where none is left out."""
    if count == len(choices):
        return list(choices)

    def score(choice: Choice) -> float:
        found = choice.logprobs or []
        return sum(item.logprob for item in found) / max(1, len(found))

    return sorted(choices, key=score, reverse=True)[:count]


class _Writer:
    """Events of one call's stream."""

    def __init__(self, plan: _Plan, spelling: Spelling) -> None:
        self._plan = plan
        self._spelling = spelling
        self._options = plan.call.stream_options
        self._usage: Usage | msgspec.UnsetType | None = (
            None if self._options and self._options.include_usage else msgspec.UNSET)
        self._is_continuous = bool(self._options and self._options.continuous_usage_stats)
        self._num_generated = 0
        num_choices = len(plan.prompts) * plan.num_kept
        self._lengths = [0] * num_choices
        """Characters of each choice that were sent."""
        self._to_echo = set(range(num_choices)) if plan.call.echo else set[int]()

    def write(self, position: int, events: Sequence[TokenEvent]) -> bytes:
        return b"".join([self._event(position, event) for event in events])

    def finish(self, results: list[Result]) -> bytes:
        if not (self._options and self._options.include_usage):
            return b""
        return event(self._chunk([], usage_of(results)))

    def _event(self, position: int, new: TokenEvent) -> bytes:
        index = position * self._plan.num_kept + new.index
        text = new.text
        if index in self._to_echo:
            self._to_echo.discard(index)
            text = self._plan.echoes[position] + text
        logprobs = None
        if new.logprobs is not None:
            logprobs = self._spelling.for_completion(new.token_ids, new.logprobs, self._lengths[index])
        self._lengths[index] += len(text)
        usage = self._usage
        if self._is_continuous:
            self._num_generated += len(new.token_ids)
            prompt = sum(map(len, self._plan.prompts))
            usage = Usage(prompt, self._num_generated, prompt + self._num_generated)
        return event(self._chunk([CompletionChoice(index, text, logprobs, new.finish_reason)], usage))

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None) -> Completion:
        plan = self._plan
        return Completion(id=plan.id, created=plan.created, model=plan.model, choices=choices, usage=usage)
