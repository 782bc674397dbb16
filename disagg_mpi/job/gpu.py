"""Builds one rank's part of an instance on a GPU: the device, pools and weights that ranks share, its stage.

``choose_devices``  which GPU each rank gets, before the world is made
``plan_devices``    each rank's device (torch is imported here, with its threads set), and what fits on all
``make_pools``      who owns a pool allocates it, the others of its host open it
``load_stage``      one rank of those with the same slice on a GPU reads it, the others open that too

All are collective over the world. Owners keep their allocations until every rank of their host has let go
(:meth:`GpuMemory.close`).
"""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_mpi.comm import environment
from disagg_mpi.comm.agree import together
from disagg_mpi.comm.ucx import cuda_aware
from disagg_mpi.config import JobConfig
from disagg_mpi.errors import ConfigError
from disagg_mpi.gpus import Gpu, emulated_gpus, torch_takes_gpus, visible_gpus
from disagg_mpi.job.arrangement import Arrangement
from disagg_mpi.job.devices import DevicePlace, place_ranks, plan_pools, positions_for, uses_of, wants_gpus
from disagg_mpi.job.world import Hosts, World
from disagg_mpi.model.checkpoint import ModelSpec
from disagg_mpi.topology import ORCHESTRATOR_RANK, Group, Role, Topology
from disagg_mpi.transfer.directory import COPY, CacheDirectory
from disagg_mpi.transfer.layout import Box
from disagg_mpi.transfer.partition import Part

if TYPE_CHECKING:
    import torch
    from mpi4py import MPI

    from disagg_mpi.engine.gpu.collectives import DeviceCollectives
    from disagg_mpi.engine.gpu.device import Device
    from disagg_mpi.engine.gpu.stage import DeviceStage
    from disagg_mpi.transfer.cuda.memory import Shared


class GpuMemory:
    """This rank's device and the allocations that it has open, its own among them."""

    def __init__(self, world: World, device: Device | None, pools: Shared, takes_device_memory: bool,
                 unreachable: list[tuple[int, int]]) -> None:
        self.device = device
        """``None`` at rank 0, which computes nothing."""
        self.pools = pools
        self.takes_device_memory = takes_device_memory
        """Whether messages may be sent from device memory; equal on all ranks."""
        self.unreachable = unreachable
        self._world = world
        self.weights: Shared | None = None
        self.collectives: DeviceCollectives | None = None

    def pool(self, memory: str) -> torch.Tensor:
        return self.pools[memory]

    def close(self) -> None:
        """Collective over the host; nothing of the engine may be used afterwards."""
        from disagg_mpi.transfer.cuda.memory import unshare

        if self.collectives is not None:
            self.collectives.close()
        gc.collect()  # what the engine opened must be let go of before its owners free it
        if self.weights is not None:
            unshare(self._world.host, self.weights)
        unshare(self._world.host, self.pools)


def choose_devices(comm: MPI.Intracomm, config: JobConfig, topology: Topology,
                   hosts: Hosts) -> tuple[JobConfig, dict[int, DevicePlace]]:
    """``config`` with ``auto`` decided, and each engine rank's GPU; none where ranks compute on processors.

    Raises :class:`LayoutError` on all ranks if one has no GPU that it should have.
    """
    if config.device == "cpu" or config.engine == "null":
        return config.replace(device="cpu"), {}

    def look() -> list[Gpu]:
        if comm.rank == ORCHESTRATOR_RANK or (config.device == "auto" and not torch_takes_gpus()):
            return []
        return emulated_gpus() if config.device == "emulated" else visible_gpus()

    seen = dict(enumerate(comm.allgather(together(comm, look))))
    if not wants_gpus(config, topology, seen):
        return config.replace(device="cpu"), {}
    if config.device == "auto":
        config = config.replace(device="cuda")
    return config, place_ranks(topology, hosts.of, hosts.names, seen)


def plan_devices(
    world: World, config: JobConfig, spec: ModelSpec
) -> tuple[Device | None, JobConfig, list[str]]:
    """This rank's device, ``None`` at rank 0; ``config`` with the size of the pools decided; and a line for
    each GPU that says what will be on it.

    Raises :class:`ConfigError` on all ranks if torch has no CUDA, or what was asked for does not fit.
    """
    place = world.places.get(world.rank)
    device = together(world.comm, lambda: None if place is None else _open_device(
        config, place, config.threads or world.threads))
    free = dict(enumerate(world.comm.allgather(0 if device is None else device.free_bytes())))
    uses = uses_of(config, world.topology, spec, world.places, free, world.host_names)
    tokens = plan_pools(config, uses)
    positions = positions_for(config, tokens)
    return device, config.replace(kv_tokens=tokens), [use.sum_text(tokens, positions) for use in uses]


def _open_device(config: JobConfig, place: DevicePlace, num_threads: int) -> Device:
    environment.apply(num_threads=num_threads)
    import torch

    from disagg_mpi.engine.gpu.device import CudaDevice, HostDevice

    torch.set_num_threads(num_threads)
    torch.set_grad_enabled(False)
    if config.device == "emulated":
        return HostDevice(place.gpu.total_bytes)
    if not torch.cuda.is_available():
        raise ConfigError(
            f"rank {place.rank} sees {place.gpu.name}, but torch {torch.__version__} cannot use it: install "
            "a torch that is built for CUDA and for this driver (nvidia-smi shows which CUDA it takes), or "
            "give --device cpu")
    return CudaDevice(place.gpu.index)


def make_pools(
    world: World, config: JobConfig, arrangement: Arrangement, device: Device | None
) -> GpuMemory:
    """The pools of this host's GPUs, as far as this rank uses them.

    Raises :class:`ConfigError` on all ranks if one cannot open the pool that its own blocks lie in.
    """
    from disagg_mpi.transfer.cuda import memory

    place = "cpu" if device is None else device.place
    owned = {name: memory.allocate(pool.num_bytes, place)
             for name, pool in arrangement.device_pools.items() if pool.owner == world.rank}
    group = world.topology.group_of(world.rank)
    wanted: list[str] = []
    if group is not None:
        own = arrangement.views[world.rank].memory
        # Generation copies out of any context's pool of its host.
        reads = group.role.does_generation and config.transport != "mpi"
        wanted = [name for name, pool in arrangement.device_pools.items()
                  if name == own or (reads and pool.owner in world.host_ranks)]
    shared = memory.share(world.host, owned, wanted, place)

    def check() -> None:
        if group is not None and own in shared.failures:
            raise ConfigError(
                f"rank {world.rank} cannot open the KV pool on its GPU, which rank "
                f"{arrangement.device_pools[own].owner} allocated: {shared.failures[own]}. Ranks that share "
                "a GPU need CUDA IPC (in a container: --ipc=host); or give --transport mpi")

    together(world.comm, check)
    failed = world.comm.allgather(list(shared.failures))
    unreachable = [(source, target) for target, names in enumerate(failed) for source, view
                   in arrangement.views.items() if view.memory in names and source != target]
    within_host = config.transport == "mpi" or bool(unreachable)
    takes = all(world.comm.allgather(
        config.device == "emulated" or cuda_aware(within_host=within_host) is True))
    return GpuMemory(world, device, shared, takes, unreachable)


def load_stage(world: World, config: JobConfig, group: Group | None, memory: GpuMemory,
               arrangement: Arrangement, path: Path, spec: ModelSpec) -> DeviceStage | None:
    """This rank's slice of the model over its part of the pool; ``None`` at rank 0.

    Raises :class:`ModelError` or :class:`ConfigError` on all ranks alike.
    """
    from disagg_mpi.transfer.cuda.memory import share

    loader = None if group is None or memory.device is None else _Loader(world, config, group, memory.device)

    def plan() -> None:
        if loader is not None:
            loader.plan(path)

    together(world.comm, plan)
    owned = together(world.comm, lambda: {} if loader is None else loader.fill())
    memory.weights = share(world.host, owned, [] if loader is None else [loader.name],
                           "cpu" if memory.device is None else memory.device.place)

    def attach() -> None:
        if loader is not None and memory.weights is not None:
            loader.attach(memory.weights)

    together(world.comm, attach)
    # No rank of a stage is missing there: none has raised.
    memory.collectives = together(world.comm, lambda: None if loader is None else loader.meet())
    return together(world.comm, lambda: None if loader is None else loader.stage(memory, arrangement, spec))


class _Loader:
    """One rank's way from a model's files to its stage, in steps that all ranks take together."""

    def __init__(self, world: World, config: JobConfig, group: Group, device: Device) -> None:
        from disagg_mpi.engine.tensor_parallel import ModelShard

        self._world = world
        self._config = config
        self._group = group
        self._device = device
        self._shard = ModelShard(
            group.shape.tp, group.tp_rank(world.rank), group.shape.pp, group.pp_rank(world.rank))
        gpu = world.gpu_of[world.rank]
        sharing = [rank for other in world.topology.groups for rank in other.ranks
                   if world.gpu_of[rank] == gpu and world.host_of[rank] == world.host_of[world.rank]
                   and (str(other.shape), other.index_of(rank)) == (
                       str(group.shape), group.index_of(world.rank))]
        self._owner = min(sharing)
        self.name = f"weights of {gpu}, loaded by rank {self._owner}"
        self._collectives: DeviceCollectives | None = None

    def plan(self, path: Path) -> None:
        from disagg_mpi.engine.gpu.weights import WeightArena
        from disagg_mpi.engine.weights import plan_model

        self._plan = plan_model(path, self._config.compute_dtype, self._shard)
        self._arena = WeightArena(self._plan)

    def fill(self) -> dict[str, torch.Tensor]:
        """The allocation with the slice, by name, if this rank is the one that loads it."""
        from disagg_mpi.transfer.cuda.memory import allocate

        if self._owner != self._world.rank:
            return {}
        memory = allocate(self._arena.num_bytes, self._device.place)
        if self._config.weights == "random":
            self._arena.fill_randomly(memory)
        else:
            self._arena.fill_from_files(memory)
        return {self.name: memory}

    def attach(self, weights: Shared) -> None:
        if self.name in weights.failures:  # without CUDA IPC, which --transport mpi can do without, too
            self._owner = self._world.rank
            weights |= self.fill()
        self._arena.attach(weights[self.name], self._device)

    def meet(self) -> DeviceCollectives | None:
        """Join the ranks of the stage, if there are several. Collective over it; raises :class:`MpiError` on
        all."""
        from disagg_mpi.engine.gpu.collectives import NcclCollectives, StagedCollectives

        link = self._world.link
        if self._shard.tp == 1 or link is None:
            return None
        ranks = self._group.stage_ranks(self._shard.pp_rank)
        gpus = {(self._world.host_of[rank], self._world.gpu_of[rank]) for rank in ranks}
        if self._device.is_cuda and len(gpus) == len(ranks):
            hosts = {self._world.host_of[rank] for rank in ranks}
            self._collectives = NcclCollectives(
                self._shard.tp_rank, self._shard.tp, link.told, self._device.place,
                host="127.0.0.1" if len(hosts) == 1 else self._world.host_names[ranks[0]])
        else:
            self._collectives = StagedCollectives(link, self._shard.tp_rank)
        return self._collectives

    def stage(self, memory: GpuMemory, arrangement: Arrangement, spec: ModelSpec) -> DeviceStage:
        from disagg_mpi.engine.gpu.attention import DevicePool, make_attention
        from disagg_mpi.engine.gpu.model import DeviceModel, head_shape
        from disagg_mpi.engine.gpu.operations import make_operations
        from disagg_mpi.engine.gpu.stage import DeviceStage
        from disagg_mpi.engine.weights import DTYPES
        from disagg_mpi.transfer.cuda.kernels import copy_blocks

        config, device = self._config, self._device
        view = arrangement.views[self._world.rank]
        pool = DevicePool(memory.pool(view.memory), view, DTYPES[config.effective_kv_dtype])
        model = DeviceModel(self._plan, self._shard, self._collectives,
                            make_operations(device, DTYPES[config.compute_dtype]))
        attention = make_attention(config.attention, device, pool, head_shape(self._plan),
                                   DTYPES[config.compute_dtype], max_requests=config.max_batch_size)
        can_capture = self._collectives is None or self._collectives.can_capture
        return DeviceStage(
            device, model, pool, attention, self._world.link,
            functools.partial(copy_blocks, memory.pool(view.memory), view),
            scratch=arrangement.scratch[self._group.instance_id], max_batch_size=config.max_batch_size,
            max_num_tokens=config.token_budget, max_model_len=spec.max_position_embeddings,
            captures=config.cuda_graphs and can_capture)


class Transports:
    """This rank's ways of moving bytes: messages, and copies out of other pools of its host."""

    def __init__(self, world: World, arrangement: Arrangement, directory: CacheDirectory,
                 memory: GpuMemory) -> None:
        from disagg_mpi.transfer.cuda.gather import GatherTransport
        from disagg_mpi.transfer.cuda.packed import HostStagedTransport, PackedTransport

        self._world = world
        self._arrangement = arrangement
        self._directory = directory
        view = arrangement.views[world.rank]
        pool = memory.pool(view.memory)
        kind = PackedTransport if memory.takes_device_memory else HostStagedTransport
        self.messages = kind(world.data_comm, pool, view)
        self.copies = GatherTransport(pool, view, memory.pools)

    def connect(self) -> None:
        """Move a block each way that there will be, from scratch to scratch or while pools are empty: kernels
        are compiled and pairs have met when the first request comes. All engine ranks call it at the same
        time."""
        views = self._arrangement.views
        me = self._world.rank
        sends: list[tuple[int, Box]] = []
        receives: list[tuple[int, Box]] = []
        for source, target, part in self._pairs():
            if me not in (source, target):
                continue
            size = max(views[rank].layout.tokens_per_block for rank in (source, target))
            if self._directory.pair_way(source, target) == COPY:
                if me == target:
                    self._gather(source, Box.of(part, 0, min(
                        views[rank].layout.tokens_per_block for rank in (source, target))))
            elif me == source:
                sends.append((target, Box.of(part, 0, size)))
            else:
                receives.append((source, Box.of(part, 0, size)))
        self.messages.connect(sends, receives)

    def _pairs(self) -> Iterator[tuple[int, int, Part]]:
        """(source rank, target rank, what goes) of every two ranks between which bytes will move."""
        groups = self._world.topology.groups
        for source in groups:
            for target in groups:
                if (source.role is not Role.CONTEXT or target.role is not Role.GENERATION
                        or self._directory.is_exchange(source.instance_id, target.instance_id)):
                    continue
                for part in self._directory.parts(source.instance_id, target.instance_id):
                    yield source.ranks[part.source], target.ranks[part.target], part

    def _gather(self, source: int, box: Box) -> None:
        scratch = [self._scratch_of(rank) for rank in (source, self._world.rank)]
        transfer = self.copies.receive(self._arrangement.views[source], [scratch[0]], [scratch[1]], box)
        while not transfer.done():
            time.sleep(0)

    def _scratch_of(self, rank: int) -> int:
        group = self._world.topology.group_of(rank)
        assert group is not None  # views are of engine ranks
        return self._arrangement.scratch[group.instance_id]


def in_words(world: World, stage: DeviceStage | None) -> list[str]:
    """What rank 0 should say of the stages, a line each; the same for all that are alike."""
    said = world.comm.allgather("" if stage is None else stage.in_words())
    return list(dict.fromkeys(filter(None, said)))
