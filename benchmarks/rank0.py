"""What rank 0 costs: tokens through it from executors that compute nothing, and ranks that wait.

Run by ``run_all.py`` under mpirun. ``tokens``: 256 requests stream at once; CPU seconds of rank 0's
process are what counts, since the executors share its cores. ``idle``: CPU of every rank over some seconds
without a request, then the time from a request's submission to its first token after a second of rest.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import disagg_mpi as dm

NUM_REQUESTS, NUM_TOKENS = 256, 400
IDLE_SECONDS = 5.0


def cpu_seconds(pid: int) -> float:
    import psutil

    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def tokens(orchestrator: dm.Orchestrator) -> dict[str, float]:
    params = dm.SamplingParams(max_tokens=NUM_TOKENS)
    for streaming in (False, True):
        start, cpu = time.perf_counter(), time.process_time()
        handles = [orchestrator.submit([1, 2, 3], params) for _ in range(NUM_REQUESTS)]
        if streaming:
            count = sum(len(event.token_ids) for handle in handles for event in handle)
        else:
            count = sum(len(handle.result().token_ids) for handle in handles)
        seconds, used = time.perf_counter() - start, time.process_time() - cpu
        assert count == NUM_REQUESTS * NUM_TOKENS
        yield {"streaming": streaming, "tokens": count, "seconds": seconds, "cpu_seconds": used}


def idle(orchestrator: dm.Orchestrator) -> dict[str, object]:
    import psutil

    me = psutil.Process()
    ranks = [me, *(p for p in me.parent().children() if p.pid != me.pid)]
    orchestrator.submit([1, 2, 3], dm.SamplingParams(max_tokens=4)).result()
    time.sleep(1.0)
    before = [cpu_seconds(p.pid) for p in ranks]
    time.sleep(IDLE_SECONDS)
    used = [(cpu_seconds(p.pid) - b) / IDLE_SECONDS for p, b in zip(ranks, before, strict=True)]
    waits = []
    for _ in range(20):
        time.sleep(0.3)
        start = time.perf_counter()
        next(iter(orchestrator.stream([1, 2, 3], dm.SamplingParams(max_tokens=2))))
        waits.append(time.perf_counter() - start)
    return {"cpu_share": used, "first_token_seconds": statistics.median(waits), "worst": max(waits)}


def main(kind: str, target: Path) -> None:
    config = dm.JobConfig(engine="null", context=1, generation=1) if kind == "idle" else \
        dm.JobConfig(engine="null", aggregated=1, max_batch_size=NUM_REQUESTS, max_num_tokens=512,
                     kv_tokens=NUM_REQUESTS * 512)
    with dm.launch(config) as orchestrator:
        if orchestrator is not None:
            found = list(tokens(orchestrator)) if kind == "tokens" else idle(orchestrator)
            target.write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
