"""Jobs of the same world size, one after the other in the same ranks, because starting these costs most.

    mpirun -n N python answers.py JOBS.json ANSWERS.json

JOBS is a list of ``{"config", "prompts", "max_tokens"}``; prompts are texts or token ids, submitted all at
once. ANSWERS has for each a list of ``{"token_ids", "way"}`` in the order of the prompts. After each job no
block is owned and no transfer is open, on any rank.
"""

import json
import sys
from pathlib import Path

import msgspec

import disagg_mpi as dm

found = []
for job in json.loads(Path(sys.argv[1]).read_text()):
    with dm.launch(msgspec.convert(job["config"], dm.JobConfig)) as orchestrator:
        if orchestrator is not None:
            sampling = dm.SamplingParams(max_tokens=job["max_tokens"])
            handles = [orchestrator.submit(prompt, sampling) for prompt in job["prompts"]]
            results = [handle.result() for handle in handles]
            orchestrator.check_integrity()
            found.append([{"token_ids": result.token_ids, "way": result.timing.transport,
                           "error": result.error} for result in results])
            Path(sys.argv[2]).write_text(json.dumps(found))
