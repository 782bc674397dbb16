"""Shapes of instances and lists of ids, as people type them: pure text and plain data.

``2xtp3,tp1pp2`` is two copies of the model on three ranks each and one on two; ``1,2;3,4`` is a group of
ids for each of two copies. Whether shapes, ids and ranks fit together is the topology's to say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby

import msgspec

from disagg_mpi.errors import ConfigError

# Ranks of a role, at most: a number above is a slip of the finger, and would cost memory before MPI
# could say so.
MAX_RANKS = 2**16

_NUMBER = "[1-9][0-9]{0,5}"
_TERM = re.compile(f"(?:(?P<copies>{_NUMBER})x)?"
                   f"(?:tp(?P<tp>{_NUMBER})(?:pp(?P<pp>{_NUMBER}))?|pp(?P<only_pp>{_NUMBER}))"
                   f"|(?P<plain>{_NUMBER})")
_ID = re.compile("[0-9]{1,6}")


class Instance(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One copy of the model: ``tp * pp`` ranks, ``tp`` in each of ``pp`` pipeline stages.

    As text ``tp2`` or ``tp1pp2``, which :func:`parse_instances` reads.
    """

    tp: int = 1
    """Ranks that share each layer, by attention heads."""
    pp: int = 1
    """Stages, each with a part of the layers."""
    participant_ids: tuple[int, ...] | None = None
    """Its ranks in the MPI world, the leader first, then stage by stage; ``None``: free ranks in order."""
    device_ids: tuple[int, ...] | None = None
    """A device for each of its ranks, in the same order."""

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"tp{self.tp}pp{self.pp}" if self.pp > 1 else f"tp{self.tp}"


def parse_instances(text: str, name: str = "shape") -> tuple[Instance, ...]:
    """The instances that ``text`` asks for; none for ``"0"``.

    A number is so many copies on one rank each; ``tp2``, ``pp2`` or ``tp2pp3`` is one copy of that shape;
    ``2xtp3`` two copies; terms are joined by commas. Raises :class:`ConfigError`, which calls the text
    ``name``.
    """
    if text.strip() == "0":
        return ()
    found: list[Instance] = []
    num_ranks = 0
    for term in text.split(","):
        match = _TERM.fullmatch(term.strip().lower())
        if match is None:
            which = "" if term == text else f", with {term.strip()!r}"
            raise ConfigError(f"{name} is {text!r}{which}; needed is a number of copies, as 2, or shapes: "
                              "tp2, pp2, tp2pp3, 2xtp3 for two copies, a comma between different ones: "
                              "2xtp3,tp1pp2")
        shape = Instance(int(match["tp"] or 1), int(match["pp"] or match["only_pp"] or 1))
        copies = int(match["copies"] or match["plain"] or 1)
        num_ranks += copies * shape.num_ranks
        check_num_ranks(num_ranks, name)
        found += [shape] * copies
    return tuple(found)


def format_instances(instances: Sequence[Instance]) -> str:
    """``2xtp3,tp1pp2``: the inverse of :func:`parse_instances`, but for ids."""
    terms = [(len(list(run)), shape) for shape, run in groupby(instances, key=str)]
    return ",".join(shape if count == 1 else f"{count}x{shape}" for count, shape in terms) or "0"


def parse_ids(text: str, name: str) -> tuple[tuple[int, ...], ...]:
    """``"1,2;3,4"`` as ``((1, 2), (3, 4))``; :class:`ConfigError`, which calls the text ``name``."""
    groups = [[part.strip() for part in group.split(",")] for group in text.split(";")]
    if not all(_ID.fullmatch(part) for group in groups for part in group):
        raise ConfigError(f"{name} is {text!r}; needed are whole numbers, a comma between those of one copy "
                          'and a semicolon between copies, as "1,2;3,4"')
    return tuple(tuple(map(int, group)) for group in groups)


def format_ids(groups: Sequence[Sequence[int]]) -> str:
    """``1,2;3,4``: the inverse of :func:`parse_ids`."""
    return ";".join(",".join(map(str, group)) for group in groups)


def check_num_ranks(count: int, name: str) -> None:
    """Raise :class:`ConfigError` for more ranks than any job could have."""
    if count > MAX_RANKS:
        raise ConfigError(f"{name} asks for {count} ranks; {MAX_RANKS} at most can be had")
