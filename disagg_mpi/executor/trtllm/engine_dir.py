"""An engine's directory: what it was built for, and whether the job asks for that.

``config.json`` is read, and nothing else: milliseconds, no library, no GPU. What a release may leave out has
a stated substitute; what an executor cannot do without is asked for. Read once a rank, before anything
starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from disagg_mpi.config import DEFAULT_TOKENS_PER_BLOCK, JobConfig
from disagg_mpi.errors import ConfigError, LayoutError, ModelError
from disagg_mpi.model.checkpoint import read_json_object
from disagg_mpi.topology import Topology


class EngineInfo(msgspec.Struct, frozen=True):
    """What an engine can take."""

    directory: Path
    tp: int | None
    """``None``: the engine does not say."""
    pp: int | None
    vocab_size: int
    max_seq_len: int
    """Prompt and output together."""
    max_batch_size: int
    max_num_tokens: int
    max_prompt_len: int
    tokens_per_block: int
    is_chunked: bool
    """Whether it can compute a prompt in several steps."""


def read_engine(directory: Path, config: JobConfig, role: str) -> EngineInfo:
    """Read the engine of ``role``. Raises :class:`ConfigError` for what is no engine, or too small for what
    the job asks, :class:`ModelError` for one that is damaged."""
    option = f"--{role}-engine-dir {directory}"
    path = directory / "config.json"
    if not directory.exists():
        raise ConfigError(f"{option}: found nothing there; needed is a directory that trtllm-build has "
                          "written")
    if not directory.is_dir():
        raise ConfigError(f"{option}: found a file; needed is the directory that holds it")
    if not path.is_file():
        raise ConfigError(f"{option}: found no config.json; needed is a directory that trtllm-build has "
                          "written, with config.json beside rank0.engine")
    data = read_json_object(path)
    pretrained, build = _part(path, data, "pretrained_config"), _part(path, data, "build_config")
    if not pretrained:
        raise ConfigError(f"{option}: {path} is no engine's (it has no pretrained_config); a Hugging Face "
                          "directory is turned into an engine by trtllm-build")
    mapping = _part(path, pretrained, "mapping")
    plugins = _part(path, build, "plugin_config")
    max_seq_len = _number(path, build, "max_seq_len") or _number(path, pretrained, "max_position_embeddings")
    vocab_size = _number(path, pretrained, "vocab_size")
    if max_seq_len is None or vocab_size is None:
        missing = "vocab_size of pretrained_config" if vocab_size is None else "max_seq_len of build_config"
        raise ModelError(f"{path}: found no {missing}, which is needed; build the engine again")
    num_tokens = _limit(path, build, config, "max_num_tokens")
    is_chunked = plugins.get("use_paged_context_fmha") is True
    longest = _number(path, build, "max_input_len") or max_seq_len
    return EngineInfo(
        directory=directory,
        tp=_number(path, mapping, "tp_size"), pp=_number(path, mapping, "pp_size"),
        vocab_size=vocab_size, max_seq_len=max_seq_len,
        max_batch_size=_limit(path, build, config, "max_batch_size"), max_num_tokens=num_tokens,
        max_prompt_len=longest if is_chunked else min(longest, num_tokens),
        tokens_per_block=_number(path, plugins, "tokens_per_block") or DEFAULT_TOKENS_PER_BLOCK,
        is_chunked=is_chunked)


def read_engines(config: JobConfig, topology: Topology) -> dict[str, EngineInfo]:
    """Role → its engine, for the roles that have instances; each checked against these.

    Raises as :func:`read_engine`, and :class:`LayoutError` for instances of another shape than their engine's
    and for engines that cannot hand over to each other.
    """
    found: dict[str, EngineInfo] = {}
    for group in topology.groups:
        role = str(group.role)
        if role not in found:
            path = config.engine_dir(role)
            if path is None:
                raise ConfigError(f"engine tensorrt_llm needs the {role} instances' engine: give "
                                  f"--{role}-engine-dir DIR, a directory that trtllm-build has written")
            found[role] = read_engine(Path(path).expanduser(), config, role)
        engine = found[role]
        sizes = engine.tp or group.shape.tp, engine.pp or group.shape.pp
        if sizes != (group.shape.tp, group.shape.pp):
            marks = dict.fromkeys(group.ranks, f"its engine is tp{sizes[0]}pp{sizes[1]}")
            raise LayoutError(f"{group.name} is {group.shape}, but {engine.directory} was built for tp "
                              f"{sizes[0]} x pp {sizes[1]}; give --{role} tp{sizes[0]}pp{sizes[1]}, or "
                              f"another --{role}-engine-dir\n" + topology.map_text(marks))
    vocabularies = {engine.vocab_size for engine in found.values()}
    if len(vocabularies) > 1:
        raise LayoutError("the engines are of different models: vocabularies of " + " and ".join(
            f"{engine.vocab_size} ({engine.directory})" for engine in found.values())
            + "; build both from the same checkpoint")
    return found


def _part(path: Path, data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object inside ``data``; empty where there is none."""
    part = data.get(name)
    if part is not None and not isinstance(part, dict):
        raise ModelError(f"{path}: found {name} = {part!r}, needed an object")
    return part or {}


def _number(path: Path, data: Mapping[str, Any], name: str) -> int | None:
    """A number above 0 in ``data``; ``None`` where there is none."""
    value = data.get(name)
    if value is not None and (type(value) is not int or value < 1):
        raise ModelError(f"{path}: found {name} = {value!r}, needed a whole number above 0")
    return value


def _limit(path: Path, build: Mapping[str, Any], config: JobConfig, name: str) -> int:
    """A limit that the engine was built for, or a lower one that the job asks for.

    What is left at the built-in engine's default was not asked for: engines take far more in a step.
    """
    asked: int | None = getattr(config, name)
    built = _number(path, build, name)
    if built is None:
        return config.token_budget if asked is None else asked
    default = next(field.default for field in msgspec.structs.fields(JobConfig) if field.name == name)
    if asked is None or asked == default:
        return built
    if asked > built:
        raise ConfigError(f"{name} is {asked}, but {path.parent} was built for {built}; give "
                          f"--{name.replace('_', '-')} {built} at most, or build another engine")
    return asked
