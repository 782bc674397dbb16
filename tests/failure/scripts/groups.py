"""A busy job of instances of several ranks, in which one rank may fail in the middle of a step.

    mpirun -n N python groups.py CONFIG [RANK]

Prompts arrive while others are generated, until something ends the job. ``RANK`` raises in its eighth step,
when the other ranks of its instance wait for it: in a sum, for hidden states, or for logits.
"""

from __future__ import annotations

import json
import random
import sys

import msgspec

import disagg_mpi as dm
from disagg_mpi.comm.messages import Batch
from disagg_mpi.engine.runner import OnLayer, StageRunner
from disagg_mpi.job import guards

victim = int(sys.argv[2]) if len(sys.argv) > 2 else None
run = StageRunner.run


def fail(self: StageRunner, batch: Batch, on_layer: OnLayer | None = None) -> object:
    if batch.number == 8:
        raise ValueError("raised on purpose")
    return run(self, batch, on_layer)


if victim is not None and guards.launcher_rank() == victim:
    StageRunner.run = fail  # type: ignore[method-assign, assignment]

with dm.launch(msgspec.convert(json.loads(sys.argv[1]), dm.JobConfig)) as orchestrator:
    if orchestrator is not None:
        chooser = random.Random(1)
        print("ready", flush=True)
        while True:
            prompts = [[chooser.randrange(128) for _ in range(400)] for _ in range(4)]
            for result in orchestrator.generate(prompts, dm.SamplingParams(max_tokens=100)):
                assert result.error is None, result.error
            print("answered", flush=True)
