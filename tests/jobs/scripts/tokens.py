"""Two jobs that answer the reference's prompts in every way and write down what they got.

The first has the prefix cache, as by default: what is asked alone was computed in a batch before. The second
has none: logits are equal to the bit, and draws the same, where a prompt is computed in the same chunks, not
where a part of it comes from another batch.
"""

import json
import sys
from pathlib import Path

import msgspec

import disagg_mpi as dm

config = msgspec.convert(json.loads(sys.argv[1]), dm.JobConfig)
prompts, target, max_tokens = json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3]), int(sys.argv[4])

with dm.launch(config) as orchestrator:
    if orchestrator is not None:
        greedy = dm.SamplingParams(max_tokens=max_tokens)
        batched = list(orchestrator.generate(prompts, greedy))
        alone = [orchestrator.submit(prompt, greedy).result() for prompt in prompts]
        found = {
            "batched": [r.token_ids for r in batched],
            "alone": [r.token_ids for r in alone],
            "cached alone": sum(r.timing.cached_tokens for r in alone),
        }
        orchestrator.check_integrity()

with dm.launch(config.replace(prefix_cache=False)) as orchestrator:
    if orchestrator is not None:
        sampled = [dm.Request(prompt=prompt, sampling=dm.SamplingParams(
                       max_tokens=max_tokens, temperature=0.8, top_p=0.9, top_k=50, seed=number, n=2))
                   for number, prompt in enumerate(prompts[::5])]
        found["sampled"] = [[choice.text for choice in r.choices] for r in orchestrator.generate(sampled)]
        logits = dm.SamplingParams(max_tokens=8, return_generation_logits=True)
        for name, prompt in (("short", prompts[0]), ("long", prompts[-1])):
            result = orchestrator.submit(prompt, logits).result()
            found[f"logits {name}"] = [row.hex() for row in result.choices[0].logits]
        orchestrator.check_integrity()
        target.write_text(json.dumps(found))
        print("integrity holds")
