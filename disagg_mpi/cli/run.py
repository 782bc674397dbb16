"""``run``: answer prompts, one or many, given by hand or in a file."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from disagg_mpi.cli.options import Settings, job_options, sampling_options, settings_of
from disagg_mpi.comm.environment import launcher_context
from disagg_mpi.config import convert
from disagg_mpi.errors import ConfigError
from disagg_mpi.frontend.jsonl import ResultFile, count_lines
from disagg_mpi.job.launch import launch
from disagg_mpi.orchestrator.orchestrator import Orchestrator
from disagg_mpi.request import Request


class RunOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``run`` needs beside job and sampling: the file's table ``[run]``."""

    prompt: tuple[str, ...] = ()
    input: Path | None = None
    output: Path | None = None
    chat: bool = False
    deadline: float | None = None
    json: bool = False
    quiet: bool = False
    check: bool = False


@click.command()
@click.option("--prompt", "-p", multiple=True, metavar="TEXT", help="A prompt. Repeatable.")
@click.option("--input", type=click.Path(path_type=Path), metavar="FILE",
              help='Prompts, a JSON object a line: {"id", "prompt" or "prompt_token_ids" or "messages"} '
                   "and sampling fields of its own.")
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE",
              help="Results of --input, a JSON object a line, written as they finish. What it holds "
                   "already is not computed again.")
@click.option("--chat", is_flag=True, help="Each --prompt is a user's message to the chat template.")
@click.option("--deadline", type=float, metavar="S", help="Seconds for each request, end to end.")
@click.option("--json", is_flag=True, help="Print results as JSON, a line each.")
@click.option("--quiet", "-q", is_flag=True, help="Results and errors only.")
@click.option("--check", is_flag=True, help="At the end, check that no block or transfer is left over.")
@job_options
@sampling_options
def run(**options: Any) -> int:
    """Answer prompts with context and generation in different ranks of one MPI job.

    \b
      mpirun -n 3 python -m disagg_mpi run --prompt "Machine learning is"
      mpirun -n 5 python -m disagg_mpi run --context 2 --generation 2 --input in.jsonl --output out.jsonl
      mpirun -n 2 python -m disagg_mpi run --aggregated 1 --prompt "the baseline"
      mpirun -n 3 python -m disagg_mpi run --config job.toml

    A file for --config:

    \b
      model = "path/to/model"
      context = 2
      generation = 1
      [sampling]
      max_tokens = 100
      [run]
      input = "in.jsonl"
      output = "out.jsonl"
    """
    settings = settings_of(options)
    run_table = dict(settings.command)
    if isinstance(run_table.get("prompt"), str):
        run_table["prompt"] = (run_table["prompt"],)
    run_options = convert(run_table, RunOptions, "[run]")
    _check(run_options)
    is_root = not launcher_context().rank
    # Opened before the job starts, at rank 0 alone: an output that cannot be written costs nothing.
    output = None
    if run_options.input is not None and run_options.output is not None and is_root:
        count_lines(run_options.input)
        output = ResultFile(run_options.output)
    tell = None if run_options.quiet or run_options.json else _tell
    with launch(settings.job, progress=tell) as orchestrator:
        if orchestrator is None:
            return 0
        code = _answer(orchestrator, settings, run_options, output)
        if run_options.check:
            orchestrator.check_integrity()
            _tell("integrity: no block and no transfer is left over")
    return code


def _check(options: RunOptions) -> None:
    if (options.input is None) == (not options.prompt):
        raise ConfigError('give --prompt "…" or --input FILE'
                          + (", not both" if options.prompt else ""))
    if (options.input is None) != (options.output is None):
        raise ConfigError("--input and --output go together")
    if options.input is not None and options.output is not None and options.output.exists() \
            and options.output.samefile(options.input):
        raise ConfigError("--input and --output are the same file")
    if options.deadline is not None and not options.deadline > 0:
        raise ConfigError(f"deadline is {options.deadline}; it must be positive seconds")
    if options.chat and options.input is not None:
        raise ConfigError('--chat is for --prompt; in a file give "messages"')
    if any(not prompt for prompt in options.prompt):
        raise ConfigError("the prompt is empty; give --prompt at least one character")


def _answer(
    orchestrator: Orchestrator, settings: Settings, options: RunOptions, output: ResultFile | None
) -> int:
    if output is not None and options.input is not None:
        return _answer_file(orchestrator, settings, options, output)
    requests = list(_requests(options, settings))
    from disagg_mpi.frontend.console import run_prompts, run_prompts_as_data

    if options.json:
        data = run_prompts_as_data(orchestrator, requests)
        for item in data:
            click.echo(json.dumps(item, ensure_ascii=False))
        return int(any("error" in item for item in data))
    results = run_prompts(orchestrator, requests)
    return int(any(result.error for result in results))


def _requests(options: RunOptions, settings: Settings) -> Sequence[Request]:
    return [
        Request(id=str(number), sampling=settings.sampling, deadline=options.deadline,
                prompt=None if options.chat else prompt,
                messages=[{"role": "user", "content": prompt}] if options.chat else None)
        for number, prompt in enumerate(options.prompt, start=1)]


def _answer_file(
    orchestrator: Orchestrator, settings: Settings, options: RunOptions, output: ResultFile
) -> int:
    from disagg_mpi.frontend.batch import run_batch

    quiet = options.quiet
    assert options.input is not None

    if output.done and not quiet:
        _tell(f"{len(output.done)} results are in {output.path} already and are kept")
    start = time.monotonic()
    try:
        summary = run_batch(orchestrator, options.input, output, settings.sampling,
                            progress=not quiet, deadline=options.deadline)
    except KeyboardInterrupt:
        _tell(f"\ninterrupted; what has finished is in {output.path}, "
              "the same command goes on from there")
        raise
    finally:
        output.close()
    seconds = time.monotonic() - start
    if not quiet:
        _tell(f"{summary.num_done} done, {len(summary.failed_lines)} failed, "
              f"{summary.num_skipped} were done before; {summary.num_tokens} tokens in "
              f"{seconds:.1f} s ({summary.num_tokens / max(seconds, 1e-9):.1f} tokens/s) → {output.path}")
    return int(bool(summary.failed_lines))


def _tell(line: str) -> None:
    click.echo(line, err=True)
    sys.stderr.flush()
