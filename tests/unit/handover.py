"""Every rank's part of the hand-over in one process, without engines: :class:`Ranks`.

Instances are placed as a job places them (:mod:`disagg_mpi.job.arrangement`), on pretended hosts: one memory
a host, or one a rank with ``transport="mpi"``. A request's KV-cache is random bytes
``[layers, 2, tokens, heads, bytes of a head]``; the oracle for where they lie writes them token by token.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from disagg_mpi.comm.channel import MemoryNetwork
from disagg_mpi.comm.messages import Message
from disagg_mpi.config import DType, JobConfig
from disagg_mpi.job.arrangement import arrange
from disagg_mpi.model.checkpoint import ModelSpec
from disagg_mpi.topology import build_topology
from disagg_mpi.transfer.directory import CacheDirectory
from disagg_mpi.transfer.memory import private_memory
from disagg_mpi.transfer.mover import Mover
from disagg_mpi.transfer.offers import Released
from disagg_mpi.transfer.pulls import Pulled
from disagg_mpi.transfer.transceiver import Transceiver
from disagg_mpi.transfer.transports import CopyTransport, MemoryTransport, MemoryWire, Pool

Bytes = npt.NDArray[np.uint8]


def model_spec(num_layers: int = 4, num_kv_heads: int = 4, head_dim: int = 2) -> ModelSpec:
    """A model of which only the KV-cache matters."""
    return ModelSpec(
        architecture="", model_type="", num_layers=num_layers, hidden_size=0, num_heads=12 * num_kv_heads,
        num_kv_heads=num_kv_heads, head_dim=head_dim, vocab_size=0, max_position_embeddings=0, dtype="F32",
        eos_token_ids=(), parameter_bytes=0)


class SlowNetwork(MemoryNetwork):
    """Counts messages; while it ``holds``, they wait until :meth:`let_through` passes them on."""

    def __init__(self) -> None:
        super().__init__()
        self.holds = False
        self.counts: Counter[type] = Counter()
        self.on_send = self._count
        self._waiting: dict[tuple[int, int], deque[Message]] = {}

    def deliver(self, source: int, rank: int, message: Message) -> None:
        if self.holds:
            self._waiting.setdefault((source, rank), deque()).append(message)
        else:
            super().deliver(source, rank, message)

    @property
    def waiting(self) -> list[tuple[int, int]]:
        """(source, destination) of messages that wait."""
        return sorted(pair for pair, messages in self._waiting.items() if messages)

    def let_through(self, pair: tuple[int, int]) -> None:
        """Pass on the oldest message of ``pair``."""
        super().deliver(*pair, self._waiting[pair].popleft())

    def flow(self) -> None:
        """Hold nothing any more."""
        self.holds = False
        for pair in self.waiting:
            while self._waiting[pair]:
                self.let_through(pair)

    def _count(self, _source: int, _rank: int, message: Message) -> None:
        self.counts[type(message)] += 1


class Ranks:
    """All ranks of all instances: a transceiver, a mover and memory each.

    ``hosts``: each world rank's host, rank 0's too; ``None``: one host for all.
    """

    def __init__(
        self, context: str = "1", generation: str = "1", *, hosts: Sequence[int] | None = None,
        spec: ModelSpec | None = None, max_tag: int = 2**15 - 1, dtype: DType = "fp32", **options: Any,
    ) -> None:
        self.spec = spec or model_spec()
        options = {"kv_tokens": 64, "tokens_per_block": 4} | options
        self.config = JobConfig(context=context, generation=generation, dtype=dtype, **options)
        self.topology = build_topology(self.config)
        self.host_of = list(hosts or [0] * self.topology.world_size)
        self.arrangement = arrange(self.config, self.topology, self.host_of, self.spec)
        self.views = self.arrangement.views
        use_memory = self.config.transport != "mpi"
        self.groups = [group.ranks for group in self.topology.groups]
        self.directory = CacheDirectory(self.views, self.groups, use_memory=use_memory)
        windows = {host: private_memory(size) for host, size in self.arrangement.window_bytes.items()}
        self.memories: dict[int, Pool] = {
            rank: windows[view.host] if use_memory else private_memory(view.layout.pool_bytes)
            for rank, view in self.views.items()}
        self.network, self.wire = SlowNetwork(), MemoryWire()
        self.movers: dict[int, Mover] = {}
        self.transceivers: dict[int, Transceiver] = {}
        for instance, ranks in enumerate(self.groups):
            for rank in ranks:
                memory, view, channel = self.memories[rank], self.views[rank], self.network.channel(rank)
                self.movers[rank] = Mover(
                    self.directory, instance, rank, channel,
                    MemoryTransport(rank, self.wire, memory, view),
                    CopyTransport(memory, view) if use_memory else None, max_tag=max_tag)
                self.transceivers[rank] = Transceiver(
                    rank, instance, channel, self.directory, self.movers[rank])
        self.context, self.generation = (
            self.transceivers[self.groups[i][0]] for i in (0, len(self.groups) - 1))
        for memory in self.distinct_memories():
            memory[:] = np.random.default_rng(0).integers(0, 256, len(memory), dtype=np.uint8)

    # ---- memory ----

    def distinct_memories(self) -> list[Pool]:
        return list({id(memory): memory for memory in self.memories.values()}.values())

    def snapshot(self) -> list[Bytes]:
        return [memory.copy() for memory in self.distinct_memories()]

    def restore(self, memories: Sequence[Bytes]) -> None:
        for memory, old in zip(self.distinct_memories(), memories, strict=True):
            memory[:] = old

    def array(self, rank: int) -> Any:
        """``[layers, 2, blocks, tokens_per_block, heads, bytes of a head]`` of the array of ``rank``."""
        view = self.views[rank]
        layout = view.layout
        return self.memories[rank][view.offset : view.offset + layout.pool_bytes].reshape(
            layout.num_layers, 2, layout.num_blocks, layout.tokens_per_block, layout.num_kv_heads,
            layout.head_bytes)

    def content(self, seed: int, num_tokens: int) -> Bytes:
        """A request's KV-cache, of the whole model."""
        head_bytes = next(iter(self.views.values())).layout.head_bytes
        shape = (self.spec.num_layers, 2, num_tokens, self.spec.num_kv_heads, head_bytes)
        return np.random.default_rng(seed + 1).integers(0, 256, shape, dtype=np.uint8)

    def write(self, instance: int, blocks: Sequence[int], content: Bytes, first: int = 0,
              end: int | None = None, layers: tuple[int, int] = (0, 2**30)) -> None:
        """Every rank of ``instance`` writes its part of the tokens ``[first, end)``."""
        for rank in self.groups[instance]:
            array, view = self.array(rank), self.views[rank]
            shard, size = view.shard, view.layout.tokens_per_block
            for layer in range(max(shard.first_layer, layers[0]), min(shard.end_layer, layers[1])):
                for token in range(first, content.shape[2] if end is None else end):
                    array[layer - view.origin_layer, :, blocks[token // size], token % size,
                          shard.first_head - view.origin_head : shard.end_head - view.origin_head] = content[
                        layer, :, token, shard.first_head : shard.end_head]

    def holds(self, instance: int, blocks: Sequence[int], content: Bytes) -> bool:
        """Whether every rank of ``instance`` has its part of ``content`` in ``blocks``."""
        before = self.snapshot()
        self.write(instance, blocks, content)
        same = all(np.array_equal(*pair) for pair in zip(before, self.distinct_memories(), strict=True))
        self.restore(before)
        return same

    def scribble(self, instance: int, blocks: Sequence[int]) -> None:
        """What a new owner of ``blocks`` does to them."""
        tokens = len(blocks) * self.views[self.groups[instance][0]].layout.tokens_per_block
        self.write(instance, blocks, np.full_like(self.content(0, tokens), 0xEE))

    # ---- time ----

    def turn(self, ranks: Iterable[int] | None = None) -> list[Pulled | Released]:
        """Each of ``ranks`` moves on once."""
        return [event for rank in (self.transceivers if ranks is None else ranks)
                for event in self.transceivers[rank].progress()]

    def rounds(self, count: int = 8) -> list[Any]:
        return [event for _ in range(count) for event in self.turn()]

    def until(self, done: Callable[[], bool]) -> None:
        for _ in range(100):
            if done():
                return
            self.rounds(1)
        raise AssertionError("it does not come")

    def assert_over(self) -> None:
        """Nothing happens any more, nothing is open, and nobody has kept anything in mind."""
        assert self.rounds() == []
        for rank, transceiver in self.transceivers.items():
            assert (rank, transceiver.num_open, transceiver.is_moving) == (rank, 0, False)
            assert not transceiver.is_urgent
            assert transceiver.is_idle, (rank, vars(transceiver._offers), vars(transceiver._pulls))
            kept = self.movers[rank]._tags, self.movers[rank]._left
            assert not any(kept), (rank, kept)
        assert self.wire._sides == {}
