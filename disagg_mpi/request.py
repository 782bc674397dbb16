"""Requests, responses and results: the data that passes between the layers.

Two levels. A user makes a :class:`Request` and gets a :class:`Result` (one, with all its choices).
An executor gets an :class:`ExecutorRequest` (one sequence, token ids only) and gives
:class:`Response` objects, one for each step that made tokens; names follow TensorRT-LLM's executor API
(``RequestType``, ``context_phase_params``). All are plain msgspec structs, so they travel as msgpack.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any, Literal

import msgspec

from disagg_mpi.errors import ConfigError

FinishReason = Literal["stop", "length", "cancelled", "deadline", "error"]

MAX_LOGPROBS = 20
MAX_BAD = 1024
"""Sequences of ``bad`` and ``bad_token_ids`` together: each is looked at for every token."""
MAX_GUIDED_BYTES = 2**16
"""UTF-8 size of a grammar: it is compiled between two steps, while all others wait. A JSON schema of 2,000
properties has this size and takes 0.23 s (one core of an EPYC, Zen 3)."""
MAX_CONTEXT_LOGITS_BYTES = 2**28
"""Size of all rows of ``return_context_logits``: 4 bytes x prompt tokens x vocabulary, kept until the first
token and sent as one message. The default model (49,152 tokens) may have 1,365 prompt tokens."""

GIVEN_UP: dict[FinishReason, str] = {
    "cancelled": "cancelled before it was done",
    "deadline": "the deadline passed before it was done",
}
"""What the error says of a request that was given up for one of these reasons."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class Guided(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the whole output must be: exactly one of these. Raises :class:`ConfigError` for bad values.

    The text itself is read where the model is: a schema or grammar that is none is the request's error, in
    the grammar library's words.
    """

    json: str | None = None
    """A JSON schema, as JSON text; ``{"type": "object"}`` for any object. Between two of its tokens JSON may
    have one blank or line break; a schema's own ``x-guidance`` can say otherwise."""
    regex: str | None = None
    """A regular expression, of Rust's ``regex`` syntax, for all of the output."""
    choice: tuple[str, ...] | None = None
    """One of these texts."""
    grammar: str | None = None
    """A context-free grammar, in Lark's form (``start: …``) or llama.cpp's GBNF (``root ::= …``)."""

    def __post_init__(self) -> None:
        given = [name for name in self.__struct_fields__ if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError("guided needs exactly one of json, regex, choice, grammar; "
                              f"found {' and '.join(given) or 'none'}")
        name, value = given[0], getattr(self, given[0])
        if name == "choice":
            if not (isinstance(value, (tuple, list)) and value and all(map(_is_text, value))):
                raise ConfigError(f"guided.choice is {value!r}; it must be texts that are not empty, "
                                  "at least one")
        elif not _is_text(value):
            raise ConfigError(f"guided.{name} is {value!r}; it must be a text that is not empty")
        size = sum(len(text.encode()) for text in (value if name == "choice" else (value,)))
        if size > MAX_GUIDED_BYTES:
            raise ConfigError(f"guided.{name} has {size} bytes; it may have {MAX_GUIDED_BYTES} at most")


class SamplingParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True
):
    """How tokens are chosen. The defaults are greedy. Raises :class:`ConfigError` for bad values.

    Penalties follow the field's definitions: ``repetition_penalty`` (Keskar et al. 2019, CTRL) over
    prompt and output; ``presence_penalty`` and ``frequency_penalty`` (OpenAI API) over the output.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    """End-of-sequence and stop tokens are not sampled before this many tokens. A ``guided`` output is made
    longer where its grammar can go on, never beyond its end."""
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    """Sample among this many most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the smallest set of tokens with this probability together."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    """Texts that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    """End-of-sequence is a token like others; only a ``guided`` output still ends with it."""
    bad: tuple[str, ...] = ()
    """Texts that must not be generated. Each is tokenised with and without a space before it; after all of
    its tokens but the last, in prompt or output, the last is forbidden."""
    bad_token_ids: tuple[tuple[int, ...], ...] = ()
    """The same as token ids: sequences of one or more."""
    logit_bias: dict[int, float] = {}
    """Token id → what is added to its logit, before penalties."""
    guided: Guided | None = None
    """What the output must be. End-of-sequence is allowed only where that may end, and where it can only end
    the output does, without an end-of-sequence token; ``finish_reason`` is ``stop``."""
    seed: int | None = None
    """The same seed gives the same tokens at every layout; ``None``: a new one each time."""
    logprobs: int | None = None
    """Also give the log-probability of each token and of this many alternatives (0 to 20)."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens. They are computed even where a prefix cache holds the prompt."""
    n: int = 1
    """Independent continuations of the one prompt."""
    return_generation_logits: bool = False
    """Also give the raw logits (fp32, before penalties) that each token was chosen from."""
    return_context_logits: bool = False
    """Also give the raw logits at each position of the prompt: 4 bytes x vocabulary each, 256 MiB at most."""

    def __post_init__(self) -> None:
        def need(good: bool, name: str, what: str) -> None:
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {what}")

        # Keywords from Python come here unchecked; a wrong type must not get as far as a message.
        for name in ("max_tokens", "min_tokens", "top_k", "n", "seed", "logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            need(type(value) is int
                 or (value is None and name in ("seed", "logprobs", "prompt_logprobs")), name,
                 "a whole number")
        for name in ("temperature", "top_p", "repetition_penalty", "presence_penalty",
                     "frequency_penalty"):
            need(type(getattr(self, name)) in (float, int), name, "a number")
        for name in ("stop", "bad"):
            value = getattr(self, name)
            need(isinstance(value, (tuple, list)) and all(map(_is_text, value)), name,
                 "a tuple of texts that are not empty")
        need(_are_tokens(self.stop_token_ids), "stop_token_ids", "a tuple of token ids")
        need(isinstance(self.bad_token_ids, (tuple, list))
             and all(_are_tokens(ids) and ids for ids in self.bad_token_ids), "bad_token_ids",
             "a tuple of tuples of token ids, none empty")
        need(isinstance(self.logit_bias, dict) and all(
            type(token) is int and type(bias) in (float, int) and -1e9 <= bias <= 1e9
            for token, bias in self.logit_bias.items()), "logit_bias",
            "numbers between -1e9 and 1e9 by token id")
        need(isinstance(self.guided, Guided | None), "guided", "a Guided")
        need(self.max_tokens >= 1, "max_tokens", "at least 1")
        need(0 <= self.min_tokens <= self.max_tokens, "min_tokens", "between 0 and max_tokens")
        need(0.0 <= self.temperature < 1e6, "temperature", "0 (greedy) or a positive number")
        need(0 <= self.top_k < 2**31, "top_k", "0 (all) or more, below 2**31")
        need(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        need(0.0 < self.repetition_penalty < 1e6, "repetition_penalty", "a positive number")
        for name in ("presence_penalty", "frequency_penalty"):
            need(-1e6 < getattr(self, name) < 1e6, name, "a number")
        need(self.seed is None or 0 <= self.seed < 2**63, "seed", "between 0 and 2**63 - 1")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            need(value is None or 0 <= value <= MAX_LOGPROBS, name, f"between 0 and {MAX_LOGPROBS}")
        if len(self.bad) + len(self.bad_token_ids) > MAX_BAD:
            raise ConfigError(f"bad and bad_token_ids hold {len(self.bad) + len(self.bad_token_ids)} "
                              f"sequences; together they may hold {MAX_BAD} at most")
        need(self.n >= 1, "n", "at least 1")

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty != 1.0 or self.presence_penalty != 0.0
                or self.frequency_penalty != 0.0)

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether logits at all positions of the prompt are asked for, not at the last alone."""
        return self.prompt_logprobs is not None or self.return_context_logits


def _is_text(value: object) -> bool:
    """A text that is not empty and can be sent (UTF-8 knows no lone surrogates)."""
    return isinstance(value, str) and value != "" and not _SURROGATE.search(value)


def _are_tokens(value: object) -> bool:
    return isinstance(value, (tuple, list)) and all(type(token) is int for token in value)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What a user asks for: exactly one of ``prompt``, ``prompt_token_ids``, ``messages``."""

    prompt: str | None = None
    prompt_token_ids: Sequence[int] | None = None
    messages: Sequence[dict[str, Any]] | None = None
    """A chat, for models with a chat template: ``{"role": …, "content": …}`` each."""
    sampling: SamplingParams = SamplingParams()
    deadline: float | None = None
    """Seconds from submission within which all of it must be done."""
    id: str | None = None
    """The user's own name for it, given back in the result."""

    def __post_init__(self) -> None:
        given = [name for name in ("prompt", "prompt_token_ids", "messages")
                 if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError("a request needs exactly one of prompt, prompt_token_ids, messages; "
                              f"found {' and '.join(given) or 'none'}")
        if self.deadline is not None and not self.deadline > 0:
            raise ConfigError(f"deadline is {self.deadline}; it must be positive seconds")


class RequestType(StrEnum):
    """Which phases an executor runs for a request."""

    CONTEXT_AND_GENERATION = "context_and_generation"
    CONTEXT_ONLY = "context_only"
    GENERATION_ONLY = "generation_only"


class ExecutorLimits(msgspec.Struct, frozen=True):
    """What an instance can take; the same for its whole life."""

    num_blocks: int
    tokens_per_block: int
    max_batch_size: int
    max_num_tokens: int
    max_model_len: int
    vocab_size: int
    reserved_output: int
    """Output positions that a request reserves when it is admitted; more is taken as it grows."""


class PoolBlocks(msgspec.Struct, frozen=True):
    """The blocks that an instance has, free or owned, as runs (first block, count)."""

    pool: str
    """Name of the memory; instances with equal names share it."""
    runs: list[tuple[int, int]]


class ContextPhaseParams(msgspec.Struct, frozen=True, array_like=True):
    """What a generation executor needs to go on where a context executor stopped."""

    first_gen_tokens: tuple[int, ...]
    req_id: int
    opaque_state: bytes
    """The hand-over's own description of where the KV-cache lies."""


class ExecutorRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One sequence for an executor."""

    request_id: int
    """63-bit, unique in the job."""
    prompt_token_ids: list[int]
    sampling: SamplingParams = SamplingParams()
    """``seed`` must be set when ``temperature`` is not 0 and phases are split."""
    type: RequestType = RequestType.CONTEXT_AND_GENERATION
    sequence_index: int = 0
    """Which of the ``n`` continuations this is; part of the random stream's key."""
    context_phase_params: ContextPhaseParams | None = None
    early_source: int | None = None
    """Enqueued while its context phase still runs on the instance with this id: reserve blocks and take the
    KV-cache over as it is computed; the ``context_phase_params`` follow."""

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's log-probabilities or logits come with this sequence: with the first of the
        ``n``, for they are the same for all, and from where the context is computed."""
        return (self.sampling.needs_prompt_logits and self.sequence_index == 0
                and self.type is not RequestType.GENERATION_ONLY)


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (natural) of one token of the output or prompt, and of the most likely ones."""

    logprob: float
    top: list[tuple[int, float]] = []


class PhaseTiming(msgspec.Struct, array_like=True):
    """Where an executor spent a request's time. Durations in seconds, measured on one rank each."""

    queue: float = 0.0
    """From enqueue to the first step that it was part of."""
    context: float = 0.0
    """From that step's start to the first token."""
    handover: float = 0.0
    """From when generation could have gone on until the KV-cache was in place: what the hand-over cost the
    request (generation's leader; bytes that moved while the context was still computed cost nothing)."""
    transfer: float = 0.0
    """From the first piece's pull to the last piece in place; with overlap longer than ``handover``."""
    handover_bytes: int = 0
    """Bytes that were copied; 0 where the block table moved and the bytes stayed."""
    kv_bytes: int = 0
    """Size of the KV-cache that was handed over, moved or not."""
    transport: str = ""
    cached_tokens: int = 0
    """Prompt positions whose KV-cache the context's pool held already: not computed."""
    held_tokens: int = 0
    """Those that the generation's pool held already: not handed over."""
    num_preempted: int = 0
    """How often the request gave its blocks back to others, and was computed again."""


class Response(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What one step made of one request. The last one of a request has ``is_final``."""

    request_id: int
    token_ids: list[int] = []
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    logits: list[bytes] | None = None
    """One fp32 row (little endian) of the vocabulary's length for each token."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """With the first token, one for each prompt token; of the first there is none."""
    context_logits: list[bytes] | None = None
    """With the first token, one row as in ``logits`` for each prompt token."""
    is_final: bool = False
    finish_reason: FinishReason | None = None
    """Set on the last response, unless a generation executor is to go on."""
    error: str | None = None
    is_refused: bool = False
    """With an ``error``: it is the request's own, which could be served nowhere and at no time."""
    context_phase_params: ContextPhaseParams | None = None
    timing: PhaseTiming | None = None
    num_blocks: int | None = None
    """Blocks that the request holds at its generation instance from now on, where that has changed."""

    @property
    def has_error(self) -> bool:
        return self.error is not None


class Usage(msgspec.Struct, frozen=True):
    """Token counts of a finished request."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Timing(msgspec.Struct, kw_only=True):
    """Where a request's time went. Seconds; ``ttft`` and ``total`` are seen from rank 0."""

    queue: float = 0.0
    """Waiting at rank 0 for a place, and at the instance for its first step."""
    context: float = 0.0
    handover: float = 0.0
    """What the hand-over added: see :class:`PhaseTiming`."""
    transfer: float = 0.0
    handover_bytes: int = 0
    kv_bytes: int = 0
    transport: str = ""
    cached_tokens: int = 0
    held_tokens: int = 0
    num_preempted: int = 0
    ttft: float = 0.0
    """Time to first token: from submission until it was at rank 0."""
    second_token: float = 0.0
    """From the first token to the second: what the hand-over costs a reader."""
    tpot: float = 0.0
    """Time per output token after the first, mean."""
    total: float = 0.0

    @property
    def handover_gb_per_s(self) -> float:
        return self.handover_bytes / self.transfer / 1e9 if self.transfer else 0.0


class Choice(msgspec.Struct):
    """One continuation."""

    index: int
    text: str = ""
    token_ids: list[int] = msgspec.field(default_factory=list)
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None
    logits: list[bytes] | None = None
    timing: Timing = msgspec.field(default_factory=Timing)


class Result(msgspec.Struct, kw_only=True):
    """A finished request: done, or with ``error`` saying why not. Never missing."""

    id: str | None
    request_id: int
    prompt_token_ids: list[int]
    choices: list[Choice]
    error: str | None = None
    is_refused: bool = False
    """With an ``error``: it is the request's own, as a grammar that is none; not the job's."""
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One for each prompt token; of the first there is none."""
    context_logits: list[bytes] | None = None
    """One fp32 row (little endian) of the vocabulary's length for each prompt token: what the token after it
    would be chosen from."""

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.choices[0].token_ids

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.choices[0].finish_reason

    @property
    def timing(self) -> Timing:
        return self.choices[0].timing

    @property
    def usage(self) -> Usage:
        return Usage(prompt_tokens=len(self.prompt_token_ids),
                     completion_tokens=sum(len(choice.token_ids) for choice in self.choices))


class TokenEvent(msgspec.Struct, frozen=True):
    """New tokens of one choice, as a stream gives them."""

    text: str
    token_ids: list[int]
    index: int = 0
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """With the first event of choice 0, if they were asked for."""
