"""A model repository → everything that ``serve`` must know of it.

:func:`plan_of` reads, checks and decides; it starts nothing, and the :class:`ServePlan` that it returns never
changes. What the user types beside ``--model-repository`` wins over what the repository says. This engine has
one value for some things that context and generation may each say: the larger holds, and is told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from disagg_mpi.config import IdKind, Instance, JobConfig, convert, role_keys
from disagg_mpi.errors import ConfigError, LayoutError
from disagg_mpi.frontend.triton.location import EngineShape, locate, locate_engines
from disagg_mpi.frontend.triton.parameters import Parameters
from disagg_mpi.frontend.triton.placement import num_copies, place
from disagg_mpi.frontend.triton.repository import has_code, read_repository, version_of
from disagg_mpi.frontend.triton.tensors import TensorNames, tensor_names
from disagg_mpi.frontend.triton.wiring import Kind, Wiring, wire
from disagg_mpi.topology import Topology, build_topology

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelConfig

V = TypeVar("V", bool, int)

# What this engine always does: where a parameter says the same, it is not worth a word.
_ALWAYS_SO = {
    "gpt_model_type": ("inflight_fused_batching", "inflight_batching"),
    "max_beam_width": ("1",),
    "enable_chunked_context": ("true", "1"),
    "decoding_mode": ("auto", "top_k", "top_p", "top_k_top_p"),
    "add_special_tokens": ("true", "1"),
    "skip_special_tokens": ("true", "1"),
}
_WHY = {
    "gpt_model_type": "requests are always batched in flight",
    "max_beam_width": "there is no beam search",
    "enable_chunked_context": "a prompt beyond --max-num-tokens is always computed in chunks",
    "dynamic_batching": "requests join a running batch at once",
}
_USED_FIELDS = {
    "name", "platform", "backend", "max_batch_size", "input", "output", "ensemble_scheduling",
    "instance_group", "parameters", "model_transaction_policy",
}
_PARAMETER_OF: dict[IdKind, str] = {"participant": "participant_ids", "device": "gpu_device_ids"}
_MAX_VALUE = 40


@dataclass(frozen=True)
class RepositoryModel:
    """A model that clients see."""

    name: str
    kind: Kind
    version: str
    config: ModelConfig
    """As the file has it; name and batch size are filled in where the file leaves them open."""


@dataclass(frozen=True)
class ServePlan:
    """A repository as a job and the names that its clients use."""

    repository: Path
    job: JobConfig
    models: tuple[RepositoryModel, ...]
    """The ensemble first, then its steps in order, then context and generation."""
    tensors: TensorNames
    exclude_input_in_output: bool
    """Whether a text comes back without its prompt where a request does not say."""
    unused: Mapping[str, tuple[str, ...]]
    """Name of a model → what its file says and this engine does not use."""
    remarks: tuple[str, ...]
    """What else the user should know, a line each."""

    def model(self, kind: Kind) -> RepositoryModel | None:
        """The model that does ``kind``; ``None`` where the repository has none."""
        return next((model for model in self.models if model.kind is kind), None)

    @property
    def topology(self) -> Topology:
        """Which rank does what; checked already."""
        return build_topology(self.job)

    def lines(self) -> list[str]:
        """All that is to be said once at the start, by rank 0."""
        said = [f"model repository {self.repository}: " + " → ".join(
            model.name for model in self.models if not model.kind.has_ranks or model.kind is Kind.AGGREGATED)]
        if self.model(Kind.BLS) is not None:
            said[0] += "; " + ", ".join(f"{model.kind} is {model.name}" for model in self.models
                                        if model.kind.has_ranks)
        names: dict[tuple[str, ...], list[str]] = {}
        for name, what in self.unused.items():  # copies of one model mostly say the same
            names.setdefault(what, []).append(name)
        said += [f"not used, of {' and '.join(of)}: {', '.join(what)}" for what, of in names.items()]
        return [*said, *self.remarks]


def plan_of(repository: Path, given: Mapping[str, Any] | None = None) -> ServePlan:
    """Read ``repository``, which every rank must see, and say what job it asks for.

    ``given``: keys of :class:`JobConfig` that the user set elsewhere; they win. Raises :class:`ConfigError`,
    :class:`LayoutError` or :class:`ModelError`, with file and line wherever one is to be changed.
    """
    given = dict(given or {})
    found = read_repository(repository)
    wiring = wire(found)
    tensors = tensor_names(wiring)
    remarks: list[str] = []
    table: dict[str, Any] = {}
    engines = _find_weights(wiring, given, table, remarks)
    ranked = {kind: model for kind, model in wiring.models.items() if kind.has_ranks}
    for kind, model in ranked.items():
        table |= _role_keys(kind, model, engines.get(model.file.name), given)
    if given.get("engine", "torch") == "torch" and any(role_keys(kind.value)[-1] in table for kind in ranked):
        table["device"] = "auto"  # whoever names devices means them, where there are any
    _limits(ranked, table, remarks)
    exclude = _larger("exclude_input_in_output", ranked,
                      lambda model: model.flag("exclude_input_in_output"), remarks)
    job = _job({**table, **given}, ranked, repository)
    remarks += _other_remarks(wiring)
    # Parameters count as used when they were asked for, so this comes last.
    unused = {model.file.name: what for kind, model in wiring.models.items()
              if (what := _unused(kind, model))}
    return ServePlan(repository, job, _models(wiring, job), tensors, bool(exclude), unused, tuple(remarks))


# ---- what the repository says of the job ----


def _find_weights(wiring: Wiring, given: Mapping[str, Any], table: dict[str, Any],
                  remarks: list[str]) -> dict[str, EngineShape]:
    """Set ``model`` in ``table``, unless it is given; the engines that models name."""
    ranked = [model for kind, model in wiring.models.items() if kind.has_ranks]
    processing = [wiring.models[Kind.PREPROCESSING], wiring.models[Kind.POSTPROCESSING]]
    if given.get("engine") == "tensorrt_llm":
        location = locate_engines(ranked, processing)
        table["model"] = location.model
        table |= {f"{kind.value}_engine_dir": str(location.engines[model.file.name].folder)
                  for kind, model in wiring.models.items() if model.file.name in location.engines}
        return location.engines
    if "model" in given:
        return {}
    location = locate(ranked, processing)
    remarks += location.remarks
    table["model"] = location.model
    return location.engines


def _role_keys(kind: Kind, model: Parameters, engine: EngineShape | None,
               given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of :class:`JobConfig` that shape the instances of ``model``."""
    keys = role_keys(kind.value)
    values: tuple[tuple[Instance, ...] | None, str | None, str | None]
    if set(keys) & set(given):  # typed ranks win as they are: only other ids are the repository's
        values = (None, model.text("participant_ids"), model.text("gpu_device_ids"))
    else:
        placement = place(model, engine)
        values = (placement.shapes, placement.participant_ids, placement.device_ids)
    return {key: value for key, value in zip(keys, values, strict=True) if value is not None}


def _limits(ranked: Mapping[Kind, Parameters], table: dict[str, Any], remarks: list[str]) -> None:
    """Set sizes in ``table``."""
    limits = {
        "max_batch_size": _larger("max_batch_size", ranked, _max_batch_size, remarks),
        "kv_tokens": _larger("max_tokens_in_paged_kv_cache", ranked,
                             lambda model: model.positive("max_tokens_in_paged_kv_cache"), remarks),
        "prefix_cache": _larger("enable_kv_cache_reuse", ranked,
                                lambda model: model.flag("enable_kv_cache_reuse"), remarks),
    }
    table |= {key: value for key, value in limits.items() if value is not None}


def _larger(name: str, ranked: Mapping[Kind, Parameters], read: Callable[[Parameters], V | None],
            remarks: list[str]) -> V | None:
    """The larger of what the models say; a remark where they do not say the same."""
    said = {model.file.name: value for model in ranked.values() if (value := read(model)) is not None}
    if not said:
        return None
    largest = max(said.values())
    if len(set(said.values())) > 1:
        values = " and ".join(f"{value} of {model}" for model, value in said.items())
        remarks.append(f"{name} is {values}: this engine has one for both, {largest}")
    return largest


def _max_batch_size(model: Parameters) -> int | None:
    size = model.file.config.max_batch_size
    if size < 0:
        where = model.file.place(r"(?<!\w)max_batch_size\s*:")
        raise ConfigError(f"{where}: max_batch_size is {size}; needed is a number of requests, 1 or more")
    return size or None


def _job(table: Mapping[str, Any], ranked: Mapping[Kind, Parameters], repository: Path) -> JobConfig:
    """The job, with its ranks checked; faults in them are told in the words of ``config.pbtxt``."""
    job = convert(table, JobConfig, str(repository))
    try:
        build_topology(job)
    except LayoutError as error:
        raise type(error)(f"{repository}: {_in_their_words(str(error), ranked)}") from None
    return job


def _in_their_words(text: str, ranked: Mapping[Kind, Parameters]) -> str:
    """Options for ids, as the topology's errors name them, as parameters of the models."""
    for kind, model in ranked.items():
        for id_kind, parameter in _PARAMETER_OF.items():
            option = f"--{kind}-{id_kind}-ids"
            text = text.replace(f'{option} "', f'{model.file.short} {parameter} "')
            text = text.replace(option, f"{parameter} of {model.file.short}")
    return text


# ---- what is said and not used ----


def _unused(kind: Kind, model: Parameters) -> tuple[str, ...]:
    for name, values in _ALWAYS_SO.items():
        model.is_default(name, *values)
    found = [(name, f"{name}={value if len(value) <= _MAX_VALUE else value[:_MAX_VALUE] + '…'}")
             for name, value in model.unused().items()]
    found += [(field.name, field.name) for field, _ in model.file.config.ListFields()
              if field.name not in _USED_FIELDS]
    if any(group.gpus for group in model.file.config.instance_group):
        found.append(("gpus", "gpus of instance_group"))
    if not kind.has_ranks and num_copies(model) > 1:
        found.append(("count", f"count={num_copies(model)} of instance_group"))
    return tuple(text + (f" ({_WHY[name]})" if name in _WHY else "") for name, text in found)


def _other_remarks(wiring: Wiring) -> list[str]:
    remarks = [f"{model.file.path} has {name} on lines {' and '.join(map(str, lines))}; the last one holds"
               for model in wiring.models.values() for name, lines in model.repeated().items()]
    programs = [model.file.name for model in wiring.models.values() if has_code(model.file)]
    if programs:
        remarks.append(f"model.py is not run, of {', '.join(programs)}: rank 0 does what Triton's own do")
    if wiring.others:
        remarks.append(f"not served: {', '.join(wiring.others)} (no step of {wiring.ensemble.name} leads "
                       "there)")
    return remarks


# ---- what clients see ----


def _models(wiring: Wiring, job: JobConfig) -> tuple[RepositoryModel, ...]:
    order = (Kind.ENSEMBLE, Kind.PREPROCESSING, Kind.BLS, Kind.AGGREGATED, Kind.POSTPROCESSING, Kind.CONTEXT,
             Kind.GENERATION)
    found = []
    for kind in order:
        if kind not in wiring.models:
            continue
        file = wiring.models[kind].file
        config = type(file.config)()
        config.CopyFrom(file.config)
        config.name = file.name
        # 0 would tell clients that tensors have no batch dimension; here they always do.
        config.max_batch_size = config.max_batch_size or job.max_batch_size
        found.append(RepositoryModel(file.name, kind, version_of(file), config))
    return tuple(found)
