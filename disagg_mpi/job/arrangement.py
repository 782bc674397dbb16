"""Where every rank's KV-cache lies: pure arithmetic over configuration, model and hosts, equal on every rank.

On each host one shared memory window. Instances that lie wholly on it have their blocks in an *exchange
pool* of the window, an array of the whole model, one for each block size: their ranks read and write their
own layers and heads of it, whatever their shapes, so that block ids can change hands. Ranks of instances
that span hosts have an array of their own part in the window. With the ``mpi`` transport each rank has its
part in private memory.

An instance's ranks use the same block ids; tags of the prefix cache lie beside an exchange pool, where all
its instances see them, and otherwise in the private memory of the instance's leader.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from disagg_mpi.config import JobConfig
from disagg_mpi.model.checkpoint import ModelSpec
from disagg_mpi.prefix import PrefixTags
from disagg_mpi.topology import Group, Topology
from disagg_mpi.transfer.layout import CacheView, KvLayout
from disagg_mpi.transfer.partition import shard_of

_PAGE = 4096


class TagsPlace(msgspec.Struct, frozen=True):
    """Tags of a pool's blocks."""

    num_blocks: int
    offset: int | None
    """In the host's window; ``None``: in the leader's private memory."""


class Arrangement(msgspec.Struct, frozen=True):
    """All places of a job."""

    views: dict[int, CacheView]
    """World rank → its cache."""
    window_bytes: dict[int, int]
    """Host → bytes of its shared window."""
    private_bytes: dict[int, int]
    """World rank → bytes of its private memory, where it has some."""
    block_ids: dict[int, range]
    """Instance → the blocks that are its own at first."""
    tags: dict[int, TagsPlace]
    """Instance → where its tags are."""


def moves_bytes(config: JobConfig, topology: Topology, host_of: Sequence[int]) -> bool:
    """Whether some hand-over of the job moves bytes, rather than exchange blocks of one pool."""
    pools = {_exchange_pool(config, group, host_of) for group in topology.groups}
    return not config.is_aggregated and (None in pools or len(pools) > 1)


def arrange(
    config: JobConfig, topology: Topology, host_of: Sequence[int], spec: ModelSpec
) -> Arrangement:
    """The places of all ranks. ``host_of``: each rank's host, named by the lowest rank on it."""
    found = Arrangement({}, {}, {}, {}, {})
    by_pool: dict[tuple[int, int], list[Group]] = {}
    for group in topology.groups:
        pool = _exchange_pool(config, group, host_of)
        if pool is not None:
            by_pool.setdefault(pool, []).append(group)
        else:
            _place_apart(found, config, group, host_of, spec)
    for (host, block_size), groups in by_pool.items():
        _place_together(found, config, host, block_size, groups, spec)
    return found


def _exchange_pool(config: JobConfig, group: Group, host_of: Sequence[int]) -> tuple[int, int] | None:
    """(host, block size) of the exchange pool that ``group`` is part of, if it can be of one."""
    hosts = {host_of[rank] for rank in group.ranks}
    if config.transport == "mpi" or len(hosts) > 1:
        return None
    return hosts.pop(), config.block_size(group.role)


def _blocks(config: JobConfig, group: Group) -> int:
    return -(-config.kv_tokens // config.block_size(group.role))


def _layout(config: JobConfig, spec: ModelSpec, num_layers: int, num_heads: int, block_size: int,
            num_blocks: int) -> KvLayout:
    return KvLayout(num_layers, num_heads, spec.head_dim, block_size, num_blocks, config.effective_kv_dtype)


def _place_together(found: Arrangement, config: JobConfig, host: int, block_size: int,
                    groups: Sequence[Group], spec: ModelSpec) -> None:
    """One array of the whole model for all of ``groups``, with their tags behind it."""
    first = 0
    for group in groups:
        count = _blocks(config, group)
        found.block_ids[group.instance_id] = range(first, first + count)
        first += count
    layout = _layout(config, spec, spec.num_layers, spec.num_kv_heads, block_size, first)
    offset = _take(found, host, layout.pool_bytes)
    tags = TagsPlace(first, _take(found, host, PrefixTags.bytes_needed(first)))
    for group in groups:
        found.tags[group.instance_id] = tags
        for index, rank in enumerate(group.ranks):
            shard = shard_of(spec.num_layers, spec.num_kv_heads, group.shape.tp, group.shape.pp, index)
            found.views[rank] = CacheView(rank, host, f"host {host}", offset, layout, 0, 0, shard)


def _place_apart(found: Arrangement, config: JobConfig, group: Group, host_of: Sequence[int],
                 spec: ModelSpec) -> None:
    """An array of its own part for each rank of ``group``."""
    count = _blocks(config, group)
    found.block_ids[group.instance_id] = range(count)
    found.tags[group.instance_id] = TagsPlace(count, None)
    for index, rank in enumerate(group.ranks):
        shard = shard_of(spec.num_layers, spec.num_kv_heads, group.shape.tp, group.shape.pp, index)
        layout = _layout(config, spec, shard.num_layers, shard.num_heads, config.block_size(group.role),
                         count)
        host = host_of[rank]
        if config.transport == "mpi":
            memory, offset = f"rank {rank}", 0
            found.private_bytes[rank] = layout.pool_bytes
        else:
            memory, offset = f"host {host}", _take(found, host, layout.pool_bytes)
        found.views[rank] = CacheView(rank, host, memory, offset, layout, shard.first_layer, shard.first_head,
                                      shard)


def _take(found: Arrangement, host: int, num_bytes: int) -> int:
    """The offset of so many bytes more, on a page of their own, in a host's window."""
    offset = found.window_bytes.get(host, 0)
    found.window_bytes[host] = offset + -(-num_bytes // _PAGE) * _PAGE
    return offset
