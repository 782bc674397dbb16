"""A job that answers rounds of prompts, all of a round at once, and writes down what it got.

    mpirun -n N python ask.py CONFIG.json ROUNDS.json ANSWERS.json MAX_TOKENS

ANSWERS has for each round a list of ``{"token_ids", "gaps", "timing"}``; gaps are those between the two
likeliest tokens, as in ``tests/jobs/reference.py``.
"""

import json
import sys
from pathlib import Path

import msgspec

import disagg_mpi as dm

config = msgspec.convert(json.loads(Path(sys.argv[1]).read_text()), dm.JobConfig)
rounds, target, max_tokens = json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]), int(sys.argv[4])


def answer(result: dm.Result) -> dict:
    """A result as JSON can hold it."""
    assert result.error is None, result.error
    tops = [token.top for token in result.choices[0].logprobs or []]
    return {"token_ids": result.token_ids, "gaps": [first[1] - second[1] for first, second in tops],
            "timing": msgspec.to_builtins(result.timing)}


with dm.launch(config, progress=lambda line: print(line, file=sys.stderr, flush=True)) as orchestrator:
    if orchestrator is not None:
        greedy = dm.SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=2)
        target.write_text(json.dumps(
            [[answer(result) for result in orchestrator.generate(prompts, greedy)] for prompts in rounds]))
        orchestrator.check_integrity()
        print("integrity holds")
