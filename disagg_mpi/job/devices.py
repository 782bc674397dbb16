"""Which rank computes on which GPU, and how much of its memory it may take: pure arithmetic over what the
ranks see.

:func:`place_ranks` is asked once, before anything is loaded, with what every rank's driver shows; its answer
is the same on every rank. Ranks without device ids get, in turn, a GPU of their host that the fewest others
have, so that each has one of its own as long as there are enough; where there are not, or ids say so, several
ranks share a GPU, each with its share of the memory. :func:`plan_pools` then says how long the KV pools can
be, from what is free; its error shows the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import count

import msgspec

from disagg_mpi.config import JobConfig
from disagg_mpi.errors import ConfigError, LayoutError
from disagg_mpi.gpus import Gpu
from disagg_mpi.model.checkpoint import ModelSpec
from disagg_mpi.shapes import format_ids
from disagg_mpi.topology import Role, Topology
from disagg_mpi.transfer.layout import ITEM_BYTES
from disagg_mpi.transfer.partition import KvShard, shard_of

# What a rank takes of a GPU beside weights and pool. CUDA's context and loaded kernels: about 0.5 GiB;
# workspaces of attention and matrix products: 0.5 GiB; the rest for captured steps.
RUNTIME_BYTES = 3 * 2**29

# What messages from device memory are packed into, in both directions (transfer/cuda/packed.py).
STAGING_BYTES = 2 * 512 * 2**20

# Rows of activations that a step holds at once: hidden states, Q, K, V, both products of the MLP, and room
# for the allocator's rounding, in widths of the hidden state.
_ACTIVATION_WIDTHS = 24

# Of each logit while a token is drawn: as it is made, and eight or nine times in float64 on the way to a
# token.
_LOGIT_BYTES = 80


class DevicePlace(msgspec.Struct, frozen=True):
    """One rank's GPU."""

    rank: int
    host: int
    gpu: Gpu
    num_sharing: int
    """Ranks of the job on this GPU."""


def wants_gpus(config: JobConfig, topology: Topology, gpus: Mapping[int, Sequence[Gpu]]) -> bool:
    """What ``auto`` comes to: GPUs if every engine rank sees one, or the one that its id names.

    ``gpus``: world rank → what it sees.
    """
    if config.device != "auto":
        return config.uses_gpus
    return all((group.device_of(rank) or 0) < len(gpus[rank])
               for group in topology.groups for rank in group.ranks)


def place_ranks(topology: Topology, host_of: Sequence[int], host_names: Sequence[str],
                gpus: Mapping[int, Sequence[Gpu]]) -> dict[int, DevicePlace]:
    """A GPU for each engine rank.

    ``host_of`` names each rank's host by the lowest rank on it. A launcher may show each rank GPUs of its
    own; ids and turns count within what a rank sees. Raises :class:`LayoutError` for a rank that sees none,
    or not the one that its id names.
    """
    chosen: dict[int, Gpu] = {}
    sharing: dict[tuple[int, str], int] = {}

    def choose(rank: int, gpu: Gpu) -> None:
        chosen[rank] = gpu
        sharing[host_of[rank], gpu.uuid] = sharing.get((host_of[rank], gpu.uuid), 0) + 1

    for group in topology.groups:
        for rank in group.ranks:
            seen = gpus[rank]
            host = host_names[rank]
            if not seen:
                raise LayoutError(
                    f"{group.name} is to compute on a GPU, and rank {rank} on host {host} sees none\n"
                    + topology.map_text({rank: f"no GPU on {host}"})
                    + "\nneeded: an NVIDIA driver and a GPU that CUDA_VISIBLE_DEVICES does not hide; or type "
                      "--device cpu")
            wanted = group.device_of(rank)
            if wanted is None:
                continue
            if wanted >= len(seen):
                have = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in seen)
                raise LayoutError(
                    f"{group.name} names device {wanted}, but rank {rank} on host {host} sees "
                    f"{'only' if len(seen) == 1 else 'these'}: {have}\n"
                    + topology.map_text({rank: f"device {wanted} is not there"})
                    + f"\nneeded: ids from 0 to {len(seen) - 1}, several ranks may share one; type e.g. "
                      f"--{group.role}-device-ids \"{_ids_that_fit(topology, group.role, gpus)}\"")
            choose(rank, seen[wanted])
    for group in topology.groups:
        for rank in group.ranks:
            if rank not in chosen:
                choose(rank, min(gpus[rank], key=lambda gpu: (
                    sharing.get((host_of[rank], gpu.uuid), 0), gpu.index)))
    return {rank: DevicePlace(rank, host_of[rank], gpu, sharing[host_of[rank], gpu.uuid])
            for rank, gpu in sorted(chosen.items())}


def describe(places: Mapping[int, DevicePlace], host_names: Sequence[str]) -> str:
    """``ranks 1, 2 on GPU 0 (NVIDIA H200), which 2 ranks share``; a GPU once."""
    on: dict[tuple[int, str], list[DevicePlace]] = {}
    for place in places.values():
        on.setdefault((place.host, place.gpu.uuid), []).append(place)
    several_hosts = len({place.host for place in places.values()}) > 1
    parts = []
    for sharers in on.values():
        first = sharers[0]
        ranks = ", ".join(str(place.rank) for place in sharers)
        where = f" of {host_names[first.rank]}" if several_hosts else ""
        share = f", which {len(sharers)} ranks share" if len(sharers) > 1 else ""
        parts.append(f"rank{'s' * (len(sharers) > 1)} {ranks} on GPU {first.gpu.index}{where} "
                     f"({first.gpu.name}){share}")
    return "; ".join(parts)


class DeviceUse(msgspec.Struct, frozen=True):
    """What the ranks of one GPU need of it, in bytes."""

    name: str
    """How errors call the GPU: ``GPU 0 of node1``."""
    ranks: tuple[int, ...]
    free: int
    weights: int
    runtime: int
    bytes_per_token: int
    """Of the pools of all these ranks together, for one position more in each."""

    def sum_text(self, tokens: int, positions: int) -> str:
        """Everything that would be on it, added up; a pool for so many tokens has so many positions."""
        pools = positions * self.bytes_per_token
        ranks = ", ".join(map(str, self.ranks))
        return (f"{self.name} (rank{'s' * (len(self.ranks) > 1)} {ranks}): {_gib(self.weights)} of weights + "
                f"{_gib(self.runtime)} of workspace ({_gib(self.runtime // len(self.ranks))} a rank) + "
                f"{_gib(pools)} of KV-cache at {tokens} tokens an instance = "
                f"{_gib(self.weights + self.runtime + pools)}; {_gib(self.free)} are free")


def uses_of(config: JobConfig, topology: Topology, spec: ModelSpec, places: Mapping[int, DevicePlace],
            free_bytes: Mapping[int, int], host_names: Sequence[str]) -> list[DeviceUse]:
    """What every GPU of the job must hold. ``free_bytes``: rank → what it saw free on its GPU before anything
    was there; of ranks that share one the least counts."""
    on: dict[tuple[int, str], list[DevicePlace]] = {}
    for place in places.values():
        on.setdefault((place.host, place.gpu.uuid), []).append(place)
    found = []
    for sharers in on.values():
        weights: dict[tuple[int, ...], int] = {}
        per_token = 0
        for place in sharers:
            group = topology.group_of(place.rank)
            assert group is not None  # places are of engine ranks
            tp, pp, index = group.shape.tp, group.shape.pp, group.index_of(place.rank)
            shard = shard_of(spec.num_layers, spec.num_kv_heads, tp, pp, index)
            # Ranks that hold the same slice hold it once.
            weights[tp, pp, index] = weight_bytes(config, spec, tp, pp)
            per_token += token_bytes(config, spec, shard)
        runtime = RUNTIME_BYTES + activation_bytes(config, spec)
        if _sends_messages(config, places):
            runtime += STAGING_BYTES
        first = sharers[0]
        found.append(DeviceUse(
            f"GPU {first.gpu.index} of {host_names[first.rank]}", tuple(place.rank for place in sharers),
            min(free_bytes[place.rank] for place in sharers), sum(weights.values()),
            len(sharers) * runtime, per_token))
    return found


def _sends_messages(config: JobConfig, places: Mapping[int, DevicePlace]) -> bool:
    """Whether KV-cache goes in messages; GPUs of a host without a path to each other are found out later."""
    spans_hosts = len({place.host for place in places.values()}) > 1
    return not config.is_aggregated and (config.transport == "mpi" or spans_hosts)


def plan_pools(config: JobConfig, uses: Sequence[DeviceUse]) -> int:
    """Positions of each instance's KV pool: what was asked for, or as many as fit on the fullest GPU.

    Raises :class:`ConfigError` if they do not fit within ``gpu_memory`` of what is free, or none does.
    """
    room = {use: int(use.free * config.gpu_memory) - use.weights - use.runtime for use in uses}
    positions = min(left // use.bytes_per_token for use, left in room.items())
    sizes = {config.block_size("context"), config.block_size("generation")}
    # Beside the scratch block of each instance.
    fits = min((positions // size - 1) * size for size in sizes)
    wanted = config.kv_tokens
    if wanted is None and fits > 0:
        return fits
    if wanted is not None and wanted <= fits:
        return wanted
    tight = min(room, key=lambda use: room[use] / use.bytes_per_token)
    advice = f"give --kv-tokens {fits}" if fits > 0 else (
        "give each rank a GPU of its own (--context-device-ids, --generation-device-ids), take a smaller "
        "model, or several ranks an instance (--context tp2)")
    share = "" if config.gpu_memory == 1 else f", of which {config.gpu_memory:.0%} may be used (--gpu-memory)"
    tokens = wanted or max(sizes)
    raise ConfigError(f"{tight.sum_text(tokens, positions_for(config, tokens))}{share}: {advice}")


def positions_for(config: JobConfig, tokens: int) -> int:
    """Positions that a pool for so many tokens has: whole blocks, and the scratch block."""
    sizes = {config.block_size("context"), config.block_size("generation")}
    return max((-(-tokens // size) + 1) * size for size in sizes)


def weight_bytes(config: JobConfig, spec: ModelSpec, tp: int, pp: int) -> int:
    """Bytes of the largest slice of the weights that a rank may have, in the type that is computed with: a
    share of the layers, and of the embedding, which the first and the last stage have whole where it is
    tied."""
    item = {"float32": 4, "float64": 8}.get(spec.dtype, 2)
    num_bytes = ITEM_BYTES[config.compute_dtype]
    embedding = spec.vocab_size * spec.hidden_size * num_bytes
    layers = max(0, spec.parameter_bytes * num_bytes // item - embedding)
    return (-(-layers // pp) + embedding) // tp


def token_bytes(config: JobConfig, spec: ModelSpec, shard: KvShard) -> int:
    """Bytes of one position in a rank's part of a pool."""
    return 2 * shard.num_layers * shard.num_heads * spec.head_dim * ITEM_BYTES[config.effective_kv_dtype]


def activation_bytes(config: JobConfig, spec: ModelSpec) -> int:
    """What a step of the whole token budget holds beside weights and pool, drawn tokens and all."""
    rows = config.token_budget * spec.hidden_size * _ACTIVATION_WIDTHS * ITEM_BYTES[config.compute_dtype]
    return rows + _LOGIT_BYTES * config.max_batch_size * spec.vocab_size


def _ids_that_fit(topology: Topology, role: Role, gpus: Mapping[int, Sequence[Gpu]]) -> str:
    """Ids for all instances of ``role``, as they are typed: of GPUs that each rank sees."""
    ids = count()
    return format_ids([[next(ids) % max(1, len(gpus[rank])) for rank in group.ranks]
                       for group in topology.groups if group.role is role])


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
