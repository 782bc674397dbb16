"""The smallest job: one context rank, one generation rank, two questions.

    python -m disagg_mpi launch -n 3 -- examples/hello.py
"""

import disagg_mpi as dm

with dm.launch(dm.JobConfig(context=1, generation=1)) as orchestrator:
    if orchestrator is not None:  # rank 0; the other ranks serve inside the with statement
        prompts = ["Machine learning is", "The capital of France is"]
        for result in orchestrator.generate(prompts, dm.SamplingParams(max_tokens=16)):
            print(f"{result.prompt_token_ids} → {result.text!r}")
