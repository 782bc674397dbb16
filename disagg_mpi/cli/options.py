"""Options that several commands share, and how they meet the configuration file.

The file's top level holds :class:`JobConfig`'s keys, its table ``[sampling]`` those of
:class:`SamplingParams`, and ``[run]`` and ``[serve]`` those of the commands. What is given on the command
line wins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from disagg_mpi.config import ROLE_NAMES, JobConfig, convert, read_toml, role_keys
from disagg_mpi.errors import ConfigError
from disagg_mpi.request import SamplingParams

COMMAND_TABLES = ("run", "serve")
"""Tables that are a command's own; one file may serve several commands."""

F = TypeVar("F", bound=Callable[..., Any])


def _count_or_shapes(text: str) -> int | str:
    """A bare number as one, anything else as it is: :class:`JobConfig` reads shapes."""
    return int(text) if text.isascii() and text.isdecimal() else text


def _tokens_or_auto(text: str) -> int | str:
    if text != "auto" and not (text.isascii() and text.isdecimal()):
        raise click.BadParameter(f"{text!r} is neither a number of tokens nor auto.")
    return text if text == "auto" else int(text)


_JOB_OPTIONS = [
    click.option("--config", "config_file", type=click.Path(path_type=Path), metavar="FILE",
                 help="A TOML file for all of this; options given here win."),
    click.option("--model", metavar="DIR|FILE|ID",
                 help="A directory with safetensors, a GGUF file, or a hub id. "
                      "Default: SmolLM2-135M-Instruct, fetched once."),
    click.option("--context", type=_count_or_shapes, metavar="N|SHAPES",
                 help="Context instances: a number of copies of the model on one rank each, or shapes: tp2 "
                      "(each layer on two ranks), pp2 (two stages), tp2pp2 (both: four ranks), 2xtp3 (two "
                      "copies of tp3), 2xtp3,tp1pp2 (copies of different shapes). [default: 1]"),
    click.option("--generation", type=_count_or_shapes, metavar="N|SHAPES",
                 help="Generation instances, as --context; their shapes need not be alike. [default: 1]"),
    click.option("--aggregated", type=_count_or_shapes, metavar="N|SHAPES",
                 help="Instead: instances that do both phases (the baseline), as --context."),
    *(click.option(f"--{role}-{kind}-ids", metavar="IDS", help=text)
      for role in ROLE_NAMES
      for kind, text in (
          ("participant", f'Ranks of the {role} instances: "1,2;3,4" puts one on ranks 1 and 2, led by 1, '
                          f"and one on 3 and 4. Without shapes in --{role} each is tp of as many ranks. "
                          "[default: free ranks in order]"),
          ("device", f'Devices of the {role} instances, one for each rank: "0,1;0,1".'))),
    click.option("--device", type=click.Choice(["cpu", "cuda", "auto", "emulated"]), metavar="cpu|cuda|auto",
                 help="What ranks compute on. cuda: a GPU for each rank, in turn; several share one where "
                      "there are too few, or device ids say so. auto: GPUs if torch is built for them and "
                      "every rank sees its. "
                      "[default: cpu]"),
    click.option("--gpu-memory", type=float, metavar="SHARE",
                 help="Share of what is free of a GPU's memory that the ranks on it may use together. "
                      "[default: 0.9]"),
    click.option("--context-gpu-share", type=float, metavar="SHARE",
                 help="Share of a GPU's processors that each context rank may take, under launch --mps: with "
                      "one of them on a GPU the rest is left to those beside it. [default: 1]"),
    click.option("--attention", type=click.Choice(["auto", "flashinfer", "sdpa"]),
                 help="Attention on GPUs: flashinfer's kernels (and our own for generation), or torch's, "
                      "which are slower. "
                      "[default: flashinfer if it is installed]"),
    click.option("--cuda-graphs/--no-cuda-graphs", default=None,
                 help="On GPUs, capture generation steps at the start and replay them. [default: on]"),
    click.option("--weights", type=click.Choice(["files", "random"]), hidden=True,
                 help="random: of the model's shape, to measure GPUs with; needs config.json alone."),
    click.option("--dtype", type=click.Choice(["fp32", "bf16"]),
                 help="Type of weights and computation. [default: fp32, on GPUs bf16]"),
    click.option("--kv-dtype", type=click.Choice(["fp32", "bf16"]),
                 help="Type of the KV-cache. [default: as --dtype]"),
    click.option("--transport", type=click.Choice(["auto", "shared", "mpi"]),
                 help="How the KV-cache is handed over: in shared memory where ranks share a host, by "
                      "MPI messages elsewhere (auto), or one of them always."),
    click.option("--kv-tokens", type=int, metavar="N",
                 help="Positions that an instance's KV pool holds. [default: 16384; on GPUs what fits]"),
    click.option("--tokens-per-block", type=int, metavar="N", help="Block size. [default: 32]"),
    click.option("--generation-tokens-per-block", type=int, metavar="N",
                 help="Block size of generation instances; another one than --tokens-per-block makes each "
                      "hand-over a copy. [default: as --tokens-per-block]"),
    click.option("--prefix-cache/--no-prefix-cache", default=None,
                 help="Keep the KV-cache of finished requests while there is room, and compute of a prompt "
                      "only what no earlier one began with. [default: on]"),
    click.option("--router", type=click.Choice(["prefix", "least-loaded"]),
                 help="Send a prompt to the instance that has its beginning cached, unless that is "
                      "overloaded, or always to the least loaded one. [default: prefix]"),
    click.option("--local-context", type=_tokens_or_auto, metavar="N|auto",
                 help="Compute a prompt of which at most N tokens are not cached on the generation instance "
                      "itself, which saves the hand-over and delays what it generates; auto decides from "
                      "measured costs. [default: 0, never]"),
    click.option("--reserved-output", type=int, metavar="N",
                 help="Output positions that a request has blocks for when it starts. Beyond, it takes "
                      "blocks as it grows, and the youngest request gives its up when there are none: a "
                      "small N lets more requests run at once, and more be computed twice. [default: 256]"),
    click.option("--overlap-tokens", type=int, metavar="N",
                 help="Hand prompts of at least N tokens over while they are computed, where bytes move "
                      "between hosts; shorter ones in one piece. [default: 512]"),
    click.option("--max-batch-size", type=int, metavar="N",
                 help="Requests in one step of an instance. [default: 64]"),
    click.option("--max-num-tokens", type=int, metavar="N",
                 help="Token budget of one step; longer prompts are computed in chunks. "
                      "[default: 512, on GPUs 4096, --max-batch-size at least]"),
    click.option("--threads", type=int, metavar="N",
                 help="Compute threads a rank. [default: cores // engine ranks on the host]"),
    click.option("--engine", type=click.Choice(["torch", "tensorrt_llm", "null"]),
                 help="torch: the built-in engine. tensorrt_llm: that library's, on engines that it has "
                      "built (pip install 'disagg_mpi[tensorrt_llm]'; never yet run on the real library, see "
                      "docs/tensorrt-llm.md). null: none, it measures all the rest. [default: torch]"),
    *(click.option(f"--{role}-engine-dir", metavar="DIR",
                   help=f"With --engine tensorrt_llm: the engine of the {role} instances, a directory that "
                        "trtllm-build has written. --model is then the directory with the tokenizer.")
      for role in ROLE_NAMES),
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
    command: dict[str, Any]
    """What is neither: the command's own table."""


def settings_of(options: Mapping[str, Any], command: str = "run") -> Settings:
    """Merge the configuration file, if one is given, with the options that were given.

    ``options``: a command's keyword arguments; those that are ``None`` or empty were not given.
    """
    job_names = {field.name for field in msgspec.structs.fields(JobConfig)}
    # By identity: 0 is a value (--seed 0, --temperature 0), though it equals False. A plain flag that was
    # not typed is False; the job's own are pairs (--x/--no-x), None if not typed.
    given = {key: value for key, value in options.items() if value is not None and value != ()
             and (value is not False or key in job_names)}
    file = given.pop("config_file", None)
    where = str(file) if file is not None else "options"
    tables = read_toml(file) if file is not None else {}
    sampling = _table(tables, "sampling", where)
    own = {name: _table(tables, name, where) for name in COMMAND_TABLES}[command]
    sampling_names = {field.name for field in msgspec.structs.fields(SamplingParams)}
    job = dict(tables)
    _choose_roles(given, job)
    for key, value in given.items():
        if key in job_names:
            job[key] = value
        elif key in sampling_names:
            sampling[key] = value
        else:
            own[key] = value
    try:
        return Settings(convert(job, JobConfig, where),
                        convert(sampling, SamplingParams, f"{where} [sampling]"), own)
    except ConfigError as error:
        if file is None or str(file) in str(error):
            raise
        raise ConfigError(f"{where}: {error}") from None


def job_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    """What file and options say of the job, as keys of :class:`JobConfig`: for a base that they change."""
    file = options.get("config_file")
    typed = {key: value for key, value in options.items() if value is not None}
    said = {**(read_toml(file) if file is not None else {}), **typed}
    return {field.name: said[field.name] for field in msgspec.structs.fields(JobConfig) if field.name in said}


def _choose_roles(given: Mapping[str, Any], job: dict[str, Any]) -> None:
    """Take out of the file's ``job`` what the roles asked for on the command line outweigh."""
    split = [*role_keys("context"), *role_keys("generation")]
    baseline = role_keys("aggregated")
    asks_baseline = any(given.get(key) for key in baseline)
    asks_split = next((key for key in split if key in given), None)
    if asks_baseline and asks_split:
        raise ConfigError(f"--aggregated and --{asks_split.replace('_', '-')} exclude each other")
    outweighed = split if asks_baseline else baseline if asks_split or "aggregated" in given else ()
    for key in outweighed:
        job.pop(key, None)


def _table(tables: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    table = tables.pop(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{where}: {name} must be a table, [{name}]")
    return dict(table)
