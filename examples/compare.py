"""Aggregated against disaggregated: the same requests, the same number of engine ranks.

    python -m disagg_mpi launch -n 3 -- examples/compare.py

Short requests are already generating when long prompts arrive. What disaggregation is for is the time
between their tokens (ITL): an aggregated instance computes the long prompts in between, a generation
instance does not. What it costs shows in the tokens a second: one of the two ranks does not generate.
"""

import statistics
import time

import disagg_mpi as dm

NUM_STREAMS, NUM_LONG = 4, 4


def measure(orchestrator: dm.Orchestrator) -> dict[str, float]:
    params = dm.SamplingParams(max_tokens=48, ignore_eos=True)
    streams = [orchestrator.stream(f"Story number {n}: once upon a time", params) for n in range(NUM_STREAMS)]
    readers = [iter(handle) for handle in streams]
    for reader in readers:
        next(reader)  # all are generating
    long_prompt = "The river bends twice before it reaches the mill. " * 70
    long = [orchestrator.submit(f"{n}. {long_prompt}", dm.SamplingParams(max_tokens=2))
            for n in range(NUM_LONG)]
    gaps: list[float] = []
    start = last = time.monotonic()
    for _ in readers[0]:  # one of the streams; the others run beside it
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    results = [handle.result() for handle in [*streams, *long]]
    seconds = time.monotonic() - start
    ordered = sorted(gaps)
    return {
        "ITL P50 (ms)": statistics.median(ordered) * 1e3,
        "ITL P99 (ms)": ordered[int(0.99 * (len(ordered) - 1))] * 1e3,
        "TTFT of the long prompts (ms)": statistics.mean(r.timing.ttft for r in results[NUM_STREAMS:]) * 1e3,
        "tokens/s": sum(len(r.token_ids) for r in results) / seconds,
    }


layouts = {
    "aggregated": dm.JobConfig(aggregated=2),
    "disaggregated": dm.JobConfig(context=1, generation=1),
}
rows: dict[str, dict[str, float]] = {}
is_root = False
for name, config in layouts.items():  # two jobs in a row, in the same processes
    with dm.launch(config) as orchestrator:
        if orchestrator is not None:
            is_root = True
            measure(orchestrator)  # the first time warms up
            rows[name] = measure(orchestrator)
if is_root:
    print(f"{'':32}" + "".join(f"{name:>16}" for name in rows))
    for figure in rows["aggregated"]:
        print(f"{figure:32}" + "".join(f"{row[figure]:16.1f}" for row in rows.values()))
