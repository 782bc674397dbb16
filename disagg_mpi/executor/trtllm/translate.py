"""Our requests as the library's, and its hand-over's parameters as ours. No state.

What :class:`SamplingParams` can say and the library's request cannot is refused, by the field's name: an
output that silently is another than the one asked for is worse than none.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from disagg_mpi.errors import RequestError
from disagg_mpi.executor.trtllm.engine_dir import EngineInfo
from disagg_mpi.request import ContextPhaseParams, ExecutorRequest, RequestType, SamplingParams

_TYPES = {
    RequestType.CONTEXT_AND_GENERATION: "REQUEST_TYPE_CONTEXT_AND_GENERATION",
    RequestType.CONTEXT_ONLY: "REQUEST_TYPE_CONTEXT_ONLY",
    RequestType.GENERATION_ONLY: "REQUEST_TYPE_GENERATION_ONLY",
}
# The library draws from a seed alone: continuations of one prompt get seeds far apart (odd, near 2**64 / φ).
_SEED_STEP = 0x9E3779B97F4A7C15


class HandOver(msgspec.Struct, frozen=True, array_like=True, tag="trtllm"):
    """The library's ``ContextPhaseParams`` as bytes that any rank may read: plain data, no pickle."""

    req_id: int
    """The library's own number of the request on its context instance: up to 64 bits."""
    opaque_state: bytes | None
    draft_tokens: tuple[int, ...] | None


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(HandOver)


def params_from_library(params: Any, request_id: int) -> ContextPhaseParams:
    """What a context instance gave, for a message; ``request_id`` is ours."""
    drafts = params.draft_tokens
    state = HandOver(params.req_id, params.opaque_state, None if drafts is None else tuple(drafts))
    return ContextPhaseParams(tuple(params.first_gen_tokens), request_id, _encoder.encode(state))


def params_to_library(library: Any, params: ContextPhaseParams) -> Any:
    """The same for a generation instance. Raises :class:`RequestError` for bytes that are not ours."""
    try:
        state = _decoder.decode(params.opaque_state)
    except msgspec.DecodeError as error:
        raise RequestError("context_phase_params are not of a context instance of TensorRT-LLM "
                           f"({error})") from None
    # By position: bindings of some releases know no names here.
    return library.ContextPhaseParams(
        list(params.first_gen_tokens), state.req_id, state.opaque_state,
        None if state.draft_tokens is None else list(state.draft_tokens))


def library_type(request: ExecutorRequest) -> RequestType:
    """What the library is to do: a context whose first token is the last has nothing to hand over."""
    if request.type is RequestType.CONTEXT_ONLY and request.sampling.max_tokens == 1:
        return RequestType.CONTEXT_AND_GENERATION
    return request.type


def problem_for_library(
    request: ExecutorRequest, engine: EngineInfo, eos_token_ids: Sequence[int]
) -> str | None:
    """Why the library cannot serve ``request`` as it is meant; ``None`` if it can."""
    params = request.sampling
    if request.early_source is not None:
        return "TensorRT-LLM takes no request whose context phase still runs"
    asked = {
        "guided": params.guided is not None,
        "logit_bias": bool(params.logit_bias),
        "logprobs": params.logprobs is not None,
        "prompt_logprobs": params.prompt_logprobs is not None,
        "return_generation_logits": params.return_generation_logits,
        "return_context_logits": params.return_context_logits,
    }
    field = next((name for name, is_asked in asked.items() if is_asked), None)
    if field is not None:
        return f"{field} is not to be had with engine tensorrt_llm; leave it out, or use --engine torch"
    # The library holds back its one end id until min_tokens, but no stop word.
    enders = [*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids[1:])]
    if params.min_tokens > 1 and enders:
        return (f"min_tokens is {params.min_tokens}: with engine tensorrt_llm token {enders[0]} would end "
                "the output before it all the same; leave min_tokens or stop_token_ids out, or give "
                "ignore_eos")
    length = len(request.prompt_token_ids)
    if length > engine.max_prompt_len:
        return (f"the prompt has {length} tokens, and {engine.directory} takes {engine.max_prompt_len} at "
                "most; shorten it" + ("" if engine.is_chunked else
                                      ", or build the engine with use_paged_context_fmha"))
    return None


def request_to_library(
    library: Any, request: ExecutorRequest, eos_token_ids: Sequence[int],
    spellings: Callable[[str], list[list[int]]],
) -> Any:
    """The library's request. ``spellings``: a bad text → its token ids. Raises :class:`RequestError`."""
    params = request.sampling
    ends = () if params.ignore_eos else tuple(eos_token_ids)
    stop_words = [[token] for token in (*ends[1:], *params.stop_token_ids)]
    bad_words = [list(ids) for ids in params.bad_token_ids]
    bad_words += [ids for text in params.bad for ids in spellings(text)]
    context = request.context_phase_params
    return library.Request(
        list(request.prompt_token_ids), params.max_tokens,
        # Each token when it is there; a response has only what is new.
        streaming=True,
        sampling_config=_sampling_to_library(library, params, request.sequence_index),
        output_config=library.OutputConfig(exclude_input_from_output=True),
        end_id=ends[0] if ends else None,
        bad_words=bad_words or None,
        stop_words=stop_words or None,
        type=getattr(library.RequestType, _TYPES[library_type(request)]),
        context_phase_params=None if context is None else params_to_library(library, context))


def _sampling_to_library(library: Any, params: SamplingParams, index: int) -> Any:
    said: dict[str, Any] = {}
    if params.temperature:
        seed = random.getrandbits(62) if params.seed is None else params.seed
        said |= {"temperature": float(params.temperature), "top_k": params.top_k,
                 "top_p": float(params.top_p), "seed": (seed + index * _SEED_STEP) % 2**63}
    else:
        said["top_k"] = 1
    if params.min_tokens > 1:
        said["min_tokens"] = params.min_tokens
    if params.repetition_penalty != 1.0:
        said["repetition_penalty"] = float(params.repetition_penalty)
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(params, name):
            said[name] = float(getattr(params, name))
    return library.SamplingConfig(beam_width=1, **said)
