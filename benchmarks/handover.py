"""The hand-over between two instances of one host, with the real transceivers, movers, transports and
progress threads, on pools of the default model's shape; no engine.

Run by ``run_all.py`` under mpirun. Rank 0 sleeps, the ranks after it are a context instance and then a
generation instance of the given shapes. Where each is one rank, every hand-over is followed by a memory copy
and by one plain MPI message of as many contiguous bytes.

    python benchmarks/handover.py mpi|copy|shared CONTEXT GENERATION TOKENS[,TOKENS…] [--scattered] RESULT
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from disagg_mpi.comm import environment

environment.apply()

from mpi4py import MPI  # noqa: E402 - after its environment

from disagg_mpi.comm.channel import MpiChannel  # noqa: E402
from disagg_mpi.comm.waiting import Doorbell  # noqa: E402
from disagg_mpi.config import JobConfig  # noqa: E402
from disagg_mpi.job.arrangement import arrange  # noqa: E402
from disagg_mpi.model.checkpoint import ModelSpec  # noqa: E402
from disagg_mpi.topology import build_topology  # noqa: E402
from disagg_mpi.transfer.directory import CacheDirectory  # noqa: E402
from disagg_mpi.transfer.layout import KvLayout  # noqa: E402
from disagg_mpi.transfer.memory import SharedMemory, private_memory  # noqa: E402
from disagg_mpi.transfer.mover import Mover  # noqa: E402
from disagg_mpi.transfer.offers import Released  # noqa: E402
from disagg_mpi.transfer.progress import ProgressThread  # noqa: E402
from disagg_mpi.transfer.pulls import Pulled  # noqa: E402
from disagg_mpi.transfer.transceiver import Transceiver  # noqa: E402
from disagg_mpi.transfer.transports import CopyTransport, MpiTransport  # noqa: E402

BLOCK = 32
# SmolLM2-135M: 30 layers, 3 KV heads of 64 in fp32.
SPEC = ModelSpec("bench", "bench", 30, 576, 9, 3, 64, 49152, 8192, "float32", (), 0)
TOKEN_BYTES = 2 * SPEC.num_layers * SPEC.num_kv_heads * SPEC.head_dim * 4
# Instances of different block sizes cannot exchange blocks: they copy.
GENERATION_BLOCK = {"copy": BLOCK // 2}
CONTEXT, GENERATION = 0, 1
_RAW, _RESULT, _END = 7, 8, 9  # tags


class Bench:
    """This rank's part; construction is collective. The leaders' main threads ask, as an engine's does."""

    def __init__(self, way: str, context: str, generation: str, most_tokens: int) -> None:
        self.world = MPI.COMM_WORLD
        self.rank = self.world.rank
        config = JobConfig(
            context=context, generation=generation, kv_tokens=-(-most_tokens // BLOCK) * BLOCK,
            transport="mpi" if way == "mpi" else "auto", tokens_per_block=BLOCK,
            generation_tokens_per_block=GENERATION_BLOCK.get(way))
        topology = build_topology(config)
        self.groups = [group.ranks for group in topology.groups]
        places = arrange(config, topology, [0] * self.world.size, SPEC)
        if way == "mpi":
            memory = private_memory(places.private_bytes.get(self.rank, 0))
        else:
            memory = SharedMemory(self.world, places.window_bytes[0]).memory
        # The first touch of new memory runs at 0.3 GB/s.
        if way == "mpi" or self.rank == 1:
            memory[:] = self.rank
        self.directory = CacheDirectory(places.views, self.groups, use_memory=way != "mpi")
        job = self.world.bcast(f"bench{time.time_ns()}" if self.rank == 0 else None)
        bell = Doorbell(job, self.rank, range(self.world.size), True)
        channel, data = MpiChannel(self.world.Dup(), bell), self.world.Dup()
        if self.rank == 0:
            return
        instance = CONTEXT if self.rank in self.groups[CONTEXT] else GENERATION
        view = places.views[self.rank]
        copies = CopyTransport(memory, view) if way != "mpi" else None
        self.mover = Mover(
            self.directory, instance, self.rank, channel, MpiTransport(data, memory, view), copies)
        self.transceiver = Transceiver(self.rank, instance, channel, self.directory, self.mover)
        self._is_over = threading.Event()
        self._thread = ProgressThread(self.transceiver, bell, self._is_over.set)
        self._thread.start()

    @property
    def leaders(self) -> tuple[int, int]:
        return self.directory.leader(CONTEXT), self.directory.leader(GENERATION)

    def layout(self, rank: int) -> KvLayout:
        return self.directory.views[rank].layout

    def offer(self, turn: int, block_ids: list[int], num_tokens: int) -> None:
        """The context's leader's part; returns when the blocks are its own again."""
        _, target = self.leaders
        self.world.send(self.transceiver.offer(turn, block_ids, num_tokens), dest=target)
        self._wait()

    def pull(self, turn: int, block_ids: list[int], num_tokens: int) -> tuple[float, Pulled]:
        """The generation's leader's part: seconds until all is in place, and the transceiver's report."""
        source, _ = self.leaders
        state = self.world.recv(source=source)
        start = time.perf_counter()
        self.transceiver.pull(turn, turn, state, block_ids, num_tokens)
        (event,) = self._wait()
        assert isinstance(event, Pulled)
        return time.perf_counter() - start, event

    def stop(self) -> int:
        """End the thread; how many messages with bytes this rank has asked for."""
        self._thread.stop()
        return self.mover.num_requests

    def _wait(self) -> list[Pulled | Released]:
        while not (events := self.transceiver.progress()):
            self._is_over.wait(0.2)
            self._is_over.clear()
        return events


class Yardstick:
    """What one rank's memory, and plain MPI, do with contiguous bytes; ranks 1 and 2."""

    def __init__(self, world: MPI.Intracomm, num_bytes: int) -> None:
        self._world = world
        self._source, self._target = private_memory(num_bytes), private_memory(num_bytes)
        self._source[:] = 1
        self._target[:] = 2

    def send(self) -> None:
        self._world.recv(source=2, tag=_RAW)
        self._world.Send([self._source, MPI.BYTE], dest=2, tag=_RAW)

    def measure(self) -> tuple[float, float]:
        """Seconds of a memory copy, and of a message."""
        start = time.perf_counter()
        np.copyto(self._target, self._source)
        copied = time.perf_counter() - start
        self._world.send(None, dest=1, tag=_RAW)
        start = time.perf_counter()
        self._world.Recv([self._target, MPI.BYTE], source=1, tag=_RAW)
        return copied, time.perf_counter() - start


def measure(bench: Bench, num_tokens: int, scattered: bool, rounds: int) -> dict[str, Any] | None:
    """Medians over ``rounds`` hand-overs after a first one; at the generation's leader."""
    source, target = bench.leaders
    if bench.rank not in (source, target):
        return None
    layout = bench.layout(bench.rank)
    own = blocks_of(layout, num_tokens, scattered, seed=bench.rank)
    yardstick = Yardstick(bench.world, num_tokens * TOKEN_BYTES) if bench.world.size == 3 else None
    if bench.rank == source:
        for turn in range(rounds + 1):
            bench.offer(turn, own, num_tokens)
            if yardstick is not None:
                yardstick.send()
        return None
    times: list[tuple[float, float, float]] = []
    for turn in range(rounds + 1):
        seconds, report = bench.pull(turn, own, num_tokens)
        times.append((seconds, *(yardstick.measure() if yardstick is not None else (0.0, 0.0))))
    found: dict[str, Any] = {
        "tokens": num_tokens, "handovers": len(times), "bytes": report.kv_bytes, "moved": report.bytes_moved,
        "seconds": statistics.median(seconds for seconds, _, _ in times[1:])}
    if yardstick is not None:
        # Round by round, because the machine's speed drifts.
        found["of_copy"] = statistics.median(copied / seconds for seconds, copied, _ in times[1:])
        found["of_message"] = statistics.median(sent / seconds for seconds, _, sent in times[1:])
    return found


def blocks_of(layout: KvLayout, num_tokens: int, scattered: bool, seed: int) -> list[int]:
    count = layout.blocks_for(num_tokens)
    if scattered:
        return random.Random(seed).sample(range(layout.num_blocks), count)
    return list(range(count))


def collect(world: MPI.Intracomm) -> list[dict[str, Any]]:
    """Rank 0's part: the results, with the number of messages of one hand-over."""
    # Asleep, as rank 0 of a job is: one that spins in MPI takes a core from the others.
    _sleep_until(world, _RESULT)
    results: list[dict[str, Any]] = world.recv(tag=_RESULT)
    others = range(1, world.size)
    for rank in others:
        world.send(None, dest=rank, tag=_END)
    messages = sum(world.recv(source=rank, tag=_END) for rank in others)
    handovers = sum(result["handovers"] for result in results)
    return [{**result, "messages": messages // handovers} for result in results]


def _sleep_until(world: MPI.Intracomm, tag: int) -> None:
    while not world.Iprobe(tag=tag):
        time.sleep(0.02)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=["mpi", "copy", "shared"])
    parser.add_argument("context")
    parser.add_argument("generation")
    parser.add_argument("tokens", type=lambda text: [int(count) for count in text.split(",")])
    parser.add_argument("result", type=Path)
    parser.add_argument("--scattered", action="store_true")
    options = parser.parse_args()
    bench = Bench(options.way, options.context, options.generation, max(options.tokens))
    if bench.rank == 0:
        options.result.write_text(json.dumps(collect(bench.world)))
        return
    results = [measure(bench, count, options.scattered, 9 if count * TOKEN_BYTES < 2**27 else 4)
               for count in options.tokens]
    if bench.rank == bench.leaders[GENERATION]:
        bench.world.send(results, dest=0, tag=_RESULT)
    _sleep_until(bench.world, _END)
    bench.world.recv(source=0, tag=_END)
    bench.world.send(bench.stop(), dest=0, tag=_END)


if __name__ == "__main__":
    main()
