"""Builds the executor of one instance on its rank: pool, engine, API.

Every rank calls :func:`make_pool` (shared memory is made collectively); ranks of an instance then call
:func:`make_executor`, which imports torch, with the thread settings in place by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from disagg_mpi.comm import environment
from disagg_mpi.comm.waiting import Waiter
from disagg_mpi.config import JobConfig
from disagg_mpi.engine.block_manager import BlockManager
from disagg_mpi.errors import LayoutError
from disagg_mpi.executor.base import Executor
from disagg_mpi.job.plan import MemoryPlan
from disagg_mpi.job.world import World
from disagg_mpi.model.checkpoint import ModelSpec
from disagg_mpi.request import ExecutorLimits
from disagg_mpi.topology import ORCHESTRATOR_RANK, Group
from disagg_mpi.transfer.layout import KvLayout
from disagg_mpi.transfer.memory import SharedPool, check_shared_memory, private_pool
from disagg_mpi.transfer.progress import ProgressThread
from disagg_mpi.transfer.transceiver import SHARED, Transceiver
from disagg_mpi.transfer.transports import MpiTransport, Pool

if TYPE_CHECKING:
    from disagg_mpi.model.tokenizer import Tokenizer


class RankPool:
    """The memory of one rank's KV-cache, and which block ids are this rank's at first."""

    def __init__(self, name: str, pool: Pool, layout: KvLayout, block_ids: range,
                 shared: SharedPool | None = None) -> None:
        self.name = name
        self.pool = pool
        self.layout = layout
        self.block_ids = block_ids
        self._shared = shared

    def close(self) -> None:
        """Collective over the host where the pool is shared."""
        if self._shared is not None:
            self._shared.close()


def make_pool(world: World, config: JobConfig, plan: MemoryPlan) -> RankPool:
    """The pool of this rank. Collective over the host. Raises :class:`ConfigError` for lack of room."""
    own = plan.blocks_per_instance
    if config.transport == "mpi":
        layout = plan.layout(own)
        num_bytes = 0 if world.rank == ORCHESTRATOR_RANK else layout.pool_bytes
        return RankPool(f"{world.job_id}/{world.rank}", private_pool(num_bytes), layout, range(own))
    ranks = world.host_engine_ranks
    layout = plan.layout(max(1, own * len(ranks)))
    num_bytes = layout.pool_bytes if ranks else 0
    shared = SharedPool(world.host, num_bytes)
    first = ranks.index(world.rank) * own if world.rank in ranks else 0
    return RankPool(f"{world.job_id}/host {world.host_ranks[0]}", shared.pool, layout,
                    range(first, first + own), shared)


def check_host_memory(world: World, config: JobConfig, plan: MemoryPlan) -> None:
    """Raise :class:`ConfigError` or :class:`LayoutError` before memory is asked for in vain."""
    num_pools = len(world.host_engine_ranks)
    plan.check_memory(num_pools)
    if config.transport == "mpi":
        return
    check_shared_memory(num_pools * plan.pool_bytes)
    if config.transport == SHARED and not world.is_one_host:
        raise LayoutError(
            f"--transport shared needs all ranks on one host; these are on {len(set(world.host_of))} "
            f"({', '.join(sorted(set(world.host_names)))}); leave --transport at auto")


def transport_between(world: World, config: JobConfig, source: int, rank: int) -> str:
    """How a KV-cache passes between two ranks."""
    same_host = world.host_of[source] == world.host_of[rank]
    return SHARED if config.transport != "mpi" and same_host else MpiTransport.name


def make_executor(
    world: World,
    config: JobConfig,
    group: Group,
    pool: RankPool | None,
    path: Path | None,
    spec: ModelSpec | None,
) -> Executor:
    """The executor of this rank's instance."""
    if spec is None or pool is None or path is None:
        from disagg_mpi.executor.null import NullExecutor

        return NullExecutor(null_limits(config), Waiter(world.doorbell))
    num_threads = config.threads or world.threads
    environment.apply(num_threads=num_threads)

    from disagg_mpi.engine.engine import Engine
    from disagg_mpi.engine.runner import ModelRunner
    from disagg_mpi.engine.sampler import Sampler
    from disagg_mpi.engine.scheduler import Scheduler
    from disagg_mpi.executor.builtin import BuiltinExecutor
    from disagg_mpi.model.detokenizer import Detokenizer

    blocks = BlockManager(pool.block_ids)
    scheduler = Scheduler(
        blocks,
        tokens_per_block=config.tokens_per_block,
        max_batch_size=config.max_batch_size,
        max_num_tokens=config.max_num_tokens,
        reserve_output_in_context=_hands_over_in_pool(world, config),
    )
    transceiver = Transceiver(
        world.rank, world.handover, MpiTransport(world.data_comm, pool.pool, pool.layout),
        pool.layout, pool=pool.name, use_shared=config.transport != "mpi",
        max_tag=world.max_tag)
    runner = ModelRunner(path, dtype=config.dtype, layout=pool.layout, memory=pool.pool,
                         num_threads=num_threads)
    runner.warm_up()
    engine = Engine(runner=runner, sampler=Sampler(spec.eos_token_ids), scheduler=scheduler,
                    blocks=blocks, transceiver=transceiver, eos_token_ids=spec.eos_token_ids)
    tokenizer = load_tokenizer(path)
    progress = None
    if world.moves_bytes:
        progress = ProgressThread(transceiver, world.handover_bell, world.doorbell.ring_self)
    return BuiltinExecutor(
        engine,
        ExecutorLimits(
            num_blocks=blocks.num_blocks, tokens_per_block=config.tokens_per_block,
            max_batch_size=config.max_batch_size, max_num_tokens=config.max_num_tokens,
            max_model_len=spec.max_position_embeddings, vocab_size=spec.vocab_size),
        Waiter(world.doorbell),
        None if tokenizer is None else lambda: Detokenizer(tokenizer),
        progress)


def load_tokenizer(path: Path) -> Tokenizer | None:
    """The model's tokenizer; ``None`` for a model without one (token ids in, token ids out)."""
    from disagg_mpi.model.tokenizer import Tokenizer

    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    return Tokenizer(path) if any((path / name).exists() for name in names) else None


def null_limits(config: JobConfig) -> ExecutorLimits:
    """Limits of the executor that computes nothing."""
    return ExecutorLimits(
        num_blocks=-(-config.kv_tokens // config.tokens_per_block),
        tokens_per_block=config.tokens_per_block, max_batch_size=config.max_batch_size,
        max_num_tokens=config.max_num_tokens, max_model_len=config.kv_tokens, vocab_size=32000)


def describe_transports(world: World, config: JobConfig, group: Group) -> dict[str, str]:
    """Peer instance → how its KV-cache comes to ``group``."""
    if not group.role.does_generation or config.engine == "null":
        return {}
    peers: Sequence[Group] = [g for g in world.topology.groups if g.role.does_context and g != group]
    return {peer.name: transport_between(world, config, peer.leader, group.leader) for peer in peers
            if not peer.role.does_generation}


def _hands_over_in_pool(world: World, config: JobConfig) -> bool:
    """Whether some generation instance shares this rank's pool."""
    here = set(world.host_ranks)
    return config.transport != "mpi" and any(
        here & set(group.ranks) for group in world.topology.groups
        if group.role.does_generation and not group.role.does_context)

