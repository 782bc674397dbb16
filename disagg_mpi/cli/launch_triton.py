"""The line that the guide starts its server with, for this engine.

``scripts/launch_triton_server.py`` calls :func:`main`. It takes the flags of Triton's own script, checks them
against the model repository before anything starts, says which ``mpirun`` that means, and runs it as
``launch`` does. Nothing is dropped in silence: what has no meaning here is told, what cannot be is an error.
The repository is read again by every rank of ``serve``; here it only counts them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from disagg_mpi.cli.launch import run_line, sigint_of, tell_line
from disagg_mpi.cli.options import F, job_keys, job_options
from disagg_mpi.comm.cores import count_cores
from disagg_mpi.comm.environment import launcher_context
from disagg_mpi.comm.installs import MpiInstall, detect_mpi
from disagg_mpi.errors import ConfigError, DisaggError, InputError, WorldSizeError
from disagg_mpi.frontend.triton.plan import ServePlan, plan_of
from disagg_mpi.job.mpirun import LaunchLine, compose, python_command, ucx_folder_for

# Flags of Triton's script that change nothing, and why.
_NO_EFFECT = {
    "multi_model": "--multi-model: context and generation are always served together",
    "disable_spawn_processes": "--disable-spawn-processes: all ranks always start at once",
    "force": "--force: there is nothing to override; a port that is taken is an error",
    "tritonserver": "--tritonserver: not used, there is no tritonserver",
    "multimodal_gpu0_cuda_mem_pool_bytes": "--multimodal_gpu0_cuda_mem_pool_bytes: not used, models are "
                                           "text only",
    "trtllm_llmapi_launch": "--trtllm_llmapi_launch: not used, there is no TensorRT-LLM",
    "exit_timeout": "--exit_timeout: not used, see serve --help for how a server ends",
}
_PORT = click.IntRange(0, 65535)


def _flag(name: str, *others: str, **settings: Any) -> Callable[[F], F]:
    """An option in Triton's spelling, which mixes ``_`` and ``-``, and in the other one."""
    other = f"--{name.replace('_', '-') if '_' in name else name.replace('-', '_')}"
    names = dict.fromkeys([f"--{name}", other, *others])
    return click.option(*names, name.replace("-", "_"), **settings)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@_flag("world_size", type=click.IntRange(min=1), metavar="N",
       help="Ranks of the job: 1 + the ranks of all copies. [default: what the repository needs]")
@_flag("model_repo", type=click.Path(path_type=Path), metavar="DIR", help="The model repository.")
@_flag("tensorrt_llm_model_name", metavar="NAMES",
       help="Names of the models that have ranks, as context,generation; checked. [default: the "
            "repository's]")
@_flag("http_port", type=_PORT, default=8000, show_default=True)
@_flag("grpc_port", type=_PORT, default=8001, show_default=True)
@_flag("metrics_port", type=_PORT, default=8002, show_default=True)
@click.option("--host", metavar="HOST", help="Address to listen on. [default: this machine alone, 127.0.0.1]")
@_flag("oversubscribe", is_flag=True, help="Let ranks share cores, also where mpirun would not.")
@_flag("log", is_flag=True, help="Write what the job prints into --log-file.")
@_flag("log-file", type=click.Path(path_type=Path, dir_okay=False), default=Path("triton_log.txt"),
       show_default=True, metavar="FILE")
@_flag("dry-run", is_flag=True, help="Print the line and start nothing.")
@_flag("multi-model", is_flag=True, help="Always so here.")
@_flag("disable-spawn-processes", is_flag=True, help="Always so here.")
@_flag("force", "-f", is_flag=True, help="Changes nothing here.")
@_flag("no-mpi", is_flag=True, help="Cannot be here.")
@_flag("tritonserver", metavar="FILE", help="Not used.")
@_flag("multimodal_gpu0_cuda_mem_pool_bytes", type=int, metavar="N", help="Not used.")
@_flag("trtllm_llmapi_launch", is_flag=True, help="Not used.")
@_flag("exit_timeout", type=int, metavar="S", help="Not used.")
@click.argument("serve_options", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def launch_triton_server(default_repository: Path | None, /, **flags: Any) -> int:
    """Serve a Triton model repository with disagg_mpi, by the flags of Triton's launch script.

    \b
      launch_triton_server.py --world_size 3 --tensorrt_llm_model_name context,generation \\
          --multi-model --disable-spawn-processes

    Options of `python -m disagg_mpi serve` may follow after --, as -- --dtype bf16.
    """
    repository = flags["model_repo"] or default_repository
    if repository is None:
        raise ConfigError("no model repository; give --model_repo DIR")
    # Options for serve may change the ranks, as --context tp2pp2 does.
    asked = _job_words.main(list(flags["serve_options"]), standalone_mode=False)
    plan = plan_of(repository, job_keys(asked))
    _check(flags, plan)
    install = detect_mpi()
    line = _compose(install, flags, plan)
    if flags["dry_run"]:
        click.echo(line.text)
        return 0
    for name, text in _NO_EFFECT.items():
        if flags[name]:
            click.echo(f"# {text}", err=True)
    click.echo(f"# {repository}: {plan.topology.sum_text()} ranks", err=True)
    tell_line(line)
    if not flags["log"]:
        return run_line(line, sigint_as=sigint_of(install))
    click.echo(f"# what the job prints goes to {flags['log_file']}", err=True)
    with _output_to(flags["log_file"]):
        code = run_line(line, sigint_as=sigint_of(install))
    if code:
        click.echo(f"the job ended with exit code {code}; see {flags['log_file']}", err=True)
    return code


@click.command(add_help_option=False,
               context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
@job_options
def _job_words(**options: Any) -> dict[str, Any]:
    """What the options for ``serve`` say of the job; ``serve`` itself looks at the others."""
    return options


def main(default_repository: Path | None = None) -> None:
    """Entry of the script: run it by ``sys.argv`` and exit with its code."""
    try:
        sys.exit(launch_triton_server.main(standalone_mode=False, obj=default_repository) or 0)
    except click.ClickException as error:
        click.echo(f"Error: {error.format_message()} (--help lists the flags)", err=True)
        sys.exit(ConfigError.exit_code)
    except click.Abort:
        sys.exit(130)
    except DisaggError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(error.exit_code)


def _check(flags: Mapping[str, Any], plan: ServePlan) -> None:
    """Raise unless the flags describe the job that the repository asks for."""
    if flags["no_mpi"]:
        raise ConfigError("--no-mpi: context and generation are ranks of one MPI job; leave it out")
    served = [model.name for model in plan.models if model.kind.has_ranks]
    named = flags["tensorrt_llm_model_name"]
    if named is not None and sorted(name.strip() for name in named.split(",")) != sorted(served):
        raise ConfigError(f"--tensorrt_llm_model_name is {named}, but the models that have ranks in "
                          f"{plan.repository} are others; write --tensorrt_llm_model_name "
                          f"{','.join(served)}, "
                          "or leave it out")
    size, topology = flags["world_size"], plan.topology
    if size is not None and size != topology.world_size:
        marks = dict.fromkeys(range(size, topology.world_size), f"not in a world of {size}")
        raise WorldSizeError(f"--world_size is {size}, but {plan.repository} needs {topology.sum_text()}; "
                             "write "
                             "--world_size "
                             f"{topology.world_size}\n{topology.map_text(marks, num_ranks=size)}")


def _compose(install: MpiInstall, flags: Mapping[str, Any], plan: ServePlan) -> LaunchLine:
    words = ["serve", "--model-repository", str(plan.repository)]
    for name in ("http_port", "grpc_port", "metrics_port"):
        words += [f"--{name.replace('_', '-')}", str(flags[name])]
    if flags["host"] is not None:
        words += ["--host", flags["host"]]
    words += flags["serve_options"]
    return compose(install, plan.topology.world_size, python_command(words), launcher_context(),
                   cores=count_cores(), oversubscribe=flags["oversubscribe"],
                   ucx_folder=ucx_folder_for(install, words))


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Let this process and its children write to ``path`` instead of stdout and stderr."""
    try:
        file = path.open("ab", buffering=0)
    except OSError as error:
        raise InputError(f"--log-file {path} cannot be written: {error.strerror}") from None
    sys.stdout.flush()
    sys.stderr.flush()
    saved = {number: os.dup(number) for number in (1, 2)}
    try:
        with file:
            for number in saved:
                os.dup2(file.fileno(), number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in saved.items():
            os.dup2(copy, number)
            os.close(copy)
