"""Options that several commands share, and how they meet the configuration file.

The file's top level holds :class:`JobConfig`'s keys, its table ``[sampling]`` those of
:class:`SamplingParams`, and ``[run]`` those of the ``run`` command. What is given on the command line wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from disagg_mpi.config import JobConfig, convert, read_toml
from disagg_mpi.errors import ConfigError
from disagg_mpi.request import SamplingParams

F = TypeVar("F", bound=Callable[..., Any])

_JOB_OPTIONS = [
    click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE",
                 help="A TOML file for all of this; options given here win."),
    click.option("--model", metavar="DIR|FILE|ID",
                 help="A directory with safetensors, a GGUF file, or a hub id. "
                      "Default: SmolLM2-135M-Instruct, fetched once."),
    click.option("--context", type=int, metavar="N", help="Number of context instances. [default: 1]"),
    click.option("--generation", type=int, metavar="N",
                 help="Number of generation instances. [default: 1]"),
    click.option("--aggregated", type=int, metavar="N",
                 help="Instead: N instances that do both phases (the baseline)."),
    click.option("--dtype", type=click.Choice(["fp32", "bf16"]),
                 help="Type of weights and computation. [default: fp32]"),
    click.option("--kv-dtype", type=click.Choice(["fp32", "bf16"]),
                 help="Type of the KV-cache. [default: as --dtype]"),
    click.option("--transport", type=click.Choice(["auto", "shared", "mpi"]),
                 help="How the KV-cache is handed over: in shared memory where ranks share a host, by "
                      "MPI messages elsewhere (auto), or one of them always."),
    click.option("--kv-tokens", type=int, metavar="N",
                 help="Positions that an instance's KV pool holds. [default: 16384]"),
    click.option("--tokens-per-block", type=int, metavar="N", help="Block size. [default: 32]"),
    click.option("--max-batch-size", type=int, metavar="N",
                 help="Requests in one step of an instance. [default: 64]"),
    click.option("--max-num-tokens", type=int, metavar="N",
                 help="Token budget of one step; longer prompts are computed in chunks. "
                      "[default: 512]"),
    click.option("--threads", type=int, metavar="N",
                 help="Compute threads a rank. [default: cores // engine ranks on the host]"),
    click.option("--engine", type=click.Choice(["torch", "null"]), hidden=True,
                 help="null computes nothing: it measures all the rest."),
]

_SAMPLING_OPTIONS = [
    click.option("--max-tokens", type=int, metavar="N", help="Tokens to generate at most. [default: 64]"),
    click.option("--min-tokens", type=int, metavar="N", help="Tokens to generate at least."),
    click.option("--temperature", type=float, metavar="T", help="0 is greedy. [default: 0]"),
    click.option("--top-k", type=int, metavar="K", help="Sample among the K most likely tokens."),
    click.option("--top-p", type=float, metavar="P",
                 help="Sample among the likeliest tokens that have probability P together."),
    click.option("--stop", multiple=True, metavar="TEXT", help="End at this text. Repeatable."),
    click.option("--repetition-penalty", type=float, metavar="X",
                 help="Above 1: tokens of prompt and output get less likely."),
    click.option("--presence-penalty", type=float, metavar="X"),
    click.option("--frequency-penalty", type=float, metavar="X"),
    click.option("--seed", type=int, metavar="N", help="The same seed, the same text, at any layout."),
    click.option("--logprobs", type=int, metavar="N",
                 help="Also give log-probabilities, of N alternatives each."),
    click.option("-k", "--num-choices", "n", type=int, metavar="N",
                 help="Continuations of each prompt. [default: 1]"),
    click.option("--ignore-eos", is_flag=True, default=None, help="Go on to --max-tokens."),
]


def job_options(function: F) -> F:
    """Options that become a :class:`JobConfig`."""
    for option in reversed(_JOB_OPTIONS):
        function = option(function)
    return function


def sampling_options(function: F) -> F:
    """Options that become :class:`SamplingParams`."""
    for option in reversed(_SAMPLING_OPTIONS):
        function = option(function)
    return function


class Settings(msgspec.Struct, frozen=True):
    """What file and options say together."""

    job: JobConfig
    sampling: SamplingParams
    run: dict[str, Any]


def settings_of(options: Mapping[str, Any]) -> Settings:
    """Merge the configuration file, if one is given, with the options that were given.

    ``options``: a command's keyword arguments; those that are ``None`` or empty were not given.
    """
    # By identity: 0 is a value (--seed 0, --temperature 0), though it equals False.
    given = {key: value for key, value in options.items()
             if value is not None and value is not False and value != ()}
    file = given.pop("config_file", None)
    where = str(file) if file is not None else "options"
    tables = read_toml(file) if file is not None else {}
    sampling = _table(tables, "sampling", where)
    run = _table(tables, "run", where)
    job_names = {field.name for field in msgspec.structs.fields(JobConfig)}
    sampling_names = {field.name for field in msgspec.structs.fields(SamplingParams)}
    job = dict(tables)
    if given.get("aggregated"):
        # Asking for the baseline on the command line outweighs a file's split.
        job.pop("context", None)
        job.pop("generation", None)
        for name in ("context", "generation"):
            if name in given:
                raise ConfigError(f"--aggregated and --{name} exclude each other")
    elif {"context", "generation"} & given.keys():
        job.pop("aggregated", None)
    for key, value in given.items():
        if key in job_names:
            job[key] = value
        elif key in sampling_names:
            sampling[key] = value
        else:
            run[key] = value
    split = [name for name in ("context", "generation") if name in job]
    if job.get("aggregated") and split:
        raise ConfigError(f"{where}: aggregated and {split[0]} exclude each other")
    return Settings(convert(job, JobConfig, where), convert(sampling, SamplingParams, f"{where} [sampling]"),
                    run)


def _table(tables: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    table = tables.pop(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: {name} must be a table, [{name}]")
    return dict(table)
