"""The map of all ranks as text, with what is wrong marked: part of every error about ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby


def rank_map(groups: Sequence[tuple[str, Sequence[int]]], num_ranks: int,
             marks: Mapping[int, str] | None = None) -> str:
    """A line for each rank, up to ``num_ranks`` or the highest that is named.

    ``groups``: name and ranks of each, the leader first; they may be wrong. A rank that is nobody's or taken
    twice is marked by itself, ``marks`` say what else is wrong with one::

        rank 0   orchestrator
        rank 1   context 0 (leader)
        rank 2   context 0, generation 0   <-- taken twice
        rank 3   -                         <-- nobody's
    """
    marks = marks or {}
    owners: dict[int, list[str]] = {0: ["orchestrator"]}
    leaders: set[int] = set()
    for name, ranks in groups:
        leaders.update(ranks[:1] if len(ranks) > 1 else ())
        for rank in ranks:
            owners.setdefault(rank, []).append(name)
    rows: list[tuple[str, str, str]] = []
    for is_nobodys, run in groupby(range(max(num_ranks, max(owners) + 1)), key=lambda r: r not in owners):
        ranks = list(run)
        if is_nobodys:  # on one line: a slip of the finger may name rank 12345
            label = str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}..{ranks[-1]}"
            rows.append((label, "-", "nobody's"))
            continue
        for rank in ranks:
            what, mark = ", ".join(owners[rank]), marks.get(rank, "")
            if len(owners[rank]) > 1:
                mark = mark or ("the orchestrator's" if rank == 0 else "taken twice")
            elif rank in leaders:
                what += " (leader)"
            rows.append((str(rank), what, mark))
    labels = max(3, *(len(label) for label, _, _ in rows))
    width = max(len(what) for _, what, _ in rows)
    return "\n".join(f"  rank {label:<{labels}} {what:<{width}}   <-- {mark}" if mark else
                     f"  rank {label:<{labels}} {what}" for label, what, mark in rows)
