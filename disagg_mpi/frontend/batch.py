"""A file of prompts through the orchestrator: as many at once as there is room, results as they finish."""

from __future__ import annotations

import queue
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from disagg_mpi.errors import RequestError
from disagg_mpi.frontend.jsonl import InputLine, ResultFile, count_lines, read_requests, result_data
from disagg_mpi.orchestrator.handle import RequestHandle
from disagg_mpi.orchestrator.orchestrator import Orchestrator
from disagg_mpi.request import SamplingParams


class BatchSummary(msgspec.Struct):
    """What became of a file."""

    num_done: int = 0
    num_skipped: int = 0
    """Finished by an earlier run."""
    num_tokens: int = 0
    failed_lines: list[int] = msgspec.field(default_factory=list)


def run_batch(
    orchestrator: Orchestrator,
    input_path: Path,
    output: ResultFile,
    defaults: SamplingParams,
    *,
    progress: bool,
    deadline: float | None = None,
) -> BatchSummary:
    """Answer every line of ``input_path`` that ``output`` does not hold yet.

    ``defaults`` and ``deadline`` (seconds) are for lines that have none of their own.
    """
    from tqdm import tqdm

    summary = BatchSummary()
    total = count_lines(input_path)
    with tqdm(total=total, unit="request", disable=not progress, file=sys.stderr,
              dynamic_ncols=True, smoothing=0.1) as bar:
        lines = read_requests(input_path, defaults, deadline)
        for line, handle in _finished(orchestrator, lines, output, summary):
            if handle is None:
                data = {"id": line.id, "line": line.number, "error": line.error}
            else:
                result = handle.result()
                data = result_data(result)
                if result.error is not None:
                    data["line"] = line.number
                summary.num_tokens += result.usage.completion_tokens
            output.write(data)
            if "error" in data:
                summary.failed_lines.append(line.number)
                bar.write(f"line {line.number}: {data['error']}", file=sys.stderr)
            else:
                summary.num_done += 1
            bar.update(1 + summary.num_skipped - getattr(bar, "skipped", 0))
            bar.skipped = summary.num_skipped  # type: ignore[attr-defined]
            bar.set_postfix_str(f"{summary.num_tokens} tokens", refresh=False)
        bar.update(summary.num_skipped - getattr(bar, "skipped", 0))
    summary.failed_lines.sort()
    return summary


def _finished(
    orchestrator: Orchestrator,
    lines: Iterator[InputLine],
    output: ResultFile,
    summary: BatchSummary,
) -> Iterator[tuple[InputLine, RequestHandle | None]]:
    """Lines with their handles as they finish; without one where the line is no request."""
    done: queue.SimpleQueue[tuple[InputLine, RequestHandle]] = queue.SimpleQueue()
    room = 4 * orchestrator.capacity
    num_open, more = 0, True
    while more or num_open:
        while more and num_open < room:
            line = next(lines, None)
            if line is None:
                more = False
            elif line.id in output.done:
                summary.num_skipped += 1
            elif line.request is None:
                yield line, None
            else:
                try:
                    handle = orchestrator.submit(line.request)
                except RequestError as error:
                    yield msgspec.structs.replace(line, error=str(error)), None
                    continue
                num_open += 1
                handle.add_done_callback(lambda h, line=line: done.put((line, h)))  # type: ignore[misc]
        if num_open:
            num_open -= 1
            yield done.get()
