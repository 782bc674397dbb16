"""Prompts from the command line: text as it is generated, then where the time went."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TextIO

from disagg_mpi.frontend.jsonl import result_data
from disagg_mpi.orchestrator.orchestrator import Orchestrator
from disagg_mpi.request import Request, Result, Timing


def run_prompts(
    orchestrator: Orchestrator, requests: Sequence[Request], out: TextIO | None = None
) -> list[Result]:
    """Answer all at once and print each, in order, as its text comes; then its summary."""
    out = out or sys.stdout
    handles = [orchestrator.stream(request) for request in requests]
    results = []
    for request, handle in zip(requests, handles, strict=True):
        if len(requests) > 1:
            out.write(f"── {request.id} ──\n")
        several = request.sampling.n > 1
        if not several:
            out.write(_shown_prompt(request))
            for event in handle:
                out.write(event.text)
                out.flush()
            out.write("\n")
        result = handle.result()
        if several:
            for choice in result.choices:
                out.write(f"[{choice.index}] {_shown_prompt(request)}{choice.text}\n")
        out.write(f"error: {result.error}\n" if result.error else "")
        out.write("\n" + summary(result) + "\n")
        out.flush()
        results.append(result)
    return results


def run_prompts_as_data(
    orchestrator: Orchestrator, requests: Sequence[Request]
) -> list[dict[str, object]]:
    """Answer all; each result as a JSON object's data, in order."""
    return [result_data(handle.result())
            for handle in [orchestrator.submit(request) for request in requests]]


def _shown_prompt(request: Request) -> str:
    return request.prompt or ""


def summary(result: Result) -> str:
    """Where the time of a result's first choice went, for reading."""
    timing = result.timing
    prompt = len(result.prompt_token_ids)
    output = len(result.token_ids)
    rows = [("queue", _seconds(timing.queue), "")]
    if timing.context:
        computed = max(prompt - timing.cached_tokens, 1)
        cached = f", {timing.cached_tokens} of them cached" if timing.cached_tokens else ""
        rows.append(("context", _seconds(timing.context),
                     f"{prompt} tokens{cached}, {computed / timing.context:.0f} tokens/s"))
    if timing.transport:
        rows.append(("hand-over", _seconds(timing.handover), _handover(timing)))
    if timing.ttft:
        rows.append(("first token", _seconds(timing.ttft), "from submission (TTFT)"))
    if timing.second_token:
        rows.append(("second token", _seconds(timing.second_token), "after the first"))
    if timing.tpot:
        rows.append(("each next token", _seconds(timing.tpot),
                     f"{output} tokens, {1 / timing.tpot:.1f} tokens/s (TPOT)"))
    if timing.num_preempted:
        rows.append(("preempted", f"{timing.num_preempted} x",
                     "its blocks went to older requests; computed again"))
    rows.append(("total", _seconds(timing.total), f"finished: {result.finish_reason}"))
    return "\n".join(f"  {name:<16}{value:>10}   {note}".rstrip() for name, value, note in rows)


def _handover(timing: Timing) -> str:
    size = f"{timing.kv_bytes / 2**20:.1f} MiB"
    if timing.held_tokens:
        size += f", but for {timing.held_tokens} tokens that were there,"
    if not timing.handover_bytes:
        return f"{size} of KV-cache stayed where it is, 0 bytes moved ({timing.transport})"
    if timing.transfer > 2 * timing.handover:
        return f"{size} moved while the context was computed ({timing.transport})"
    return f"{size} moved, {timing.handover_gb_per_s:.2f} GB/s ({timing.transport})"


def _seconds(value: float) -> str:
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"
