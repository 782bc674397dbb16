"""``gpt_model_path`` and ``tokenizer_dir`` → the model that is loaded.

To Triton ``gpt_model_path`` is an engine that TensorRT-LLM built. Here it is a directory with a model of
Hugging Face's, a GGUF file or a hub id. A repository that serves with Triton already names such a model too:
``tokenizer_dir`` of preprocessing. So an engine gives its tp and pp, and the weights are looked for there;
where nothing is set it is the default model. With ``--engine tensorrt_llm`` the engine itself is run. Nothing
is loaded here, but every path is looked at.
"""

from __future__ import annotations

import filecmp
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from disagg_mpi.errors import ConfigError, ModelError
from disagg_mpi.frontend.triton.parameters import Parameters
from disagg_mpi.model.checkpoint import check_model_directory, read_json_object
from disagg_mpi.model.resolve import DEFAULT

_PATH, _TOKENIZER = "gpt_model_path", "tokenizer_dir"
_NEEDED = ("needed is a directory with a Hugging Face model (to this engine gpt_model_path is not an engine "
           "of TensorRT-LLM), a .gguf file, a hub id, or nothing for the default model")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
# A name with at most one slash that is no folder here may be one of the hub's.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class EngineShape:
    """What an engine of TensorRT-LLM was built for."""

    folder: Path
    tp: int
    pp: int


@dataclass(frozen=True)
class Location:
    """Where the one model of a job is."""

    model: str | None
    """As ``--model`` takes it; ``None``: the default model."""
    engines: dict[str, EngineShape]
    """Name of a model of the repository → the engine that it names."""
    remarks: tuple[str, ...] = ()


def locate(models: Sequence[Parameters], processing: Sequence[Parameters]) -> Location:
    """The model of a job. ``models`` have ranks, ``processing`` are pre- and postprocessing.

    Raises :class:`ConfigError` or :class:`ModelError`, with file and line, for a path that is not there or
    holds no model, and for two models or tokenizers in one job.
    """
    engines, named = _named_models(models)
    tokenizers = [(model, value) for model in (*models, *processing)
                  if (value := model.text(_TOKENIZER)) is not None and value != DEFAULT]
    for model, value in tokenizers:
        _must_exist(model, _TOKENIZER, value)
    if named is not None:
        found = named
    elif tokenizers:
        found = _checked(tokenizers[0][0], _TOKENIZER, tokenizers[0][1])
    elif engines:
        folder = next(iter(engines.values())).folder
        raise ConfigError(f"{folder} is an engine of TensorRT-LLM, which nothing else can load; set "
                          f"{_PATH} of {' and '.join(engines)} to a Hugging Face directory of the same "
                          f"model, or {_TOKENIZER} of preprocessing to it")
    else:
        return Location(None, engines)
    remarks = [f"{name}: {_PATH} is an engine of TensorRT-LLM; the weights are those of {found}"
               for name in engines]
    for model, value in tokenizers:
        remarks += _check_tokenizer(model, value, found)
    return Location(found, engines, tuple(remarks))


def locate_engines(models: Sequence[Parameters], processing: Sequence[Parameters]) -> Location:
    """For ``--engine tensorrt_llm``: ``gpt_model_path`` is the engine that it runs, ``tokenizer_dir`` what it
    takes for ``model``. Raises as :func:`locate`."""
    engines: dict[str, EngineShape] = {}
    for model in models:
        value = model.text(_PATH)
        if value is None or value == DEFAULT:
            continue  # it may be given elsewhere
        engine = _engine(model, value)
        if engine is None:
            raise model.error(_PATH, "found no engine of TensorRT-LLM there (a directory with its "
                                     "config.json), which --engine tensorrt_llm needs")
        engines[model.file.name] = engine
    for model in (*models, *processing):
        value = model.text(_TOKENIZER)
        if value is not None and value != DEFAULT:
            return Location(value, engines)
    return Location(None, engines)


def _named_models(models: Sequence[Parameters]) -> tuple[dict[str, EngineShape], str | None]:
    """What the models' paths name: engines, and the one Hugging Face model if there is one."""
    engines: dict[str, EngineShape] = {}
    named: list[tuple[Parameters, str]] = []
    for model in models:
        value = model.text(_PATH)
        if value is None or value == DEFAULT:
            continue
        engine = _engine(model, value)
        if engine is not None:
            engines[model.file.name] = engine
        else:
            named.append((model, _checked(model, _PATH, value)))
    for model, value in named[1:]:
        first, other = named[0]
        if not _same(value, other):
            raise ConfigError(f"{model.place(_PATH)}: {_PATH} is {value!r}, but {other!r} on "
                              f"{first.place(_PATH)}; one job serves one model: name the same in both")
    return engines, named[0][1] if named else None


def _engine(model: Parameters, value: str) -> EngineShape | None:
    """The engine at ``value``; ``None`` where there is something else, or nothing."""
    folder = Path(value).expanduser()
    config = folder / "config.json"
    if not config.is_file():
        if folder.is_dir() and any(folder.glob("*.engine")):
            raise ConfigError(f"{model.place(_PATH)}: {folder} has an engine of TensorRT-LLM but no "
                              "config.json that says its tp and pp; name a Hugging Face directory of the "
                              "model instead")
        return None
    data = read_json_object(config)
    built = data.get("pretrained_config", data.get("builder_config"))
    if not isinstance(built, dict):
        return None
    # Since 0.8 a mapping inside pretrained_config; before, two numbers of the builder's.
    mapping = built.get("mapping")
    sizes = [mapping.get("tp_size", 1), mapping.get("pp_size", 1)] if isinstance(mapping, dict) else \
        [built.get("tensor_parallel", 1), built.get("pipeline_parallel", 1)]
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ModelError(f"{config}: found tp {sizes[0]!r} and pp {sizes[1]!r} of an engine, needed whole "
                         "numbers above 0")
    return EngineShape(folder, *sizes)


def _checked(model: Parameters, name: str, value: str) -> str:
    """``value`` as ``--model`` takes it, after a look at what is there."""
    _must_exist(model, name, value)
    path = Path(value).expanduser()
    if path.is_dir():
        try:
            check_model_directory(path)
        except ModelError as error:
            raise ModelError(f"{model.place(name)}: {name} is {value!r}, which is not a whole model: "
                             f"{error}") from None
    elif path.exists() and path.suffix != ".gguf":
        raise model.error(name, f"found a file there; {_NEEDED}")
    return str(path.absolute()) if path.exists() else value


def _must_exist(model: Parameters, name: str, value: str) -> None:
    path = Path(value).expanduser()
    is_hub_id = _HUB_ID.fullmatch(value) is not None and not path.parent.exists()
    if not path.exists() and not is_hub_id:
        raise model.error(name, f"found nothing there; {_NEEDED}")


def _check_tokenizer(model: Parameters, value: str, found: str) -> list[str]:
    """Text must become the tokens that the configuration means; remarks where that cannot be seen."""
    if _same(value, found):
        return []
    own, asked = Path(found), Path(value).expanduser()
    for name in _TOKENIZER_FILES:
        if not ((own / name).is_file() and (asked / name).is_file()):
            continue
        if filecmp.cmp(own / name, asked / name, shallow=False):
            return []
        raise ConfigError(f"{model.place(_TOKENIZER)}: {asked / name} is not the model's own tokenizer, "
                          f"{own / name}, which this engine uses; name {found} here, or nothing")
    return [f"{model.file.name}: {_TOKENIZER} {value} is not used; the tokenizer is that of {found}"]


def _same(one: str, other: str) -> bool:
    paths = [Path(value).expanduser() for value in (one, other)]
    return one == other or (all(path.exists() for path in paths) and paths[0].samefile(paths[1]))
