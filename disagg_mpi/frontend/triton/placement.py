"""Participant ids, device ids and copies of a model → instances.

Triton's configuration knows ranks, not shapes: an instance has as many ranks as its group of ids. How many of
these are pipeline stages stands elsewhere, and is looked for in this order: shapes in the options of
``serve`` (``--context tp2pp2``; those never come here), the parameter ``pipeline_parallel_size`` of
``config.pbtxt`` (the name that TensorRT-LLM's LLM API has for it), the engine that ``gpt_model_path`` names,
and else 1. Whether ids, copies and the world fit together is the topology's to say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from disagg_mpi.errors import ConfigError, LayoutError
from disagg_mpi.frontend.triton.location import EngineShape
from disagg_mpi.frontend.triton.parameters import Parameters
from disagg_mpi.shapes import MAX_RANKS, Instance, format_ids

Groups = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Placement:
    """The copies of one model."""

    shapes: tuple[Instance, ...]
    """Of each copy, without ids."""
    participant_ids: str | None
    device_ids: str | None


def place(model: Parameters, engine: EngineShape | None) -> Placement:
    """The copies that the configuration of ``model`` asks for; ``engine``: what it was built for, if it names
    one.

    Raises :class:`ConfigError` for values that cannot be, :class:`LayoutError` for ranks that cannot be
    divided into stages or are not as many as the engine needs.
    """
    count = num_copies(model)
    participants, devices = model.ids("participant_ids"), model.ids("gpu_device_ids")
    if devices is not None and len(devices) < count:
        # Copies may share devices: copy i has group i % len. Ranks cannot be shared, so for these it is an
        # error.
        devices = tuple(devices[index % len(devices)] for index in range(count))
    pp = model.positive("pipeline_parallel_size") or (engine.pp if engine else 1)
    groups = participants or devices
    shapes = []
    for index in range(count):
        if groups is None:
            num_ranks = engine.tp * pp if engine else pp
        else:
            num_ranks = len(groups[min(index, len(groups) - 1)])
        shapes.append(_shape(model, num_ranks, pp, engine))
    return Placement(tuple(shapes), _text(participants), _text(devices))


def num_copies(model: Parameters) -> int:
    """The instances of a model: the counts of its instance groups. Raises :class:`ConfigError`."""
    counts = [group.count for group in model.file.config.instance_group]
    if any(not 0 <= count <= MAX_RANKS for count in counts):
        where = model.file.place(r"(?<!\w)count\s*:")
        raise ConfigError(f"{where}: count of instance_group is {max(counts, key=abs)}; needed is a number "
                          f"of copies, 1 to {MAX_RANKS}")
    return sum(count or 1 for count in counts) or 1


def _shape(model: Parameters, num_ranks: int, pp: int, engine: EngineShape | None) -> Instance:
    where = model.place("participant_ids")
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    if num_ranks % pp:
        raise LayoutError(f"{where}: a copy of {model.file.name} has {ranks}, which {pp} pipeline stages "
                          "cannot share evenly; give it a multiple of that many participant ids, or change "
                          "pipeline_parallel_size")
    if engine is not None and num_ranks != engine.tp * engine.pp:
        raise LayoutError(f"{where}: a copy of {model.file.name} has {ranks}, but its engine "
                          f"{engine.folder} was built for {engine.tp * engine.pp} = tp {engine.tp} x pp "
                          f"{engine.pp}; give each copy {engine.tp * engine.pp} participant ids")
    return Instance(tp=num_ranks // pp, pp=pp)


def _text(groups: Sequence[Sequence[int]] | None) -> str | None:
    return None if groups is None else format_ids(groups)
