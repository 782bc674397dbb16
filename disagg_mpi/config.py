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
from disagg_mpi.shapes import Instance as Instance  # part of a configuration
from disagg_mpi.shapes import check_num_ranks, parse_ids, parse_instances

DType = Literal["fp32", "bf16"]
DeviceName = Literal["auto", "cpu", "cuda", "emulated"]
WeightsName = Literal["files", "random"]
AttentionName = Literal["auto", "flashinfer", "sdpa"]
EngineName = Literal["torch", "tensorrt_llm", "null"]
TransportName = Literal["auto", "shared", "mpi"]
RouterName = Literal["prefix", "least-loaded"]
IdKind = Literal["participant", "device"]
T = TypeVar("T")

# Block size. On CPU a request's blocks mostly lie together, so attention does not care; the hand-over
# sends one piece for each run of blocks, layer and K or V. 32 keeps the waste of a half-filled last
# block small, and a single block of the default model (24 KiB a layer) large enough for memcpy speed.
DEFAULT_TOKENS_PER_BLOCK = 32

# Positions of KV-cache that an instance's pool holds unless told otherwise, when memory allows.
DEFAULT_KV_TOKENS = 16384

# Token budgets of a step. On a processor a step of 512 takes half a second, as long as those who generate
# should wait; a GPU needs some thousand tokens for its matrix units to be busy.
DEFAULT_NUM_TOKENS = 512
DEFAULT_GPU_NUM_TOKENS = 4096

# Output positions that a request has blocks for from the start: most answers of a chat are shorter.
DEFAULT_RESERVED_OUTPUT = 256

# From here on a prompt's hand-over between hosts is hidden behind its computation: one whole chunk of the
# default budget. Measured over 1 Gbit/s (docs/benchmarks.md): 600 tokens held generation up for 230 ms in one
# piece and for 1 ms overlapped; 300 tokens, one chunk, for as long either way.
DEFAULT_OVERLAP_TOKENS = 512

# What only our own engine and hand-over know: TensorRT-LLM has it in its engines, or does it itself.
NOT_OF_TENSORRT_LLM = {
    "device": "it runs on GPUs alone",
    "context_gpu_share": "it is not told of it",
    "attention": "its kernels are its own",
    "weights": "an engine holds them",
    "dtype": "an engine is built for its type",
    "kv_dtype": "an engine is built for its KV-cache's type",
    "tokens_per_block": "an engine is built for its block size",
    "generation_tokens_per_block": "an engine is built for its block size",
    "transport": "it hands over by itself, over MPI",
    "overlap_tokens": "it hands over by itself, over MPI",
    "reserved_output": "all that a request may need is reserved",
    "threads": "its threads are its own",
}

ROLE_NAMES = ("context", "generation", "aggregated")


def role_keys(role: str) -> tuple[str, str, str]:
    """The keys of :class:`JobConfig` that shape the instances of ``role``."""
    return (role, f"{role}_participant_ids", f"{role}_device_ids")


class JobConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that shapes a job. Sizes are in tokens, blocks, or seconds, as named.

    ``context`` and ``generation`` (or ``aggregated``) are a number of copies of the model on one rank each,
    shapes as text (``"tp2"``, ``"2xtp3,tp1pp2"``; see :func:`~disagg_mpi.shapes.parse_instances`), or a
    sequence of :class:`Instance`. Participant ids name their ranks and device ids the devices of these, as
    text with ``,`` inside a copy and ``;`` between copies; where they are given and the shape is not, a copy
    is ``tp`` of as many ranks as its group has ids.
    Raises :class:`ConfigError` for anything that no job could run with; whether ids fit the instances and
    the world is checked by :func:`~disagg_mpi.topology.build_topology`.
    """

    model: str | None = None
    """A directory, a GGUF file or a hub id; ``None`` is the default model."""
    context: int | str | tuple[Instance, ...] | None = None
    """``None``: as many as there are groups of ids, or one; none if there are aggregated instances."""
    generation: int | str | tuple[Instance, ...] | None = None
    aggregated: int | str | tuple[Instance, ...] | None = None
    """Instances that do both phases; excludes ``context`` and ``generation``."""
    context_participant_ids: str | None = None
    context_device_ids: str | None = None
    generation_participant_ids: str | None = None
    generation_device_ids: str | None = None
    aggregated_participant_ids: str | None = None
    aggregated_device_ids: str | None = None
    engine: EngineName = "torch"
    """``tensorrt_llm``: that library's executor, on engines that it has built; ``null`` computes nothing: it
    measures everything around the engine."""
    context_engine_dir: str | None = None
    """With ``tensorrt_llm``: the directory of the engine that context instances run; ``model`` is then the
    directory with the tokenizer. Of a role without instances it is not used."""
    generation_engine_dir: str | None = None
    aggregated_engine_dir: str | None = None
    device: DeviceName = "cpu"
    """What ranks compute on. ``cuda``: a GPU for each rank, or several ranks on one where device ids or too
    few GPUs say so. ``auto``: ``cuda`` if every rank sees the GPU it is to have and torch is
    built for CUDA. ``emulated`` is for tests: the
    engine for GPUs on the processor, with what :mod:`disagg_mpi.gpus` pretends is there."""
    dtype: DType | None = None
    """Of weights and computation; ``None``: fp32 on a processor, bf16 on a GPU."""
    kv_dtype: DType | None = None
    """Type of the KV-cache; ``None``: the same as ``dtype``."""
    gpu_memory: float = 0.9
    """Share of what is free of a GPU's memory that the ranks on it may use together."""
    context_gpu_share: float = 1.0
    """Share of a GPU's processors that each context rank may take, under NVIDIA's MPS (``launch --mps``):
    with one of them on a GPU the rest is left to the ranks beside it. It lasts as long as the process."""
    attention: AttentionName = "auto"
    """On GPUs. ``auto``: flashinfer where it is installed, else torch's own, which is slower, with a word."""
    cuda_graphs: bool = True
    """Whether generation steps are captured once for each batch size and replayed."""
    weights: WeightsName = "files"
    """``random``: of the shape that config.json says, for measurements on GPUs; no file is read."""
    transport: TransportName = "auto"
    tokens_per_block: int = DEFAULT_TOKENS_PER_BLOCK
    generation_tokens_per_block: int | None = None
    """Block size of generation instances; ``None``: as ``tokens_per_block``."""
    kv_tokens: int | None = None
    """Positions that the pool of one instance holds; ``None``: 16,384 on processors, on GPUs what fits."""
    prefix_cache: bool = True
    """Whether blocks of equal beginnings of prompts are computed once and then copied."""
    reserved_output: int = DEFAULT_RESERVED_OUTPUT
    """Output positions that a request has blocks for when it is admitted; beyond, blocks are taken as it
    grows, and the youngest request is preempted when there are none."""
    local_context: int | Literal["auto"] = 0
    """A prompt of which at most so many tokens are left to compute, after what the generation instance has
    cached, is computed on the generation instance. ``auto``: where measured costs say so; 0: never."""
    overlap_tokens: int = DEFAULT_OVERLAP_TOKENS
    """A prompt of at least so many tokens is handed over while it is computed, where bytes move between
    hosts; a shorter one in one piece."""
    router: RouterName = "prefix"
    """``prefix``: to the instance that has the beginning of a prompt cached, unless it is overloaded;
    ``least-loaded``: whatever is cached."""
    max_batch_size: int = 64
    """Requests in one step of an instance."""
    max_num_tokens: int | None = None
    """Token budget of one step: generation tokens first, context chunks in what is left. ``None``: 512 on
    processors, 4,096 on GPUs, ``max_batch_size`` where that is more."""
    threads: int | None = None
    """Compute threads a rank; ``None``: cores // engine ranks on the host."""
    start_timeout: float = 600.0
    """Seconds within which every rank must be ready."""

    def __post_init__(self) -> None:
        # Keywords from Python come here unchecked, so types are looked at as well.
        for name in ("tokens_per_block", "generation_tokens_per_block", "kv_tokens", "reserved_output",
                     "overlap_tokens", "max_batch_size", "max_num_tokens"):
            value = getattr(self, name)
            if name in ("generation_tokens_per_block", "kv_tokens", "max_num_tokens") and value is None:
                continue
            if type(value) is not int or value <= 0:
                raise ConfigError(f"{name} is {value!r}; it must be a positive whole number")
        if self.local_context != "auto" and (type(self.local_context) is not int or self.local_context < 0):
            raise ConfigError(f"local_context is {self.local_context!r}; it is a number of tokens, "
                              "0 for never, or auto")
        for name in ("prefix_cache", "cuda_graphs"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it is true or false")
        for name in ("gpu_memory", "context_gpu_share"):
            value = getattr(self, name)
            if not (type(value) in (float, int) and 0 < value <= 1):
                raise ConfigError(f"{name} is {value!r}; it is a share, above 0 and at most 1")
        if not self.start_timeout > 0:
            raise ConfigError(f"start_timeout is {self.start_timeout}; it must be positive")
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads is {self.threads}; it must be at least 1")
        for name, kind in (("engine", EngineName), ("dtype", DType), ("transport", TransportName),
                           ("kv_dtype", DType), ("router", RouterName), ("device", DeviceName),
                           ("attention", AttentionName), ("weights", WeightsName)):
            value, known = getattr(self, name), get_args(kind)
            if value not in known and not (name in ("dtype", "kv_dtype") and value is None):
                raise ConfigError(f"{name} is {value!r}; known are {', '.join(known)}")
        if self.weights == "random" and self.device == "cpu":
            raise ConfigError("weights random are for measurements on GPUs; give --device cuda, or leave "
                              "them at files")
        for role in ROLE_NAMES:
            _check_asked(role, getattr(self, role))
            for instance in self._asked(role):
                _check_instance(role, instance)
        if self.is_aggregated:
            for role in ("context", "generation"):
                for name in role_keys(role):
                    if getattr(self, name) is not None:
                        raise ConfigError(f"aggregated and {name} exclude each other: aggregated instances "
                                          f"do both phases; leave {name} out")
        else:
            for role in ("context", "generation"):
                if not self.instances(role):
                    raise ConfigError(
                        f"no {role} instance; give --{role} 1 or more, or --aggregated N for "
                        "instances that do both phases")
        if self.token_budget < self.max_batch_size:
            raise ConfigError(
                f"max_num_tokens ({self.token_budget}) is below max_batch_size "
                f"({self.max_batch_size}): a step could not take one token of each request")
        _check_engine(self)

    def instances(self, role: str) -> tuple[Instance, ...]:
        """The instances of ``role``: ``"context"``, ``"generation"`` or ``"aggregated"``."""
        return () if role != "aggregated" and self.is_aggregated else self._asked(role)

    def id_groups(self, role: str, kind: IdKind) -> tuple[tuple[int, ...], ...] | None:
        """The groups of ids that ``{role}_{kind}_ids`` holds; ``None`` if it is not given."""
        name = f"{role}_{kind}_ids"
        text = getattr(self, name)
        if text is not None and not isinstance(text, str):
            raise ConfigError(f'{name} is {text!r}; it is text such as "1,2;3,4"')
        return None if text is None else parse_ids(text, name)

    def engine_dir(self, role: str) -> str | None:
        """The engine that ``tensorrt_llm`` runs in the instances of ``role``."""
        return getattr(self, f"{role}_engine_dir")  # type: ignore[no-any-return]

    def block_size(self, role: str) -> int:
        """Tokens in a block of the instances of ``role``."""
        return (role == "generation" and self.generation_tokens_per_block) or self.tokens_per_block

    @property
    def is_aggregated(self) -> bool:
        return bool(self._asked("aggregated"))

    @property
    def uses_gpus(self) -> bool:
        """Whether ranks compute on devices with memory of their own; ``auto`` must have been decided."""
        return self.device in ("cuda", "emulated")

    @property
    def compute_dtype(self) -> DType:
        """Of weights and computation."""
        return self.dtype or ("bf16" if self.device == "cuda" else "fp32")

    @property
    def effective_kv_dtype(self) -> DType:
        return self.kv_dtype or self.compute_dtype

    @property
    def token_budget(self) -> int:
        """Tokens of one step of an instance."""
        default = DEFAULT_GPU_NUM_TOKENS if self.uses_gpus else DEFAULT_NUM_TOKENS
        return self.max_num_tokens or max(default, self.max_batch_size)

    @property
    def pool_tokens(self) -> int:
        """Positions that the pool of one instance holds; on GPUs, once what fits has been worked out."""
        return self.kv_tokens or DEFAULT_KV_TOKENS

    def _asked(self, role: str) -> tuple[Instance, ...]:
        """The instances that keywords and ids of ``role`` ask for, whatever the other roles say.

        Ids are dealt out as far as they go; :func:`~disagg_mpi.topology.build_topology` counts them.
        """
        asked = getattr(self, role)
        participants, devices = (self.id_groups(role, kind) for kind in get_args(IdKind))
        groups = participants or devices or ()
        if asked is None:
            asked = len(groups) or int(role != "aggregated")
        elif isinstance(asked, str) and asked.strip().isdecimal():
            asked = len(parse_instances(asked, role))
        if isinstance(asked, int):
            # A number says how many copies, the ids how wide each is.
            shapes = tuple(Instance(tp=len(groups[i]) if i < len(groups) else 1) for i in range(asked))
        else:
            shapes = parse_instances(asked, role) if isinstance(asked, str) else tuple(asked)
        for field, given in (("participant_ids", participants), ("device_ids", devices)):
            if given is None:
                continue
            if any(getattr(shape, field) is not None for shape in shapes):
                raise ConfigError(f"{role} names {field} in an instance, and {role}_{field} again; "
                                  "leave one out")
            shapes = tuple(msgspec.structs.replace(shape, **{field: ids})
                           for shape, ids in zip(shapes, given, strict=False)) + shapes[len(given):]
        return shapes

    def replace(self, **changes: Any) -> JobConfig:
        """A copy with ``changes``, checked again."""
        return msgspec.structs.replace(self, **changes)


def _check_asked(role: str, asked: object) -> None:
    """Raise :class:`ConfigError` unless ``asked`` is a number, text, or a sequence of instances."""
    if isinstance(asked, int):
        if isinstance(asked, bool) or asked < 0:
            raise ConfigError(f"{role} is {asked}; it is a number of instances, 0 or more")
        check_num_ranks(asked, role)
    elif asked is not None and not isinstance(asked, str) and not (
            isinstance(asked, Sequence) and all(isinstance(instance, Instance) for instance in asked)):
        raise ConfigError(f"{role} is {asked!r}; it is a number of instances, shapes as text, or a sequence "
                          "of Instance")


def _check_engine(config: JobConfig) -> None:
    """Raise :class:`ConfigError` for options that the job's engine does not know.

    What it lacks is asked for later: a model repository may still name it.
    """
    dirs = {role: config.engine_dir(role) for role in ROLE_NAMES}
    for role, path in dirs.items():
        if path is not None and (not isinstance(path, str) or not path):
            raise ConfigError(f"{role}_engine_dir is {path!r}; it is the path of a directory")
    if config.engine != "tensorrt_llm":
        given = next((role for role, path in dirs.items() if path is not None), None)
        if given is not None:
            raise ConfigError(f"{given}_engine_dir is for engine tensorrt_llm, and this is {config.engine}; "
                              f"give --engine tensorrt_llm, or leave {given}_engine_dir out")
        return
    if config.local_context == "auto":
        raise ConfigError("local_context is auto, and engine tensorrt_llm does not say what a hand-over "
                          "costs; give a number of tokens")
    for field in msgspec.structs.fields(JobConfig):
        if field.name in NOT_OF_TENSORRT_LLM and getattr(config, field.name) != field.default:
            raise ConfigError(f"{field.name} means nothing to engine tensorrt_llm: "
                              f"{NOT_OF_TENSORRT_LLM[field.name]}; leave it out")


def _check_instance(role: str, instance: Instance) -> None:
    """Raise :class:`ConfigError` for sizes and ids that cannot be."""
    if any(type(size) is not int or size < 1 for size in (instance.tp, instance.pp)):
        raise ConfigError(f"{role} names an instance with tp={instance.tp} pp={instance.pp}; both must be "
                          "at least 1")
    check_num_ranks(instance.num_ranks, role)
    for name in ("participant_ids", "device_ids"):
        ids = getattr(instance, name)
        if ids is not None and not (isinstance(ids, Sequence) and all(
                type(number) is int and number >= 0 for number in ids)):
            raise ConfigError(f"{role} names an instance with {name} {ids!r}; they are a sequence of whole "
                              "numbers, 0 or more")


def convert(data: Mapping[str, Any], kind: type[T], where: str) -> T:
    """``data`` as a ``kind``; a :class:`ConfigError` that names ``where`` for anything off."""
    try:
        # JSON and TOML have no keys but texts: token ids are written so.
        return msgspec.convert(dict(data), kind, dec_hook=_path_of, str_keys=True)
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
