"""Whether an instance can serve a request at all: asked once, before anything is reserved. Pure."""

from __future__ import annotations

import itertools

from disagg_mpi.engine.sequence import positions_needed
from disagg_mpi.request import MAX_CONTEXT_LOGITS_BYTES, ExecutorLimits, ExecutorRequest, RequestType


def blocks_needed(limits: ExecutorLimits, num_prompt_tokens: int, max_tokens: int) -> int:
    """Blocks that a request holds in a generation instance when it generates its last token."""
    return -(-positions_needed(num_prompt_tokens, max_tokens) // limits.tokens_per_block)


def blocks_reserved(limits: ExecutorLimits, num_prompt_tokens: int, max_tokens: int) -> int:
    """Blocks that it is admitted with."""
    return blocks_needed(limits, num_prompt_tokens, min(max_tokens, limits.reserved_output))


def problem_with(request: ExecutorRequest, limits: ExecutorLimits) -> str | None:
    """Why ``request`` can never be served here, in words for its user; ``None`` if it can."""
    prompt, params = request.prompt_token_ids, request.sampling
    length = len(prompt)
    first = request.context_phase_params.first_gen_tokens if request.context_phase_params else ()
    if not prompt:
        return "the prompt is empty; at least one token is needed"
    named = itertools.chain(prompt, params.stop_token_ids, params.logit_bias, *params.bad_token_ids, first)
    unknown = next((token for token in named if not 0 <= token < limits.vocab_size), None)
    if unknown is not None:
        return f"token id {unknown} is outside the model's vocabulary of {limits.vocab_size}"
    if length + params.max_tokens > limits.max_model_len:
        room = limits.max_model_len - length
        advice = (f"max_tokens can be {room} at most" if room > 0
                  else "the prompt must be shortened")
        return (f"{length} prompt tokens and max_tokens {params.max_tokens} exceed the model's "
                f"context length of {limits.max_model_len}; {advice}")
    needed = blocks_needed(limits, length, params.max_tokens)
    if needed > limits.num_blocks:
        return (f"{length} prompt tokens and max_tokens {params.max_tokens} need {needed} blocks of "
                f"{limits.tokens_per_block} tokens, the pool of an instance has {limits.num_blocks}; "
                f"lower max_tokens or give --kv-tokens {needed * limits.tokens_per_block} or more")
    logits_bytes = 4 * length * limits.vocab_size
    if params.return_context_logits and logits_bytes > MAX_CONTEXT_LOGITS_BYTES:
        most = MAX_CONTEXT_LOGITS_BYTES // (4 * limits.vocab_size)
        return (f"the context logits of {length} prompt tokens are {logits_bytes} bytes, at most "
                f"{MAX_CONTEXT_LOGITS_BYTES} are given; shorten the prompt to {most} tokens, or ask for "
                "prompt_logprobs")
    if params.temperature and params.seed is None and request.type is not (
            RequestType.CONTEXT_AND_GENERATION):
        return "a sampled request whose phases are split needs a seed, so that both draw alike"
    if request.type is RequestType.GENERATION_ONLY and request.early_source is None:
        context = request.context_phase_params
        if context is None:
            return "a GENERATION_ONLY request needs the context_phase_params of its context phase"
        if not 1 <= len(context.first_gen_tokens) < params.max_tokens:
            return (f"context_phase_params holds {len(context.first_gen_tokens)} first tokens; at "
                    f"least 1 is needed, and fewer than max_tokens {params.max_tokens}")
    return None
