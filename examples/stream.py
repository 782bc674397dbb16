"""Tokens as they come: first with a plain for, then three requests at once with asyncio.

    python -m disagg_mpi launch -n 3 -- examples/stream.py
"""

import asyncio

import disagg_mpi as dm


async def tell(orchestrator: dm.Orchestrator, name: str, prompt: str) -> None:
    params = dm.SamplingParams(max_tokens=12, temperature=0.7, seed=7)
    async for event in orchestrator.stream(prompt, params):
        print(f"[{name}] {event.text!r}")


async def main(orchestrator: dm.Orchestrator) -> None:
    await asyncio.gather(*(tell(orchestrator, name, f"A short story about a {name}:")
                           for name in ("river", "robot", "bread")))


with dm.launch(dm.JobConfig()) as orchestrator:
    if orchestrator is not None:
        handle = orchestrator.stream("Machine learning is", dm.SamplingParams(max_tokens=24))
        for event in handle:
            print(event.text, end="", flush=True)
        print(f"\n{handle.result().timing}\n")
        asyncio.run(main(orchestrator))
