"""The hand-over between two ranks of one host against one memory copy of the same bytes.

Run by ``run_all.py`` under mpirun; rank 1 offers, rank 2 pulls, with the real transceiver, transport and
progress threads, on pools of the default model's shape. The copy is taken in the same run, by rank 2, from
the shared memory of the one pool to a private one.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import threading
import time
from pathlib import Path

import numpy as np

from disagg_mpi.comm import environment

environment.apply()

from mpi4py import MPI  # noqa: E402 - after its environment

from disagg_mpi.comm.channel import MpiChannel  # noqa: E402
from disagg_mpi.comm.waiting import Doorbell  # noqa: E402
from disagg_mpi.transfer.layout import KvLayout  # noqa: E402
from disagg_mpi.transfer.memory import SharedPool, private_pool  # noqa: E402
from disagg_mpi.transfer.progress import ProgressThread  # noqa: E402
from disagg_mpi.transfer.transceiver import Pulled, Transceiver  # noqa: E402
from disagg_mpi.transfer.transports import MpiTransport  # noqa: E402

LAYOUT = KvLayout(30, 3, 64, 32, 160, "fp32")  # SmolLM2-135M, 5,120 tokens, 225 MiB
ROUNDS = 9
CASES = [("256 tokens", 256, False), ("1,024 tokens", 1024, False), ("3,072 tokens", 3072, False),
         ("3,072 tokens, scattered blocks", 3072, True)]


def table_of(num_tokens: int, scattered: bool, seed: int) -> list[int]:
    count = LAYOUT.blocks_for(num_tokens)
    if scattered:
        return random.Random(seed).sample(range(LAYOUT.num_blocks), count)
    return list(range(count))


def memcpy_seconds(source: np.ndarray, target: np.ndarray, num_bytes: int) -> float:
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        np.copyto(target[:num_bytes], source[:num_bytes])
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(target: Path) -> None:
    world = MPI.COMM_WORLD
    rank = world.rank
    host = world.Split_type(MPI.COMM_TYPE_SHARED)
    job = world.bcast(f"bench{time.time_ns()}" if rank == 0 else None)
    shared = SharedPool(host, LAYOUT.pool_bytes)
    own = private_pool(LAYOUT.pool_bytes)
    own[:] = rank + 1
    if rank == 1:
        shared.pool[:] = 7
    bell = Doorbell(job, rank, range(world.size), True)
    duplicates = {way: (world.Dup(), world.Dup()) for way in ("mpi", "shared")}
    if rank == 0:
        # Asleep, as rank 0 of a job is: a rank that spins in a barrier takes a core from the other two.
        while not world.Iprobe(source=2, tag=9):
            time.sleep(0.02)
        target.write_text(json.dumps(world.recv(source=2, tag=9)))
    else:
        results = measure(world, duplicates, shared.pool, own, bell)
        if rank == 2:
            world.send(results, dest=0, tag=9)
    shared.close()


def measure(
    world: MPI.Intracomm,
    duplicates: dict[str, tuple[MPI.Intracomm, MPI.Intracomm]],
    shared: np.ndarray,
    own: np.ndarray,
    bell: Doorbell,
) -> list[dict]:
    """Ranks 1 and 2: both ways of handing over, every case."""
    rank = world.rank
    pair = world.Create_group(world.group.Incl([1, 2]))
    results = []
    for way in ("mpi", "shared"):
        comms = duplicates[way]
        pool = own if way == "mpi" else shared
        transceiver = Transceiver(rank, MpiChannel(comms[0], bell), MpiTransport(comms[1], pool, LAYOUT),
                                  LAYOUT, pool=way if way == "shared" else f"{way}{rank}", use_shared=True)
        is_over = threading.Event()
        thread = ProgressThread(transceiver, bell, is_over.set)
        for name, num_tokens, scattered in CASES:
            source_table = table_of(num_tokens, scattered, 1)
            own_table = table_of(num_tokens, scattered, 2)
            times = []
            for turn in range(ROUNDS + 2):
                pair.Barrier()
                if rank == 1:
                    world.send(transceiver.offer(turn, source_table, num_tokens), dest=2)
                    is_over.wait()
                    is_over.clear()
                    transceiver.progress()
                elif rank == 2:
                    state = world.recv(source=1)
                    start = time.perf_counter()
                    transceiver.pull(turn, turn, state, own_table)
                    events = transceiver.progress()  # in a shared pool it is over at once
                    while not events:
                        is_over.wait()
                        is_over.clear()
                        events = transceiver.progress()
                    assert isinstance(events[0], Pulled)
                    if turn > 1:
                        times.append(time.perf_counter() - start)
                pair.Barrier()
            if rank == 2:
                num_bytes = LAYOUT.kv_bytes(num_tokens)
                copy = memcpy_seconds(shared, own, num_bytes)
                seconds = statistics.median(times)
                results.append({"way": way, "case": name, "bytes": num_bytes, "seconds": seconds,
                                "memcpy_seconds": copy, "ratio": copy / seconds})
        pair.Barrier()
        thread.stop()
    return results


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
