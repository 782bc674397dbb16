"""Which rank holds which part of a KV-cache, and who sends what to whom: pure arithmetic.

Every rank knows the shapes of all instances from the start, so each works out the parts of a hand-over by
itself: a pull needs no message that describes them.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec


class KvShard(msgspec.Struct, frozen=True, array_like=True):
    """The part of a model's KV-cache that one rank holds, in the model's own numbering."""

    first_layer: int
    num_layers: int
    first_head: int
    """KV heads, here and below: there may be more query heads."""
    num_heads: int

    @property
    def end_layer(self) -> int:
        return self.first_layer + self.num_layers

    @property
    def end_head(self) -> int:
        return self.first_head + self.num_heads

    def overlap(self, other: KvShard) -> KvShard | None:
        """What both hold, ``None`` if nothing."""
        first_layer = max(self.first_layer, other.first_layer)
        first_head = max(self.first_head, other.first_head)
        num_layers = min(self.end_layer, other.end_layer) - first_layer
        num_heads = min(self.end_head, other.end_head) - first_head
        if num_layers <= 0 or num_heads <= 0:
            return None
        return KvShard(first_layer, num_layers, first_head, num_heads)


class Part(msgspec.Struct, frozen=True, array_like=True):
    """What one rank sends to another: layers and heads in the model's own numbering."""

    source: int
    """Index in the sending group."""
    target: int
    """Index in the receiving group."""
    first_layer: int
    num_layers: int
    first_head: int
    num_heads: int

    @property
    def shard(self) -> KvShard:
        return KvShard(self.first_layer, self.num_layers, self.first_head, self.num_heads)


def shard_of(num_layers: int, num_kv_heads: int, tp: int, pp: int, index: int) -> KvShard:
    """The part that rank ``index`` of a ``tp`` x ``pp`` group holds.

    Stage ``s`` has the layers ``[L*s//pp, L*(s+1)//pp)``. Its ranks share the KV heads evenly; where there
    are more ranks than heads, ``tp/H`` neighbours hold the same one, as they also share its query heads.
    Raises :class:`ValueError` if heads or layers cannot be divided so.
    """
    if num_kv_heads % tp and tp % num_kv_heads:
        raise ValueError(f"{num_kv_heads} KV heads on tp={tp} ranks: one must be a multiple of the other")
    if pp > num_layers:
        raise ValueError(f"{num_layers} layers on pp={pp} stages: a stage needs at least one")
    if not 0 <= index < tp * pp:
        raise ValueError(f"rank {index} of a group of {tp * pp} (tp={tp}, pp={pp})")
    pp_rank, tp_rank = divmod(index, tp)
    first_layer = num_layers * pp_rank // pp
    end_layer = num_layers * (pp_rank + 1) // pp
    return KvShard(first_layer, end_layer - first_layer,
                   tp_rank * num_kv_heads // tp, max(1, num_kv_heads // tp))


def partition(sources: Sequence[KvShard], targets: Sequence[KvShard]) -> list[Part]:
    """Who sends what to whom, so that each target gets every layer and head of its shard once.

    Sorted by target, then source; at most one part a pair. Sources that hold the same shard take turns:
    the targets that need some of it are dealt out to them in order. Raises :class:`ValueError` if the
    sources do not hold all that a target needs, or if two hold shards that overlap without being equal.
    """
    holders: dict[KvShard, list[int]] = {}
    for source, shard in enumerate(sources):
        holders.setdefault(shard, []).append(source)
    shards = list(holders)
    for at, shard in enumerate(shards):
        for other in shards[:at]:
            if shard.overlap(other) is not None:
                raise ValueError(f"sources hold {other} and {shard}: they must be equal or apart")
    turns = dict.fromkeys(shards, 0)
    parts: list[Part] = []
    for target, wanted in enumerate(targets):
        found = []
        for shard, ranks in holders.items():
            common = wanted.overlap(shard)
            if common is not None:
                source = ranks[turns[shard] % len(ranks)]
                turns[shard] += 1
                found.append(Part(source, target, common.first_layer, common.num_layers,
                                  common.first_head, common.num_heads))
        if sum(p.num_layers * p.num_heads for p in found) != wanted.num_layers * wanted.num_heads:
            raise ValueError(f"target {target} needs {wanted}; the sources hold only {shards}")
        parts += sorted(found, key=lambda part: part.source)
    return parts
