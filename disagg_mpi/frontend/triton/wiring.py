"""Which model of a repository does what.

The ensemble's steps name the model between preprocessing and postprocessing. That is the BLS, whose
parameters name the context and the generation model, or, without a BLS, a language model that does both
phases. Only the configuration says so: names are free, and a model that nobody names is not served.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from disagg_mpi.errors import ConfigError
from disagg_mpi.frontend.triton.parameters import Parameters
from disagg_mpi.frontend.triton.pbtxt import ConfigFile
from disagg_mpi.frontend.triton.repository import EXAMPLE, Repository

if TYPE_CHECKING:
    from tritonclient.grpc.model_config_pb2 import ModelEnsembling

# What the guide calls its models, for where a template leaves a name open and where there is a choice.
_CONTEXT, _GENERATION, _ENSEMBLE, _COPIED_FROM = "context", "generation", "ensemble", "tensorrt_llm"


class Kind(StrEnum):
    """What a model does. The first three are instances of ranks, the others rank 0's work."""

    CONTEXT = "context"
    GENERATION = "generation"
    AGGREGATED = "aggregated"
    """Does both phases: ``tensorrt_llm``."""
    BLS = "bls"
    ENSEMBLE = "ensemble"
    PREPROCESSING = "preprocessing"
    POSTPROCESSING = "postprocessing"

    @property
    def has_ranks(self) -> bool:
        return self in (Kind.CONTEXT, Kind.GENERATION, Kind.AGGREGATED)


@dataclass(frozen=True)
class Wiring:
    """The models that are served, by what they do, and the others."""

    models: Mapping[Kind, Parameters]
    others: tuple[str, ...]
    """Names of models that nothing leads to."""

    @property
    def ensemble(self) -> ConfigFile:
        return self.models[Kind.ENSEMBLE].file

    @property
    def core(self) -> ConfigFile:
        """The model that the ensemble calls between preprocessing and postprocessing."""
        return (self.models.get(Kind.BLS) or self.models[Kind.AGGREGATED]).file

    def kind_of(self, name: str) -> Kind | None:
        """What the model ``name`` does."""
        return next((kind for kind, model in self.models.items() if model.file.name == name), None)


def wire(repository: Repository) -> Wiring:
    """Find out what each model does. Raises :class:`ConfigError`, with the line to change if there is one."""
    ensemble = _find_ensemble(repository)
    bls = _find_bls(repository)
    models: dict[Kind, Parameters] = {}
    if bls is not None:
        models |= _phases(repository, bls)
        models[Kind.BLS] = bls
        core = bls.file
        _check_leads_to_bls(repository, ensemble, core)
    else:
        core = _find_language_model(repository, ensemble)
        models[Kind.AGGREGATED] = Parameters(core)
    models[Kind.ENSEMBLE] = Parameters(ensemble)
    models |= _processing(repository, ensemble, core)
    named = {model.file.name for model in models.values()}
    return Wiring(models, tuple(name for name in repository.files if name not in named))


def step_place(ensemble: ConfigFile, model: str) -> str:
    """The file and the line where a step of ``ensemble`` names ``model``."""
    return ensemble.place(rf'(?<!\w)model_name\s*:\s*["\']{re.escape(model)}["\']')


def _find_ensemble(repository: Repository) -> ConfigFile:
    found = [file for file in repository.files.values()
             if file.config.platform == "ensemble" or file.config.HasField("ensemble_scheduling")]
    if not found:
        raise ConfigError(f"{repository.folder} has no ensemble, the model that clients send text to; needed "
                          f'is one with platform: "ensemble" and steps ({EXAMPLE}). Its models are: '
                          + ", ".join(repository.files))
    ensemble = next((file for file in found if file.name == _ENSEMBLE), found[0])
    if not _scheduling(ensemble).step:
        raise ConfigError(f"{ensemble.path}: the ensemble has no steps; needed is ensemble_scheduling with a "
                          f"step for each model ({EXAMPLE})")
    return ensemble


def _find_bls(repository: Repository) -> Parameters | None:
    found = [file for file in repository.files.values()
             if {"context_model_name", "generation_model_name"} & set(file.config.parameters)]
    if len(found) > 1:
        raise ConfigError(f"{found[0].path} and {found[1].path} both name context and generation models; "
                          "one job serves one of them: take the other folder out")
    return Parameters(found[0]) if found else None


def _phases(repository: Repository, bls: Parameters) -> dict[Kind, Parameters]:
    """The two models that the BLS leads the phases of."""
    names: dict[Kind, str] = {}
    for kind, usual in ((Kind.CONTEXT, _CONTEXT), (Kind.GENERATION, _GENERATION)):
        parameter = f"{kind}_model_name"
        name = bls.text(parameter)
        if name is None and usual not in repository.files:
            where = bls.place(parameter)
            raise ConfigError(f"{where}: {parameter} is not set and {repository.folder} has no "
                              f"model {usual!r}; set it to one of: {', '.join(repository.files)}")
        names[kind] = name or usual
    context, generation = names.values()
    if context == generation:
        raise ConfigError(f"{bls.place('generation_model_name')}: context and generation are the same model, "
                          f"{context!r}; needed are two, each a copy of tensorrt_llm with ids of its own")
    return {kind: Parameters(repository.get(name, f"{bls.place(f'{kind}_model_name')}: {kind}_model_name"))
            for kind, name in names.items()}


def _check_leads_to_bls(repository: Repository, ensemble: ConfigFile, bls: ConfigFile) -> None:
    """The guide's step 6: the ensemble's ``tensorrt_llm`` is renamed."""
    names = [step.model_name for step in _scheduling(ensemble).step]
    if bls.name in names:
        return
    suspects = [name for name in names if name == _COPIED_FROM or name not in repository.files
                or _is_language_model(repository.files[name])]
    name = suspects[0] if suspects else names[len(names) // 2]
    raise ConfigError(f'{step_place(ensemble, name)}: the ensemble calls "{name}", not the BLS, so that '
                      f'context and generation would never be asked; write model_name: "{bls.name}"')


def _find_language_model(repository: Repository, ensemble: ConfigFile) -> ConfigFile:
    """Without a BLS: the one model that the ensemble calls for tokens."""
    for step in _scheduling(ensemble).step:
        if step.model_name in repository.files and _is_language_model(repository.files[step.model_name]):
            return repository.files[step.model_name]
    phases = [file.name for file in repository.files.values() if _is_language_model(file)]
    advice = ("let one name tensorrt_llm, or disaggregated_serving_bls with a context and a generation model"
              if len(phases) < 2 else f"to serve {' and '.join(phases)} add disaggregated_serving_bls, which "
              "leads them, and let a step of the ensemble name it")
    raise ConfigError(f"{ensemble.path}: no step of the ensemble names a language model; {advice} "
                      f"({EXAMPLE})")


def _is_language_model(file: ConfigFile) -> bool:
    parameters = file.config.parameters
    # preprocessing has a gpt_model_path too, for models that see images.
    return file.config.backend == "tensorrtllm" or (
        "gpt_model_path" in parameters and "max_num_images" not in parameters)


def _processing(repository: Repository, ensemble: ConfigFile, core: ConfigFile) -> dict[Kind, Parameters]:
    """The models before and after ``core``: the one that it has tensors from, and the one that has its."""
    steps = _scheduling(ensemble).step
    core_step = next(step for step in steps if step.model_name == core.name)
    taken, given = set(core_step.input_map.values()), set(core_step.output_map.values())
    found: dict[Kind, Parameters] = {}
    for step in steps:
        if step.model_name == core.name:
            continue
        where = step_place(ensemble, step.model_name)
        file = repository.get(step.model_name, f"{where}: a step of the ensemble")
        kind = Kind.PREPROCESSING if taken & set(step.output_map.values()) else \
            Kind.POSTPROCESSING if given & set(step.input_map.values()) else None
        if kind is None or kind in found:
            raise ConfigError(f"{where}: {file.name!r} is neither the step before {core.name!r} nor the one "
                              "after it; needed are a step that turns text into tokens, one that generates, "
                              "and one that turns tokens into text")
        found[kind] = Parameters(file)
    missing = [kind for kind in (Kind.PREPROCESSING, Kind.POSTPROCESSING) if kind not in found]
    if missing:
        raise ConfigError(f"{ensemble.path}: the ensemble has no step for {missing[0]}; needed are "
                          f"preprocessing, {core.name} and postprocessing ({EXAMPLE})")
    return found


def _scheduling(ensemble: ConfigFile) -> ModelEnsembling:
    return ensemble.config.ensemble_scheduling


def steps_of(ensemble: ConfigFile) -> Iterator[tuple[str, Mapping[str, str], Mapping[str, str]]]:
    """Of each step the model, and the maps from the model's tensors to the ensemble's, in and out."""
    for step in _scheduling(ensemble).step:
        yield step.model_name, step.input_map, step.output_map
