"""Seconds from ``mpirun`` to the first token, and the peak memory of each rank."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

from common import median, table

ROUNDS = 3


def one_start() -> tuple[float, dict[str, tuple[int, int]]]:
    """Seconds to the first character, and rank → (peak RSS, peak private bytes)."""
    import psutil

    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "disagg_mpi", "launch", "-n", "3", "--", "run", "--quiet", "--max-tokens",
         "32", "--prompt", "Machine learning is"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    peaks: dict[str, tuple[int, int]] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.1):
            for child in psutil.Process(process.pid).children(recursive=True):
                try:
                    environ = child.environ()
                    rank = environ.get("OMPI_COMM_WORLD_RANK") or environ.get("PMI_RANK")
                    if rank is None:
                        continue
                    memory = child.memory_full_info()
                    old = peaks.get(rank, (0, 0))
                    peaks[rank] = max(old[0], memory.rss), max(old[1], memory.uss)
                except psutil.Error:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert process.stdout is not None
    shown = len("Machine learning is")
    data = b""
    while len(data) <= shown and (piece := os.read(process.stdout.fileno(), 4096)):
        data += piece
    seconds = time.perf_counter() - start
    process.stdout.read()
    process.wait()
    ended.set()
    watcher.join()
    return seconds, peaks


def main() -> str:
    runs = [one_start() for _ in range(ROUNDS)]
    seconds = median([run[0] for run in runs])
    rows = [["mpirun to the first token", f"{seconds:.1f} s"]]
    for rank in sorted(runs[0][1]):
        rss = max(run[1].get(rank, (0, 0))[0] for run in runs)
        private = max(run[1].get(rank, (0, 0))[1] for run in runs)
        rows.append([f"peak memory of rank {rank}: resident / its own",
                     f"{rss / 2**20:.0f} / {private / 2**20:.0f} MiB"])
    return table("Start and memory (-n 3, default model)", ["figure", "value"], rows,
                 "Resident counts the weights and the shared pool in each rank, although a host holds "
                 "them once; 'its own' counts what no other process maps.")


if __name__ == "__main__":
    print(main())
