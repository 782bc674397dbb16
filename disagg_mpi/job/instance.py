"""Builds one rank's part of an instance: memory, model, and at the leader engine and API.

Every rank calls :func:`make_memory` (shared memory is made collectively); ranks of an instance then call
:func:`load_stage` (on GPUs :mod:`disagg_mpi.job.gpu`'s), which imports torch, with the thread settings in
place by then, and when all of them have their model :func:`make_worker`: a rank that cannot load leaves no
other in a collective.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from disagg_mpi.comm import environment
from disagg_mpi.comm.messages import Message
from disagg_mpi.comm.waiting import Waiter
from disagg_mpi.config import JobConfig
from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.errors import LayoutError
from disagg_mpi.executor.base import Executor
from disagg_mpi.executor.follower import FollowerService
from disagg_mpi.job.arrangement import Arrangement
from disagg_mpi.job.gpu import GpuMemory, Transports, make_pools
from disagg_mpi.job.plan import MemoryPlan
from disagg_mpi.job.world import World
from disagg_mpi.model.checkpoint import ModelSpec
from disagg_mpi.prefix import BlockHasher, PrefixTags
from disagg_mpi.request import ExecutorLimits
from disagg_mpi.topology import Group
from disagg_mpi.transfer.directory import CacheDirectory
from disagg_mpi.transfer.memory import SharedMemory, check_shared_memory, private_memory
from disagg_mpi.transfer.mover import Mover
from disagg_mpi.transfer.progress import ProgressThread
from disagg_mpi.transfer.transceiver import Transceiver
from disagg_mpi.transfer.transports import Copies, CopyTransport, MpiTransport, Pool, Transport

if TYPE_CHECKING:
    from disagg_mpi.engine.gpu.device import Device
    from disagg_mpi.engine.gpu.runner import GpuRunner
    from disagg_mpi.engine.gpu.stage import DeviceStage
    from disagg_mpi.engine.runner import StageRunner
    from disagg_mpi.model.tokenizer import Tokenizer


class RankMemory:
    """The memory of this rank's KV-cache, and where everybody's lies."""

    def __init__(self, arrangement: Arrangement, directory: CacheDirectory, memory: Pool,
                 shared: SharedMemory | None, gpu: GpuMemory | None = None) -> None:
        """``memory``: on the host; with ``gpu`` the pool is there, and only tags are on the host."""
        self.arrangement = arrangement
        self.directory = directory
        self.memory = memory
        self.shared = shared
        self.gpu = gpu
        self.transports: Transports | None = None
        """Of an engine rank on a GPU."""

    def tags(self, instance: int) -> PrefixTags:
        """The tags of the pool that ``instance`` has its blocks in; for its leader."""
        place = self.arrangement.tags[instance]
        num_bytes = PrefixTags.bytes_needed(place.num_blocks)
        if place.offset is None or self.shared is None:
            return PrefixTags(np.zeros(num_bytes, dtype=np.uint8), place.num_blocks)
        memory = self.memory[place.offset : place.offset + num_bytes]
        return PrefixTags(memory, place.num_blocks, self.shared.sync)

    def close(self) -> None:
        """Collective over the host where memory is shared."""
        self.transports = None
        if self.gpu is not None:
            self.gpu.close()
        if self.shared is not None:
            self.shared.close()


# Of executors that compute nothing: any tokenizer's ids are in it.
_NULL_VOCABULARY = 2**20


def make_memory(world: World, config: JobConfig, arrangement: Arrangement,
                device: Device | None) -> RankMemory:
    """The memory of this rank, whose ``device`` computes where the job is on GPUs. Collective over the
    world."""
    groups = [group.ranks for group in world.topology.groups]
    use_memory = config.transport != "mpi"
    if config.uses_gpus:
        gpu = make_pools(world, config, arrangement, device)
        directory = CacheDirectory(arrangement.views, groups, use_memory=use_memory,
                                   unreachable=gpu.unreachable)
        window = SharedMemory(world.host, arrangement.window_bytes.get(world.host_ranks[0], 0))
        memory = RankMemory(arrangement, directory, window.memory, window, gpu)
        if device is not None:
            memory.transports = Transports(world, arrangement, directory, gpu)
        return memory
    directory = CacheDirectory(arrangement.views, groups, use_memory=use_memory)
    if config.transport == "mpi":
        num_bytes = arrangement.private_bytes.get(world.rank, 0)
        return RankMemory(arrangement, directory, private_memory(num_bytes), None)
    shared = SharedMemory(world.host, arrangement.window_bytes.get(world.host_ranks[0], 0))
    return RankMemory(arrangement, directory, shared.memory, shared)


def check_host_memory(
    world: World, config: JobConfig, plan: MemoryPlan, arrangement: Arrangement
) -> None:
    """Raise :class:`ConfigError` or :class:`LayoutError` before memory is asked for in vain."""
    ranks = world.host_engine_ranks
    window = arrangement.window_bytes.get(world.host_ranks[0], 0)
    if not config.uses_gpus:  # their memory has been planned by now
        plan.check_memory(
            len(ranks), window + sum(arrangement.private_bytes.get(rank, 0) for rank in ranks))
    if config.transport == "mpi":
        return
    check_shared_memory(window)
    if config.transport == "shared" and not world.is_one_host:
        raise LayoutError(
            f"--transport shared needs all ranks on one host; these are on {len(set(world.host_of))} "
            f"({', '.join(sorted(set(world.host_names)))}); leave --transport at auto")


def make_worker(
    world: World,
    config: JobConfig,
    group: Group,
    memory: RankMemory | None,
    path: Path | None,
    spec: ModelSpec | None,
    stage: StageRunner | DeviceStage | None,
) -> Executor | FollowerService:
    """This rank's part of its instance: the executor at the leader, else a follower. Collective over it."""
    is_leader = world.rank == group.leader
    if spec is None or memory is None or path is None or stage is None:
        from disagg_mpi.executor.null import NullExecutor

        if is_leader:
            return NullExecutor(null_limits(config, group), Waiter(world.doorbell))
        assert world.link is not None
        return FollowerService(None, world.control, Waiter(world.doorbell), world.link, None)
    stage.warm_up()
    transceiver = _make_transceiver(world, config, group, memory)
    progress = None
    if world.has_threads:
        progress = ProgressThread(transceiver, world.handover_bell, world.doorbell.ring_self, world.link)
    if not is_leader:
        assert world.link is not None
        return FollowerService(stage, world.control, Waiter(world.doorbell), world.link, progress)
    return _make_executor(world, config, group, memory, path, spec, stage, transceiver, progress)


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The model's tokenizer; ``None`` for a model without one (token ids in, token ids out)."""
    from disagg_mpi.model.tokenizer import Tokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return Tokenizer(path) if any((path / name).exists() for name in names) else None


def null_limits(config: JobConfig, group: Group) -> ExecutorLimits:
    """Limits of the executor that computes nothing."""
    block_size = config.block_size(group.role)
    return ExecutorLimits(
        num_blocks=-(-config.pool_tokens // block_size), tokens_per_block=block_size,
        max_batch_size=config.max_batch_size, max_num_tokens=config.token_budget,
        max_model_len=config.pool_tokens, vocab_size=_NULL_VOCABULARY, reserved_output=config.reserved_output)


def load_stage(
    world: World, config: JobConfig, group: Group, memory: RankMemory, path: Path
) -> StageRunner:
    """This rank's slice of the model, over its part of the pool, on a processor. Raises
    :class:`ModelError`."""
    environment.apply(num_threads=config.threads or world.threads)
    import torch

    from disagg_mpi.engine.attention import KvPool
    from disagg_mpi.engine.model import StageModel
    from disagg_mpi.engine.runner import StageRunner
    from disagg_mpi.engine.tensor_parallel import ModelShard

    torch.set_num_threads(config.threads or world.threads)
    torch.set_grad_enabled(False)
    shard = ModelShard(group.shape.tp, group.tp_rank(world.rank), group.shape.pp, group.pp_rank(world.rank))
    model = StageModel(path, dtype=config.compute_dtype, shard=shard, link=world.link)
    view = memory.directory.views[world.rank]
    return StageRunner(model, KvPool(memory.memory, view), world.link)


def _make_transceiver(
    world: World, config: JobConfig, group: Group, memory: RankMemory
) -> Transceiver:
    view = memory.directory.views[world.rank]
    messages: Transport
    copies: Copies | None
    if memory.transports is not None:
        messages, copies = memory.transports.messages, memory.transports.copies
    else:
        messages = MpiTransport(world.data_comm, memory.memory, view)
        copies = CopyTransport(memory.memory, view) if memory.shared is not None else None
    mover = Mover(memory.directory, group.instance_id, world.rank, world.handover, messages, copies,
                  max_tag=world.max_tag)
    return Transceiver(world.rank, group.instance_id, world.handover, memory.directory, mover)


def _make_executor(
    world: World,
    config: JobConfig,
    group: Group,
    memory: RankMemory,
    path: Path,
    spec: ModelSpec,
    stage: StageRunner | DeviceStage,
    transceiver: Transceiver,
    progress: ProgressThread | None,
) -> Executor:
    """The leader's engine and API."""
    from disagg_mpi.engine.engine import Engine
    from disagg_mpi.engine.guided import GrammarCompiler
    from disagg_mpi.engine.reuse import PrefixReuse
    from disagg_mpi.engine.runner import Runner, StageRunner
    from disagg_mpi.engine.sampler import Sampler
    from disagg_mpi.engine.scheduler import Scheduler
    from disagg_mpi.engine.tensor_parallel import ModelShard
    from disagg_mpi.executor.builtin import BuiltinExecutor
    from disagg_mpi.executor.prepare import Preparer
    from disagg_mpi.model.detokenizer import Detokenizer

    tp, pp = group.shape.tp, group.shape.pp
    view = memory.directory.views[world.rank]
    block_size = view.layout.tokens_per_block
    followers = group.ranks[1:]

    def tell(message: Message) -> None:
        for rank in followers:
            world.control.send(rank, message)

    runner: Runner | GpuRunner
    makers = {(pp - 1) * tp + rank: ModelShard(tp, rank, pp, pp - 1).range_of(spec.vocab_size)
              for rank in range(tp)}
    makers.pop(0, None)
    if memory.gpu is not None and pp == 1:
        from disagg_mpi.engine.gpu.runner import GpuRunner

        assert not isinstance(stage, StageRunner)
        runner = GpuRunner(stage, tell)
    else:
        runner = Runner(stage, layout=view.layout, link=world.link, tell=tell, vocab_ranges=makers)
    tags = memory.tags(group.instance_id) if config.prefix_cache else None
    blocks = BlockManager(memory.arrangement.block_ids[group.instance_id], tags)
    reuse = None
    if tags is not None:
        reuse = PrefixReuse(
            blocks, tags, BlockHasher(world.job_id.encode(), block_size), runner.copy_blocks,
            tokens_per_block=block_size, fetches=transceiver.fetches)
    scheduler = Scheduler(
        blocks,
        tokens_per_block=block_size,
        max_batch_size=config.max_batch_size,
        max_num_tokens=config.token_budget,
        reserved_output=config.reserved_output,
        reserve_output_in_context=_hands_over_in_pool(world.topology.groups, group, memory.directory),
        num_stages=pp,
        place=None if reuse is None else reuse.place,
    )
    engine = Engine(runner=runner, sampler=Sampler(spec.eos_token_ids), scheduler=scheduler,
                    blocks=blocks, transceiver=transceiver, eos_token_ids=spec.eos_token_ids, reuse=reuse,
                    announces_layers=runner.is_done_at_launch)
    tokenizer = load_tokenizer(path)
    preparer = Preparer(spec.vocab_size) if tokenizer is None else Preparer(
        spec.vocab_size, functools.partial(tokenizer.encode, add_special_tokens=False),
        GrammarCompiler(tokenizer, spec.vocab_size, spec.eos_token_ids))
    return BuiltinExecutor(
        engine,
        ExecutorLimits(
            num_blocks=blocks.num_blocks, tokens_per_block=block_size,
            max_batch_size=config.max_batch_size, max_num_tokens=config.token_budget,
            max_model_len=spec.max_position_embeddings, vocab_size=spec.vocab_size,
            reserved_output=config.reserved_output),
        Waiter(world.doorbell),
        None if tokenizer is None else lambda: Detokenizer(tokenizer),
        progress,
        preparer)


def ways_to(world: World, directory: CacheDirectory | None, group: Group) -> dict[int, str]:
    """Context instance → how its KV-cache comes to ``group``."""
    if not group.role.does_generation or directory is None:
        return {}
    return {other.instance_id: directory.way(other.instance_id, group.instance_id)
            for other in world.topology.groups if other.role.does_context and not other.role.does_generation}


def _hands_over_in_pool(groups: Sequence[Group], group: Group, directory: CacheDirectory) -> bool:
    """Whether some generation instance takes this context instance's blocks by exchange."""
    return group.role.does_context and any(
        directory.is_exchange(group.instance_id, other.instance_id) for other in groups
        if other.role.does_generation and not other.role.does_context)
