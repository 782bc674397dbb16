"""The smallest job: one context rank, one generation rank, one question.

    python -m disagg_mpi launch -n 3 -- examples/hello.py
"""

import disagg_mpi as dm

with dm.launch(dm.JobConfig(context=1, generation=1)) as orchestrator:
    if orchestrator is not None:  # rank 0; the other ranks serve inside the with statement
        for result in orchestrator.generate(["Machine learning is"], dm.SamplingParams(max_tokens=32)):
            print(result.prompt_token_ids, result.token_ids)
            print(result.text)
