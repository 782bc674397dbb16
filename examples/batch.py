"""A file of prompts, answered as they finish, with the library instead of the command line.

    python -m disagg_mpi launch -n 4 -- examples/batch.py [prompts.jsonl]

Without a file it makes one of its own.
"""

import json
import sys
import tempfile
from pathlib import Path

import disagg_mpi as dm


def read(path: Path) -> list[dm.Request]:
    params = dm.SamplingParams(max_tokens=16)
    return [dm.Request(id=str(data["id"]), prompt=data["prompt"], sampling=params)
            for data in map(json.loads, path.read_text().splitlines())]


def made_up() -> Path:
    path = Path(tempfile.mkstemp(suffix=".jsonl")[1])
    path.write_text("".join(json.dumps({"id": n, "prompt": f"{n} times {n} is"}) + "\n" for n in range(12)))
    return path


with dm.launch(dm.JobConfig(context=1, generation=2)) as orchestrator:
    if orchestrator is not None:
        path = Path(sys.argv[1]) if len(sys.argv) > 1 else made_up()
        for result in orchestrator.generate(read(path), ordered=False):
            print(json.dumps({"id": result.id, "text": result.text, "error": result.error}))
        orchestrator.check_integrity()  # no block and no transfer is left over, on any rank
