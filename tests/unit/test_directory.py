"""How the KV-cache passes between instances, by where their ranks are."""

from __future__ import annotations

from typing import Any

import pytest
from handover import Ranks

from disagg_mpi.transfer.directory import COPY, MPI, SHARED

SMALL = {"generation_tokens_per_block": 2}
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("one pool for all shapes", {"context": "tp2", "generation": "tp2pp2"}, SHARED),
    ("other block size", {"context": "tp2", **SMALL}, COPY),
    ("other block size, other shape", {"context": "tp2", "generation": "pp2", **SMALL}, COPY),
    ("two hosts", {"hosts": [0, 0, 2]}, MPI),
    ("no shared memory", {"transport": "mpi"}, MPI),
    ("generation on two hosts", {"generation": "tp2", "hosts": [0, 0, 0, 3]}, MPI),
    ("context on two hosts", {"context": "tp2", "hosts": [0, 0, 2, 0]}, MPI),
    # Stage by stage on the same two hosts: each rank has all that it needs at home.
    ("both on two hosts", {"context": "pp2", "generation": "pp2", "hosts": [0, 0, 2, 0, 2]}, COPY),
    ("both on two hosts, crosswise", {"context": "pp2", "generation": "pp2", "hosts": [0, 0, 2, 2, 0]}, MPI),
    ("all of one host beside rank 0's", {"hosts": [0, 1, 1]}, SHARED),
]


@pytest.mark.parametrize(("options", "way"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_the_dearest_pair_of_ranks_decides(options: dict[str, Any], way: str) -> None:
    directory = Ranks(**options).directory
    assert directory.way(0, 1) == way
    assert directory.is_exchange(0, 1) == directory.is_exchange(1, 0) == (way == SHARED)


def test_each_pair_of_ranks_has_its_way() -> None:
    directory = Ranks(context="tp2", hosts=[0, 0, 2, 0]).directory
    assert [directory.pair_way(rank, 3) for rank in (1, 2)] == [COPY, MPI]
    directory = Ranks(context="tp2", transport="mpi").directory
    assert [directory.pair_way(rank, 3) for rank in (1, 2)] == [MPI, MPI]


def test_leaders_and_parts() -> None:
    ranks = Ranks("tp2,1", "pp2", context_participant_ids="5,2;1")
    directory = ranks.directory
    assert [directory.leader(instance) for instance in range(3)] == [5, 1, 3]
    assert [(part.source, part.target) for part in directory.parts(0, 2)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [(part.source, part.target) for part in directory.parts(2, 1)] == [(0, 0), (1, 0)]
    assert directory.parts(0, 2) is directory.parts(0, 2), "worked out once"


def test_arrays_alike_in_other_memory_are_other_pools() -> None:
    """Two hosts, laid out alike."""
    ranks = Ranks("1,1", "1,1", hosts=[0, 0, 1, 0, 1])
    views = ranks.views
    assert (views[1].offset, views[1].layout) == (views[2].offset, views[2].layout)
    assert [[ranks.directory.way(source, target) for target in (2, 3)] for source in (0, 1)] == [
        [SHARED, MPI], [MPI, SHARED]]


def test_arrays_alike_in_one_memory_are_other_pools() -> None:
    """Ranks of two instances that both span hosts have arrays of their own side by side."""
    ranks = Ranks("pp2", "pp2", hosts=[0, 0, 2, 0, 2])
    views = ranks.views
    assert (views[1].memory, views[1].layout) == (views[3].memory, views[3].layout)
    assert not ranks.directory.is_exchange(0, 1)
