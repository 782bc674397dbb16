"""Where every rank's KV-cache lies: pure arithmetic over configuration, model and hosts, equal on every rank.

On each host one shared memory window. Instances that lie wholly on it have their blocks in an *exchange
pool* of the window, an array of the whole model, one for each block size: their ranks read and write their
own layers and heads of it, whatever their shapes, so that block ids can change hands. Ranks of instances
that span hosts have an array of their own part in the window. With the ``mpi`` transport each rank has its
part in private memory.

On GPUs a rank's part is one allocation of its GPU. Instances of one shape and block size whose ranks share
GPUs one by one have theirs together: one rank of each place allocates for all of them, the others open it,
and block ids change hands there too. One block more an instance, its *scratch*, takes what a step computes
for nobody.

An instance's ranks use the same block ids; tags of the prefix cache lie in the host's window where instances
share a pool, and all of them see them, and otherwise in the private memory of the instance's leader.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


class DevicePool(msgspec.Struct, frozen=True):
    """One allocation of a GPU."""

    owner: int
    """The world rank that allocates it; those whose views name it open it."""
    num_bytes: int


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
    device_pools: dict[str, DevicePool] = {}
    """Name of a memory → the allocation that it is, for memories of GPUs."""
    scratch: dict[int, int] = {}
    """Instance → its scratch block, on GPUs."""


GpuOf = Mapping[int, str]
"""World rank → its GPU, named alike by all ranks of its host; empty where ranks compute on processors."""

_PoolKey = tuple[int, int, tuple[str, ...], str]
"""Of an exchange pool: host, block size, and on GPUs the GPU of each place and the shape."""


def moves_bytes(config: JobConfig, topology: Topology, host_of: Sequence[int], gpu_of: GpuOf = {}) -> bool:  # noqa: B006
    """Whether some hand-over of the job moves bytes, rather than exchange blocks of one pool."""
    pools = {_exchange_pool(config, group, host_of, gpu_of) for group in topology.groups}
    return not config.is_aggregated and (None in pools or len(pools) > 1)


def arrange(
    config: JobConfig, topology: Topology, host_of: Sequence[int], spec: ModelSpec, gpu_of: GpuOf = {}  # noqa: B006
) -> Arrangement:
    """The places of all ranks. ``host_of``: each rank's host, named by the lowest rank on it."""
    found = Arrangement({}, {}, {}, {}, {}, {}, {})
    by_pool: dict[_PoolKey, list[Group]] = {}
    for group in topology.groups:
        pool = _exchange_pool(config, group, host_of, gpu_of)
        if pool is not None:
            by_pool.setdefault(pool, []).append(group)
        else:
            _place_apart(found, config, group, host_of, spec, gpu_of)
    for key, groups in by_pool.items():
        if gpu_of:
            _place_on_gpus(found, config, key, groups, spec)
        else:
            _place_together(found, config, key[0], key[1], groups, spec)
    return found


def _exchange_pool(config: JobConfig, group: Group, host_of: Sequence[int], gpu_of: GpuOf) -> _PoolKey | None:
    """The exchange pool that ``group`` is part of, if it can be of one."""
    hosts = {host_of[rank] for rank in group.ranks}
    if config.transport == "mpi" or len(hosts) > 1:
        return None
    gpus = tuple(gpu_of[rank] for rank in group.ranks) if gpu_of else ()
    return hosts.pop(), config.block_size(group.role), gpus, str(group.shape) if gpu_of else ""


def _blocks(config: JobConfig, group: Group) -> int:
    return -(-config.pool_tokens // config.block_size(group.role))


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


def _place_on_gpus(found: Arrangement, config: JobConfig, key: _PoolKey, groups: Sequence[Group],
                   spec: ModelSpec) -> None:
    """An allocation for each place of ``groups``, which have equal shapes, with the blocks of all of them."""
    host, block_size, gpus, _ = key
    first = 0
    for group in groups:
        count = _blocks(config, group)
        found.block_ids[group.instance_id] = range(first, first + count)
        found.scratch[group.instance_id] = first + count
        first += count + 1
    tags = TagsPlace(first, _take(found, host, PrefixTags.bytes_needed(first)))
    shape = groups[0].shape
    for index, gpu in enumerate(gpus):
        shard = shard_of(spec.num_layers, spec.num_kv_heads, shape.tp, shape.pp, index)
        layout = _layout(config, spec, shard.num_layers, shard.num_heads, block_size, first)
        owner = groups[0].ranks[index]
        memory = f"{gpu} of host {host}, allocated by rank {owner}"
        found.device_pools[memory] = DevicePool(owner, layout.pool_bytes)
        for group in groups:
            rank = group.ranks[index]
            found.views[rank] = CacheView(rank, host, memory, 0, layout, shard.first_layer, shard.first_head,
                                          shard)
    for group in groups:
        found.tags[group.instance_id] = tags


def _place_apart(found: Arrangement, config: JobConfig, group: Group, host_of: Sequence[int],
                 spec: ModelSpec, gpu_of: GpuOf) -> None:
    """An array of its own part for each rank of ``group``."""
    count = _blocks(config, group)
    found.block_ids[group.instance_id] = range(count)
    if gpu_of:
        found.scratch[group.instance_id] = count
        count += 1
    found.tags[group.instance_id] = TagsPlace(count, None)
    for index, rank in enumerate(group.ranks):
        shard = shard_of(spec.num_layers, spec.num_kv_heads, group.shape.tp, group.shape.pp, index)
        layout = _layout(config, spec, shard.num_layers, shard.num_heads, config.block_size(group.role),
                         count)
        host = host_of[rank]
        if gpu_of:
            memory, offset = f"{gpu_of[rank]} of host {host}, allocated by rank {rank}", 0
            found.device_pools[memory] = DevicePool(rank, layout.pool_bytes)
        elif config.transport == "mpi":
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
