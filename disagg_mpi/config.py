"""The job's configuration: plain frozen data, checked once, the same on every rank.

A :class:`JobConfig` is made from keywords, from a TOML file, or from both (the command line overrides
the file). It is immutable; every rank builds the same one from the same arguments, so it is never sent.
Checks that need the model or the machine are made later, by the layer that knows them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import msgspec

from disagg_mpi.errors import ConfigError

DType = Literal["fp32", "bf16"]
EngineName = Literal["torch", "null"]
TransportName = Literal["auto", "shared", "mpi"]
T = TypeVar("T")

# Block size. On CPU a request's blocks mostly lie together, so attention does not care; the hand-over
# sends one piece for each run of blocks, layer and K or V. 32 keeps the waste of a half-filled last
# block small, and a single block of the default model (24 KiB a layer) large enough for memcpy speed.
DEFAULT_TOKENS_PER_BLOCK = 32

# Positions of KV-cache that an instance's pool holds unless told otherwise, when memory allows.
DEFAULT_KV_TOKENS = 16384


class Instance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One copy of the model: ``tp * pp`` ranks."""

    tp: int = 1
    pp: int = 1

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp{self.tp}pp{self.pp}" if self.pp > 1 else f"tp{self.tp}"


class JobConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that shapes a job. Sizes are in tokens, blocks, or seconds, as named.

    ``context`` and ``generation`` (or ``aggregated``) are a number of instances or a sequence of
    :class:`Instance`. Raises :class:`ConfigError` for anything that no job could run with.
    """

    model: str | None = None
    """A directory, a GGUF file or a hub id; ``None`` is the default model."""
    context: int | tuple[Instance, ...] | None = None
    """``None``: one, unless ``aggregated`` is given."""
    generation: int | tuple[Instance, ...] | None = None
    aggregated: int | tuple[Instance, ...] = 0
    """Instances that do both phases; excludes ``context`` and ``generation``."""
    engine: EngineName = "torch"
    """``null`` computes nothing: it measures everything around the engine."""
    dtype: DType = "fp32"
    kv_dtype: DType | None = None
    """Type of the KV-cache; ``None``: the same as ``dtype``."""
    transport: TransportName = "auto"
    tokens_per_block: int = DEFAULT_TOKENS_PER_BLOCK
    kv_tokens: int = DEFAULT_KV_TOKENS
    """Positions that the pool of one instance holds."""
    max_batch_size: int = 64
    """Requests in one step of an instance."""
    max_num_tokens: int = 512
    """Token budget of one step: generation tokens first, context chunks in what is left."""
    threads: int | None = None
    """Compute threads a rank; ``None``: cores // engine ranks on the host."""
    start_timeout: float = 600.0
    """Seconds within which every rank must be ready."""

    def __post_init__(self) -> None:
        # Keywords from Python come here unchecked, so types are looked at as well.
        for name in ("tokens_per_block", "kv_tokens", "max_batch_size", "max_num_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value <= 0:
                raise ConfigError(f"{name} is {value!r}; it must be a positive whole number")
        if not self.start_timeout > 0:
            raise ConfigError(f"start_timeout is {self.start_timeout}; it must be positive")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; it must be at least 1")
        for name, kind in (("engine", EngineName), ("dtype", DType), ("transport", TransportName),
                           ("kv_dtype", DType)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known and not (name == "kv_dtype" and value is None):
                raise ConfigError(f"{name} is {value!r}; known are {', '.join(known)}")
        for name in ("context", "generation", "aggregated"):
            value = getattr(self, name)
            if value is None:
                continue
            if isinstance(value, int):
                if isinstance(value, bool) or value < 0:
                    raise ConfigError(f"{name} is {value}; it is a number of instances, 0 or more")
            elif isinstance(value, str) or not isinstance(value, Sequence) or not all(
                    isinstance(instance, Instance) for instance in value):
                raise ConfigError(f"{name} is {value!r}; it is a number of instances, or a sequence "
                                  "of Instance")
            for instance in self.instances(name):
                if instance.tp < 1 or instance.pp < 1:
                    raise ConfigError(f"{name} names an instance with tp={instance.tp} "
                                      f"pp={instance.pp}; both must be at least 1")
        if self.is_aggregated:
            for name in ("context", "generation"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"aggregated and {name} exclude each other: aggregated instances "
                                      f"do both phases; leave {name} out")
        else:
            for name in ("context", "generation"):
                if not self.instances(name):
                    raise ConfigError(
                        f"no {name} instance; give --{name} 1 or more, or --aggregated N for "
                        "instances that do both phases")
        if self.max_num_tokens < self.max_batch_size:
            raise ConfigError(
                f"max_num_tokens ({self.max_num_tokens}) is below max_batch_size "
                f"({self.max_batch_size}): a step could not take one token of each request")

    def instances(self, role: str) -> tuple[Instance, ...]:
        """The instances of ``role``: ``"context"``, ``"generation"`` or ``"aggregated"``."""
        if role != "aggregated" and self.is_aggregated:
            return ()
        value: int | Sequence[Instance] | None = getattr(self, role)
        if value is None:
            value = 1
        return (Instance(),) * value if isinstance(value, int) else tuple(value)

    @property
    def is_aggregated(self) -> bool:
        return bool(self.aggregated)

    @property
    def effective_kv_dtype(self) -> DType:
        return self.kv_dtype or self.dtype

    def replace(self, **changes: Any) -> JobConfig:
        """A copy with ``changes``, checked again."""
        return msgspec.structs.replace(self, **changes)


def convert(data: Mapping[str, Any], kind: type[T], where: str) -> T:
    """``data`` as a ``kind``; a :class:`ConfigError` that names ``where`` for anything off."""
    try:
        return msgspec.convert(dict(data), kind, dec_hook=_path_of)
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(kind))  # type: ignore[arg-type]
        raise ConfigError(f"{where}: {error}. Known keys: {known}") from None


def _path_of(kind: type, value: Any) -> Any:
    """The one type beyond msgspec's own that options have: a path, given as text in a file."""
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    raise ValueError(f"Expected `{kind.__name__}`, got `{type(value).__name__}`")


def read_toml(path: str | Path) -> dict[str, Any]:
    """The tables of a TOML file; :class:`ConfigError` with the line when it is not one."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
