"""A prompt for the first time, and again: what the prefix cache saves of computation and hand-over.

Run by ``run_all.py`` under mpirun.

    python benchmarks/reuse.py auto|mpi RESULT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from common import median, random_prompt

import disagg_mpi as dm

ROUNDS = 3
NUM_PROMPT_TOKENS, NUM_OUTPUT_TOKENS = 1000, 8
NAMES = ("ttft", "second_token", "handover_bytes", "cached_tokens", "held_tokens")


def main(transport: str, target: Path) -> None:
    with dm.launch(dm.JobConfig(context=1, generation=1, transport=transport)) as orchestrator:
        if orchestrator is None:
            return
        params = dm.SamplingParams(max_tokens=NUM_OUTPUT_TOKENS, ignore_eos=True)
        runs: dict[str, list[dm.Timing]] = {"first": [], "again": []}
        for turn in range(ROUNDS):
            prompt = random_prompt(NUM_PROMPT_TOKENS, turn)
            for timings in runs.values():
                timings.append(orchestrator.submit(prompt, params).result().timing)
    target.write_text(json.dumps({
        which: {name: median([getattr(timing, name) for timing in timings]) for name in NAMES}
        | {"way": timings[0].transport} for which, timings in runs.items()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
